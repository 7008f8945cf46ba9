import pytest

from vnnigen.bench.machine import caches, cpu_name, describe_machine, parse_size


@pytest.mark.parametrize(
    ("text", "expected"), [("48K", 49152), ("2M", 2 << 20), ("1G", 1 << 30), ("512", 512)]
)
def test_parse_size(text, expected):
    assert parse_size(text) == expected


def test_caches_from_sysfs(tmp_path):
    for index, (level, kind, size) in enumerate([("1", "Data", "48K"), ("2", "Unified", "2048K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", "0-1")):
            (folder / name).write_text(value + "\n")
    (tmp_path / "index2").mkdir()  # an incomplete entry is left out
    assert caches(tmp_path) == [
        {"level": 1, "type": "data", "bytes": 49152, "cpus": "0-1"},
        {"level": 2, "type": "unified", "bytes": 2 << 20, "cpus": "0-1"},
    ]
    assert caches(tmp_path / "missing") == []


def test_description_is_consistent():
    machine = describe_machine()
    assert machine["name"] == cpu_name() != ""
    assert machine["features"] == sorted(machine["features"])
    usable = [tier["name"] for tier in machine["tiers"] if tier["usable"]]
    assert usable[0] == machine["best_tier"]
    assert usable[-1] == "reference"
    assert all(bool(tier["why_not"]) != tier["usable"] for tier in machine["tiers"])
    assert machine["threads"] >= 1
