import json

import pytest

from vnnigen.bench.machine import describe_machine
from vnnigen.isa.tiers import set_max_isa


@pytest.fixture
def uncapped():
    yield
    set_max_isa(None)


def test_description_is_consistent():
    machine = describe_machine()
    assert machine["name"]
    assert machine["features"] == sorted(machine["features"])
    usable = [tier["name"] for tier in machine["tiers"] if tier["usable"]]
    assert usable[0] == machine["best_tier"]
    assert usable[-1] == "reference"
    assert all(bool(tier["why_not"]) != tier["usable"] for tier in machine["tiers"])
    assert machine["threads"] >= 1
    assert json.loads(json.dumps(machine)) == machine


def test_cap_is_shown_with_its_consequence(uncapped):
    set_max_isa("reference")
    machine = describe_machine()
    assert (machine["max_isa"], machine["best_tier"]) == ("reference", "reference")
    assert all(tier["why_not"] for tier in machine["tiers"] if tier["name"] != "reference")
