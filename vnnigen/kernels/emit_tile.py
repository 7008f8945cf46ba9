"""The microkernel: one register tile's multiplication over all of K, then its epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Assembler, Mem
from vnnigen.kernels.blocking import Blocking
from vnnigen.kernels.emit_common import add_const, counted
from vnnigen.kernels.emit_epilogue import emit_epilogue
from vnnigen.kernels.emit_store import Tile
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.geometry import Segments
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.mac import ONES8, Mac, MacStream, TierCode

Reg = Any
#: Pixels of a tile that each filter column matters to; empty: all to all.
Live = tuple[tuple[int, ...], ...]
#: Tiles of at most this many multiply-accumulate instructions in all are written out without loops.
UNROLL_WHOLE = 200


@dataclass
class Cursors:
    """The general registers a tile works with. `src` and `weights` point at the tile's first dwords."""

    args: Reg
    consts: Reg
    src: Reg
    weights: Reg
    col: Reg
    off: Reg
    ptr: Reg
    k: Reg
    outer: Reg
    inner: Reg | None


@dataclass(frozen=True)
class TileCode:
    """Everything constant about a kernel's tiles."""

    tier: TierCode
    mac: Mac
    spec: EpilogueSpec
    lay: ConstLayout
    seg: Segments
    blocking: Blocking
    row_sums: bool

    @property
    def panel_bytes(self) -> int:
        """Bytes from one packed panel of weights to the next."""
        return self.seg.total_dwords * self.mac.panel_step(self.tier)


@dataclass
class _Loop:
    """State of one tile's K loop."""

    a: Assembler
    code: TileCode
    cur: Cursors
    rows: list[int]
    acc: list[list[Reg]]
    sums: list[Reg]
    weights: list[Reg]
    source: Reg
    stream: MacStream
    taps: tuple[int, int]
    live: Live
    ones8: Reg | None

    @property
    def pair_tail(self) -> bool:
        """Whether the last dword of a run holds one bf16 only."""
        return self.code.mac.element == "bf16" and self.code.seg.tail == 1

    def step(self, src_disp: int, dword: int, pixels: Sequence[int], *, tail: bool) -> None:
        """One dword of K for `pixels` and all vectors; `dword` counts from the weights cursor."""
        a, code = self.a, self.code
        at = [dword * code.mac.panel_step(code.tier) + j * code.panel_bytes for j in range(len(self.acc[0]))]
        operands: list[Any] = list(self.weights)
        for j, w in enumerate(self.weights):
            (a.vpmovsxbw if code.mac.narrow else a.vmovups)(w, Mem(self.cur.weights, at[j]))
        operands += [Mem(self.cur.weights, d) for d in at[len(self.weights) :]]
        ones: Any = self.ones8
        if tail and self.sums:
            partial = ONES8[: code.tier.vector_bytes].copy()
            partial.reshape(-1, 4)[:, code.seg.tail :] = 0
            ones = a.const(partial)
        for i in pixels:
            a.vbroadcastss(self.source, Mem(self.cur.src, self.rows[i] + src_disp))
            if tail and self.pair_tail:
                # What follows an odd run may be NaN, and 0 * NaN is NaN: the weight's zero is not enough.
                a.vpandd(self.source, self.source, a.const(np.array([0xFFFF], dtype=np.uint32), align=4).broadcast())
            for j, w in enumerate(operands):
                self.stream.add(self.acc[i][j], self.source, w)
            if self.sums:
                self.stream.add(self.sums[i], self.source, ones)

    def whole(self) -> None:
        """All of K without loops."""
        seg = self.code.seg
        for o in range(*self.taps):
            for i in range(seg.inner):
                base = o * seg.outer_stride + i * seg.inner_stride
                for d in range(seg.dwords):
                    at = (o * seg.inner + i) * seg.dwords + d
                    self.step(base + 4 * d, at, range(len(self.rows)), tail=d == seg.dwords - 1)
        self.stream.flush()

    def looped(self) -> None:
        """Loops over the runs of K, and over dwords within a run; both cursors are put back afterwards."""
        a, seg, cur = self.a, self.code.seg, self.cur
        vb = self.code.mac.panel_step(self.code.tier)
        first, last = self.taps
        outer = last - first
        skipped = first * seg.inner * seg.dwords * vb
        add_const(a, cur.src, first * seg.outer_stride)
        add_const(a, cur.weights, skipped)
        with counted(a, cur.outer, outer):
            with counted(a, cur.inner, seg.inner):
                for dwords, pixels in self._parts():
                    self._run(dwords, pixels)
                add_const(a, cur.src, seg.inner_stride * (seg.inner > 1) - 4 * seg.dwords)
            add_const(
                a,
                cur.src,
                seg.outer_stride * (seg.outer > 1) - seg.inner_stride * seg.inner * (seg.inner > 1),
            )
        add_const(a, cur.src, -seg.outer_stride * (outer * (seg.outer > 1) + first))
        a.sub(cur.weights, outer * seg.inner * seg.dwords * vb + skipped)

    def _parts(self) -> list[tuple[int, Sequence[int]]]:
        """A run of K cut where the pixels that it matters to change: (dwords, pixels)."""
        everyone: Sequence[int] = range(len(self.rows))
        if not self.live:
            return [(self.code.seg.dwords, everyone)]
        tap = self.code.seg.dwords // len(self.live)
        return [(tap * len(list(same)), pixels) for pixels, same in groupby(self.live)]

    def _run(self, dwords: int, pixels: Sequence[int]) -> None:
        """The next `dwords` of a run; both cursors pass them."""
        a, code, cur = self.a, self.code, self.cur
        vb, unroll = code.mac.panel_step(code.tier), code.blocking.unroll
        # The last dword of a run stands alone when its row sum, or its pair of bf16, must leave the padding out.
        special = self.pair_tail or (bool(self.sums) and code.seg.tail != code.mac.k_per_dword)
        turns = (dwords - special) // unroll if pixels else 0
        if turns == 1:
            turns = 0
        if turns:
            a.mov(cur.k, turns)
            with a.loop(cur.k):
                for u in range(unroll):
                    self.step(4 * u, u, pixels, tail=False)
                self.stream.flush()
                a.add(cur.src, 4 * unroll)
                a.add(cur.weights, vb * unroll)
        rest = dwords - turns * unroll
        for d in range(rest if pixels else 0):
            self.step(4 * d, d, pixels, tail=d == rest - 1)
        self.stream.flush()
        add_const(a, cur.weights, vb * rest)
        add_const(a, cur.src, 4 * rest)


def emit_tile(
    a: Assembler, code: TileCode, cur: Cursors, rows: list[int], outs: list[int], nr: int, valid: int,
    taps: tuple[int, int], live: Live = (),
) -> None:  # fmt: skip
    """One tile: pixels at byte offsets `rows` from the source cursor, outputs at element offsets `outs`.

    `nr` vectors of columns, the last with `valid` live lanes. Filter rows outside `taps` meet padding only: what they
    would add is added to the start values instead. `live` says, if not empty, which pixels each filter column matters
    to; the others meet zeros there. All cursors keep their values.
    """
    bits = code.tier.bits
    with a.scope():
        acc = [[a.vec(bits, f"acc{i}_{j}") for j in range(nr)] for i in range(len(rows))]
        with a.section(f"start values {len(rows)}x{nr}"):
            for j in range(nr):
                start = Mem(cur.consts, code.lay.init + j * code.tier.vector_bytes, index=cur.col, scale=4)
                a.vmovups(acc[0][j], start)
                for r in range(code.lay.taps):
                    if taps[0] <= r < taps[1]:
                        continue
                    a.vpaddd(acc[0][j], acc[0][j], start + (code.lay.tap(r) - code.lay.init))
                for row in acc[1:]:
                    a.vmovaps(row[j], acc[0][j])
        with a.scope():
            sums = [a.vec(bits, f"sum{i}") for i in range(len(rows))] if code.row_sums else []
            with a.scope(), a.section("multiply"):
                if taps[0] < taps[1]:
                    _multiply(a, code, cur, rows, acc, sums, taps, live)
            if sums:
                _subtract_row_sums(a, code, cur, acc, sums)
        with a.section("epilogue"):
            tile = Tile(
                a,
                code.tier,
                code.spec,
                code.lay,
                acc,
                outs,
                valid,
                cur.args,
                cur.consts,
                cur.col,
                cur.off,
                cur.ptr,
            )
            emit_epilogue(tile)


def _multiply(
    a: Assembler, code: TileCode, cur: Cursors, rows: list[int], acc: list[list[Reg]], sums: list[Reg],
    taps: tuple[int, int], live: Live,
) -> None:  # fmt: skip
    bits, mac = code.tier.bits, code.mac
    for s in sums:
        a.vpxor(s.xmm, s.xmm, s.xmm) if not code.tier.masks else a.vpxord(s, s, s)
    stream = MacStream(a, mac, bits)
    ones8 = None
    if sums:
        ones8 = a.vec(bits, "ones8")
        a.vmovups(ones8, a.const(ONES8[: code.tier.vector_bytes]))
    resident = min(code.blocking.resident, len(acc[0]))
    weights = [a.vec(bits, f"w{j}") for j in range(resident)]
    loop = _Loop(a, code, cur, rows, acc, sums, weights, a.vec(bits, "src"), stream, taps, live, ones8)
    if not live and code.seg.total_dwords * len(rows) * len(acc[0]) <= UNROLL_WHOLE:
        loop.whole()
    else:
        loop.looped()


def _subtract_row_sums(a: Assembler, code: TileCode, cur: Cursors, acc: list[list[Reg]], sums: list[Reg]) -> None:
    """Acc -= w_zero_point * (sum of the source row): the part of an asymmetric weight known only at run time."""
    with a.scope(), a.section("weight zero points"):
        product = a.vec(code.tier.bits, "zp_sum")
        for j in range(len(acc[0])):
            at = Mem(cur.consts, code.lay.w_zp + j * code.tier.vector_bytes, index=cur.col, scale=4)
            for i, s in enumerate(sums):
                a.vpmulld(product, s, at)
                a.vpsubd(acc[i][j], acc[i][j], product)


def tile_offsets(th: int, tw: int, row: int, pixel: int) -> list[int]:
    """Offsets of a th x tw tile's pixels."""
    return [h * row + w * pixel for h in range(th) for w in range(tw)]
