"""All passes together: random chains, and the small models of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graph.pass_helpers import Build, check
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.infer import infer
from vnnigen.graph.ir import Graph
from vnnigen.graph.passes import PASSES, run_passes

CHANNELS = 4
UNARY = ("Relu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "LeakyRelu", "Identity", "Gelu", "Softplus", "Abs")
LINKS = (*UNARY, "conv", "pad", "norm", "factor", "offset", "rest", "divide", "sum", "gate", "clip", "silu", "turn",
         "transposed", "linear", "concat", "output")  # fmt: skip


def link(b: Build, kind: str, values: list[str], choice: int) -> str:
    """One more value of shape [batch, 4, 6, 6]."""
    x, other = values[-1], values[choice % len(values)]
    per_channel = (CHANNELS, 1, 1) if choice % 3 else ()
    if kind in UNARY:
        return b.op(kind, x)
    if kind == "pad":
        return b.conv(b.op("Pad", x, b.ints(0, 0, 1, 1, 0, 0, 1, 1)), CHANNELS, CHANNELS, k=3)
    if kind == "norm":
        return b.norm(x, CHANNELS)
    if kind in ("factor", "offset", "rest", "divide"):
        op = {"factor": "Mul", "offset": "Add", "rest": "Sub", "divide": "Div"}[kind]
        operands = [x, b.random(*per_channel, low=0.5, high=1.5)]
        return b.op(op, *(operands[::-1] if choice % 2 and op != "Div" else operands))
    if kind == "sum":
        return b.op("Add", x, other)
    if kind == "gate":
        return b.op("Mul", x, b.op("Sigmoid", b.conv(b.op("GlobalAveragePool", other), CHANNELS, CHANNELS)))
    if kind == "clip":
        return b.op("Clip", x, b.const(-1), b.const(1))
    if kind == "silu":
        return b.op("Mul", x, b.op("Sigmoid", x))
    if kind == "turn":
        return b.op("Transpose", b.op("Transpose", x, perm=(0, 1, 3, 2)), perm=(0, 1, 3, 2))
    if kind == "transposed":
        return b.op("ConvTranspose", x, b.random(CHANNELS, CHANNELS, 1, 1))
    if kind == "linear":
        return b.op("Add", b.op("MatMul", x, b.random(6, 6)), b.random(6))
    if kind == "concat":
        return b.conv(b.op("Concat", x, other, axis=1), 2 * CHANNELS, CHANNELS)
    return b.conv(x, CHANNELS, CHANNELS, k=3 if choice % 2 else 1, pad=choice % 2, group=1 + choice % 2)


def random_graph(kinds: list[tuple[str, int]]) -> Graph:
    b = Build(len(kinds))
    values, outputs = [b.input("batch", CHANNELS, 6, 6)], []
    for kind, choice in kinds:
        if kind == "output":
            outputs.append(values[-1])
        else:
            values.append(link(b, kind, values, choice))
    made = [v for v in outputs if v != "x"]
    return b.graph(*dict.fromkeys([*made, b.op("Mul", values[-1], b.const(0.5))]))


def everything(graph: Graph) -> int:
    return len(run_passes(graph))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LINKS), st.integers(0, 7)), min_size=1, max_size=12))
def test_random_chains(kinds: list[tuple[str, int]]) -> None:
    graph = random_graph(kinds)
    check(graph, everything, tolerance=1e-4)
    assert not {"BatchNormalization", "Pad"} & {n.op for n in graph}
    types = dict(graph.types)
    infer(graph)  # the passes keep types as inference would find them
    assert {n: t.dtype for n, t in types.items()} == {n: graph.types[n].dtype for n in types}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LINKS), st.integers(0, 7)), min_size=1, max_size=9), st.sampled_from(PASSES))
def test_each_pass_alone(kinds: list[tuple[str, int]], run: object) -> None:
    check(random_graph(kinds), run, tolerance=1e-4)  # type: ignore[arg-type]


# Models.


def imported(name: str, seed: int = 0) -> tuple[Graph, dict[str, npt.NDArray[Any]]]:
    """A small model as a graph with types, and random inputs."""
    pytest.importorskip("onnx")
    from tests.graph.models import BUILDERS, feeds
    from vnnigen.graph.importer import import_model

    model = BUILDERS[name](seed=seed)
    graph = import_model(model)
    infer(graph)
    return graph, feeds(model, seed)


#: What is left of each model, at most, besides the arithmetic of shapes.
LEFT = {
    "small_cnn": {"Conv", "MaxPool", "GlobalAveragePool", "Flatten", "Linear"},
    "mobile_block": {"Conv", "GlobalAveragePool", "Mul", "ReduceMean", "Linear", "Softmax"},
    "detector_head": {"Conv", "Resize", "Concat", "Transpose", "Reshape", "Softmax"},
}


@pytest.mark.parametrize(
    "name", ["small_cnn", "mobile_block", "bert_layer", "detector_head", "qdq_cnn", "qoperator_cnn"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_models_keep_their_outputs(name: str, seed: int) -> None:
    graph, inputs = imported(name, seed)
    before = run_reference(graph, inputs)
    outputs = graph.outputs
    run_passes(graph)
    assert graph.outputs == outputs
    for output, y in run_reference(graph, inputs).items():
        np.testing.assert_allclose(y, before[output], rtol=1e-5, atol=1e-5 * np.abs(before[output]).max())
    assert run_passes(graph) == []
    if name in LEFT:
        assert {n.op for n in graph} <= LEFT[name]


def test_quantizers_of_models_stay() -> None:
    graph, _ = imported("qdq_cnn")
    count = sum(n.op == "QuantizeLinear" for n in graph)
    run_passes(graph)
    assert sum(n.op == "QuantizeLinear" for n in graph) == count > 0


def test_the_log_names_passes() -> None:
    b = Build()
    graph = b.graph(b.op("Relu", b.norm(b.conv(b.input(1, 4, 5, 5), 4, 4), 4)))
    assert run_passes(graph) == ["fold_batch_norm: 1 change", "fuse_activation: 1 change"]
    assert PASSES[0].__name__ == "fold_constants"
