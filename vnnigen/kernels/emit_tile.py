"""The microkernel: one register tile's multiplication over all of K, then its epilogue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from vnnigen.kernels.taps import Part, Piece, Taps, parts

Reg = Any
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
    #: What is fetched into the L2 cache meanwhile, and the stack slot that says where that ends.
    ahead: Reg | None = None
    ahead_end: Mem | None = None


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
    #: Cache lines fetched ahead in one turn of the K loop.
    ahead: int = 0

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
    parts: tuple[Part, ...]
    ones8: Reg | None
    #: How far the cursors have run from the tile's first dwords, in bytes of source and of weights.
    at: tuple[int, int] = (0, 0)

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
        for part in self.parts:
            for row in range(part.first, part.first + part.count):
                for piece in part.pieces:
                    for run in range(piece.runs):
                        base = row * seg.outer_stride + piece.src + run * seg.inner_stride
                        first = row * seg.inner * seg.dwords + piece.dword + run * seg.dwords
                        for d in range(piece.dwords):
                            self.step(base + 4 * d, first + d, piece.pixels, tail=d == piece.dwords - 1)
        self.stream.flush()

    def looped(self) -> None:
        """Loops over the runs of K, and over dwords within a run; both cursors are put back afterwards."""
        seg, cur = self.code.seg, self.cur
        step = self.code.mac.panel_step(self.code.tier)
        row = (seg.outer_stride, seg.inner * seg.dwords * step)
        for part in self.parts:
            with self._repeat(cur.outer, part.count, (part.first * row[0], part.first * row[1]), row):
                src, weights = self.at
                for piece in part.pieces:
                    start = src + piece.src, weights + piece.dword * step
                    with self._repeat(cur.inner, piece.runs, start, (seg.inner_stride, seg.dwords * step)):
                        self._run(piece)
        self._go((0, 0))

    def _run(self, piece: Piece) -> None:
        """One run of K, a loop over dwords and the rest."""
        a, seg = self.a, self.code.seg
        step, unroll = self.code.mac.panel_step(self.code.tier), self.code.blocking.unroll
        # The last dword of a run stands alone when its row sum, or its pair of bf16, must leave the padding out.
        special = self.pair_tail or (bool(self.sums) and seg.tail != self.code.mac.k_per_dword)
        turns = (piece.dwords - special) // unroll
        if turns == 1:
            turns = 0
        if turns:
            a.mov(self.cur.k, turns)
            with a.loop(self.cur.k):
                for u in range(unroll):
                    self.step(4 * u, u, piece.pixels, tail=False)
                    self._fetch_ahead(u, unroll)
                self.stream.flush()
                a.add(self.cur.src, 4 * unroll)
                a.add(self.cur.weights, step * unroll)
            self.at = self.at[0] + 4 * unroll * turns, self.at[1] + step * unroll * turns
        rest = piece.dwords - turns * unroll
        for d in range(rest):
            self.step(4 * d, d, piece.pixels, tail=d == rest - 1)
        self.stream.flush()

    def _fetch_ahead(self, u: int, unroll: int) -> None:
        """Fetch the lines that fall to step `u` of a turn."""
        if self.cur.ahead is None:
            return
        lines = self.code.ahead
        for i in range(u * lines // unroll, (u + 1) * lines // unroll):
            self.a.prefetcht1(Mem(self.cur.ahead, 64 * i))
        if u == unroll - 1:
            self.a.add(self.cur.ahead, 64 * lines)

    def _go(self, to: tuple[int, int]) -> None:
        """Move the cursors."""
        add_const(self.a, self.cur.src, to[0] - self.at[0])
        add_const(self.a, self.cur.weights, to[1] - self.at[1])
        self.at = to

    @contextmanager
    def _repeat(self, counter: Reg, count: int, start: tuple[int, int], stride: tuple[int, int]) -> Iterator[None]:
        """Run the body with the cursors at `start`, then `stride` further, `count` times in all."""
        self._go(start)
        with counted(self.a, counter, count):
            yield
            if count > 1:
                self._go((start[0] + stride[0], start[1] + stride[1]))
        if count > 1:
            self.at = start[0] + count * stride[0], start[1] + count * stride[1]


def emit_tile(
    a: Assembler, code: TileCode, cur: Cursors, rows: list[int], outs: list[int], nr: int, valid: int,
    taps: Taps,
) -> None:  # fmt: skip
    """One tile: pixels at byte offsets `rows` from the source cursor, outputs at element offsets `outs`.

    `nr` vectors of columns, the last with `valid` live lanes. What `taps` leaves out meets padding: what that would
    add is added to the start values instead. All cursors keep their values.
    """
    bits = code.tier.bits
    if cur.ahead is not None:
        # What lies beyond the end is not wanted; the tile's own weights are in the cache anyway.
        a.cmp(cur.ahead, cur.ahead_end)
        a.cmovae(cur.ahead, cur.weights)
    with a.scope():
        acc = [[a.vec(bits, f"acc{i}_{j}") for j in range(nr)] for i in range(len(rows))]
        with a.section(f"start values {len(rows)}x{nr}"):
            _start_values(a, code, cur, acc, taps)
        with a.scope():
            sums = [a.vec(bits, f"sum{i}") for i in range(len(rows))] if code.row_sums else []
            with a.scope(), a.section("multiply"):
                if todo := parts(code.seg, taps):
                    _multiply(a, code, cur, rows, acc, sums, todo)
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


def _start_values(a: Assembler, code: TileCode, cur: Cursors, acc: list[list[Reg]], taps: Taps) -> None:
    """Load the accumulators' start values, and add what the taps would add that a pixel leaves out."""
    lay, kw = code.lay, len(taps.cols)
    first: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(acc):
        offsets: list[int] = []
        for r, missing in taps.missing(i) if code.mac.acc == "s32" else ():
            offsets += [lay.tap(r)] if len(missing) == kw and lay.taps else [lay.cell(r * kw + c) for c in missing]
        same = first.setdefault(tuple(offsets), i)
        for j, register in enumerate(row):
            if same != i:
                a.vmovaps(register, acc[same][j])
                continue
            start = Mem(cur.consts, lay.init + j * code.tier.vector_bytes, index=cur.col, scale=4)
            a.vmovups(register, start)
            for offset in offsets:
                a.vpaddd(register, register, start + (offset - lay.init))


def _multiply(
    a: Assembler, code: TileCode, cur: Cursors, rows: list[int], acc: list[list[Reg]], sums: list[Reg],
    todo: tuple[Part, ...],
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
    loop = _Loop(a, code, cur, rows, acc, sums, weights, a.vec(bits, "src"), stream, todo, ones8)
    if sum(part.products for part in todo) * len(acc[0]) <= UNROLL_WHOLE:
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
