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


def gather(a: Assembler, tier: TierCode, dst: Reg, sources: list[Reg], places: list[tuple[int, int]]) -> None:
    """Lane k of `dst` = lane places[k][1] of sources[places[k][0]]; `dst` is no source."""

    def index(values: list[int]) -> Reg:
        v = a.vec(tier.bits, "index")
        a.vmovups(v, a.const(np.array(values, dtype=np.int32)))
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
            picks = [tier.lanes + lane if r == i else kept[k] for k, (r, lane) in enumerate(places)]
            with a.scope():
                a.vpermt2d(dst, index(picks), source)
