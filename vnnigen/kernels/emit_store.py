"""The register tile that an epilogue works on, and how its accumulators leave the registers.

Stores know every output type; tails never touch a byte beyond the last live column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Assembler, Mem
from vnnigen.kernels.emit_common import lane_mask, set_mask, store_bytes
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.mac import TierCode

Reg = Any


@dataclass
class Tile:
    """What the epilogue works on: accumulators [pixel][vector] and where their outputs go.

    `offsets[i]` is pixel i's distance from `off`, in elements; `valid` the live lanes of the last vector.
    `interleaved` columns (see `depthwise`) are in the order that narrowing to bytes puts right by itself, and narrowing
    to bf16 by one permutation; then `valid` may be negative: all vectors together hold (nr-1)*lanes + valid columns.
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


def splat(a: Assembler, tier: TierCode, value: np.int32 | np.float32) -> Mem:
    """A memory operand with `value` in all lanes: four bytes broadcast, or, without EVEX, a whole vector."""
    if tier.masks:
        return a.const(value, align=4).broadcast()
    return a.const(np.full(tier.lanes, value))


def store_dwords(t: Tile) -> None:
    """Store s32 accumulators or f32 values as they are."""
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


def store_words(t: Tile) -> None:
    """Round f32 to bf16 and store, two neighbouring vectors at once where one instruction takes them.

    Interleaved columns are two vectors, of the even and of the odd ones, on a tier with that instruction.
    """
    a, lanes = t.a, t.tier.lanes
    masks: dict[int, Reg] = {}
    with a.scope():
        order = None
        if t.interleaved:
            order = t.temp("order")
            a.vmovups(order, a.const(np.arange(2 * lanes, dtype=np.int16).reshape(2, lanes).T))
        for i, row in enumerate(t.acc):
            j = 0
            while j < t.nr:
                mem, count, v, took = t.element(2, i, j), t.lanes(j), row[j], 1
                if t.tier.bf16 and j + 1 < t.nr:
                    count, took = lanes + t.lanes(j + 1), 2
                    a.vcvtne2ps2bf16(v, row[j + 1], v)
                    if order is not None:
                        a.vpermw(v, order, v)
                elif t.tier.bf16:
                    v = v.ymm
                    a.vcvtneps2bf16(v, row[j])
                else:
                    v = round_words(a, t.tier, v)
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


def round_words(a: Assembler, tier: TierCode, v: Reg) -> Reg:
    """Round f32 to bf16 as VCVTNEPS2BF16 does, with integer arithmetic (the twin of `bf16.round_to_bf16`).

    Returns the lower half of v's register, which holds the result.
    """

    def word(value: int) -> Mem:
        return splat(a, tier, np.int32(value))

    def temp(name: str) -> Reg:
        return a.vec(tier.bits, name)

    with a.scope():
        top, r = temp("top"), temp("rounded")
        a.vpsrld(top, v, 16)
        if tier.masks:
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
        other, choose = temp("other"), temp("choose")
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


def store_packed(t: Tile) -> None:
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
