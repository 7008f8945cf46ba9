"""The epilogue's code: accumulators to outputs, in registers.

`STEP_EMIT` holds one emitter per step kind, each the twin of the function of the same kind in
`epilogue.STEP_REFERENCE`; a new post-op adds one entry to both tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Assembler, Mem
from vnnigen.kernels import emit_approx
from vnnigen.kernels.approx import PROGRAMS, Bits, Scalar
from vnnigen.kernels.emit_common import lane_mask, load_bytes, set_mask, store_bytes
from vnnigen.kernels.epilogue import FLOATS, EpilogueSpec, StepSpec
from vnnigen.kernels.layout import ARG_DST, ARG_TENSORS, ConstLayout
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.post_ops import CHANNEL_KINDS, TENSOR_KINDS

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


@dataclass
class Tile:
    """What the epilogue works on: accumulators [pixel][vector] and where their outputs go.

    `offsets[i]` is pixel i's distance from `off`, in elements; `valid` the live lanes of the last vector.
    `interleaved` columns (see `depthwise`) are in the order that narrowing to bytes puts right by itself; then
    `valid` may be negative: all vectors together hold (nr-1)*lanes + valid columns.
    """

    a: Assembler
    tier: TierCode
    spec: EpilogueSpec
    lay: ConstLayout
    acc: list[list[Reg]]
    offsets: list[int]
    valid: int
    args: Reg
    consts: Reg
    col: Reg
    off: Reg
    ptr: Reg
    interleaved: bool = False

    @property
    def nr(self) -> int:
        """Vectors of output columns."""
        return len(self.acc[0])

    def lanes(self, j: int) -> int:
        """Live lanes of vector j."""
        return self.valid if j == self.nr - 1 else self.tier.lanes

    def temp(self, name: str) -> Reg:
        """A vector register of the tier's width."""
        return self.a.vec(self.tier.bits, name)

    def column(self, array: int, j: int) -> Mem:
        """Vector j of a per-column array of the constant block."""
        return Mem(self.consts, array + j * self.tier.vector_bytes, index=self.col, scale=4)

    def scalar(self, name: str, index: int) -> Reg:
        """A register with post-op scalar `index` in all lanes."""
        r = self.temp(name)
        self.a.vbroadcastss(r, Mem(self.consts, self.lay.scalars + 4 * index))
        return r

    def element(self, size: int, i: int, j: int) -> Mem:
        """Element address of pixel i, vector j in the tensor whose base is in `ptr`."""
        return Mem(self.ptr, (self.offsets[i] + j * self.tier.lanes) * size, index=self.off, scale=size)

    def cells(self) -> list[tuple[int, int]]:
        """All (pixel, vector) pairs."""
        return [(i, j) for i in range(len(self.acc)) for j in range(self.nr)]


StepEmit = Callable[[Tile, StepSpec, int, int], None]


def splat(a: Assembler, tier: TierCode, value: np.int32 | np.float32) -> Mem:
    """A memory operand with `value` in all lanes: four bytes broadcast, or, without EVEX, a whole vector."""
    if tier.masks:
        return a.const(value, align=4).broadcast()
    return a.const(np.full(tier.lanes, value))


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
        _store_bytes(t)
    elif spec.out == "bf16":
        _store_words(t)
    else:
        _store_dwords(t)


def _store_dwords(t: Tile) -> None:
    a = t.a
    with a.scope():
        mask = None
        if t.valid != t.tier.lanes:
            if t.tier.masks:
                mask = a.kreg("lanes")
                set_mask(a, mask, t.valid, a.gpr("mask_bits"))
            else:
                mask = t.temp("lane_mask")
                a.vmovups(mask, lane_mask(a, t.valid))
        for i, j in t.cells():
            mem = t.element(4, i, j)
            if t.lanes(j) == t.tier.lanes:
                a.vmovups(mem, t.acc[i][j])
            elif t.tier.masks:
                a.vmovups(mem, t.acc[i][j], mask=mask)
            else:
                a.vmaskmovps(mem, mask, t.acc[i][j])


def _store_words(t: Tile) -> None:
    """Round f32 to bf16 and store, two neighbouring vectors at once where one instruction takes them."""
    a, lanes = t.a, t.tier.lanes
    masks: dict[int, Reg] = {}
    with a.scope():
        for i, row in enumerate(t.acc):
            j = 0
            while j < t.nr:
                mem, count, v, took = t.element(2, i, j), t.lanes(j), row[j], 1
                if t.tier.bf16 and j + 1 < t.nr:
                    count, took = lanes + t.lanes(j + 1), 2
                    a.vcvtne2ps2bf16(v, row[j + 1], v)
                elif t.tier.bf16:
                    v = v.ymm
                    a.vcvtneps2bf16(v, row[j])
                else:
                    v = _round_words(t, v)
                _store_counted(t, mem, v, count, masks)
                j += took


def _store_counted(t: Tile, mem: Mem, v: Reg, count: int, masks: dict[int, Reg]) -> None:
    """Store the lowest `count` words of v."""
    a = t.a
    if count * 16 == v.bits:
        a.vmovups(mem, v)
    elif t.tier.masks:
        if count not in masks:
            masks[count] = a.kreg(f"words{count}")
            set_mask(a, masks[count], count, a.gpr("mask_bits"))
        a.vmovdqu16(mem, v, mask=masks[count])
    else:
        store_bytes(a, mem, v, 2 * count)


def _round_words(t: Tile, v: Reg) -> Reg:
    """Round f32 to bf16 as VCVTNEPS2BF16 does, with integer arithmetic (the twin of `bf16.round_to_bf16`).

    Returns the lower half of v's register, which holds the result.
    """
    a = t.a

    def word(value: int) -> Mem:
        return splat(a, t.tier, np.int32(value))

    with a.scope():
        top, r = t.temp("top"), t.temp("rounded")
        a.vpsrld(top, v, 16)
        if t.tier.masks:
            nan, tiny = a.kreg("nan"), a.kreg("tiny")
            a.vcmpps(nan, v, v, 3)
            a.vptestnmd(tiny, v, word(0x7F800000))
            a.vpandd(r, top, word(1))
            a.vpaddd(r, r, word(0x7FFF))
            a.vpaddd(v, v, r)
            a.vpsrld(v, v, 16)
            a.vpord(v, top, word(0x40), mask=nan)
            a.vpandd(v, top, word(0x8000), mask=tiny)
            a.vpmovdw(v.ymm, v)
            return v.ymm
        other, choose = t.temp("other"), t.temp("choose")
        a.vpand(r, top, word(1))
        a.vpaddd(r, r, word(0x7FFF))
        a.vpaddd(r, r, v)
        a.vpsrld(r, r, 16)
        a.vpand(choose, top, word(0x7FFF))
        a.vpcmpgtd(choose, choose, word(0x7F))
        a.vpand(other, top, word(0x8000))
        a.vblendvps(r, other, r, choose)
        a.vcmpps(choose, v, v, 3)
        a.vpor(top, top, word(0x40))
        a.vblendvps(r, r, top, choose)
        a.vextracti128(v.xmm, r, 1)
        a.vpackusdw(v.xmm, r.xmm, v.xmm)
        return v.xmm


def _byte_groups(t: Tile) -> list[list[tuple[int, int]]]:
    """Vectors to pack together, four at a time: along a row first, what is left over across rows."""
    whole: list[list[tuple[int, int]]] = []
    loose: list[tuple[int, int]] = []
    left = t.nr % 4
    for i in range(len(t.acc)):
        whole += [[(i, j + q) for q in range(4)] for j in range(0, t.nr - left, 4)]
        rest = [(i, j) for j in range(t.nr - left, t.nr)]
        if left == 3:
            whole.append(rest)
        else:
            loose += rest
    return whole + [loose[s : s + 4] for s in range(0, len(loose), 4)]


def _store_bytes(t: Tile) -> None:
    """Narrow s32 to bytes with saturation, add the zero point between the two narrowings, store.

    After VPACKSSDW and VPACKUSWB each 128-bit lane holds four bytes of each of four vectors; one VPERMD (a
    transposition of dwords) makes every vector's bytes contiguous.
    """
    a = t.a
    lanes128 = t.tier.bits // 128
    order = np.array([lane * 4 + q for q in range(4) for lane in range(lanes128)], dtype=np.int32)
    pack = a.vpackuswb if t.spec.out == "u8" else a.vpacksswb
    with a.scope():
        index = None
        if not t.interleaved:
            index = t.temp("order")
            a.vmovups(index, a.const(order))
        masks: dict[int, Reg] = {}
        for group in _byte_groups(t):
            v = [t.acc[i][j] for i, j in group]
            words = []
            for lo in range(0, len(v), 2):
                hi = v[lo + 1] if lo + 1 < len(v) else v[lo]
                a.vpackssdw(v[lo], v[lo], hi)
                if t.spec.add_zp:
                    a.vpaddsw(v[lo], v[lo], Mem(t.consts, t.lay.zero_point))
                words.append(v[lo])
            pack(v[0], words[0], words[-1])
            if index is not None:
                a.vpermd(v[0], index, v[0])
            _store_group(t, group, v[0], masks)


def _runs(group: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Split a group into (start, length) runs of neighbours in one row."""
    runs = []
    start = 0
    for q in range(1, len(group) + 1):
        if q == len(group) or group[q] != (group[q - 1][0], group[q - 1][1] + 1):
            runs.append((start, q - start))
            start = q
    return runs


def _store_group(t: Tile, group: list[tuple[int, int]], v: Reg, masks: dict[int, Reg]) -> None:
    """Store a packed group: vector q's bytes are quarter q of the register."""
    for start, length in _runs(group):
        pieces = [(start, length)]
        if (start, length) not in ((0, 4), (0, 3), (0, 2), (2, 2), (0, 1)) or (length == 3 and not t.tier.masks):
            pieces = [(start + q, 1) for q in range(length)]
        for q, n in pieces:
            i, j = group[q]
            count = (n - 1) * t.tier.lanes + t.lanes(j + n - 1)
            _store_piece(t, t.element(1, i, j), v, q, count, masks)


def _store_piece(t: Tile, mem: Mem, v: Reg, quarter: int, count: int, masks: dict[int, Reg]) -> None:
    """Store `count` bytes that start at `quarter` of v; clobbers v's lower part when it must move bytes down."""
    a = t.a
    size = t.tier.lanes
    if not t.tier.masks:
        _store_piece_ymm(t, mem, v, quarter, count)
        return
    full = {64: v, 32: v.ymm, 16: v.xmm}
    if count in full and count % size == 0:
        if quarter == 0:
            a.vmovups(mem, full[count])
        elif count == 32:
            a.vextracti64x4(mem, v, 1)
        else:
            a.vextracti32x4(mem, v, quarter)
        return
    if count not in masks:
        masks[count] = a.kreg(f"bytes{count}")
        set_mask(a, masks[count], count, a.gpr("mask_bits"))
    if quarter == 0:
        a.vmovdqu8(mem, v, mask=masks[count])
        return
    with a.scope():
        low = t.temp("moved")
        if count > 16:
            a.vextracti64x4(low.ymm, v, 1)
        else:
            a.vextracti32x4(low.xmm, v, quarter)
        a.vmovdqu8(mem, low, mask=masks[count])


def _store_piece_ymm(t: Tile, mem: Mem, v: Reg, quarter: int, count: int) -> None:
    """AVX2: quarters are 8 bytes; full ones go out directly, partial ones byte by byte."""
    a = t.a
    if count == 32:
        a.vmovdqu(mem, v)
        return
    with a.scope():
        if quarter >= 2:
            low = t.temp("moved").xmm
            a.vextracti128(low, v, 1)
        else:
            low = v.xmm
        if count > 16:
            a.vmovdqu(mem, low)
            high = t.temp("high").xmm
            a.vextracti128(high, v, 1)
            store_bytes(a, mem + 16, high, count - 16)
        elif quarter % 2 == 0:
            store_bytes(a, mem, low, count)
        else:
            moved = t.temp("odd").xmm
            a.vpshufd(moved, low, 0b11101110)
            store_bytes(a, mem, moved, count)
