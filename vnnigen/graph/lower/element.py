"""Element-wise operators, and softmax."""

from __future__ import annotations

import math
from typing import Any, cast

from vnnigen.graph.attributes import int_attr
from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Array, Node
from vnnigen.graph.lower.broadcast import broadcast
from vnnigen.graph.lower.context import Lowering, lowers
from vnnigen.graph.lower.post_ops import (
    ACTIVATIONS,
    OPERATIONS,
    channel_vector,
    constant_op,
    fused_ops,
    fused_tensor,
    output_arguments,
    tensor_op,
)
from vnnigen.graph.storage import KERNEL_TYPES, Layout, Place, Storage
from vnnigen.kernels.layout import MAX_TENSORS
from vnnigen.kernels.post_ops import Function, Linear, PostOp
from vnnigen.kernels.types import DType
from vnnigen.ops.element import Convert, Softmax, SumTensors


@lowers("Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Gelu", "Silu")
def unary(ctx: Lowering, node: Node) -> str | None:
    """One activation, and what is fused behind it."""
    attrs: dict[str, Any] = dict(node.attrs)
    if node.op == "Clip":
        for key, name in zip(("min", "max"), node.inputs[1:3], strict=False):
            bound = ctx.constant(name)
            if name and bound is None:
                return "its bounds are not constant"
            if bound is not None:
                attrs[key] = float(bound.reshape(()))
        if attrs.get("min", -math.inf) > attrs.get("max", math.inf):
            return "its bounds are crossed"
    if ctx.value(node.inputs[0]).dtype not in KERNEL_TYPES:
        return "no kernel for this type"
    return _apply(ctx, node, ACTIVATIONS[node.op](attrs), [])


def _layout(ctx: Lowering, node: Node) -> Layout:
    return ctx.assignment.values[node.outputs[0]].layout


def _apply(ctx: Lowering, node: Node, ops: tuple[PostOp, ...], tensors: list[str]) -> str | None:
    """Apply post-ops, then the fused ones, to the node's first input."""
    layout = _layout(ctx, node)
    more = fused_ops(ctx, node, layout)
    if isinstance(more, str):
        return more
    x = ctx.wanted(node, 0)
    if not x.lies(layout):
        x = ctx.take(node.inputs[0], Storage(x.dtype, x.quant, layout))
    return _convert(ctx, node, x, (*ops, *more[0]), [*tensors, *more[1]])


def _convert(ctx: Lowering, node: Node, x: Place, ops: tuple[PostOp, ...], names: list[str]) -> str | None:
    layout = _layout(ctx, node)
    tensors = [fused_tensor(ctx, name, layout) for name in names]
    if len(tensors) > MAX_TENSORS:
        return f"more than {MAX_TENSORS} tensors"
    assigned = ctx.assignment.values[node.outputs[0]]
    q: dict[str, Any] = {} if x.quant is None else {"x_scale": x.quant.scale, "x_zero_point": x.quant.zero_point}

    def make() -> Convert:
        return Convert(
            numpy_dtype(assigned.dtype), **q, **output_arguments(assigned), post_ops=ops, isa=ctx.tiers.element
        )

    op = ctx.operator(node, (x.dtype, x.quant, assigned, tuple((t.dtype, t.quant) for t in tensors)), make)
    out = ctx.result(node)
    places = [flat(p, layout) for p in (x, *tensors, out)]
    steps = op.native([places[0].shape], [cast("DType", x.dtype)])
    ctx.native(node, steps, places[:-1], places[-1])
    return None


def flat(p: Place, layout: Layout) -> Place:
    """A place without gaps as [rows, channels], in the order of its memory."""
    seen = p.channels_last() if layout == "nhwc" and len(p.shape) > 2 else p
    rows = seen.reshape((-1, seen.shape[-1]) if seen.shape else (1, 1))
    assert rows is not None
    return rows


FUNCTIONS: dict[str, tuple[PostOp, ...]] = {
    "Exp": (Function("exp"),), "Erf": (Function("erf"),), "Softplus": (Function("softplus"),),
    "Mish": (Function("mish"),), "Sqrt": (Function("sqrt"),), "Reciprocal": (Function("reciprocal"),),
    "Abs": (Function("abs"),), "Neg": (Linear(-1.0, 0.0),),
}  # fmt: skip
#: Powers with an exponent that has a kernel.
POWERS: dict[float, tuple[PostOp, ...]] = {
    2.0: (Function("square"),), 3.0: (Function("cube"),), 0.5: (Function("sqrt"),), -0.5: (Function("rsqrt"),),
    -1.0: (Function("reciprocal"),), 1.0: (),
}  # fmt: skip


@lowers(*FUNCTIONS, "Pow")
def function(ctx: Lowering, node: Node) -> str | None:
    """A function of each element, and what is fused behind it."""
    if ctx.value(node.inputs[0]).dtype not in KERNEL_TYPES or ctx.graph.types[node.output].dtype != "f32":
        return "no kernel for this type"
    ops = FUNCTIONS.get(node.op)
    if ops is None:
        exponent = ctx.constant(node.inputs[1])
        ops = None if exponent is None or exponent.size != 1 else POWERS.get(float(exponent.reshape(())))
        if ops is None or ctx.shape(node.inputs[0]) != ctx.shape(node.output):
            return "no kernel for this exponent"
    return _apply(ctx, node, ops, [])


@lowers("Add", "Sub", "Mul", "Sum", "Min", "Max")
def binary(ctx: Lowering, node: Node) -> str | None:
    """Arithmetic of tensors of one shape, or of a tensor and numbers per channel."""
    shape, layout = ctx.shape(node.output), _layout(ctx, node)
    own = _own_inputs(node)
    names = [n for n in own if ctx.constant(n) is None]
    arrays = [a for n in own if (a := ctx.constant(n)) is not None]
    if not names or any(ctx.shape(n) != shape for n in names):
        return broadcast(ctx, node)
    if any(ctx.value(n).dtype not in KERNEL_TYPES for n in names) or ctx.graph.types[node.output].dtype != "f32":
        return "no kernel for this type"
    ops = _constants(node, arrays, shape, layout)
    if ops is None or (node.op == "Sub" and names[0] != own[0]):
        return broadcast(ctx, node)
    places = [ctx.take(n, _as_read(ctx, n, layout)) for n in names]
    if len(places) > 1 and OPERATIONS[node.op] == "add":
        return _sum(ctx, node, places, ops)
    tensors = tuple(tensor_op(node.op, p) for p in places[1:])
    more = fused_ops(ctx, node, layout)
    if isinstance(more, str):
        return more
    return _convert(ctx, node, places[0], (*tensors, *ops, *more[0]), [*names[1:], *more[1]])


def _as_read(ctx: Lowering, name: str, layout: Layout) -> Storage:
    place = ctx.value(name)
    return Storage(place.dtype, place.quant, layout)


def _own_inputs(node: Node) -> list[str]:
    fused = {f.operand for f in node.fused}
    return [name for i, name in enumerate(node.inputs) if i not in fused]


def _constants(node: Node, arrays: list[Array], shape: tuple[int, ...], layout: Layout) -> tuple[PostOp, ...] | None:
    ops: list[PostOp] = []
    for array in arrays:
        value = channel_vector(array, shape, layout, -1)
        if value is None:
            return None
        ops += constant_op(node.op, value)
    return tuple(ops)


def _sum(ctx: Lowering, node: Node, places: list[Place], ops: tuple[PostOp, ...]) -> str | None:
    """A sum of tensors, each with its own scale."""
    layout = _layout(ctx, node)
    more = fused_ops(ctx, node, layout)
    if isinstance(more, str):
        return more
    if more[1] or len(places) > 1 + MAX_TENSORS:
        return "too many tensors for one kernel"
    assigned = ctx.assignment.values[node.output]
    scales = [1.0 if p.quant is None else p.quant.scale for p in places]
    zeros = [0 if p.quant is None else p.quant.zero_point for p in places]

    def make() -> SumTensors:
        return SumTensors(
            len(places), numpy_dtype(assigned.dtype), scales=scales, zero_points=zeros, **output_arguments(assigned),
            post_ops=(*ops, *more[0]), isa=ctx.tiers.element,
        )  # fmt: skip

    op = ctx.operator(node, (tuple((p.dtype, p.quant) for p in places), assigned), make)
    out = ctx.result(node)
    seen = [flat(p, layout) for p in (*places, out)]
    steps = op.native([p.shape for p in seen[:-1]], [cast("DType", p.dtype) for p in places])
    ctx.native(node, steps, seen[:-1], seen[-1])
    return None


@lowers("Softmax")
def softmax(ctx: Lowering, node: Node) -> str | None:
    """Softmax over the dimension that is last in memory."""
    layout = _layout(ctx, node)
    rank = len(ctx.shape(node.output))
    axis = int_attr(node, "axis", -1) % max(rank, 1)
    if node.fused or axis != (1 if layout == "nhwc" else rank - 1):
        return f"softmax over dimension {axis}"
    x = ctx.take(node.inputs[0], Storage("f32", None, layout))
    out = ctx.result(node, storage=Storage("f32", None, layout))
    op = ctx.operator(node, (), lambda: Softmax(ctx.tiers.element))
    source, target = flat(x, layout), flat(out, layout)
    ctx.native(node, op.native([source.shape], ["f32"]), [source], target)
    return None
