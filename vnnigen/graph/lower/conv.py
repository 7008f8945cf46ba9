"""Convolutions, and linear layers: products with constant weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from vnnigen.graph.attributes import float_attr, int_attr
from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Array, Node, QWeight
from vnnigen.graph.lower.context import Lowering, lowers
from vnnigen.graph.lower.post_ops import fused_ops, fused_tensor, output_arguments
from vnnigen.graph.storage import Layout, Place, Storage
from vnnigen.graph.windows import windows
from vnnigen.kernels.post_ops import PostOp
from vnnigen.kernels.types import DType
from vnnigen.ops.bf16 import Conv2dBf16, GemmBf16
from vnnigen.ops.conv import Conv2dF32, Conv2dInt8
from vnnigen.ops.gemm import GemmF32, GemmInt8
from vnnigen.ops.operator import Operator


@lowers("Conv")
def conv(ctx: Lowering, node: Node) -> str | None:
    """A convolution of images, or of sequences as images of one row."""
    spatial = ctx.shape(node.inputs[0])[2:]
    if len(spatial) not in (1, 2):
        return f"no kernel for convolutions of {len(spatial)} spatial dimensions"
    if ctx.constant(node.inputs[1]) is None or (_bias(ctx, node) is None and _has_bias(node)):
        return "its weights are not constant"
    parts = fused_ops(ctx, node, "nhwc")
    if isinstance(parts, str):
        return parts
    x = ctx.wanted(node, 0)
    w = windows(node, ctx.shape(node.inputs[1])[2:], spatial)
    row = len(spatial) == 1
    window = {
        "stride": (1, *w.strides) if row else w.strides, "dilation": (1, *w.dilations) if row else w.dilations,
        "padding": tuple(zip((0, *w.begin) if row else w.begin, (0, *w.end) if row else w.end, strict=True)),
        "groups": int_attr(node, "group", 1),
    }  # fmt: skip

    def images(values: Array) -> Array:
        return values[:, :, None] if row else values

    def make(storage: Storage) -> Operator:
        common: dict[str, Any] = {"bias": _bias(ctx, node), "post_ops": parts[0], **window}
        if x.dtype == "f32":
            weights = images(_real(ctx, node))
            return Conv2dF32(weights, **common, isa=ctx.tiers.of("f32"))
        if x.dtype == "bf16":
            weights = images(_real(ctx, node))
            return Conv2dBf16(
                weights, **common, out_dtype=numpy_dtype(storage.dtype), isa=ctx.tiers.of("bf16")
            )  # fmt: skip
        assert x.quant is not None
        q = ctx.graph.constants[node.inputs[1]]
        assert isinstance(q, QWeight)
        return Conv2dInt8(
            images(read_only(q.values)), **common, x_scale=x.quant.scale, x_zero_point=x.quant.zero_point,
            w_scale=_per(q.scale), w_zero_point=_per(q.zero_point), out_dtype=numpy_dtype(storage.dtype),
            isa=ctx.tiers.of("int8"), **output_arguments(storage),
        )  # fmt: skip

    def image(p: Place) -> Place:
        return _image(p.channels_last())

    _weighted(ctx, node, image, x, parts, make, "nhwc")
    return None


def _image(p: Place) -> Place:
    """[n, l, c] as [n, 1, l, c]; images as they are."""
    if len(p.shape) == 4:
        return p
    n, length, c = p.shape
    s = p.strides
    return Place(p.buffer, (n, 1, length, c), (s[0], s[0], *s[1:]), p.dtype, p.quant, p.offset)


@lowers("Linear", "Gemm", "MatMul")
def linear(ctx: Lowering, node: Node) -> str | None:
    """A product with a constant matrix [k, n]; a product of two activations is left to `matmul`."""
    from vnnigen.graph.lower.matmul import matmul

    b = ctx.graph.constants.get(node.inputs[1])
    if b is None and node.op == "MatMul":
        return matmul(ctx, node)
    a_shape, b_shape = ctx.shape(node.inputs[0]), ctx.shape(node.inputs[1])
    if b is None or len(b_shape) != 2 or len(a_shape) < 2 or (_has_bias(node) and _bias(ctx, node) is None):
        return "its weights or bias are not constant" if b is None else f"no kernel for shapes {a_shape} x {b_shape}"
    if node.op == "Gemm" and (int_attr(node, "transA", 0) or _scaled(node)):
        return "a transposed or scaled product"
    transposed = node.op == "Gemm" and int_attr(node, "transB", 0) == 1
    bias = _bias(ctx, node)
    n = b_shape[0 if transposed else 1]
    if bias is not None and bias.size not in (1, n):
        return f"its bias has shape {bias.shape}"
    flat_bias = None if bias is None else np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), (n,)))
    parts = fused_ops(ctx, node, "plain")
    if isinstance(parts, str):
        return parts
    x = ctx.wanted(node, 0)

    def matrix(values: Array) -> Array:
        return values.T if transposed else values

    def make(storage: Storage) -> Operator:
        common: dict[str, Any] = {"bias": flat_bias, "post_ops": parts[0]}
        if x.dtype == "f32":
            return GemmF32(matrix(_real(ctx, node)), **common, isa=ctx.tiers.of("f32"))
        if x.dtype == "bf16":
            return GemmBf16(
                matrix(_real(ctx, node)), **common, out_dtype=numpy_dtype(storage.dtype), isa=ctx.tiers.of("bf16")
            )  # fmt: skip
        assert x.quant is not None
        assert isinstance(b, QWeight)
        return GemmInt8(
            matrix(read_only(b.values)), **common, a_scale=x.quant.scale, a_zero_point=x.quant.zero_point,
            b_scale=_per(b.scale), b_zero_point=_per(b.zero_point), out_dtype=numpy_dtype(storage.dtype),
            isa=ctx.tiers.of("int8"), **output_arguments(storage),
        )  # fmt: skip

    _weighted(ctx, node, rows, x, parts, make, "plain")
    return None


def rows(p: Place) -> Place:
    """[..., k] as [m, k]; rows may have gaps between them."""
    pitch = p.pitch
    assert pitch is not None
    m = int(np.prod(p.shape[:-1]))
    return Place(p.buffer, (m, p.shape[-1]), (pitch * p.itemsize, p.itemsize), p.dtype, p.quant, p.offset)


def _weighted(
    ctx: Lowering, node: Node, view: Any, x: Place, parts: tuple[tuple[PostOp, ...], Sequence[str]], make: Any,
    layout: Layout,
) -> None:  # fmt: skip
    """Emit an operator with weights; `view` shows a place as the operator sees it."""
    tensors = [fused_tensor(ctx, name, layout) for name in parts[1]]
    assigned = ctx.assignment.values[node.outputs[0]]
    storage = _emitted(x.dtype, assigned, layout)
    key = (x.dtype, x.quant, storage, tuple((t.dtype, t.quant) for t in tensors))
    op: Operator = ctx.operator(node, key, lambda: make(storage))
    out = ctx.result(node, pitched=not tensors and op.takes_pitch, storage=storage)
    if _channels_last(out, layout).pitch is None:
        out = ctx.result(node, storage=storage)
    source, target = view(x), view(out)
    steps = op.native(source.shape, cast("DType", x.dtype), pitch=target.pitch or 0)
    ctx.native(node, steps, [source, *map(view, tensors)], target)


def _channels_last(p: Place, layout: Layout) -> Place:
    return p.channels_last() if layout == "nhwc" else p


def _emitted(src: str, wanted: Storage, layout: Layout) -> Storage:
    """How kernels that read `src` store their result, if not as is wanted."""
    if src in ("u8", "s8") or (src == "bf16" and wanted.dtype == "bf16"):
        return Storage(wanted.dtype, wanted.quant, layout)
    return Storage("f32", None, layout)


def _scaled(node: Node) -> bool:
    return float_attr(node, "alpha", 1.0) != 1.0 or float_attr(node, "beta", 1.0) != 1.0


def _has_bias(node: Node) -> bool:
    """Whether a node has a third input of its own (not one of a fused step)."""
    return len(node.inputs) > 2 and bool(node.inputs[2]) and all(f.operand != 2 for f in node.fused)


def _bias(ctx: Lowering, node: Node) -> Array | None:
    return ctx.constant(node.inputs[2]) if _has_bias(node) else None


def _real(ctx: Lowering, node: Node) -> Array:
    """Weights as f32."""
    values = ctx.constant(node.inputs[1])
    assert values is not None
    return read_only(values.astype(np.float32, copy=False))


def read_only(values: Array) -> Array:
    """A view that operators keep without a copy: nobody changes arrays of a graph."""
    view: Array = values.view()
    view.flags.writeable = False
    return view


def _per(values: Array) -> Any:
    """A scale or zero point per channel, or for the tensor."""
    return values.reshape(()) if values.size == 1 else values
