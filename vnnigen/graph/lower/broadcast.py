"""Arithmetic of two tensors with broadcasting."""

from __future__ import annotations

from typing import Any, cast

from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Node
from vnnigen.graph.lower.context import Lowering, lowers
from vnnigen.graph.lower.post_ops import fused_ops, output_arguments
from vnnigen.graph.storage import Layout, Place, Storage
from vnnigen.kernels.element.binary import BinaryFn
from vnnigen.kernels.post_ops import Binary
from vnnigen.kernels.types import DType
from vnnigen.ops.broadcast import BinaryOp

#: Types that the kernels read and write.
TYPES = ("f32", "bf16", "u8", "s8")
FUNCTIONS: dict[str, BinaryFn] = {
    "Add": "add", "Sum": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Min": "min", "Max": "max", "PRelu": "prelu",
}  # fmt: skip


@lowers("Div", "PRelu")
def broadcast(ctx: Lowering, node: Node) -> str | None:
    """Two tensors, constant or not, of any shapes that broadcast."""
    fused = {f.operand for f in node.fused}
    names = [name for i, name in enumerate(node.inputs) if i not in fused]
    if len(names) != 2:
        return "only two tensors are broadcast at a time"
    if ctx.graph.types[node.output].dtype != "f32" or any(ctx.value(n).dtype not in TYPES for n in names):
        return "no kernel for this type"
    assigned = ctx.assignment.values[node.output]
    more = fused_ops(ctx, node, assigned.layout)
    if isinstance(more, str):
        return more
    if more[1] or any(isinstance(op, Binary) for op in more[0]):
        return "what is fused behind it reads tensors"
    rank = len(ctx.shape(node.output))
    a, b = (_operand(ctx, name, rank, assigned.layout) for name in names)

    def make() -> BinaryOp:
        q: dict[str, Any] = {}
        for name, place in (("a", a), ("b", b)):
            if place.quant is not None:
                q |= {f"{name}_scale": place.quant.scale, f"{name}_zero_point": place.quant.zero_point}
        return BinaryOp(
            FUNCTIONS[node.op], numpy_dtype(assigned.dtype), **q, **output_arguments(assigned), post_ops=more[0],
            isa=ctx.tiers.element,
        )  # fmt: skip

    op = ctx.operator(node, ("broadcast", a.dtype, a.quant, b.dtype, b.quant, assigned), make)
    out = ctx.result(node)
    seen = [in_memory(p, assigned.layout) for p in (a, b, out)]
    steps = op.native([p.shape for p in seen[:2]], [cast("DType", p.dtype) for p in seen[:2]])
    ctx.native(node, steps, seen[:2], seen[2])
    return None


def _operand(ctx: Lowering, name: str, rank: int, layout: Layout) -> Place:
    """A value without gaps, in the result's order and with its rank."""
    place = ctx.value(name)
    if len(place.shape) in (0, 1) or len(place.shape) == rank or layout == "plain":
        place = ctx.take(name, Storage(place.dtype, place.quant, layout if len(place.shape) == rank else "plain"))
    else:
        place = ctx.take(name, Storage(place.dtype, place.quant, "plain"))
    whole = place.reshape((1,) * (rank - len(place.shape)) + place.shape)
    assert whole is not None
    return whole if whole.lies(layout) else ctx.copy(name, whole, Storage(place.dtype, place.quant, layout))


def in_memory(place: Place, layout: Layout) -> Place:
    """A place with its dimensions in the order in which they lie."""
    return place.channels_last() if layout == "nhwc" and len(place.shape) > 2 else place
