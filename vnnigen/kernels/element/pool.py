"""Pooling kernels: vectors run along the channels, windows are loops.

A step is a strip of output rows of one image.  Several outputs of a row are computed at a time, with the columns of
their windows written out, so that neighbours share their loads.  Where they have most of their columns in common, a
column's maximum or sum is made once and then combined with others; so 3 x 3 taps cost each output some 5 operations.
Windows too wide to be written out loop over taps.
Which rows and columns of a window are inside comes from tables behind the constants, so the code does not grow with
padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.kernels.element.common import SIZE, NoScratch, by_last, check_offsets, loop_or_skip, steps_of
from vnnigen.kernels.element.pool_bodies import BODIES, Block, Body, BodyCode, sums_bytes
from vnnigen.kernels.element.pooling import MAX_WORD_TAPS, PoolProblem, PoolTables
from vnnigen.kernels.emit_common import add_const, counted, div_const
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.layout import ARG_CONSTS, ARG_SRC
from vnnigen.kernels.mac import TierCode

Reg = Any
#: Windows of at most this many columns are written out.
UNROLL = 16
#: Bytes of rows that stay in the L1 cache while the next row of outputs reads them again.
ROWS_BYTES = 24 << 10


@dataclass(frozen=True)
class PoolKey(NoScratch):
    """Everything the code of a pooling kernel depends on; `op` is "maxpool" or "avgpool".

    `has_start` says that sums do not start at zero: a zero point, or s8 summed as u8. `mode` is "" or that of a
    `WordAverage`, `tie_counts` the numbers of taps that have ties then. `pitch` is the distance of output pixels in
    elements where others lie between them, else 0.
    """

    op: str
    tier: TierCode
    p: PoolProblem
    spec: EpilogueSpec
    has_start: bool = False
    mode: str = ""
    tie_counts: tuple[int, ...] = ()
    pitch: int = 0

    @property
    def name(self) -> str:
        """The kernel's name: operation, types, window, tier."""
        p = self.p
        return f"{self.op}-{p.src}{self.spec.out}-{p.kernel[0]}x{p.kernel[1]}-{self.tier.name}"

    @property
    def split(self) -> tuple[int, int]:
        """Output rows per step, and steps per image."""
        p = self.p
        row = min(p.stride[0], p.h) * p.w * p.c * SIZE[p.src] + p.ow * p.c * SIZE[self.spec.out]
        return steps_of(p.oh, row, 1)

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.p.n * self.split[1]

    @property
    def flush(self) -> bool:
        """Whether 16-bit sums must be emptied on the way."""
        return sums_bytes(self.op, self.p.src) and self.p.taps > MAX_WORD_TAPS

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _Pool(self, features).build()


class _Pool:
    """Emits one key."""

    IMAGE, ROW, DOWN, BLOCKS, ENTRY, OFF, COLUMN = range(7)  # stack slots

    def __init__(self, key: PoolKey, features: frozenset[str] | None) -> None:
        p = key.p
        self.key, self.p = key, p
        self.pixel = p.c * SIZE[p.src]
        self.row_pitch = p.w * self.pixel
        self.out_pixel = key.pitch or p.c
        check_offsets(f"{p.w} x {p.c} elements", self.row_pitch * (p.dilation[0] + 1), p.ow * self.out_pixel * 4)
        self.tables = PoolTables.of(p)
        self.a = a = Assembler(
            key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features
        )
        self.args, self.index = a.load_argument("args"), a.load_argument("index")
        a.release(a.load_argument("scratch"))
        self.slots = a.stack(64)
        names = ("consts", "at", "off", "row", "tap", "rows", "count", "taps", "real", "ptr", "along", "entry")
        self.r: dict[str, Reg] = {name: a.gpr(name) for name in names}
        self._columns()
        self.rows_vary = bool((p.valid(0)[:, 1] != p.kernel[0]).any())
        code = BodyCode(key.tier, p, key.spec, key.flush, key.has_start, self.rows_vary, key.mode, key.tie_counts)
        self.body: Body = BODIES[key.op, key.p.src](a, code, self.r, self.args)

    def _columns(self) -> None:
        """Split output columns into (left borders, whole windows, right borders)."""
        inside = np.flatnonzero(self.p.valid(1)[:, 1] == self.p.kernel[1])
        self.left = int(inside[0]) if len(inside) else self.p.ow
        self.inside = len(inside)
        self.right = self.p.ow - self.left - self.inside

    def _slot(self, which: int) -> Mem:
        return self.slots + 8 * which

    def _slot_loop(self, which: int, body: Callable[[], None]) -> None:
        a = self.a
        top = a.label("slot_loop")
        a.bind(top)
        body()
        a.mov(self.r["ptr"], self._slot(which))
        a.sub(self.r["ptr"], 1)
        a.mov(self._slot(which), self.r["ptr"])
        a.jnz(top)

    def build(self) -> Code:
        """Emit everything and encode it."""
        a, p, r = self.a, self.p, self.r
        strip, strips = self.key.split
        a.mov(r["consts"], Mem(self.args, 8 * ARG_CONSTS))
        self.body.setup()
        image = r["at"]
        if strips == 1:
            a.mov(image, self.index)
            a.mov(self.index, 0)
        else:
            div_const(a, image, self.index, strips, self.key.steps)
            a.imul(r["ptr"], image, -strips)
            a.add(self.index, r["ptr"])
        by_last(a, r["ptr"], self.index, strips, strip, p.oh - (strips - 1) * strip)
        a.mov(self._slot(self.DOWN), r["ptr"])
        a.imul(r["off"], image, p.oh)
        a.imul(self.index, self.index, strip)
        a.add(r["off"], self.index)
        a.imul(r["off"], r["off"], p.ow * self.out_pixel)
        a.mov(self._slot(self.OFF), r["off"])
        a.imul(image, image, p.h)
        a.imul(image, image, self.row_pitch)
        a.add(image, Mem(self.args, 8 * ARG_SRC))
        a.mov(self._slot(self.IMAGE), image)
        a.imul(self.index, self.index, 16)
        a.add(self.index, r["consts"])
        add_const(a, self.index, self.tables.rows)
        self.row_entry = self.index
        self._slot_loop(self.DOWN, self._row)
        a.ret()
        return a.finalize().encode()

    def _row(self) -> None:
        """One row of outputs."""
        a, p, r = self.a, self.p, self.r
        a.mov(r["at"], self._slot(self.IMAGE))
        a.add(r["at"], Mem(self.row_entry))
        a.mov(r["rows"], Mem(self.row_entry, 8))
        a.mov(r["off"], self._slot(self.OFF))
        full, rest = divmod(p.c, self.body.block)
        if full:
            if full > 1:
                a.mov(r["ptr"], full)
                a.mov(self._slot(self.BLOCKS), r["ptr"])
            block = Block(self.body.vectors, self.body.unit)

            def one() -> None:
                self._block(block)
                a.add(r["at"], self.body.block * SIZE[p.src])
                a.add(r["off"], self.body.block)

            if full > 1:
                self._slot_loop(self.BLOCKS, one)
            else:
                one()
        if rest:
            vectors = -(-rest // self.body.unit)
            valid = rest - (vectors - 1) * self.body.unit
            back = vectors * self.body.unit - rest
            if not self.key.tier.masks and valid != self.body.unit and p.c >= vectors * self.body.unit:
                # Without masks: the last whole vectors again, partly computed already.
                a.sub(r["at"], back * SIZE[p.src])
                a.sub(r["off"], back)
                valid = self.body.unit
            self._block(Block(vectors, valid))
        a.add(self.row_entry, 16)
        a.mov(r["ptr"], self._slot(self.OFF))
        a.add(r["ptr"], p.ow * self.out_pixel)
        a.mov(self._slot(self.OFF), r["ptr"])

    def _block(self, b: Block) -> None:
        """All columns of a row for one block of channels; `at` and `off` keep their values."""
        a, r = self.a, self.r
        a.mov(self._slot(self.COLUMN), r["off"])
        tw = 0 if self.key.flush else self._tile_width(b)
        if tw and max(self.left, self.right) <= tw:
            self._written(b, tw)
        else:
            self._border(b, 0, self.left)
            if self.inside:
                a.lea(r["entry"], self._window(r["at"], self.left))
                with counted(a, r["along"], self.inside):
                    a.mov(r["row"], r["entry"])
                    a.mov(r["real"], self.p.kernel[1])
                    self._looped(b)
                    a.add(r["entry"], self.p.stride[1] * self.pixel)
                    a.add(r["off"], self.out_pixel)
            self._border(b, self.left + self.inside, self.right)
        a.mov(r["off"], self._slot(self.COLUMN))

    def _window(self, base: Reg, x: int) -> Mem:
        """Where the window of output column x begins, perhaps outside the image."""
        return Mem(base, (x * self.p.stride[1] - self.p.pad[1][0]) * self.pixel)

    def _border(self, b: Block, first: int, count: int) -> None:
        """Outputs whose windows the table describes."""
        a, r = self.a, self.r
        if not count:
            return
        a.lea(r["entry"], Mem(r["consts"], self.tables.columns + 16 * first))
        with counted(a, r["along"], count):
            a.mov(r["row"], r["at"])
            a.add(r["row"], Mem(r["entry"]))
            a.mov(r["real"], Mem(r["entry"], 8))
            self._looped(b)
            a.add(r["entry"], 16)
            a.add(r["off"], self.out_pixel)

    def _written(self, b: Block, tw: int) -> None:
        """`tw` outputs at a time, those at the borders with the taps that they have."""
        a, p, r = self.a, self.p, self.r
        head = min(tw, p.ow) if self.left else 0
        full = max(0, p.ow - self.right - head) // tw
        if head:
            a.mov(r["row"], r["at"])
            self._outputs(b, range(head), self._window(r["row"], 0).disp)
        if full:
            a.lea(r["entry"], self._window(r["at"], head))
            with counted(a, r["along"], full):
                a.mov(r["row"], r["entry"])
                self._outputs(b, range(head, head + tw), 0)
                a.add(r["entry"], tw * p.stride[1] * self.pixel)
        for x in range(head + full * tw, p.ow, tw):
            a.mov(r["row"], r["at"])
            self._outputs(b, range(x, min(x + tw, p.ow)), self._window(r["row"], x).disp)

    def _tile_width(self, b: Block) -> int:
        """Outputs that are computed together: up to 8, as accumulators permit; 0 where windows are too wide."""
        if self.p.kernel[1] > UNROLL:
            return 0
        return max((t for t in range(1, 9) if self.body.fits(b.vectors, t)), default=0)

    def _outputs(self, b: Block, xs: range, start: int) -> None:
        """Neighbouring outputs, the first one's window `start` bytes from `row`; `off` moves on."""
        a, p, r = self.a, self.p, self.r
        sw, dw = p.stride[1], p.dilation[1]
        first = xs[0] * sw - p.pad[1][0]
        windows = [
            [c for c in range(t * sw, t * sw + p.kernel[1] * dw, dw) if 0 <= first + c < p.w] for t in range(len(xs))
        ]
        outputs = [t * sw for t in range(len(xs))]
        # The accumulators that a column goes to: its own, numbered by its place, or those of its outputs.
        slots: dict[int, list[int]] = {}
        for output, window in zip(outputs, windows, strict=True):
            for c in window:
                slots[c] = [c] if p.by_columns else [*slots.get(c, []), output]
        with a.scope():
            self.body.start(b, sorted({*outputs, *(s for some in slots.values() for s in some)}))
            whole = bool((p.valid(0)[:, 1] > 0).all())

            def row(*, fresh: bool) -> None:
                seen: set[int] = set() if fresh else set(self.body.slots)
                for column, some in sorted(slots.items()):
                    mem = Mem(r["row"], start + column * self.pixel)
                    self.body.tap(mem, [s for s in some if s in seen], [s for s in some if s not in seen])
                    seen.update(some)
                a.add(r["row"], p.dilation[0] * self.row_pitch)

            if whole:
                self.body.clear([output for output, window in zip(outputs, windows, strict=True) if not window])
                row(fresh=True)
                self._rows(lambda: row(fresh=False), less=1)
            else:
                self.body.clear(list(self.body.slots))
                self._rows(lambda: row(fresh=False))
            self._prefetch(b, len(xs), start)
            if p.by_columns:
                # The first column's accumulator takes the output: outputs further on do not have that column.
                for output, window in zip(outputs, windows, strict=True):
                    self.body.combine(output, window)
            self.body.keep(outputs)
            taps = p.valid(1)[:, 1]
            self.body.finish([t * self.out_pixel for t in range(len(xs))], [int(taps[x]) for x in xs])
        a.add(r["off"], len(xs) * self.out_pixel)

    def _prefetch(self, b: Block, outputs: int, start: int) -> None:
        """Fetch what the next row of outputs reads and this one did not, where the rest stays in the L1 cache."""
        p = self.p
        rows = p.kernel[0] * self.row_pitch + p.ow * p.c * SIZE[self.key.spec.out]
        if p.stride[0] >= p.kernel[0] or p.dilation[0] > 1 or rows > ROWS_BYTES:
            return
        for y in range(p.stride[0]):
            for x in range(outputs * p.stride[1]):
                for line in range(0, b.vectors * self.body.unit * SIZE[p.src], 64):
                    self.a.prefetcht0(Mem(self.r["row"], start + y * self.row_pitch + x * self.pixel + line))

    def _rows(self, row: Callable[[], None], less: int = 0) -> None:
        """Repeat for the rows of the window that are inside the image, but for the first `less`."""
        taps = self.p.valid(0)[:, 1] - less
        if (taps == taps[0]).all() and taps[0] <= 2:
            for _ in range(taps[0]):
                row()
            return
        self.a.mov(self.r["count"], self.r["rows"])
        if less:
            self.a.sub(self.r["count"], less)
        loop_or_skip(self.a, self.r["count"], row, may_be_zero=bool((taps == 0).any()))

    def _looped(self, b: Block) -> None:
        """One output from `row` on, `real` columns; afterwards `real` counts the window's taps."""
        a, r = self.a, self.r
        with a.scope():
            by_columns = self.p.by_columns and not self.key.flush
            self.body.start(b, [0, 1] if by_columns else [0])
            self.body.clear([0])
            if by_columns:
                self._loop_by_columns()
            else:
                self._loop_by_rows()
            self.body.keep([0])
            a.imul(r["real"], r["rows"])
            self.body.finish([0], [None])

    def _loop_by_rows(self) -> None:
        """All taps of a row, then the next one."""
        a, p, r = self.a, self.p, self.r

        def tap() -> None:
            self.body.tap(Mem(r["tap"]), [0])
            a.add(r["tap"], p.dilation[1] * self.pixel)

        def row() -> None:
            a.mov(r["tap"], r["row"])
            a.mov(r["taps"], r["real"])
            self._taps(tap)
            a.add(r["row"], p.dilation[0] * self.row_pitch)

        self._rows(row)

    def _loop_by_columns(self) -> None:
        """Each column on its own, then together with those before it."""
        a, p, r = self.a, self.p, self.r

        def tap() -> None:
            self.body.tap(Mem(r["tap"]), [1])
            a.add(r["tap"], p.dilation[0] * self.row_pitch)

        def column() -> None:
            a.mov(r["tap"], r["row"])
            self.body.clear([1])
            self._rows(tap)
            self.body.combine(0, [0, 1])
            a.add(r["row"], p.dilation[1] * self.pixel)

        a.mov(r["taps"], r["real"])
        loop_or_skip(a, r["taps"], column, may_be_zero=bool((p.valid(1)[:, 1] == 0).any()))

    def _taps(self, tap: Callable[[], None]) -> None:
        """`taps` times a tap, emptying 16-bit sums when they are full."""
        a, r = self.a, self.r
        empty = bool((self.p.valid(1)[:, 1] == 0).any())
        if not self.key.flush:
            loop_or_skip(a, r["taps"], tap, may_be_zero=empty)
            return
        top, end, some = a.label("chunk"), a.label("chunks_end"), a.label("whole_chunk")
        if empty:
            a.test(r["taps"], r["taps"])
            a.jz(end)
        a.bind(top)
        a.mov(r["ptr"], MAX_WORD_TAPS)
        a.cmp(r["taps"], MAX_WORD_TAPS)
        a.jae(some)
        a.mov(r["ptr"], r["taps"])
        a.bind(some)
        a.sub(r["taps"], r["ptr"])
        with a.loop(r["ptr"]):
            tap()
        self.body.empty()
        a.test(r["taps"], r["taps"])
        a.jnz(top)
        a.bind(end)
