"""QuantizeLinear and DequantizeLinear that stay nodes: those at bytes that the caller gives or gets, above all."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np

from vnnigen.graph.attributes import int_attr
from vnnigen.graph.ir import Node, ValueQuant
from vnnigen.graph.lower.context import Lowering, converter, lowers
from vnnigen.graph.lower.element import flat
from vnnigen.graph.storage import Storage
from vnnigen.kernels.types import DType


def _quant(ctx: Lowering, node: Node, kind: str) -> ValueQuant | str:
    """What the node's bytes mean, or why that takes more than one scale and zero point."""
    scale = ctx.constant(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else ""
    zero_point = ctx.constant(given) if given else np.zeros(())
    if scale is None or zero_point is None:
        return "its scale is computed"
    if kind not in ("u8", "s8") or scale.size != 1 or zero_point.size != 1 or int_attr(node, "block_size", 0):
        return "a scale per channel or block, or no bytes"
    number = float(scale.reshape(()))
    if not (np.isfinite(number) and number > 0):
        return f"its scale is {number}"
    return ValueQuant("u8" if kind == "u8" else "s8", number, int(zero_point.reshape(())))


@lowers("QuantizeLinear")
def quantize(ctx: Lowering, node: Node) -> str | None:
    """Round real numbers to bytes."""
    quant = _quant(ctx, node, ctx.graph.types[node.output].dtype)
    if isinstance(quant, str):
        return quant
    if ctx.graph.types[node.inputs[0]].dtype != "f32" or node.fused:
        return "not of real numbers"
    layout = ctx.assignment.values[node.output].layout
    x = ctx.take(node.inputs[0], Storage("f32", None, layout))
    op = ctx.operator(node, (), lambda: converter("f32", None, Storage(quant.dtype, quant), None, ctx.tiers.element))
    out = ctx.result(node, storage=Storage(quant.dtype, None, layout))
    source, target = flat(x, layout), flat(out, layout)
    ctx.native(node, op.native([source.shape], [cast("DType", x.dtype)]), [source], target)
    return None


@lowers("DequantizeLinear")
def dequantize(ctx: Lowering, node: Node) -> str | None:
    """The same bytes, and what they mean: who needs real numbers converts them."""
    quant = _quant(ctx, node, ctx.graph.types[node.inputs[0]].dtype)
    if isinstance(quant, str):
        return quant
    if node.fused:
        return "nothing is fused to what is read as bytes"
    ctx.set(node.output, replace(ctx.value(node.inputs[0]), quant=quant))
    return None
