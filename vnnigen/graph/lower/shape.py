"""Operators that move nothing: their result is their input seen otherwise."""

from __future__ import annotations

import numpy as np

from vnnigen.graph.attributes import axis_of, int_attr, ints_attr
from vnnigen.graph.ir import Node
from vnnigen.graph.lower.context import Lowering, lowers
from vnnigen.graph.storage import Place, Storage


@lowers("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout")
def reshape(ctx: Lowering, node: Node) -> str | None:
    """Another shape; only what lies in another order than the model says is copied (and reordered) first."""
    if node.fused or len([n for n in node.outputs if n]) > 1:
        return "more than a change of shape"
    name = node.inputs[0]
    place = ctx.value(name)
    shape = ctx.shape(node.outputs[0])
    seen = place if place.shape == shape else place.reshape(shape)
    if seen is None:
        place = ctx.take(name, Storage(place.dtype, place.quant, "plain"))
        seen = place.reshape(shape)
        assert seen is not None
    ctx.set(node.outputs[0], seen)
    return None


@lowers("Transpose")
def transpose(ctx: Lowering, node: Node) -> str | None:
    """Other strides; readers that cannot take them copy."""
    if node.fused:
        return "more than a change of order"
    place = ctx.value(node.inputs[0])
    rank = len(place.shape)
    perm = ints_attr(node, "perm", tuple(reversed(range(rank))))
    ctx.set(node.output, place.transpose(perm))
    return None


@lowers("Split")
def split(ctx: Lowering, node: Node) -> str | None:
    """Slices next to each other."""
    place = ctx.value(node.inputs[0])
    axis = axis_of(node, int_attr(node, "axis", 0), len(place.shape))
    start = 0
    for name in node.outputs:
        length = ctx.shape(name)[axis] if name else 0
        if not name:
            return "an output is left out"
        ctx.set(name, place.slice(axis, start, length))
        start += length
    return None


@lowers("Slice")
def slice_(ctx: Lowering, node: Node) -> str | None:
    """A part along some axes, with steps."""
    given = [ctx.constant(name) if name else None for name in node.inputs[1:]]
    if any(name and g is None for name, g in zip(node.inputs[1:], given, strict=True)):
        return "its bounds are not constant"
    starts, ends, axes, steps = [None if g is None else [int(v) for v in g] for g in (*given, None, None)[:4]]
    place: Place = ctx.value(node.inputs[0])
    rank = len(place.shape)
    assert starts is not None
    assert ends is not None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis_of(node, axis, rank)  # noqa: PLW2901
        span = range(*slice(start, _end(end, step), step).indices(place.shape[axis]))
        place = place.slice(axis, span.start, len(span), step)
    if place.shape != ctx.shape(node.output):
        return f"a slice of shape {place.shape}"
    ctx.set(node.output, place)
    return None


def _end(end: int, step: int) -> int | None:
    """An end as Python's slices have it: for steps backwards, ONNX writes "past the first" as a huge negative."""
    return None if step < 0 and end < -np.iinfo(np.int32).max else end
