"""The code of Winograd's algorithm.

One step of the grid transforms a strip's pixels, then, column block by column block, multiplies them, transforms the
sums to outputs and runs the epilogue. The strip's source rows are copied to scratch first, padded up
to whole tiles, so that no transform meets an edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Mem
from vnnigen.kernels.emit_common import add_const, counted
from vnnigen.kernels.emit_epilogue import emit_epilogue
from vnnigen.kernels.emit_store import Tile
from vnnigen.kernels.emit_tile import tile_offsets
from vnnigen.kernels.geometry import TileClass
from vnnigen.kernels.mac import MacStream
from vnnigen.kernels.nest import LoopNest
from vnnigen.kernels.winograd import INVERSE, POINTS, REACH, SHIFT, TILE, WinogradKey

Reg = Any
#: How far ahead weights are fetched that come from beyond the L2 cache: a processor's own prefetching stops at pages.
AHEAD = 4096


class WinogradNest(LoopNest):
    """Emits one kernel."""

    def __init__(self, key: WinogradKey, features: frozenset[str] | None):
        super().__init__(key, features)
        self.winograd = key
        self.rows = key.copy_rows
        self.copied_row, self.copied_pixel = self.rows.pitch, self.rows.pixel
        # The loops over outputs do not move the cursor, which is on the sums.
        self.row_pitch = self.pixel = 0
        self.half_at, self.pixels_at, self.sums_at, _ = key.parts
        self.dwords = -(-key.g.ic // 2)
        self.panel_bytes = POINTS * self.dwords * key.tier.vector_bytes
        self.block_bytes = key.blocking.nr * self.panel_bytes
        # Rows of tiles of this strip: the last one's may be fewer.
        self.down = key.blocking.strip // TILE

    @property
    def tiles(self) -> int:
        """Tiles of the strip whose code is being emitted."""
        return self.down * self.winograd.across

    def _groups(self) -> None:
        """The strip, as most of them are, and as the last one is."""
        a, key = self.a, self.key
        usual = key.blocking.strip // TILE
        last = -(-key.g.oh // TILE) - (key.strips - 1) * usual
        done = a.label("strip_done")
        if key.strips > 1:
            is_last = a.label("last_strip")
            a.mov(self.cur.ptr, self._slot(self.STRIP))
            a.cmp(self.cur.ptr, key.strips - 1)
            a.jz(is_last)
            self._strip_of(usual, last=False)
            a.jmp(done)
            a.bind(is_last)
        self._strip_of(last, last=True)
        a.bind(done)

    def _strip_of(self, down: int, *, last: bool) -> None:
        """A strip of `down` rows of tiles; the last one's last row may be a part of a tile."""
        g = self.key.g
        self.down = down
        part = g.oh % TILE if last else 0
        whole = down - bool(part)
        classes = (TileClass(0, whole, TILE, ()), TileClass(whole, 1, part, ()))
        self.row_classes = tuple(c for c in classes if c.count and c.size)
        self._transform_pixels()
        self._column_blocks()

    @contextmanager
    def _rows_of_strip(self, rows: TileClass) -> Iterator[None]:
        """Repeat the body for the rows of tiles of a class; all of them lie in this strip."""
        if rows.count == 1:
            yield
            return
        self.a.mov(self.cur.ptr, rows.count)
        self.a.mov(self._slot(self.DOWN_LEFT), self.cur.ptr)
        with self._slot_loop(self.DOWN_LEFT, may_be_zero=False):
            yield

    # --- pixels -----------------------------------------------------------------------------------------------

    def _transform_pixels(self) -> None:
        """V = B' d B of every tile, as words."""
        a, key, cur = self.a, self.winograd, self.cur
        unit = key.tier.vector_bytes // 2
        vectors = -(-key.g.ic // unit)
        with a.scope(), a.section("transform the pixels"):
            to = a.gpr("transformed")
            a.mov(cur.col, self._slot(self.SCRATCH))
            a.lea(to, Mem(cur.col, self.pixels_at))
            a.mov(cur.src, self.first_src)
            with counted(a, cur.outer, self.down):
                with counted(a, cur.k, key.across):
                    with counted(a, cur.ptr, vectors):
                        self._transform_vector(to)
                        a.add(cur.src, unit)
                        a.add(to, 2 * unit)
                    add_const(a, cur.src, TILE * self.copied_pixel - vectors * unit)
                    add_const(a, to, key.pixel_pitch - 2 * unit * vectors)
                add_const(a, cur.src, TILE * (self.copied_row - key.across * self.copied_pixel))
            self._first_column()

    def _first_column(self) -> None:
        """The column cursor lent its register: set it again."""
        a, b = self.a, self.key.blocking
        a.mov(self.cur.col, self._slot(self.CHUNK))
        a.imul(self.cur.col, self.cur.col, b.chunk * self.key.block_columns)

    def _transform_vector(self, to: Reg) -> None:
        """One vector of a tile's channels: down its columns into scratch, then along its rows."""
        key, cur, six = self.winograd, self.cur, range(REACH)
        plane = key.tiles * key.pixel_pitch
        pixels = [[Mem(cur.src, r * self.copied_row + c * self.copied_pixel) for c in six] for r in six]
        half = [[Mem(cur.col, self.half_at + (r * REACH + c) * key.tier.vector_bytes) for c in six] for r in six]
        for c in six:
            self._transform([pixels[r][c] for r in six], [half[r][c] for r in six], self.a.vpmovzxbw)
        for r in six:
            self._transform(half[r], [Mem(to, (r * REACH + c) * plane) for c in six], self.a.vmovups)

    def _transform(self, sources: list[Mem], targets: list[Mem], load: Callable[[Reg, Mem], None]) -> None:
        """B' times six words."""
        a, bits = self.a, self.key.tier.bits

        def store(v: Reg, i: int) -> None:
            a.vmovups(targets[i], v)

        with a.scope():
            d = [a.vec(bits, f"d{i}") for i in range(REACH)]
            t, u = a.vec(bits, "t"), a.vec(bits, "u")
            for v, source in zip(d, sources, strict=True):
                load(v, source)
            # 4 d0 - 5 d2 + d4 = 4 (d0 - d2) + (d4 - d2)
            a.vpsubw(d[0], d[0], d[2])
            a.vpsllw(d[0], d[0], 2)
            a.vpsubw(t, d[4], d[2])
            a.vpaddw(d[0], d[0], t)
            store(d[0], 0)
            # 4 d1 - 5 d3 + d5 = (d5 - d3) - 4 (d3 - d1)
            a.vpsubw(d[5], d[5], d[3])
            a.vpsubw(u, d[3], d[1])
            a.vpaddw(u, u, u)
            a.vpsubw(d[5], d[5], u)
            a.vpsubw(d[5], d[5], u)
            store(d[5], 5)
            # (d4 - d2) +- 2 (d3 - d1)
            a.vpaddw(d[0], t, u)
            store(d[0], 3)
            a.vpsubw(d[5], t, u)
            store(d[5], 4)
            # (d4 - 4 d2) +- (d3 - 4 d1)
            a.vpsllw(d[2], d[2], 2)
            a.vpsubw(d[4], d[4], d[2])
            a.vpsllw(d[1], d[1], 2)
            a.vpsubw(d[3], d[3], d[1])
            a.vpaddw(t, d[4], d[3])
            store(t, 1)
            a.vpsubw(u, d[4], d[3])
            store(u, 2)

    # --- products ---------------------------------------------------------------------------------------------

    def _strip(self, nr: int, valid: int) -> None:
        """Multiply the strip's transformed pixels with a column block's weights, then make outputs of the sums."""
        self._multiply(nr)
        super()._strip(nr, valid)

    def _begin_strip(self, _nr: int, _valid: int) -> None:
        """Put the cursors on the first tile's sums and outputs."""
        a = self.a
        a.mov(self.cur.src, self._slot(self.SCRATCH))
        add_const(a, self.cur.src, self.sums_at)
        a.mov(self.cur.off, self.first_off)

    def _multiply(self, nr: int) -> None:
        """36 products of matrices: [tiles, channels] times [channels, columns of the block]."""
        a, key, cur = self.a, self.winograd, self.cur
        vb = key.tier.vector_bytes
        whole, rest = divmod(self.tiles, key.group)
        with a.scope(), a.section("multiply"):
            sums, group = a.gpr("sums"), a.gpr("group")
            a.mov(cur.src, self._slot(self.SCRATCH))
            a.lea(sums, Mem(cur.src, self.sums_at))
            add_const(a, cur.src, self.pixels_at)
            with counted(a, cur.outer, POINTS):
                if whole:
                    with counted(a, group, whole):
                        self._multiply_group(key.group, nr, sums)
                if rest:
                    self._multiply_group(rest, nr, sums)
                a.add(cur.weights, self.dwords * nr * vb)
                add_const(a, cur.src, (key.tiles - self.tiles) * key.pixel_pitch)
                add_const(a, sums, (key.tiles - self.tiles) * nr * vb)
            a.sub(cur.weights, POINTS * self.dwords * nr * vb)

    def _multiply_group(self, count: int, nr: int, sums: Reg) -> None:
        """Multiply `count` tiles; the source and sums cursors move on."""
        a, key, cur = self.a, self.winograd, self.cur
        bits, vb, unroll = key.tier.bits, key.tier.vector_bytes, key.blocking.unroll
        with a.scope():
            acc = [[a.vec(bits, f"sum{i}_{j}") for j in range(nr)] for i in range(count)]
            weights = [a.vec(bits, f"w{j}") for j in range(nr)]
            source = a.vec(bits, "src")
            stream = MacStream(a, key.mac, bits)
            for v in (v for row in acc for v in row):
                a.vpxord(v, v, v) if key.tier.masks else a.vpxor(v, v, v)

            def step(d: int) -> None:
                for j, w in enumerate(weights):
                    a.vmovups(w, Mem(cur.weights, (d * nr + j) * vb))
                    if key.streams:
                        a.prefetcht0(Mem(cur.weights, (d * nr + j) * vb + AHEAD))
                for i, row in enumerate(acc):
                    a.vbroadcastss(source, Mem(cur.src, i * key.pixel_pitch + 4 * d))
                    for v, w in zip(row, weights, strict=True):
                        stream.add(v, source, w)

            turns, rest = divmod(self.dwords, unroll)
            if turns:
                with counted(a, cur.k, turns):
                    for d in range(unroll):
                        step(d)
                    stream.flush()
                    a.add(cur.src, 4 * unroll)
                    a.add(cur.weights, unroll * nr * vb)
            for d in range(rest):
                step(d)
            stream.flush()
            if turns:
                a.sub(cur.weights, turns * unroll * nr * vb)
            for i, row in enumerate(acc):
                for j, v in enumerate(row):
                    a.vmovups(Mem(sums, (i * nr + j) * vb), v)
            if self.ahead is not None:
                # Beyond the step's share there is nothing to fetch; the weights at the cursor are in the cache anyway.
                a.cmp(self.ahead, self._slot(self.AHEAD_END))
                a.cmovae(self.ahead, cur.weights)
                for i in range(key.ahead):
                    a.prefetcht1(Mem(self.ahead, 64 * i))
                a.add(self.ahead, 64 * key.ahead)
            add_const(a, cur.src, count * key.pixel_pitch - 4 * unroll * turns)
            a.add(sums, count * nr * vb)

    # --- outputs ----------------------------------------------------------------------------------------------

    def emit_tile(self, th: int, tw: int, nr: int, valid: int) -> None:
        """Transform one tile's sums to th x tw outputs; its halfway values replace the sums."""
        a, key, cur = self.a, self.winograd, self.cur
        vb = key.tier.vector_bytes
        plane = key.tiles * nr * vb

        def at(r: int, c: int, j: int) -> Mem:
            return Mem(cur.src, (r * REACH + c) * plane + j * vb)

        with a.section(f"outputs {th}x{tw}"):
            for c in range(REACH):
                for j in range(nr):
                    with a.scope():
                        y = [a.vec(key.tier.bits, f"y{i}") for i in range(th)]
                        self._combine(y, [at(r, c, j) for r in range(REACH)])
                        for r, v in enumerate(y):
                            a.vmovups(at(r, c, j), v)
            for r in range(th):
                with a.scope():
                    acc = [[a.vec(key.tier.bits, f"y{i}_{j}") for j in range(nr)] for i in range(tw)]
                    for j in range(nr):
                        self._combine([row[j] for row in acc], [at(r, c, j) for c in range(REACH)])
                    self._finish(acc)
                    offsets = [r * key.g.ow * key.ldo + x for x in tile_offsets(1, tw, 0, key.ldo)]
                    tile = Tile(
                        a, key.tier, key.spec, self.lay, acc, offsets, valid, cur.args, cur.consts, cur.col, cur.off,
                        cur.ptr,
                    )  # fmt: skip
                    emit_epilogue(tile)
        a.add(cur.src, nr * vb)

    def _combine(self, y: list[Reg], m: list[Mem]) -> None:
        """Y = A' m, the first len(y) rows of it; m[5] counts three times."""
        a, bits = self.a, self.key.tier.bits
        with a.scope():
            s, d, p, q = (a.vec(bits, name) for name in "sdpq")
            a.vmovups(d, m[1])
            a.vpaddd(s, d, m[2])
            a.vpsubd(d, d, m[2])
            a.vmovups(q, m[3])
            a.vpaddd(p, q, m[4])
            a.vpsubd(q, q, m[4])
            a.vpaddd(y[0], s, p)
            a.vpaddd(y[0], y[0], m[0])
            if len(y) > 1:
                a.vpaddd(q, q, q)
                a.vpaddd(y[1], d, q)
            if len(y) > 2:
                a.vpslld(p, p, 2)
                a.vpaddd(y[2], s, p)
            if len(y) > 3:
                a.vpslld(q, q, 2)
                a.vpaddd(y[3], d, q)
                a.vmovups(s, m[5])
                a.vpaddd(y[3], y[3], s)
                a.vpaddd(s, s, s)
                a.vpaddd(y[3], y[3], s)

    def _finish(self, acc: list[list[Reg]]) -> None:
        """Divide by 9 * 2^SHIFT modulo 2^32, and add the start values."""
        a, tier = self.a, self.key.tier
        with a.scope():
            inverse = a.vec(tier.bits, "inverse")
            a.vmovups(inverse, a.const(np.full(tier.lanes, INVERSE, np.int32)))
            for row in acc:
                for j, v in enumerate(row):
                    a.vpmulld(v, v, inverse)
                    a.vpsrad(v, v, SHIFT)
                    start = Mem(self.cur.consts, self.lay.init + j * tier.vector_bytes, index=self.cur.col, scale=4)
                    a.vpaddd(v, v, start)
