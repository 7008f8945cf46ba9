"""Transpositions in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Assembler
from vnnigen.kernels.mac import TierCode

Reg = Any
Merge = Callable[[Reg, Reg, Reg], None]


def _exchange(r: list[Reg], t: list[Reg], low: Merge, high: Merge, even: Merge, odd: Merge) -> None:
    """Transpose 4 x 4 in place: halves of neighbours first, then of what that gave; `t` are two temporaries."""
    a, b, c, d = r
    high(t[0], a, b)
    low(a, a, b)
    high(t[1], c, d)
    low(c, c, d)
    odd(b, a, c)
    even(a, a, c)
    even(c, t[0], t[1])
    odd(d, t[0], t[1])


def dwords_4x4(a: Assembler, r: list[Reg], t: list[Reg]) -> None:
    """Transpose the dwords within each 128-bit lane of four registers: dword q of r[i] becomes dword i of r[q]."""
    _exchange(r, t, a.vpunpckldq, a.vpunpckhdq, a.vpunpcklqdq, a.vpunpckhqdq)


def lanes_4x4(a: Assembler, tier: TierCode, r: list[Reg], t: list[Reg]) -> None:
    """Concatenate lane 0 of all four registers, then lane 1, ...: into four registers, in order.

    With four lanes that is a transposition: lane q of r[i] becomes lane i of r[q].
    """
    if tier.bits == 512:

        def shuffle(control: int) -> Merge:
            return lambda dst, x, y: a.vshufi32x4(dst, x, y, control)

        _exchange(r, t, shuffle(0x44), shuffle(0xEE), shuffle(0x88), shuffle(0xDD))
        return
    a.vperm2i128(t[0], r[0], r[1], 0x31)
    a.vperm2i128(r[0], r[0], r[1], 0x20)
    a.vperm2i128(t[1], r[2], r[3], 0x31)
    a.vperm2i128(r[1], r[2], r[3], 0x20)
    a.vmovaps(r[2], t[0])
    a.vmovaps(r[3], t[1])


def gather(
    a: Assembler, tier: TierCode, dst: Reg, sources: list[Reg], places: list[tuple[int, int]], size: int = 4
) -> None:  # fmt: skip
    """Lane k of `dst` = lane places[k][1] of sources[places[k][0]]; `dst` is no source.

    Lanes have `size` bytes: 4, or 1 where the CPU has VPERMT2B.
    """
    dtype, permute, lanes = (np.int32, a.vpermt2d, tier.lanes) if size == 4 else (np.uint8, a.vpermt2b, 64)

    def index(values: list[int]) -> Reg:
        v = a.vec(tier.bits, "index")
        a.vmovups(v, a.const(np.array(values, dtype=dtype)))
        return v

    with a.scope():
        if not tier.masks:
            order, part = index([lane for _, lane in places]), a.vec(tier.bits, "part")
            a.vpermd(dst, order, sources[0])
            for i, source in enumerate(sources[1:], 1):
                a.vpermd(part, order, source)
                a.vpblendd(dst, dst, part, sum(1 << k for k, (r, _) in enumerate(places) if r == i))
            return
        a.vmovaps(dst, sources[0])
        for i, source in enumerate(sources[1:], 1):
            # The first step picks from two sources, later ones keep what is in place.
            kept = [lane if i == 1 else k for k, (_, lane) in enumerate(places)]
            picks = [lanes + lane if r == i else kept[k] for k, (r, lane) in enumerate(places)]
            with a.scope():
                permute(dst, index(picks), source)


class Interleaver:
    """Transposes elements of `size` bytes within the 128-bit lanes of as many registers as a lane has elements.

    Each pass interleaves the lower half of the registers with the upper one: a perfect shuffle of an element's address,
    after log2 of which rows and columns have changed places.  Registers are merged as soon as both are there, which
    leaves the processor less to reorder; `order` says which rows to give first.
    """

    def __init__(self, a: Assembler, size: int, temp: Reg) -> None:
        """`temp` is a free register; `self.temp` is free from then on, `temp` may hold a column."""
        self.a, self.size, self.temp = a, size, temp
        self.side = 16 // size
        bits = self.side.bit_length() - 1
        self.passes = bits
        self.order = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(self.side)]
        self.columns: dict[int, Reg] = {}
        self._waiting: dict[tuple[int, int], Reg] = {}

    def merges(self) -> tuple[Merge, Merge]:
        """The instructions that interleave the lower and the upper halves of lanes."""
        a = self.a
        return {1: (a.vpunpcklbw, a.vpunpckhbw), 2: (a.vpunpcklwd, a.vpunpckhwd), 4: (a.vpunpckldq, a.vpunpckhdq)}[
            self.size
        ]

    def give(self, i: int, reg: Reg, done: int = 0) -> None:
        """Row i (of what `done` passes made); what can be merged is."""
        if done == self.passes:
            self.columns[i] = reg
            return
        half = self.side // 2
        other = self._waiting.pop((done, i ^ half), None)
        if other is None:
            self._waiting[done, i] = reg
            return
        first, second = (reg, other) if i < half else (other, reg)
        low, high = self.merges()
        free = self.temp
        high(free, first, second)
        low(first, first, second)
        self.temp = second
        at = 2 * (i % half)
        self.give(at, first, done + 1)
        self.give(at + 1, free, done + 1)
