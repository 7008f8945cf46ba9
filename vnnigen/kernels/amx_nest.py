"""The loops of an AMX kernel: blocks of one shape follow each other without a break.

The epilogue of a block runs beside the multiplies of the next one, so the nest of loops over columns, rows and pixels
is one loop, whose cursors step like an odometer.  Where the shape of blocks changes (tails, rows of the image whose
filter rows meet padding) a new loop begins; only there is an epilogue waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from vnnigen.isa.assembler import Label, Mem
from vnnigen.kernels.amx_block import Block, BlockCode, KRuns, Registers
from vnnigen.kernels.amx_fold import emit_fold, emit_spread
from vnnigen.kernels.amx_key import AmxKey
from vnnigen.kernels.amx_tiling import (
    ROW_BYTES,
    TILE_REGISTERS,
    Variant,
    plan_tiles,
    row_tiles,
    run_elements,
)
from vnnigen.kernels.emit_common import add_const
from vnnigen.kernels.emit_copy import scratch_rows
from vnnigen.kernels.geometry import SRC_BYTES, TileClass, row_classes, taps_inside
from vnnigen.kernels.nest import LoopNest

Reg = Any


@dataclass(frozen=True)
class _Phase:
    """Blocks of one shape: `along` of them in a row from column `x` on; a count of rows or columns may be one."""

    block: Block
    th: int
    tw: int
    x: int
    along: int
    one_row: bool
    one_column: bool

    @property
    def alone(self) -> bool:
        """Whether there is one such block."""
        return self.along == 1 and self.one_row and self.one_column


class AmxNest(LoopNest):
    """Emits an AMX kernel."""

    # Slots of the stack: where the group, the rows of a class and a phase begin, the odometer, and what blocks need.
    (
        SRC0, OFF0, COL0, WEIGHTS0, CLASS_SRC, CLASS_OFF, ROW_COUNT, SRC, OFF, PIXEL, PIXELS_LEFT, ROWS_LEFT,
        COLUMNS_LEFT, COLUMNS, BUFFER, BUFFERS, START, OUTER, INNER, WAITING, BLOCKS_LEFT, LAST_COL, LAST_OFF,
    ) = range(23)  # fmt: skip

    def __init__(self, key: AmxKey, features: frozenset[str] | None):
        super().__init__(key, features)
        self.tiles_key = key
        g, steps = key.g, key.steps_of_run
        self.runs = KRuns(g.kh, 1 if run_elements(g)[1] else g.kw, steps, g.dh * self.row_pitch, g.dw * self.pixel)
        self.panel_bytes = self.runs.panel_bytes
        self.block_bytes = key.blocking.nr * self.panel_bytes

    def _my(self, which: int) -> Mem:
        return self.own + 8 * which

    def _set(self, which: int, value: Any) -> None:
        """Store a constant or another slot's value."""
        a, tmp = self.a, self.cur.ptr
        a.mov(tmp, value)
        a.mov(self._my(which), tmp)

    def _shift(self, which: int, by: int) -> None:
        """Add a constant to a slot."""
        a, tmp = self.a, self.cur.ptr
        if by:
            a.mov(tmp, self._my(which))
            add_const(a, tmp, by)
            a.mov(self._my(which), tmp)

    def _count(self, which: int) -> None:
        """Subtract one from a slot; flags say whether it came to zero."""
        a, tmp = self.a, self.cur.ptr
        a.mov(tmp, self._my(which))
        a.sub(tmp, 1)
        a.mov(self._my(which), tmp)

    def _locate(self, args: Reg, weights: Reg, col: Reg, consts: Reg) -> None:
        """Decode the step's index and copy its rows; what is to be laid out anew are rows of the source."""
        key, source = self.tiles_key, self.tiles_key.source
        if source is None:
            super()._locate(args, weights, col, consts)
            return
        after, self.rows = self.rows, scratch_rows(source, key.mac, key.blocking.strip)
        self.key = replace(key, g=source)
        super()._locate(args, weights, col, consts)
        self.key, before, self.rows = key, self.rows, after
        a = self.a
        with a.scope():
            dst = a.gpr("folded")
            a.lea(dst, Mem(self.first_src, key.folded_at))
            counters = [a.gpr("row"), a.gpr("pixels")]
            if key.spreads:
                emit_spread(a, source, before, after, self.first_src, dst, counters)
            else:
                emit_fold(a, source.sh, before, after, key.g.ow - 1 + key.g.kw, self.first_src, dst, counters)
        a.mov(self.first_src, self._slot(self.SCRATCH))
        add_const(a, self.first_src, key.folded_at)

    def _groups(self) -> None:
        """All groups, one after the other."""
        a, key, g, cur = self.a, self.key, self.key.g, self.cur
        self.own = a.stack(8 * 23)
        for slot, register in (
            (self.SRC0, self.first_src), (self.OFF0, self.first_off), (self.COL0, cur.col),
            (self.WEIGHTS0, cur.weights),
        ):  # fmt: skip
            a.mov(self._my(slot), register)
        a.release(self.first_off)
        done, fresh = a.gpr("done"), a.gpr("fresh")
        self.code = self._block_code(done, fresh)
        self._prepare(done, fresh)
        if g.groups == 1:
            self._column_blocks()
            return
        a.mov(cur.ptr, g.groups)
        a.mov(self._slot(self.GROUP), cur.ptr)
        with self._slot_loop(self.GROUP, may_be_zero=False):
            self._column_blocks()
            self._shift(self.SRC0, g.icg * (key.mac.element_bytes if key.blocking.copy else SRC_BYTES[g.src]))
            self._shift(self.OFF0, g.n)
            self._shift(self.COL0, key.padded_columns)
            self._shift(self.WEIGHTS0, key.padded_columns // key.tier.lanes * self.panel_bytes)

    def _block_code(self, done: Reg, fresh: Reg) -> BlockCode:
        a, key, cur, g = self.a, self.tiles_key, self.cur, self.key.g
        registers = Registers(
            cur.args, cur.consts, cur.src, cur.weights, cur.col, cur.off, self.first_src, done, fresh,
            cur.k if key.stores_late else fresh, cur.ptr, cur.k,
            cur.outer, a.gpr("row_bytes"), self._my(self.BUFFERS), self._my(self.START), self._my(self.WAITING),
            self._my(self.OUTER), self._my(self.INNER), cur.ahead, cur.ahead_end,
        )  # fmt: skip
        down = g.sh * self.row_pitch
        return BlockCode(
            a, key.tier, key.mac, key.spec, self.lay, self.runs, plan_tiles(*key.block_tiles), key.rows,
            (down, down if g.ow == 1 else g.sw * self.pixel), (g.ow * key.ldo, key.ldo),
            [a.tile(f"tile{i}") for i in range(TILE_REGISTERS)], registers, key.ahead, key.streams,
        )  # fmt: skip

    def _prepare(self, done: Reg, fresh: Reg) -> None:
        """Addresses in scratch, and the two distances between rows of tiles."""
        a, key, r = self.a, self.tiles_key, self.code.r
        a.mov(fresh, self._slot(self.SCRATCH))
        add_const(a, fresh, key.buffer_at)
        a.mov(self._my(self.BUFFER), fresh)
        a.lea(done, Mem(fresh, key.buffer_bytes, index=fresh))
        a.mov(self._my(self.BUFFERS), done)
        add_const(a, fresh, 2 * key.buffer_bytes)
        a.mov(self._my(self.START), fresh)
        a.mov(r.stride, self.code.pitches[1])
        a.mov(r.width, ROW_BYTES)

    def _column_blocks(self) -> None:
        """Full column blocks of the chunk, then, in the last chunk, the tail block."""
        a, key, b = self.a, self.key, self.key.blocking
        lanes = key.tier.lanes
        last = key.full_blocks - (key.chunks - 1) * b.chunk
        if key.full_blocks:
            none = a.label("no_full_blocks")
            a.mov(self.cur.ptr, self._slot(self.BLOCKS))
            if last == 0:
                a.test(self.cur.ptr, self.cur.ptr)
                a.jz(none)
            a.mov(self._my(self.COLUMNS), self.cur.ptr)
            if key.full_blocks > 1 and Variant.SPLIT_K in self.tiles_key.variant:
                self._columns_by_parts(lanes)
            else:
                self._rows_of_image(b.nr, lanes, one_column=key.full_blocks == 1)
            a.bind(none)
        tail = key.g.n - key.full_blocks * key.block_columns
        if tail:
            panels = -(-tail // lanes)
            with self._only_last(self.CHUNK, key.chunks):
                self._shift_columns(last)
                self._rows_of_image(panels, tail - (panels - 1) * lanes, one_column=True)
                self._shift_columns(-last)

    def _shift_columns(self, blocks: int) -> None:
        """Move the group's beginning by column blocks."""
        self._shift(self.OFF0, blocks * self.key.block_columns)
        self._shift(self.COL0, blocks * self.key.block_columns)
        self._shift(self.WEIGHTS0, blocks * self.block_bytes)

    def _columns_by_parts(self, lanes: int) -> None:
        """Full column blocks one by one, each with all parts of K; the group's beginning is put back."""
        a, cur, first = self.a, self.cur, (self.OFF0, self.COL0, self.WEIGHTS0)
        saved = a.stack(8 * len(first))
        for i, slot in enumerate(first):
            a.mov(cur.ptr, self._my(slot))
            a.mov(saved + 8 * i, cur.ptr)
        self._set(self.BLOCKS_LEFT, self._my(self.COLUMNS))
        top = a.label("column_block")
        a.bind(top)
        self._rows_of_image(self.key.blocking.nr, lanes, one_column=True)
        self._shift_columns(1)
        self._count(self.BLOCKS_LEFT)
        a.jnz(top)
        for i, slot in enumerate(first):
            self._set(slot, saved + 8 * i)

    def _classes(self) -> list[tuple[TileClass, tuple[int, int]]]:
        """Rows of blocks by height and by the filter rows that meet the image."""
        g = self.key.g
        skip = self.key.skip_padding and g.kh > 1

        def kind(rows: TileClass) -> tuple[int, tuple[int, int]]:
            return rows.size, taps_inside(g, rows) if skip else (0, g.kh)

        found = []
        for (size, taps), members in groupby(row_classes(g, self.key.blocking.th), kind):
            classes = list(members)
            found.append((TileClass(classes[0].first, sum(c.count for c in classes), size, ()), taps))
        return found

    def _rows_of_image(self, nr: int, valid: int, *, one_column: bool) -> None:
        """All blocks of `nr` panels, class of rows by class of rows."""
        a, g, b = self.a, self.key.g, self.key.blocking
        for rows, taps in self._classes():
            absent = a.label("class_not_in_strip")
            self._locate_class(rows, absent)
            full, tail = divmod(g.ow, b.tw)
            for x, tw, along in ((0, b.tw, full), (full * b.tw, tail, 1)):
                if tw and along:
                    tiles = row_tiles(g, self.tiles_key.shape(rows.size, tw, nr), self.code.rows)
                    one_row = self.key.strips == 1 and rows.count == 1
                    for part in self.tiles_key.k_parts:
                        block = Block(self.code, tiles, nr, valid, taps, part)
                        emit = self._late_phase if self.tiles_key.stores_late else self._phase
                        emit(_Phase(block, rows.size, tw, x, along, one_row, one_column))
            a.bind(absent)

    def _locate_class(self, rows: TileClass, absent: Label) -> None:
        """Set the slots of a class of rows: where its first one in this strip begins, and how many there are."""
        a, key, g, b, cur = self.a, self.key, self.key.g, self.key.blocking, self.cur
        down, out = g.sh * self.row_pitch * b.th, g.ow * key.ldo * b.th
        if key.strips == 1:
            self._set(self.ROW_COUNT, rows.count)
            for start, to, by in ((self.SRC0, self.CLASS_SRC, down), (self.OFF0, self.CLASS_OFF, out)):
                a.mov(cur.ptr, rows.first * by)
                a.add(cur.ptr, self._my(start))
                a.mov(self._my(to), cur.ptr)
            return
        first, last, bound = cur.ptr, cur.k, cur.src
        strip = cur.off
        a.imul(strip, self._slot(self.STRIP), b.strip // b.th)
        a.mov(first, rows.first)
        a.cmp(first, strip)
        a.cmovl(first, strip)
        a.lea(last, Mem(strip, b.strip // b.th))
        a.mov(bound, rows.first + rows.count)
        a.cmp(last, bound)
        a.cmovg(last, bound)
        a.sub(last, first)
        a.jle(absent)
        a.mov(self._my(self.ROW_COUNT), last)
        a.sub(first, strip)
        for start, to, by in ((self.SRC0, self.CLASS_SRC, down), (self.OFF0, self.CLASS_OFF, out)):
            a.imul(last, first, by)
            a.add(last, self._my(start))
            a.mov(self._my(to), last)

    # One loop over blocks of a shape

    def _phase(self, p: _Phase) -> None:
        """Blocks of one shape: the first alone, each further one with the epilogue of the one before, the last's."""
        a, r = self.a, self.code.r
        self._begin(p)
        p.block.multiply(finish=False)
        top, body, end = a.label("next_block"), a.label("block"), a.label("last_block")
        if not p.block.ends:
            if not p.alone:
                self._advance(p, top, end)
                a.bind(top)
                p.block.multiply(finish=False)
                self._advance(p, top, end)
                a.jmp(top)
                a.bind(end)
            return
        if not p.alone:
            a.bind(top)
        a.mov(r.done, r.fresh)
        a.mov(r.done_col, r.col)
        self._find_output(r.done_off)
        if not p.alone:
            with a.section("next block"):
                self._advance(p, body, end)
            a.bind(body)
            p.block.multiply(finish=True)
            a.jmp(top)
            a.bind(end)
        with a.section("finish the last block"):
            p.block.epilogue()

    def _late_phase(self, p: _Phase) -> None:
        """Blocks of one shape of few steps: each stores the sums of the one before and finishes the one before that."""
        a, block = self.a, p.block
        self._begin(p)
        block.multiply_late(store=False, finish=False)
        self._remember()
        if not p.alone:
            second, top, body = a.label("second_block"), a.label("next_block"), a.label("block")
            one, end = a.label("one_block"), a.label("last_block")
            self._advance(p, second, one)
            a.bind(second)
            block.multiply_late(store=True, finish=False)
            a.bind(top)
            self._recall()
            self._remember()
            with a.section("next block"):
                self._advance(p, body, end)
            a.bind(body)
            block.multiply_late(store=True, finish=True)
            a.jmp(top)
            a.bind(end)
            with a.section("finish the last block but one"):
                block.epilogue()
            a.bind(one)
        with a.section("finish the last block"):
            block.store_late()
            self._recall()
            block.epilogue()

    def _remember(self) -> None:
        """Keep where the outputs of this block go."""
        a, r = self.a, self.code.r
        self._set(self.LAST_COL, r.col)
        self._find_output(r.ptr)
        a.mov(self._my(self.LAST_OFF), r.ptr)

    def _find_output(self, to: Reg) -> None:
        """Where this block's outputs begin."""
        a = self.a
        a.mov(to, self._my(self.PIXEL))
        a.add(to, self.code.r.col)
        a.sub(to, self._my(self.COL0))

    def _recall(self) -> None:
        """The sums just stored, of the block that `_remember` was called for, are those to finish next."""
        a, r = self.a, self.code.r
        a.mov(r.done, r.fresh)
        a.mov(r.done_col, self._my(self.LAST_COL))
        a.mov(r.done_off, self._my(self.LAST_OFF))

    def _begin(self, p: _Phase) -> None:
        """Put the cursors on the first block and set the odometer."""
        a, r, g = self.a, self.code.r, self.key.g
        a.mov(r.src, self._my(self.CLASS_SRC))
        add_const(a, r.src, p.x * g.sw * self.pixel)
        a.mov(self._my(self.SRC), r.src)
        a.mov(r.ptr, self._my(self.CLASS_OFF))
        add_const(a, r.ptr, p.x * self.key.ldo)
        a.mov(self._my(self.OFF), r.ptr)
        a.mov(self._my(self.PIXEL), r.ptr)
        self._first_column(p)
        self._first_pixels(p)
        a.mov(r.done, self._my(self.BUFFERS))
        a.sub(r.done, self._my(self.BUFFER))
        if p.block.part is not None:
            a.mov(r.ptr, self._my(self.START))
            a.add(r.ptr, self.key.blocking.nr * ROW_BYTES)
            a.mov(self._my(self.WAITING), r.ptr)

    def _first_column(self, p: _Phase) -> None:
        a, r = self.a, self.code.r
        a.mov(r.col, self._my(self.COL0))
        a.mov(r.weights, self._my(self.WEIGHTS0))
        if not p.one_column:
            self._set(self.COLUMNS_LEFT, self._my(self.COLUMNS))

    def _first_pixels(self, p: _Phase) -> None:
        if p.along > 1:
            self._set(self.PIXELS_LEFT, p.along)
        if not p.one_row:
            self._set(self.ROWS_LEFT, self._my(self.ROW_COUNT))

    def _advance(self, p: _Phase, body: Label, end: Label) -> None:
        """Move to the next block and fall through or jump to `body`; to `end` after the last."""
        a, r = self.a, self.code.r
        if Variant.COLUMNS_INSIDE in self.tiles_key.variant:
            if not p.one_column:
                self._next_column(p, body)
            self._next_pixels(p, body, end)
            return
        around = a.label("next_column")
        self._next_pixels(p, body, end if p.one_column else around)
        if p.one_column:
            return
        if p.along > 1 or not p.one_row:
            a.jmp(body)
            a.bind(around)
            a.mov(r.src, self._my(self.SRC))
            self._set(self.PIXEL, self._my(self.OFF))
            self._first_pixels(p)
        self._count(self.COLUMNS_LEFT)
        a.jz(end)
        a.add(r.col, self.key.block_columns)
        a.add(r.weights, self.block_bytes)

    def _next_column(self, p: _Phase, body: Label) -> None:
        """To the next column block, and on to `body`; or back to the first one."""
        a, r = self.a, self.code.r
        around = a.label("first_column")
        self._count(self.COLUMNS_LEFT)
        a.jz(around)
        a.add(r.col, self.key.block_columns)
        a.add(r.weights, self.block_bytes)
        a.jmp(body)
        a.bind(around)
        self._first_column(p)

    def _next_pixels(self, p: _Phase, body: Label, end: Label) -> None:
        """To the next pixels of the row or the first of the next row; to `end` after the last row."""
        a, r, g, ldo = self.a, self.code.r, self.key.g, self.key.ldo
        source, out = p.tw * g.sw * self.pixel, p.tw * ldo
        if p.along > 1:
            around = a.label("next_row")
            self._count(self.PIXELS_LEFT)
            a.jz(around)
            a.add(r.src, source)
            self._shift(self.PIXEL, out)
            a.jmp(body)
            a.bind(around)
            self._set(self.PIXELS_LEFT, p.along)
        if p.one_row:
            if p.along > 1 or Variant.COLUMNS_INSIDE in self.tiles_key.variant or p.one_column:
                a.jmp(end)
            return
        self._count(self.ROWS_LEFT)
        a.jz(end)
        add_const(a, r.src, p.th * g.sh * self.row_pitch - (p.along - 1) * source)
        self._shift(self.PIXEL, p.th * g.ow * ldo - (p.along - 1) * out)
