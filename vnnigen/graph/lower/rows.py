"""Layer normalization, rows by their numbers, and what only changes places: padding, repetition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from vnnigen.errors import QuantizationError
from vnnigen.graph.attributes import axes_of, axis_of, float_attr, int_attr, ints_attr, str_attr
from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Node
from vnnigen.graph.lower.broadcast import TYPES, in_memory
from vnnigen.graph.lower.context import Lowering, lowers
from vnnigen.graph.lower.post_ops import fused_ops, output_arguments
from vnnigen.graph.storage import Layout, Place, Storage
from vnnigen.kernels.post_ops import Binary
from vnnigen.kernels.types import DType
from vnnigen.ops.cast import CastWide
from vnnigen.ops.element import Convert
from vnnigen.ops.gather import Gather
from vnnigen.ops.layernorm import LayerNorm
from vnnigen.ops.permute import Expand, MoveOperator, Pad, Upsample
from vnnigen.ops.step import NativeStep


@lowers("LayerNormalization")
def layer_norm(ctx: Lowering, node: Node) -> str | None:
    """Over the last axes, which are one for the kernel."""
    shape = ctx.shape(node.inputs[0])
    axis = axis_of(node, int_attr(node, "axis", -1), len(shape))
    vectors = [ctx.constant(name) if name else None for name in (*node.inputs[1:3], "")[:2]]
    given = [name for name, vector in zip(node.inputs[1:3], vectors, strict=False) if name and vector is None]
    if given or len([n for n in node.outputs if n]) > 1:
        return "scale and bias are not constant" if given else "mean or deviation are asked for"
    n = math.prod(shape[axis:])
    flat = [None if v is None else np.broadcast_to(v, shape[axis:]).reshape(n) for v in vectors]
    more = fused_ops(ctx, node, "plain")
    if isinstance(more, str):
        return more
    if more[1] or any(isinstance(op, Binary) for op in more[0]):
        return "what is fused behind it reads tensors"
    assigned = ctx.assignment.values[node.outputs[0]]
    if assigned.dtype not in TYPES or assigned.layout != "plain":
        return "no kernel for this type"
    epsilon = float_attr(node, "epsilon", 1e-5)

    def make() -> LayerNorm:
        return LayerNorm(
            *flat, epsilon=epsilon, out_dtype=numpy_dtype(assigned.dtype), **output_arguments(assigned),
            post_ops=more[0], isa=ctx.tiers.element,
        )  # fmt: skip

    try:
        op = ctx.operator(node, (assigned,), make)
        steps = op.native([(math.prod(shape[:axis]), n)], ["f32"])
    except QuantizationError as e:
        return str(e)
    x = ctx.take(node.inputs[0], Storage("f32"))
    out = ctx.result(node)
    rows = [p.reshape(steps[0].y_shape) for p in (x, out)]
    assert rows[0] is not None
    assert rows[1] is not None
    ctx.native(node, steps, [rows[0]], rows[1])
    return None


@lowers("Gather")
def gather(ctx: Lowering, node: Node) -> str | None:
    """Rows by their numbers; a constant number is a view."""
    if node.fused:
        return "what is fused behind it"
    shape = ctx.shape(node.inputs[0])
    axis = axis_of(node, int_attr(node, "axis", 0), len(shape))
    number = ctx.constant(node.inputs[1])
    if number is not None and number.ndim == 0 and ctx.constant(node.inputs[0]) is None:
        if not -shape[axis] <= int(number) < shape[axis]:
            return f"index {int(number)} is out of range"
        place = ctx.value(node.inputs[0]).slice(axis, int(number) % shape[axis], 1)
        others = [i for i in range(len(shape)) if i != axis]
        ctx.set(node.output, _without(place, others))
        return None
    indices = ctx.take(node.inputs[1], Storage(ctx.value(node.inputs[1]).dtype))
    if indices.dtype not in ("s32", "s64"):
        return "no kernel for indices of this type"
    x = ctx.value(node.inputs[0])
    if x.quant is not None or x.dtype not in (ctx.assignment.values[node.output].dtype,):
        x = ctx.take(node.inputs[0], Storage(ctx.assignment.values[node.output].dtype))
    x = ctx.take(node.inputs[0], Storage(x.dtype)) if not x.lies("plain") else x
    op = ctx.operator(node, (axis,), lambda: Gather(axis, isa=ctx.tiers.element))
    out = ctx.result(node, storage=Storage(x.dtype))
    step = op.step([x.shape, indices.shape], [numpy_dtype(x.dtype), numpy_dtype(indices.dtype)])
    ctx.native(node, [step], [x, indices], out)
    return None


def _without(place: Place, kept: list[int]) -> Place:
    """A place with only some of its dimensions; the others have length 1."""
    strides = tuple(place.strides[i] for i in kept)
    return Place(place.buffer, tuple(place.shape[i] for i in kept), strides, place.dtype, place.quant, place.offset)


def _move(ctx: Lowering, node: Node, make: Callable[[Layout], MoveOperator]) -> str | None:
    """A copy of the first input by an operator that gets the order of its dimensions."""
    assigned = ctx.assignment.values[node.output]
    x = ctx.value(node.inputs[0])
    if assigned.dtype not in TYPES:
        return "no kernel for this type"
    same = (x.dtype, x.quant) == (assigned.dtype, assigned.quant)
    x = ctx.take(node.inputs[0], Storage(x.dtype, x.quant, assigned.layout) if same else assigned)
    source = in_memory(x, assigned.layout)
    op = make(assigned.layout)
    steps = op.native([source.shape], [cast("DType", x.dtype)])
    ctx.native(node, steps, [source], in_memory(ctx.result(node), assigned.layout))
    return None


def _ordered(values: list[Any], layout: Layout) -> list[Any]:
    return [values[0], *values[2:], values[1]] if layout == "nhwc" and len(values) > 2 else values


@lowers("Pad")
def pad(ctx: Lowering, node: Node) -> str | None:
    """Padding with a constant."""
    constants = [ctx.constant(name) if name else None for name in (*node.inputs[1:4], "", "", "")[:3]]
    if node.fused or str_attr(node, "mode", "constant") != "constant" or constants[0] is None:
        return "only padding with a constant has a kernel"
    if any(name and c is None for name, c in zip(node.inputs[1:4], constants, strict=False)):
        return "its numbers are not constant"
    rank = len(ctx.shape(node.output))
    axes = list(range(rank)) if constants[2] is None else [axis_of(node, int(a), rank) for a in constants[2]]
    pads = [(0, 0)] * rank
    amounts = [int(v) for v in constants[0]]
    for axis, before, after in zip(axes, amounts[: len(axes)], amounts[len(axes) :], strict=True):
        pads[axis] = (before, after)
    value = 0.0 if constants[1] is None else float(constants[1].reshape(()))
    if ctx.assignment.values[node.output].quant is not None:
        return "padding of integers"
    return _move(ctx, node, lambda layout: Pad(_ordered(pads, layout), value, isa=ctx.tiers.element))


@lowers("Resize")
def resize(ctx: Lowering, node: Node) -> str | None:
    """Nearest neighbours by whole factors, where every way of rounding gives the same."""
    source, target = ctx.shape(node.inputs[0]), ctx.shape(node.output)
    factors = [n // m for m, n in zip(source, target, strict=True)]
    exact = all(m * f == n for m, f, n in zip(source, factors, target, strict=True))
    scales = ctx.constant(node.inputs[2]) if node.inputs[2:] and node.inputs[2] else None
    if node.inputs[2:3] != ("",) and node.inputs[2:] and scales is None:
        return "its scales are not constant"
    if scales is not None and scales.size:
        axes = axes_of(node, ints_attr(node, "axes", tuple(range(len(source)))), len(source))
        exact = exact and all(factors[axis] == scale for axis, scale in zip(axes, scales, strict=True))
    way = str_attr(node, "coordinate_transformation_mode", "half_pixel")
    rounding = str_attr(node, "nearest_mode", "round_prefer_floor")
    # No position lies half-way between two elements, so that both ways of rounding are one.
    floors = (way == "asymmetric" and rounding == "floor") or (way == "half_pixel" and rounding.startswith("round"))
    if node.fused or str_attr(node, "mode", "nearest") != "nearest" or not exact or not floors:
        return "only nearest neighbours by whole factors have a kernel"
    if str_attr(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return "only stretching has a kernel"
    return _move(ctx, node, lambda layout: Upsample(_ordered(factors, layout), isa=ctx.tiers.element))


@lowers("Expand")
def expand(ctx: Lowering, node: Node) -> str | None:
    """Repetition along dimensions of length 1."""
    if node.fused or ctx.assignment.values[node.output].layout != "plain":
        return "only copies in the model's order have a kernel"
    shape = ctx.shape(node.output)
    return _move(ctx, node, lambda _layout: Expand(shape, isa=ctx.tiers.element))


@lowers("Cast")
def cast_(ctx: Lowering, node: Node) -> str | None:
    """Integers as real numbers."""
    x = ctx.value(node.inputs[0])
    if node.fused or ctx.graph.types[node.output].dtype != "f32" or x.dtype not in ("s64", "s32", "u8", "s8", "bool"):
        return "no kernel for these types"
    if x.quant is not None:
        return "integers that stand for real numbers"
    x = ctx.take(node.inputs[0], Storage(x.dtype))
    flat = x.reshape((math.prod(x.shape),))
    out = ctx.result(node, storage=Storage("f32"))
    target = out.reshape((math.prod(x.shape),))
    assert flat is not None
    assert target is not None
    if x.dtype == "s64":
        steps: Sequence[NativeStep] = [ctx.operator(node, "s64", lambda: CastWide(ctx.tiers.element)).step(flat.shape)]
    else:
        kind = cast("DType", "u8" if x.dtype == "bool" else x.dtype)
        op = ctx.operator(node, kind, lambda: Convert(np.float32, isa=ctx.tiers.element))
        steps = op.native([flat.shape], [kind])
    ctx.native(node, steps, [flat], target)
    return None
