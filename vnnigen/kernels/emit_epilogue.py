"""The epilogue's code: accumulators to outputs, in registers.

`STEP_EMIT` holds one emitter per step kind, each the twin of the function of the same kind in
`steps.STEP_REFERENCE`; a new kind of step adds one entry to both tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Assembler, Mem
from vnnigen.kernels import emit_approx
from vnnigen.kernels.approx import PROGRAMS, Bits, Scalar
from vnnigen.kernels.emit_common import lane_mask, load_bytes, set_mask
from vnnigen.kernels.emit_store import Tile, splat, store_dwords, store_packed, store_words
from vnnigen.kernels.epilogue import FLOATS, EpilogueSpec, StepSpec
from vnnigen.kernels.layout import ARG_DST, ARG_TENSORS
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.steps import CHANNEL_KINDS, S32_TOP, TENSOR_KINDS

Reg = Any
OUT_BYTES = {"u8": 1, "s8": 1, "bf16": 2, "s32": 4, "f32": 4}
#: Instructions that widen a tensor's elements to 32 bits (a bf16 is then shifted into the upper half).
WIDEN = {"u8": "vpmovzxbd", "s8": "vpmovsxbd", "bf16": "vpmovzxwd"}
#: Vector registers that steps use besides the accumulators, where nothing below says more.
EPILOGUE_TEMPS = 3


#: The same for rounding to bf16 without VCVTNEPS2BF16 and without masks.
ROUND_TEMPS = 4


def epilogue_registers(spec: EpilogueSpec, tier: TierCode) -> int:
    """Vector registers that an epilogue needs besides its accumulators: what blocking must leave free."""
    rounding = ROUND_TEMPS if spec.out == "bf16" and not tier.bf16 and not tier.masks else 0
    programs = [emit_approx.lowered(s.kind, tier.masks).registers for s in spec.steps if s.kind in PROGRAMS]
    return max(EPILOGUE_TEMPS, rounding, *programs)


StepEmit = Callable[[Tile, StepSpec, int, int], None]


def _load_lanes(t: Tile, dst: Reg, mem: Mem, kind: str, lanes: int, k: Reg | None) -> None:
    """Load `lanes` elements of a tensor as 32-bit lanes: integers as s32, bf16 as f32, the rest zero."""
    a = t.a
    widen = WIDEN.get(kind)
    full = lanes == t.tier.lanes
    if widen and t.tier.masks:
        getattr(a, widen)(dst, mem, **({} if full else {"mask": k, "zero": True}))
    elif widen:
        if full:
            getattr(a, widen)(dst, mem)
        else:
            load_bytes(a, dst.xmm, mem, lanes * OUT_BYTES[kind])
            getattr(a, widen)(dst, dst.xmm)
    elif full:
        a.vmovups(dst, mem)
    elif t.tier.masks:
        a.vmovups(dst, mem, mask=k, zero=True)
    else:
        a.vmovups(dst, lane_mask(a, lanes))
        a.vmaskmovps(dst, dst, mem)
    if kind == "bf16":
        a.vpslld(dst, dst, 16)


def _addend(a: Assembler, v: Reg, x: Reg, scale: Reg) -> None:
    a.vfmadd231ps(v, x, scale)


def _then(mnemonic: str) -> Callable[[Assembler, Reg, Reg, Reg], None]:
    """X *= scale, then v = op(v, x)."""

    def combine(a: Assembler, v: Reg, x: Reg, scale: Reg) -> None:
        a.vmulps(x, x, scale)
        getattr(a, mnemonic)(v, v, x)

    return combine


TENSOR_EMIT: dict[str, Callable[[Assembler, Reg, Reg, Reg], None]] = {
    "sum": _addend,
    "tensor_mul": _then("vmulps"),
    "tensor_max": _then("vmaxps"),
    "tensor_min": _then("vminps"),
}


def _emit_tensor(t: Tile, step: StepSpec, at: int, tensor: int) -> None:
    """Combine v with f32(x - zp) and a scale; the subtraction of small integers is exact in f32."""
    a = t.a
    kind = step.tensor or "f32"
    with a.scope():
        scale = t.scalar("tensor_scale", at)
        zp = t.scalar("tensor_zp", at + 1) if step.has_zero_point else None
        x = t.temp("addend")
        k = None
        a.mov(t.ptr, Mem(t.args, 8 * (ARG_TENSORS + tensor)))
        if t.tier.masks and t.valid != t.tier.lanes:
            k = a.kreg("lanes")
            tmp = a.gpr("mask_bits")
            set_mask(a, k, t.valid, tmp)
        for i, j in t.cells():
            _load_lanes(t, x, t.element(OUT_BYTES[kind], i, j), kind, t.lanes(j), k)
            if kind not in FLOATS:
                a.vcvtdq2ps(x, x)
            if zp is not None:
                a.vsubps(x, x, zp)
            TENSOR_EMIT[step.kind](a, t.acc[i][j], x, scale)


def _emit_channel(mnemonic: str) -> StepEmit:
    """V = op(v, x[c]), x a vector of the constant block."""

    def emit(t: Tile, _step: StepSpec, _at: int, vector: int) -> None:
        for j in range(t.nr):
            for row in t.acc:
                getattr(t.a, mnemonic)(row[j], row[j], t.column(t.lay.vector(vector), j))

    return emit


def _emit_program(t: Tile, step: StepSpec, at: int, _tensor: int) -> None:
    """A function of `approx`."""
    code = emit_approx.lowered(step.kind, t.tier.masks)

    def memory(place: Bits | Scalar, four_bytes: bool) -> Mem:
        if isinstance(place, Scalar):
            mem = Mem(t.consts, t.lay.scalars + 4 * (at + place.index))
            return mem if four_bytes else mem.broadcast()
        if four_bytes:
            return t.a.const(np.uint32(place.bits), align=4)
        return splat(t.a, t.tier, place.value)

    with t.a.scope():
        temps = [t.temp(f"{step.kind}{i}") for i in range(code.registers)]
        for i, j in t.cells():
            emit_approx.emit(t.a, code, t.acc[i][j], temps, memory)


def _emit_linear(t: Tile, _step: StepSpec, at: int, _tensor: int) -> None:
    """V = fma(v, alpha, beta)."""
    with t.a.scope():
        alpha, beta = t.scalar("alpha", at), t.scalar("beta", at + 1)
        for i, j in t.cells():
            t.a.vfmadd213ps(t.acc[i][j], alpha, beta)


def _emit_bound(mnemonic: str) -> Callable[[Tile, StepSpec, int, int], None]:
    """V = op(v, bound); VMAXPS and VMINPS return their second source when either is NaN, or on equal zeros."""

    def emit(t: Tile, _step: StepSpec, at: int, _tensor: int) -> None:
        with t.a.scope():
            bound = t.scalar("bound", at)
            for i, j in t.cells():
                getattr(t.a, mnemonic)(t.acc[i][j], t.acc[i][j], bound)

    return emit


def _emit_leaky(t: Tile, _step: StepSpec, at: int, _tensor: int) -> None:
    """V = v * alpha where the sign bit is set."""
    a = t.a
    with a.scope():
        alpha = t.scalar("alpha", at)
        if t.tier.masks:
            k = a.kreg("negative")
            zero = t.temp("zero")
            a.vpxord(zero, zero, zero)
            for i, j in t.cells():
                a.vpcmpgtd(k, zero, t.acc[i][j])
                a.vmulps(t.acc[i][j], t.acc[i][j], alpha, mask=k)
        else:
            scaled = t.temp("scaled")
            for i, j in t.cells():
                v = t.acc[i][j]
                a.vmulps(scaled, v, alpha)
                a.vblendvps(v, v, scaled, v)


def _emit_to_s32(t: Tile, _step: StepSpec, _at: int, _tensor: int) -> None:
    """VCVTPS2DQ makes INT_MIN of NaN and of all that does not fit; only the upper end needs a bound before it."""
    a = t.a
    with a.scope():
        top = t.temp("top")
        a.vbroadcastss(top, a.const(S32_TOP, align=4))
        for i, j in t.cells():
            a.vminps(t.acc[i][j], top, t.acc[i][j])
            a.vcvtps2dq(t.acc[i][j], t.acc[i][j])


#: Arguments: the tile, the step, its first scalar, and which tensor argument or vector of constants is its own.
STEP_EMIT: dict[str, StepEmit] = {
    **dict.fromkeys(TENSOR_EMIT, _emit_tensor),
    "channel_add": _emit_channel("vaddps"),
    "channel_mul": _emit_channel("vmulps"),
    "channel_max": _emit_channel("vmaxps"),
    "channel_min": _emit_channel("vminps"),
    **dict.fromkeys(PROGRAMS, _emit_program),
    "linear": _emit_linear,
    "max": _emit_bound("vmaxps"),
    "min": _emit_bound("vminps"),
    "leaky": _emit_leaky,
    "to_s32": _emit_to_s32,
}


def _scale(t: Tile) -> None:
    """V = f32(acc) * m + b in one rounding, or what of it the structure has."""
    a, spec = t.a, t.spec
    if spec.acc == "s32" and spec.out != "s32":
        for i, j in t.cells():
            a.vcvtdq2ps(t.acc[i][j], t.acc[i][j])
    if not (spec.has_m or spec.has_b):
        return
    for j in range(t.nr):
        with a.scope():
            m = t.temp("m") if spec.has_m else None
            b = t.temp("b") if spec.has_b else None
            for r, array in ((m, t.lay.m), (b, t.lay.b)):
                if r is not None:
                    a.vmovups(r, t.column(array, j))
            for row in t.acc:
                v = row[j]
                if m is not None and b is not None:
                    a.vfmadd213ps(v, m, b)
                elif m is not None:
                    a.vmulps(v, v, m)
                else:
                    a.vaddps(v, v, b)


def emit_epilogue(t: Tile) -> None:
    """Scale, apply the post-ops, convert and store a tile. Uses at most `epilogue_registers` vectors at a time."""
    a, spec = t.a, t.spec
    _scale(t)
    tensor = vector = 0
    for step, at in spec.slots():
        STEP_EMIT[step.kind](t, step, at, vector if step.kind in CHANNEL_KINDS else tensor)
        tensor += step.kind in TENSOR_KINDS
        vector += step.kind in CHANNEL_KINDS
    if spec.post_scale:
        with a.scope():
            scale = t.scalar("post_scale", spec.post_scale_slot)
            for i, j in t.cells():
                a.vmulps(t.acc[i][j], t.acc[i][j], scale)
    if spec.clamp_hi:
        # VCVTPS2DQ turns what does not fit into INT_MIN, so only the upper bound needs a clamp before it; the
        # second source is v, so that NaN stays NaN and becomes INT_MIN as well.
        with a.scope():
            bound = t.scalar("bound", spec.clamp_slot)
            for i, j in t.cells():
                a.vminps(t.acc[i][j], bound, t.acc[i][j])
    a.mov(t.ptr, Mem(t.args, 8 * ARG_DST))
    if spec.out in ("u8", "s8"):
        for i, j in t.cells():
            a.vcvtps2dq(t.acc[i][j], t.acc[i][j])
        store_packed(t)
    elif spec.out == "bf16":
        store_words(t)
    else:
        store_dwords(t)
