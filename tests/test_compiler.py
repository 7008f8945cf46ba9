"""`compile`: from a model to results, in every precision; what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

import vnnigen
from tests.graph.models import BUILDERS, feeds
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.importer import import_model
from vnnigen.graph.infer import infer

#: Least signal-to-noise ratio of the outputs in dB: the weights are random, and int8 has about 30 dB per layer.
LEAST = {"f32": 90.0, "bf16": 25.0, "int8": 12.0}


def sqnr(exact: list[Any], y: list[Any]) -> float:
    a, b = (np.concatenate([np.asarray(v, np.float64).ravel() for v in values]) for values in (exact, y))
    return float(10 * np.log10((a**2).sum() / max(((a - b) ** 2).sum(), 1e-300)))


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_results_are_the_models(name: str, precision: Any) -> None:
    model = BUILDERS[name]()
    x = feeds(model)
    graph = import_model(model)
    infer(graph)
    exact = run_reference(graph, x)
    net = vnnigen.compile(model, precision, calibration=[x])
    y = net(**x)
    already = name in ("qdq_cnn", "qoperator_cnn")
    least = 30.0 if already else LEAST[precision]
    assert sqnr([exact[n] for n in graph.outputs], list(y) if isinstance(y, tuple) else [y]) > least


def test_int8_needs_samples() -> None:
    with pytest.raises(vnnigen.QuantizationError, match="calibration="):
        vnnigen.compile(BUILDERS["small_cnn"](), "int8")
    with pytest.raises(vnnigen.QuantizationError):
        vnnigen.compile(BUILDERS["small_cnn"](), "int8", calibration=[])


def test_a_precision_that_there_is_not() -> None:
    precision: Any = "int4"
    with pytest.raises(vnnigen.QuantizationError, match="int8"):
        vnnigen.compile(BUILDERS["small_cnn"](), precision)


def test_progress_counts_samples() -> None:
    model = BUILDERS["small_cnn"]()
    seen: list[int] = []
    vnnigen.compile(model, "int8", calibration=[feeds(model)] * 3, progress=seen.append)
    assert seen == [1, 2, 3]
