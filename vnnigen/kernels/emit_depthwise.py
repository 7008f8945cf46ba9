"""The code of depthwise convolution: tiles of pixels, and inside each the blocks of channels.

Channels are the innermost loop, so that a tile reads and writes runs of consecutive bytes, which is what caches fetch
ahead.  The source is read in place, padding included, for copying a strip into padded scratch rows costs a depthwise
kernel a third of its time: tiles at the image's edges are code of their own, in which a register that holds the
padding's value takes the place of loads.  Which tiles those are is known when the code is generated, so rows and
columns of tiles are cut into *classes* with the same padding, most of them one tile thick.  Only AVX2, whose tails of
channels cannot be loaded in place, multiplies scratch rows, in which everything lies inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Mem
from vnnigen.kernels.depthwise import DepthwiseKey, Group, plan_groups, plan_registers
from vnnigen.kernels.emit_common import add_const, set_mask
from vnnigen.kernels.emit_copy import WIDEN
from vnnigen.kernels.emit_epilogue import emit_epilogue
from vnnigen.kernels.emit_store import Tile
from vnnigen.kernels.emit_tile import tile_offsets
from vnnigen.kernels.geometry import SRC_BYTES, row_classes, tile_classes
from vnnigen.kernels.mac import MacStream
from vnnigen.kernels.nest import LoopNest

Reg = Any
#: Upper halves of 32-bit lanes: the odd ones of 16-bit channels, as f32.
ODD = np.full(16, 0xFFFF0000, dtype=np.uint32)


class DepthwiseNest(LoopNest):
    """Emits a depthwise kernel."""

    #: More slots of the stack frame: weights and column of the chunk's first block. There is but one group.
    WEIGHTS, COLUMN = LoopNest.GROUP, 7

    def __init__(self, key: DepthwiseKey, features: frozenset[str] | None):
        super().__init__(key, features)
        g, b = key.g, key.blocking
        self.size, self.width = key.mac.k_per_dword, b.nr
        self.window, self.vectors, self.interleaved = key.window, key.weight_vectors, key.interleaved
        self.block_bytes = self.panel_bytes = len(self.vectors) * self.width * key.tier.vector_bytes
        self.element = key.mac.element_bytes if b.copy else SRC_BYTES[g.src]
        self.source_step = key.block_columns * self.element
        self.widen = None if b.copy else WIDEN.get((g.src, key.mac.element))
        self.shift = not b.copy and g.src == "s8" and key.mac.element == "u8"
        self.left, width = (0, g.padded_w) if b.copy else (g.left, g.w)
        if b.copy:
            self.row_classes = row_classes(replace(g, padded=False), b.th)
        self.column_classes = tile_classes(g.ow, b.tw, width, g.sw, g.kw, g.dw, self.left)
        self.columns_inside: tuple[bool, ...] = ()

    def _groups(self) -> None:
        """All tiles of the strip; `first_src` and `first_off` are at the tile's first block."""
        a, g, cur = self.a, self.key.g, self.cur
        a.mov(self._slot(self.WEIGHTS), cur.weights)
        a.mov(self._slot(self.COLUMN), cur.col)
        # The window of the first output begins `left` columns before the image.
        add_const(a, self.first_src, -self.left * self.pixel)
        for rows in self.row_classes:
            self.rows_inside = rows.inside
            with self._rows_of_strip(rows):
                self._along(rows.size)
                add_const(a, self.first_src, rows.size * g.sh * self.row_pitch - g.ow * g.sw * self.pixel)
                add_const(a, self.first_off, (rows.size - 1) * g.ow * self.key.ldo)

    def _along(self, th: int) -> None:
        """A row of tiles, class by class."""
        a, cur = self.a, self.cur
        for columns in self.column_classes:
            self.columns_inside = columns.inside
            if columns.count > 1:
                a.mov(cur.ptr, columns.count)
                a.mov(self._slot(self.ALONG_LEFT), cur.ptr)
            with self._slot_loop(self.ALONG_LEFT, may_be_zero=False) if columns.count > 1 else nullcontext():
                self._blocks(th, columns.size)
                add_const(a, self.first_src, columns.size * self.key.g.sw * self.pixel)
                add_const(a, self.first_off, columns.size * self.key.ldo)

    def _blocks(self, th: int, tw: int) -> None:
        """One tile of all the chunk's blocks of channels."""
        a, key, cur = self.a, self.key, self.cur
        a.mov(cur.src, self.first_src)
        a.mov(cur.off, self.first_off)
        a.mov(cur.weights, self._slot(self.WEIGHTS))
        a.mov(cur.col, self._slot(self.COLUMN))
        tail = key.g.n - key.full_blocks * key.block_columns
        if key.full_blocks:
            with self._full_blocks():
                self.emit_tile(th, tw, self.width, key.tier.lanes)
                a.add(cur.src, self.source_step)
                a.add(cur.off, key.block_columns)
                a.add(cur.weights, self.block_bytes)
                a.add(cur.col, key.block_columns)
        if tail:
            panels = -(-tail // key.tier.lanes)
            with self._only_last(self.CHUNK, key.chunks):
                self.emit_tile(th, tw, panels, tail - (panels - 1) * key.tier.lanes)

    @contextmanager
    def _full_blocks(self) -> Iterator[None]:
        """Repeat the body for the chunk's full blocks, of which the last chunk may have none."""
        a, count, key = self.a, self.cur.k, self.key
        none = a.label("no_full_block")
        a.mov(count, self._slot(self.BLOCKS))
        if key.full_blocks == (key.chunks - 1) * key.blocking.chunk:
            a.test(count, count)
            a.jz(none)
        with a.loop(count):
            yield
        a.bind(none)

    def emit_tile(self, th: int, tw: int, nr: int, valid: int) -> None:
        """Emit th x tw outputs of one block of channels."""
        a, key, cur = self.a, self.key, self.cur
        bits, vb = key.tier.bits, key.tier.vector_bytes
        count = (nr - 1) * key.tier.lanes + valid
        # A tail of channels needs all of interleaved accumulators, but only so many of plain ones.
        width = nr if self.size == 1 and not self.interleaved else self.width
        with a.scope():
            acc = [[a.vec(bits, f"acc{p}_{q}") for q in range(width)] for p in range(th * tw)]
            for q in range(width):
                a.vmovups(acc[0][q], Mem(cur.consts, self.lay.init + q * vb, index=cur.col, scale=4))
                for pixel in acc[1:]:
                    a.vmovaps(pixel[q], acc[0][q])
            with a.scope(), a.section(f"taps {th}x{tw}"):
                emit = self._float_taps if self.size == 1 else self._mixed_taps
                emit(acc, plan_groups(self.window, th, tw, self.size), count)
            outs = tile_offsets(th, tw, key.g.ow * key.ldo, key.ldo)
            with a.section("epilogue"):
                self._epilogue(acc, outs, count)

    def _float_taps(self, acc: list[list[Reg]], groups: tuple[Group, ...], count: int) -> None:
        """Columns one after the other; of bf16 first the even channels of all, then the odd ones, by a second load.

        So the filter's taps of either stay in registers. An interleaved block is never partial.
        """
        a, key = self.a, self.key
        source, pad = (a.vec(key.tier.bits, name) for name in ("column", "pad"))
        a.vmovups(pad, Mem(self.cur.consts, self.lay.pad))
        odd = None
        if self.interleaved:
            odd = a.vec(key.tier.bits, "odd")
            a.vmovups(odd, a.const(ODD))
        mask = self._channel_mask(count % key.tier.lanes)
        inside = [g for g in groups if self._inside(g.row, g.columns[0]) or not key.skip_padding]
        vectors = range(len(acc[0]))
        steps = (
            [(g, q) for q in vectors for g in inside] if self.interleaved else [(g, q) for g in inside for q in vectors]
        )
        weights = Weights(self, steps)
        for group, q in steps:
            there = self._inside(group.row, group.columns[0])
            if there:
                at = 0 if self.interleaved else q * key.tier.lanes * self.element
                mem = Mem(self.cur.src, group.row * self.row_pitch + group.columns[0] * self.pixel + at)
                last = q == len(acc[0]) - 1
                self._load_float(source, mem, odd if q else None, mask if last else None)
            for pixel, _, _ in group.users:
                a.vfmadd231ps(acc[pixel][q], source if there else pad, weights.take())

    def _load_float(self, dst: Reg, mem: Mem, odd: Reg | None, mask: Reg | None) -> None:
        """Load a vector of channels as f32; a bf16 is the upper half of the f32 of the same value."""
        a = self.a
        if odd is not None:
            a.vpandd(dst, odd, mem)
        elif self.interleaved:
            a.vpslld(dst, mem, 16)
        else:
            masked = {} if mask is None else {"mask": mask, "zero": True}
            getattr(a, self.widen or "vmovups")(dst, mem, **masked)
            if self.widen:
                a.vpslld(dst, dst, 16)

    def _mixed_taps(self, acc: list[list[Reg]], groups: tuple[Group, ...], count: int) -> None:
        """Groups of columns, interleaved."""
        a, key, size = self.a, self.key, self.size
        bits, vb = key.tier.bits, key.tier.vector_bytes
        stream = MacStream(a, key.mac, bits)
        work = [a.vec(bits, f"col{i}") for i in range({4: 5, 2: 3}[size])]
        pad = a.vec(bits, "pad")
        a.vmovups(pad, Mem(self.cur.consts, self.lay.pad))
        flip = None
        if self.shift:
            flip = a.vec(bits, "flip")
            a.vmovups(flip, a.const(np.full(vb, 0x80, dtype=np.uint8)))
        mask = self._channel_mask(count % (size * key.tier.lanes))
        weights = Weights(self, [(g, q) for g in groups for q in range(size)])
        for group in groups:
            there = [c if self._inside(group.row, c) else None for c in group.columns]
            mixed = [pad] * size
            if any(c is not None for c in there):
                self._load_mixed(work, group.row, there, pad, flip, mask)
                mixed = self._mix(work)
            for q, source in enumerate(mixed):
                for pixel, _, _ in group.users:
                    stream.add(acc[pixel][q], source, weights.take())
        stream.flush()

    def _load_mixed(
        self, work: list[Reg], row: int, columns: list[int | None], pad: Reg, flip: Reg | None, mask: Reg | None
    ) -> None:
        """Load the columns of a group into the first work registers; spare ones meet zero weights."""
        a = self.a
        move = "vmovdqu8" if mask is not None and self.element == 1 else "vmovups"
        masked = {} if mask is None else {"mask": mask, "zero": True}
        for i in range(self.size):
            column = columns[i] if i < len(columns) else None
            if column is None:
                a.vmovaps(work[i], pad)
                continue
            mem = Mem(self.cur.src, row * self.row_pitch + column * self.pixel)
            getattr(a, self.widen or move)(work[i], mem, **masked)
            if flip is not None:
                a.vxorps(work[i], work[i], flip)

    def _inside(self, row: int, column: int) -> bool:
        """Whether a row and a column of the tile's windows are in the image."""
        return self.rows_inside[row] and self.columns_inside[column]

    def _channel_mask(self, tail: int) -> Reg | None:
        """A mask of the channels in a load that is not full; None where all are, and where scratch is loaded."""
        if not tail or self.key.blocking.copy:
            return None
        mask = self.a.kreg("channels")
        set_mask(self.a, mask, tail, self.a.gpr("mask_bits"))
        return mask

    def _mix(self, r: list[Reg]) -> list[Reg]:
        """Interleave the first G registers: each lane of the G results has G taps of one channel."""
        a = self.a
        if self.size == 2:
            a.vpunpcklwd(r[2], r[0], r[1])
            a.vpunpckhwd(r[0], r[0], r[1])
            return [r[2], r[0]]
        a.vpunpcklbw(r[4], r[0], r[1])
        a.vpunpckhbw(r[0], r[0], r[1])
        a.vpunpcklbw(r[1], r[2], r[3])
        a.vpunpckhbw(r[2], r[2], r[3])
        a.vpunpcklwd(r[3], r[4], r[1])
        a.vpunpckhwd(r[4], r[4], r[1])
        a.vpunpcklwd(r[1], r[0], r[2])
        a.vpunpckhwd(r[0], r[0], r[2])
        return [r[3], r[4], r[1], r[0]]

    def _epilogue(self, acc: list[list[Reg]], outs: list[int], count: int) -> None:
        """Store `count` channels; in natural order where the epilogue needs it."""
        key, cur, lanes = self.key, self.cur, self.key.tier.lanes
        if not self.interleaved:
            acc = [self._natural(pixel)[: -(-count // lanes)] for pixel in acc]
        emit_epilogue(
            Tile(
                self.a,
                key.tier,
                key.spec,
                self.lay,
                acc,
                outs,
                count - (len(acc[0]) - 1) * lanes,
                cur.args,
                cur.consts,
                cur.col,
                cur.off,
                cur.ptr,
                self.interleaved,
            )
        )

    def _natural(self, q: list[Reg]) -> list[Reg]:
        """Put a pixel's accumulators into channel order."""
        a = self.a
        if self.size == 1:
            return q
        with a.scope():
            t = [a.vec(self.key.tier.bits, f"turn{i}") for i in range(2)]
            if self.key.tier.bits == 256:
                return self._natural_ymm(q, t)
            if self.size == 2:
                return self._natural_words(q, t)
            a.vshufi32x4(t[0], q[0], q[1], 0x44)
            a.vshufi32x4(q[0], q[0], q[1], 0xEE)
            a.vshufi32x4(t[1], q[2], q[3], 0x44)
            a.vshufi32x4(q[2], q[2], q[3], 0xEE)
            a.vshufi32x4(q[1], t[0], t[1], 0xDD)
            a.vshufi32x4(q[3], q[0], q[2], 0xDD)
            a.vshufi32x4(q[2], q[0], q[2], 0x88)
            a.vshufi32x4(q[0], t[0], t[1], 0x88)
            return q

    def _natural_words(self, q: list[Reg], t: list[Reg]) -> list[Reg]:
        """Merge the lanes of two zmm: channels 8l..8l+3 of lane l are in the first, 8l+4..8l+7 in the second."""
        a = self.a
        # VPERMT2D replaces its first operand, which is a source of both halves: the lower half works on a copy.
        a.vmovaps(t[0], q[0])
        for half, dst in ((0, t[0]), (1, q[0])):
            lanes = (2 * half, 2 * half + 1)
            order = [i + 16 * h for lane in lanes for h in range(2) for i in range(4 * lane, 4 * lane + 4)]
            a.vmovups(t[1], a.const(np.array(order, dtype=np.int32)))
            a.vpermt2d(dst, t[1], q[1])
        a.vmovaps(q[1], q[0])
        a.vmovaps(q[0], t[0])
        return q

    def _natural_ymm(self, q: list[Reg], t: list[Reg]) -> list[Reg]:
        a = self.a
        a.vperm2i128(t[0], q[0], q[1], 0x31)
        a.vperm2i128(q[0], q[0], q[1], 0x20)
        if self.size == 2:
            a.vmovaps(q[1], t[0])
            return q
        a.vperm2i128(t[1], q[2], q[3], 0x31)
        a.vperm2i128(q[1], q[2], q[3], 0x20)
        a.vmovaps(q[2], t[0])
        a.vmovaps(q[3], t[1])
        return q


class Weights:
    """Hands out the packed weights of a tile's multiplies, in registers as far as there are any left."""

    def __init__(self, nest: DepthwiseNest, steps: Sequence[tuple[Group, int]]) -> None:
        """Plan for `steps`, groups with the number of their vector of channels, and take all registers it needs."""
        self.a, self.base, self.bytes = nest.a, nest.cur.weights, nest.key.tier.vector_bytes
        uses = [nest.vectors[kr, taps] * nest.width + q for group, q in steps for _, kr, taps in group.users]
        plan = plan_registers(uses, self.a.available_vectors())
        slots = 1 + max((slot for slot, _ in plan if slot is not None), default=-1)
        self.registers = [self.a.vec(nest.key.tier.bits, f"weights{i}") for i in range(slots)]
        self.plan = iter(zip(uses, plan, strict=True))

    def take(self) -> Any:
        """The next multiply's weights: a register, loaded if it must be, or memory."""
        index, (slot, load) = next(self.plan)
        mem = Mem(self.base, index * self.bytes)
        if slot is None:
            return mem
        if load:
            self.a.vmovups(self.registers[slot], mem)
        return self.registers[slot]
