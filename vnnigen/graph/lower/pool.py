"""Pooling."""

from __future__ import annotations

from typing import Any, cast

from vnnigen.graph.attributes import int_attr, ints_attr
from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Node
from vnnigen.graph.lower.context import Lowering, lowers
from vnnigen.graph.lower.post_ops import output_arguments
from vnnigen.graph.storage import Place, Storage
from vnnigen.graph.windows import windows
from vnnigen.kernels.types import DType
from vnnigen.ops.pool import AvgPool2d, MaxPool2d, _Pool

_SOURCES = ("u8", "s8", "f32", "bf16")


def _window(ctx: Lowering, node: Node) -> dict[str, Any] | str:
    """The window as arguments of pooling operators; paddings end where the last window does."""
    kernel = ints_attr(node, "kernel_shape", ())
    spatial = ctx.shape(node.inputs[0])[2:]
    w = windows(node, kernel, spatial)
    end = list(w.end)
    if int_attr(node, "ceil_mode", 0):
        counts = ctx.shape(node.outputs[0])[2:]
        reach = [(n - 1) * s + e for n, s, e in zip(counts, w.strides, w.extent, strict=True)]
        end = [max(r - size - b, 0) for r, size, b in zip(reach, spatial, w.begin, strict=True)]
        if int_attr(node, "count_include_pad", 0) and end != list(w.end):
            return "windows beyond the padding that count it"
    padding = tuple(zip(w.begin, end, strict=True))
    return {"kernel": w.kernel, "stride": w.strides, "dilation": w.dilations, "padding": padding}


def _source_why_not(ctx: Lowering, node: Node) -> str | None:
    if len(ctx.shape(node.inputs[0])) != 4:
        return "no kernel but for images of two dimensions"
    if node.fused:
        return "pooling kernels have no post-ops"
    return None


@lowers("MaxPool")
def max_pool(ctx: Lowering, node: Node) -> str | None:
    """Max pooling keeps scale and zero point."""
    why = _source_why_not(ctx, node)
    window = _window(ctx, node) if why is None else why
    if isinstance(window, str) or len([n for n in node.outputs if n]) > 1:
        return window if isinstance(window, str) else "indices are asked for"
    if ctx.value(node.inputs[0]).dtype not in _SOURCES:
        return "no kernel for this type"
    x = ctx.wanted(node, 0)
    op = ctx.operator(node, (), lambda: MaxPool2d(**window, isa=ctx.tiers.element))
    _emit(ctx, node, op, x, Storage(x.dtype, x.quant, "nhwc"))
    return None


def _emit(ctx: Lowering, node: Node, op: _Pool, x: Place, storage: Storage) -> None:
    """Emit a pool, into a slice of a concatenation where there is one."""
    out = ctx.result(node, pitched=True, storage=storage)
    if out.channels_last().pitch is None:
        out = ctx.result(node, storage=storage)
    image, target = x.channels_last(), out.channels_last()
    assert target.pitch is not None
    steps = op.native_pitched(image.shape, cast("DType", x.dtype), target.pitch)
    ctx.native(node, steps, [image], target)


@lowers("AveragePool", "GlobalAveragePool")
def average_pool(ctx: Lowering, node: Node) -> str | None:
    """Average pooling, requantized as the result is stored."""
    why = _source_why_not(ctx, node)
    if why is not None:
        return why
    window: dict[str, Any] | str = {"kernel": None} if node.op == "GlobalAveragePool" else _window(ctx, node)
    if isinstance(window, str):
        return window
    arguments = {**window, "include_padding": bool(int_attr(node, "count_include_pad", 0))}
    x = ctx.wanted(node, 0)
    assigned = ctx.assignment.values[node.output]

    def make() -> _Pool:
        q: dict[str, Any] = {} if x.quant is None else {"x_scale": x.quant.scale, "x_zero_point": x.quant.zero_point}
        return AvgPool2d(
            **arguments, **q, **output_arguments(assigned), out_dtype=numpy_dtype(assigned.dtype),
            isa=ctx.tiers.element,
        )  # fmt: skip

    op = ctx.operator(node, (x.dtype, x.quant, assigned), make)
    _emit(ctx, node, op, x, assigned)
    return None
