"""Calibration: what samples it takes, and that ranges are those of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.graph.pass_helpers import Build
from vnnigen.errors import QuantizationError
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.ir import Graph
from vnnigen.graph.passes import run_passes
from vnnigen.quant import QuantConfig, calibrate


def network(batch: int | str = "n", width: int | str = "w") -> Graph:
    b = Build()
    graph = b.graph(b.conv(b.op("Relu", b.conv(b.input(batch, 3, 4, width), 3, 4)), 4, 2))
    run_passes(graph)
    return graph


def image(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("method", ["minmax", "kl", "percentile"])
def test_a_stream_of_samples_of_many_shapes(method: Any) -> None:
    graph = network()
    samples = [image(1, 3, 4, 4), {"x": image(5, 3, 4, 9, seed=1)}, image(2, 3, 4, 1, seed=2)]
    seen: list[int] = []

    def stream() -> Iterator[Any]:
        yield from samples

    made = calibrate(graph, stream(), QuantConfig(method=method), seen.append)
    assert seen == [1, 2, 3]
    assert made.samples == 3
    assert set(made.ranges) == {"x", graph.nodes[0].output}
    for name, found in made.ranges.items():
        values = [run_reference(graph, s if isinstance(s, dict) else {"x": s}, [name])[name] for s in samples]
        low, high = (f([f(v) for v in values]) for f in (np.min, np.max))
        assert low <= found.low <= found.high <= high
        assert method != "minmax" or found == (low, high)


def test_samples_are_cut_to_a_fixed_batch() -> None:
    x, batches = image(6, 3, 4, 4), []

    def runner(graph: Graph, wanted: tuple[str, ...]) -> Any:
        def run(feeds: Any) -> Any:
            batches.append(feeds["x"].shape[0])
            return run_reference(graph, feeds, wanted)

        return run

    fixed = calibrate(network(2, 4), [x], QuantConfig(), runner=runner)
    assert batches == [2, 2, 2]
    whole = calibrate(network("n", 4), [x], QuantConfig())
    assert fixed.ranges == whole.ranges
    for name, mean in fixed.means.items():
        np.testing.assert_allclose(mean, whole.means[name])


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (image(1, 3, 4), r"sample 0, input 'x' has shape \(1, 3, 4\)"),
        (image(1, 2, 4, 4), "does not fit"),
        (image(0, 3, 4, 4), "is empty"),
        (image(1, 3, 4, 4).astype(np.float64), "must be float32, not float64"),
        (image(1, 3, 4, 4) * np.float32(np.nan), "contains NaN"),
        ([1.0], "must be a NumPy array, not list"),
        ({}, r"has the inputs \[\]; the graph has \['x'\]"),
        ({"y": image(1, 3, 4, 4)}, r"has the inputs \['y'\]"),
    ],
)
def test_samples_that_do_not_fit(sample: Any, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        calibrate(network(), [sample], QuantConfig())


def test_no_samples_and_several_inputs() -> None:
    with pytest.raises(QuantizationError, match="no samples"):
        calibrate(network(), [], QuantConfig())
    b = Build()
    graph = b.graph(b.op("MatMul", b.input("n", 2, name="a"), b.input(2, "n", name="b")))
    with pytest.raises(QuantizationError, match="give a dict"):
        calibrate(graph, [image(1, 2)], QuantConfig())
    with pytest.raises(QuantizationError, match="does not fit"):
        calibrate(graph, [{"a": image(3, 2), "b": image(2, 4)}], QuantConfig())
    calibrate(graph, [{"a": image(3, 2), "b": image(2, 3)}], QuantConfig())


def test_values_that_are_not_finite_are_named() -> None:
    b = Build()
    x = b.op("Log", b.op("Relu", b.conv(b.input(1, 3, 4, 4), 3, 4)))
    graph = b.graph(b.conv(x, 4, 4))
    with pytest.raises(QuantizationError, match=f"value '{x}' contains NaN or infinity"):
        calibrate(graph, [image(1, 3, 4, 4)], QuantConfig())
