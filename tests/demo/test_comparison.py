"""Comparisons of two networks, and the report."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.graph.pass_helpers import Build
from vnnigen import Network, VnnigenError
from vnnigen.demo import report
from vnnigen.demo.comparison import Accuracy, Comparison, batches, compare, sqnr_db
from vnnigen.errors import ShapeError


def network(bias: list[float]) -> Network:
    b = Build()
    x = b.op("Flatten", b.input("n", 1, 1, 3))
    return Network(b.graph(b.op("Linear", x, b.const(np.eye(3)), b.const(bias))))


IMAGES = np.eye(3, dtype=np.float32).reshape(3, 1, 1, 3)


def test_compare_counts() -> None:
    labels = np.array([0, 1, 1])
    found = compare("x", network([0, 0, 0]), network([0, 2, 0]), batches(IMAGES, 2), labels, rounds=2)
    assert (found.images, found.classes, found.same_top1) == (3, 3, 1)
    assert found.f32 == Accuracy(2, 3)
    assert found.int8 == Accuracy(2, 3)
    assert found.sqnr_db == pytest.approx(10 * np.log10(3 / 12))
    assert found.f32_ms > 0
    assert found.as_dict()["agreement"] == pytest.approx(1 / 3)
    with pytest.raises(ShapeError, match="4 labels for 3 images"):
        compare("x", network([0, 0, 0]), network([0, 0, 0]), batches(IMAGES, 2), np.zeros(4, np.int64))


def test_accuracy_counts_ranks() -> None:
    logits = np.array([[3, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5]], np.float32)
    assert Accuracy.of(logits, np.array([0, 0])) == Accuracy(1, 1)
    assert Accuracy.of(logits, np.array([1, 1])) == Accuracy(0, 2)


def test_sqnr() -> None:
    x = np.array([3.0, 4.0], np.float32)
    assert sqnr_db(x, x) == float("inf")
    assert sqnr_db(x, x + np.float32(0.5)) == pytest.approx(10 * np.log10(25 / 0.5))


def fake_demo(title: str) -> report.Demo:
    found = Comparison("c", 10, 1000, Accuracy(9, 10), Accuracy(8, 9), 7, 20.0, 3.0, 1.0, 3.0, 1)
    net = network([0, 0, 0])
    return report.Demo(title, "about it", (found, found), net.profile(IMAGES))


def test_the_report(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(report, "DEMOS", {name: lambda _, name=name: fake_demo(name) for name in ("one", "two")})
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    assert len(report.run_demo(console)) == 2
    text = console.export_text()
    for part in ("one: about it.", "two, c", "9/8", "10/9", "70.0%", "3.00/1.00", "3.0", "on 1 thread(s)"):
        assert part in text
    assert "…" not in text
    assert len(report.run_demo(console, network="two", as_json=True)) == 1
    assert json.loads(capsys.readouterr().out)["two"]["comparisons"][0]["same_top1"] == 7
    with pytest.raises(VnnigenError, match="known are all, one, two"):
        report.run_demo(console, network="three")
