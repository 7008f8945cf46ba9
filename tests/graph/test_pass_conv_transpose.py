"""expand_conv_transpose, and the kernels that then run it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vnnigen
from tests.graph.pass_helpers import Build, check, feeds, steps
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.ir import Graph
from vnnigen.graph.network import Network
from vnnigen.graph.passes.expand_conv_transpose import expand_conv_transpose
from vnnigen.graph.passes.fuse_activation import fuse_activation

GEOMETRIES: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "blocks": ({"strides": (2, 2)}, 2, ["Conv", "DepthToSpace"]),
    "overlapping": ({"strides": (2, 2), "pads": (1, 1, 1, 1)}, 4, ["Conv", "DepthToSpace", "Slice"]),
    "odd kernel": (
        {"strides": (2, 2), "pads": (1, 1, 1, 1), "output_padding": (1, 1)}, 3, ["Conv", "DepthToSpace", "Slice"],
    ),
    "uneven padding": ({"strides": (3, 3), "pads": (0, 2, 1, 4)}, 5, ["Conv", "DepthToSpace", "Slice"]),
    "padding of whole blocks": ({"strides": (2, 2), "pads": (2, 2, 2, 2)}, 4, ["Conv", "DepthToSpace"]),
    "stride 1": ({"pads": (1, 1, 1, 1)}, 3, ["Conv"]),
    "gaps": ({"strides": (3, 3)}, 2, ["Conv", "DepthToSpace", "Slice"]),
    "same": ({"strides": (2, 2), "auto_pad": "SAME_UPPER"}, 3, ["Conv", "DepthToSpace"]),
    "asked for": ({"strides": (2, 2), "output_shape": (11, 9)}, 3, ["Conv", "DepthToSpace", "Slice"]),
}  # fmt: skip
LEFT: dict[str, dict[str, Any]] = {
    "two strides": {"strides": (2, 1)},
    "dilated": {"dilations": (2, 2)},
    "zeros behind": {"strides": (2, 2), "output_padding": (1, 1)},
}


def graph_of(
    attrs: dict[str, Any], k: int, groups: int = 1, *, bias: bool = True, size: tuple[Any, Any] = (6, 5)
) -> Graph:
    b = Build()
    x = b.input(2, 4, *size)
    extra = [b.random(3 * groups)] if bias else []
    return b.graph(b.op("ConvTranspose", x, b.random(4, 3, k, k), *extra, group=groups, **attrs))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("attrs", "k", "expected"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(attrs: dict[str, Any], k: int, expected: list[str], groups: int) -> None:
    graph = graph_of(attrs, k, groups, bias=groups == 1)
    assert check(graph, expand_conv_transpose) == expected


@pytest.mark.parametrize("attrs", LEFT.values(), ids=LEFT)
def test_others_are_left(attrs: dict[str, Any]) -> None:
    assert check(graph_of(attrs, 2), expand_conv_transpose) == ["ConvTranspose"]


def test_unknown_lengths() -> None:
    graph = graph_of({"strides": (2, 2), "pads": (1, 1, 1, 1)}, 4, size=("h", "w"))
    assert check(graph, expand_conv_transpose) == ["Conv", "DepthToSpace", "Slice"]


@pytest.mark.parametrize("activation", ["Relu", "HardSigmoid"])
def test_steps_are_those_of_the_convolution(activation: str) -> None:
    b = Build()
    y = b.op("ConvTranspose", b.input(1, 4, 5, 5), b.random(4, 3, 2, 2), b.random(3), strides=(2, 2))
    graph = b.graph(b.op(activation, y))
    assert check(graph, fuse_activation, expand_conv_transpose) == ["Conv", "DepthToSpace"]
    fused = steps(graph, graph.nodes[0].output)
    assert fused == (["Relu"] if activation == "Relu" else ["Mul", "Add", "Clip"])


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 6), s=st.integers(1, 4), groups=st.sampled_from([1, 2]),
    pads=st.tuples(*[st.integers(0, 3)] * 4), extra=st.tuples(*[st.integers(0, 3)] * 2),
)  # fmt: skip
def test_any_geometry(k: int, s: int, groups: int, pads: tuple[int, ...], extra: tuple[int, ...]) -> None:
    attrs = {"strides": (s, s), "pads": pads, "output_padding": tuple(min(e, s - 1) for e in extra)}
    try:
        graph = graph_of(attrs, k, groups)
    except vnnigen.ModelError:  # nothing is left of it
        return
    check(graph, expand_conv_transpose)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@pytest.mark.parametrize("op", ["DepthToSpace", "SpaceToDepth"])
def test_blocks_have_a_kernel(op: str, mode: str) -> None:
    b = Build()
    x = b.conv(b.input(2, 3, 6, 10), 3, 8)
    extra = {"mode": mode} if op == "DepthToSpace" else {}
    graph = b.graph(b.conv(b.op(op, x, blocksize=2, **extra), 2 if op == "DepthToSpace" else 32, 5))
    given_ = feeds(graph)
    net = Network(graph)
    want = run_reference(graph, given_)[graph.outputs[0]]
    np.testing.assert_allclose(net(given_), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    if vnnigen.tiers()[0] != "reference":
        assert all(step.native is not None for step in net._current().lowered.steps)


def test_int8_runs_through() -> None:
    b = Build()
    x = b.op("Relu", b.conv(b.input(1, 3, 12, 10), 3, 16, k=3, pad=1))
    x = b.op("Relu", b.op("ConvTranspose", x, b.random(16, 8, 2, 2), b.random(8), strides=(2, 2)))
    graph = b.graph(b.conv(x, 8, 4))
    samples = [feeds(graph, seed) for seed in range(4)]
    net = vnnigen.compile(graph, "int8", calibration=samples)
    want = run_reference(graph, samples[0])[graph.outputs[0]]
    noise = np.square(net(samples[0]) - want).sum() / np.square(want).sum()
    assert noise < 1e-3
    kinds = {s.op: s.outputs[0].dtype for s in net._current().lowered.steps if s.outputs[0] is not None}
    if vnnigen.tiers()[0] != "reference":
        assert kinds["Copy" if "Copy" in kinds else "DepthToSpace"] == "u8"
