"""Products of two activations; transposed operands are read where they lie."""

from __future__ import annotations

from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Node
from vnnigen.graph.lower.context import Lowering
from vnnigen.graph.lower.post_ops import fused_ops, fused_tensor, output_arguments
from vnnigen.graph.storage import Place, Storage
from vnnigen.kernels.matmul import a_in_place, b_in_place
from vnnigen.ops.matmul import MatMulBf16, MatMulF32, MatMulInt8, _MatMul


def matmul(ctx: Lowering, node: Node) -> str | None:
    """The rule: operands [..., m, k] and [..., k, n], as views."""
    if min(len(ctx.shape(n)) for n in node.inputs[:2]) < 2:
        return "no kernel for vectors"
    parts = fused_ops(ctx, node, "plain")
    if isinstance(parts, str):
        return parts
    a, b = (_operand(ctx, node, i) for i in (0, 1))
    if {a.dtype, b.dtype} <= {"u8", "s8"} or a.dtype == b.dtype:
        pass
    else:
        a, b = (ctx.take(n, Storage("f32")) for n in node.inputs[:2])
    if not a_in_place(a.array()):
        a = ctx.copy(node.inputs[0], a, Storage(a.dtype, a.quant))
    if not b_in_place(b.array()):
        b = ctx.copy(node.inputs[1], b, Storage(b.dtype, b.quant))
    tensors = [fused_tensor(ctx, name, "plain") for name in parts[1]]
    assigned = ctx.assignment.values[node.outputs[0]]
    storage = Storage("f32")
    if a.dtype in ("u8", "s8") or (a.dtype == "bf16" and assigned.dtype == "bf16"):
        storage = Storage(assigned.dtype, assigned.quant)
    key = (a.dtype, a.quant, b.dtype, b.quant, storage, tuple((t.dtype, t.quant) for t in tensors))

    def make() -> _MatMul:
        if a.dtype == "f32":
            return MatMulF32(post_ops=parts[0], isa=ctx.tiers.of("f32"))
        out = numpy_dtype(storage.dtype)
        if a.dtype == "bf16":
            return MatMulBf16(post_ops=parts[0], out_dtype=out, isa=ctx.tiers.of("bf16"))
        assert a.quant is not None
        assert b.quant is not None
        return MatMulInt8(
            a_scale=a.quant.scale, a_zero_point=a.quant.zero_point, b_scale=b.quant.scale,
            b_zero_point=b.quant.zero_point, post_ops=parts[0], out_dtype=out, isa=ctx.tiers.of("int8"),
            **output_arguments(storage),
        )  # fmt: skip

    op = ctx.operator(node, key, make)
    out = ctx.result(node, storage=storage)
    ctx.native(node, op.native_views(a.array(), b.array()), [a, b, *tensors], out)
    return None


def _operand(ctx: Lowering, node: Node, i: int) -> Place:
    """An operand in the numbers that are multiplied, in whatever order it lies."""
    name, want = node.inputs[i], ctx.assignment.wants[node.name, i]
    place = ctx.value(name)
    if want is not None and (place.dtype, place.quant) != (want.dtype, want.quant):
        if place.dtype in ("u8", "s8") and want.dtype in ("u8", "s8"):
            return place
        return ctx.take(name, want)
    return place
