"""Places as views, and how values of a network are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vnnigen.graph.infer import infer
from vnnigen.graph.ir import Fused, Graph, Node, Precision, QWeight, TensorType, ValueQuant
from vnnigen.graph.storage import Place, Storage, assign, common_pitch, strides_of

F32 = Storage("f32")
NHWC = Storage("f32", None, "nhwc")

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)


@settings(max_examples=200, deadline=None)
@given(shapes, st.data())
def test_places_are_views_as_numpy_has_them(shape: tuple[int, ...], data: st.DataObject) -> None:
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    memory = x.reshape(-1).view(np.uint8)
    p = Place.new(0, shape, F32)
    for _ in range(data.draw(st.integers(0, 3))):
        kind = data.draw(st.sampled_from(["transpose", "slice", "reshape"]))
        if kind == "transpose":
            perm = data.draw(st.permutations(range(x.ndim)))
            x, p = x.transpose(perm), p.transpose(perm)
        elif kind == "slice":
            axis = data.draw(st.integers(0, x.ndim - 1))
            start = data.draw(st.integers(0, x.shape[axis] - 1))
            step = data.draw(st.integers(1, 2))
            length = len(range(start, x.shape[axis], step))
            p = p.slice(axis, start, length, step)
            x = x[(slice(None),) * axis + (slice(start, None, step),)]
        else:
            seen = p.reshape((-1, x.shape[-1]))
            flat = x.reshape(-1, x.shape[-1])
            assert (seen is not None) == np.shares_memory(flat, x) or seen is None
            if seen is not None:
                x, p = flat, seen
    np.testing.assert_array_equal(p.array(memory), x)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 7), (1, 8, 1, 6), (4, 3)])
def test_layouts(shape: tuple[int, ...]) -> None:
    plain, nhwc = Place.new(0, shape, F32), Place.new(0, shape, NHWC)
    assert plain.lies("plain")
    assert nhwc.lies("nhwc")
    assert plain.layout == "plain"
    assert nhwc.channels_last().lies("plain") or len(shape) == 2
    same = len(shape) == 2 or shape[1] == 1 or np.prod(shape[2:]) == 1
    assert plain.lies("nhwc") == same
    assert strides_of(shape, "plain", 4) == np.empty(shape, np.float32).strides


def test_gaps_have_no_layout_but_a_pitch() -> None:
    whole = Place.new(0, (2, 10, 4, 4), NHWC)
    part = whole.slice(1, 3, 4)
    assert part.layout is None
    assert part.channels_last().pitch == 10
    assert part.offset == 12
    assert whole.slice(3, 1, 2).channels_last().pitch is None
    assert whole.channels_last().pitch == 10
    assert common_pitch((1, 1), (8, 4)) == 0


def network(nodes: list[Node], quant: dict[str, ValueQuant], **constants: Any) -> Graph:
    graph = Graph("g", {"x": TensorType("f32", (1, 4, 6, 6))}, (nodes[-1].output,), nodes, constants, quant=quant)
    infer(graph)
    return graph


def conv(name: str, x: str, precision: Precision = "int8", *more: str, fused: tuple[Fused, ...] = ()) -> Node:
    return Node(name, "Conv", (x, f"w_{name}", *more), (f"y_{name}",), {"kernel_shape": (1, 1)}, fused, precision)


def weights(oc: int = 4) -> QWeight:
    return QWeight(np.ones((oc, 4, 1, 1), np.int8), np.ones(oc, np.float32), np.zeros(oc, np.int32), 0)


U8, S8 = ValueQuant("u8", 0.1, 3), ValueQuant("s8", 0.2, 0)


def test_bytes_between_int8_layers_and_f32_at_the_end() -> None:
    nodes = [conv("a", "x"), conv("b", "y_a"), conv("c", "y_b")]
    graph = network(nodes, {"x": U8, "y_a": S8, "y_b": U8}, w_a=weights(), w_b=weights(), w_c=weights())
    found = assign(graph)
    assert found.values["x"] == F32
    assert found.wants["a", 0] == Storage("u8", U8, "nhwc")
    assert found.values["y_a"] == Storage("s8", S8, "nhwc")
    assert found.wants["b", 0] == Storage("s8", S8, "nhwc")
    assert found.values["y_c"] == NHWC
    assert not found.fallbacks


@pytest.mark.parametrize(
    ("quant", "qweights", "why"),
    [({}, True, "no quantization"), ({"x": U8}, False, "not quantized")],
)
def test_a_layer_that_cannot_be_int8_says_why(quant: dict[str, ValueQuant], qweights: bool, why: str) -> None:
    w = weights() if qweights else np.ones((4, 4, 1, 1), np.float32)
    found = assign(network([conv("a", "x")], quant, w_a=w))
    assert found.precision["a"] == "f32"
    assert why in found.fallbacks["a"]
    assert found.wants["a", 0] == NHWC


def test_a_residual_is_read_as_it_is_stored() -> None:
    nodes = [conv("a", "x"), conv("b", "y_a"), conv("c", "y_b", "int8", "y_a", fused=(Fused("Add", operand=2),))]
    graph = network(nodes, {"x": U8, "y_a": S8, "y_b": U8}, w_a=weights(), w_b=weights(), w_c=weights())
    assert assign(graph).wants["c", 2] == Storage("s8", S8, "nhwc")


def test_pooling_and_activations_follow_images() -> None:
    nodes = [
        conv("a", "x", "f32"),
        Node("r", "Relu", ("y_a",), ("y_r",)),
        Node("m", "MaxPool", ("y_r",), ("y_m",), {"kernel_shape": (2, 2), "strides": (2, 2)}),
        Node("f", "Flatten", ("y_m",), ("y_f",), {"axis": 1}),
    ]
    found = assign(network(nodes, {}, w_a=np.ones((4, 4, 1, 1), np.float32)))
    assert [found.values[f"y_{n}"].layout for n in "armf"] == ["nhwc", "nhwc", "nhwc", "plain"]


def test_bf16_layers_write_bf16_for_bf16_readers() -> None:
    w = np.ones((4, 4, 1, 1), np.float32)
    found = assign(network([conv("a", "x", "bf16"), conv("b", "y_a", "bf16"), conv("c", "y_b", "f32")], {},
                           w_a=w, w_b=w, w_c=w))  # fmt: skip
    assert [found.values[f"y_{n}"].dtype for n in "abc"] == ["bf16", "f32", "f32"]
    assert found.wants["a", 0] == Storage("bf16", None, "nhwc")
