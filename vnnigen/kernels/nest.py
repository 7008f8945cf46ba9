"""The loop nest around the microkernel: one function that computes one step of the parallel grid.

Step `index` is (image, strip of output rows, chunk of column blocks), or, where weights are larger than the source,
(chunk, image, strip), so that they are read once.  It copies its source rows to scratch if they
must be padded, shifted or widened, then runs: groups > column blocks > tiles down the strip > tiles along the row.
The weights of one column block stay in the L1 cache while all of the strip's tiles use them; meanwhile those of later
steps, or of the kernel that runs next, are fetched into the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from vnnigen.errors import ShapeError
from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.kernels.blocking import Blocking, Registers
from vnnigen.kernels.emit_common import add_const, div_const
from vnnigen.kernels.emit_copy import CopyRegs, CopyStage, scratch_rows
from vnnigen.kernels.emit_epilogue import epilogue_registers
from vnnigen.kernels.emit_tile import Cursors, TileCode, emit_tile, tile_offsets
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.geometry import SRC_BYTES, Geometry, TileClass, row_classes, segments
from vnnigen.kernels.layout import (
    ARG_AHEAD,
    ARG_AHEAD_FROM,
    ARG_AHEAD_SHARE,
    ARG_CONSTS,
    ARG_NEXT,
    ARG_NEXT_SHARE,
    ARG_SRC,
    ARG_WEIGHTS,
    ConstLayout,
)
from vnnigen.kernels.mac import Mac, TierCode
from vnnigen.kernels.packing import filter_cells, filter_rows
from vnnigen.kernels.taps import column_classes, cuts_columns, everything, tile_taps

Reg = Any


@dataclass(frozen=True)
class NestKey:
    """Everything the code of a GEMM or convolution kernel depends on.

    `column0` is the first output column (of each group) computed, `ldo` the distance of output pixels in
    elements, `launch` picks the pair of weight and constant slots: weights of mixed chain safety are run as
    several launches over column ranges.
    """

    op: str
    g: Geometry
    tier: TierCode
    mac: Mac
    spec: EpilogueSpec
    blocking: Blocking
    row_sums: bool
    column0: int
    ldo: int
    launch: int
    #: Whether filter rows that meet padding only may be left out.
    skip_padding: bool = False
    #: Cache lines that a turn of the K loop fetches ahead.
    ahead: int = field(default=0, kw_only=True)

    @property
    def columns_first(self) -> bool:
        """Whether all images and strips meet a chunk's weights before the next chunk's turn comes."""
        g = self.g
        return g.groups == 1 and g.n * g.k * self.mac.weight_bytes > g.h * g.w * g.ic * SRC_BYTES[g.src]

    @property
    def streams(self) -> bool:
        """Whether it fetches its own weights from beyond the L2 cache as it goes."""
        return False

    @property
    def leaves_own(self) -> bool:
        """Whether it leaves fetching its own weights to the processor, and fetches those of the next kernel only."""
        return False

    @property
    def name(self) -> str:
        """The kernel's name, which says what it is: operation, types, tile, tier and chain."""
        weights = self.g.src if self.mac.acc == "f32" else "s8"
        usual = {"int8": "vnni", "bf16": "bf16"}
        main = "amx" if self.tier.tiles else usual.get("bf16" if self.g.src == "bf16" else "int8")
        chain = "" if self.mac.name == main or self.g.src == "f32" else f"-{self.mac.name}"
        types = self.g.src if self.g.src == weights == self.spec.out else f"{self.g.src}{weights}{self.spec.out}"
        return f"{self.op}-{types}-{self.tile_name}-{self.tier.name}{chain}"

    @property
    def tile_name(self) -> str:
        """Rows and columns of a register tile."""
        return f"{self.blocking.mr}x{self.block_columns}"

    @property
    def strips(self) -> int:
        """Strips of output rows in one image."""
        return -(-self.g.oh // self.blocking.strip)

    @property
    def pixel_blocks(self) -> int:
        """Register tiles that share a column block's weights."""
        g, b = self.g, self.blocking
        return g.images * -(-g.oh // b.th) * -(-g.ow // b.tw)

    @property
    def block_columns(self) -> int:
        """Columns of a full block."""
        return self.blocking.nr * self.tier.lanes

    @property
    def full_blocks(self) -> int:
        """Column blocks without a tail."""
        return self.g.n // self.block_columns

    @property
    def chunks(self) -> int:
        """Chunks of column blocks."""
        blocks = -(-self.g.n // self.block_columns)
        return -(-blocks // self.blocking.chunk)

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.g.images * self.strips * self.chunks

    @property
    def skip_columns(self) -> bool:
        """Whether a tile leaves out the pixels that a filter column meets padding in."""
        return self.skip_padding and cuts_columns(self.g, self.mac)

    @property
    def padded_columns(self) -> int:
        """Columns of a group rounded up to whole panels."""
        return -(-self.g.n // self.tier.lanes) * self.tier.lanes

    @property
    def layout(self) -> ConstLayout:
        """The constant block's layout."""
        g = self.g
        taps, cells = filter_rows(self.mac, g.kh), filter_cells(self.mac, g.kh, g.kw)
        return ConstLayout(g.groups * self.padded_columns, taps=taps, cells=cells)

    @property
    def scratch(self) -> int:
        """Bytes of scratch a step needs."""
        if not self.blocking.copy:
            return 0
        return scratch_rows(self.g, self.mac, self.blocking.strip).size

    @property
    def tile_config(self) -> bytes | None:
        """The AMX configuration its code runs under: none, as it uses no tiles."""
        return None

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code, using only instructions of `features`."""
        return Nest(self, features).build()


def register_need(mac: Mac, tier: TierCode, row_sums: bool, spec: EpilogueSpec) -> Registers:
    """Registers a tile needs besides accumulators, in the K loop and in the epilogue."""
    return Registers(temps=mac.temps(tier.bits), row_sums=row_sums, epilogue=epilogue_registers(spec, tier))


class LoopNest:
    """Emits the loops of one key; a subclass emits the tiles."""

    #: Bytes of packed weights of a full column block, and of a panel of it.
    block_bytes: int
    panel_bytes: int
    #: Bytes the source moves from one column block to the next.
    source_step = 0
    #: Whether a tile needs a second tap counter.
    two_taps = False

    def __init__(self, key: NestKey, features: frozenset[str] | None):
        self.key = key
        g, b = key.g, key.blocking
        if b.copy:
            rows = scratch_rows(g, key.mac, b.strip)
            self.rows = rows
            self.row_pitch, self.pixel = rows.pitch, rows.pixel
        else:
            self.pixel = g.ic * SRC_BYTES[g.src]
            self.row_pitch = g.w * self.pixel
        self._check_offsets()
        self.row_classes = row_classes(g, b.th)
        self.rows_here = self.row_classes[0]
        full, tail = divmod(g.ow, b.tw)
        columns = (TileClass(0, full, b.tw, ()), TileClass(full, 1, tail, ()))
        self.column_classes = tuple(c for c in columns if c.count and c.size)
        self.columns_here = self.column_classes[0]
        self.lay = key.layout
        self.a = Assembler(
            key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features
        )

    def _check_offsets(self) -> None:
        """Raise ShapeError where a distance within a tile or between rows leaves the 32 bits that code can hold."""
        key, g = self.key, self.key.g
        down = (key.blocking.th * g.sh + g.kh * g.dh) * self.row_pitch
        across = (key.blocking.tw * g.sw + g.kw * g.dw) * self.pixel
        out = (key.blocking.th * g.ow + key.blocking.tw) * key.ldo * 4
        if max(down + across, out, g.w * g.ic * SRC_BYTES[g.src]) >= 1 << 31:
            raise ShapeError(
                f"rows of {g.w} pixels of {g.ic} channels are too long for the 32-bit offsets of a kernel; "
                "split the image or the matrix"
            )

    def emit_tile(self, th: int, tw: int, nr: int, valid: int) -> None:
        """Emit a th x tw tile of `nr` vectors, the last with `valid` live lanes; cursors keep their values."""
        raise NotImplementedError

    def build(self) -> Code:
        """Emit everything and encode it."""
        a = self.a
        args = a.load_argument("args")
        self.slots = a.stack(64, align=64)
        self.first_src = a.gpr("strip_src")
        self.first_off = a.gpr("strip_off")
        weights, consts, col = a.gpr("weights"), a.gpr("consts"), a.gpr("col")
        a.mov(consts, Mem(args, 8 * (ARG_CONSTS + 2 * self.key.launch)))
        a.mov(weights, Mem(args, 8 * (ARG_WEIGHTS + 2 * self.key.launch)))
        a.mov(self._slot(self.SCRATCH), a.load_argument("scratch"))
        self.ahead = a.gpr("ahead") if self.key.ahead else None
        self._locate(args, weights, col, consts)
        inner = a.gpr("tap") if self.two_taps else None
        self.cur = Cursors(
            args,
            consts,
            a.gpr("src"),
            weights,
            col,
            a.gpr("off"),
            a.gpr("ptr"),
            a.gpr("k"),
            a.gpr("tap_row"),
            inner,
            self.ahead,
            self._slot(self.AHEAD_END),
        )
        self._groups()
        a.ret()
        return a.finalize().encode()

    # Slots of the stack frame: loop counts that are touched once per column block.
    CHUNK, STRIP, BLOCKS, GROUP, DOWN_LEFT, ALONG_LEFT, SCRATCH, AHEAD_END = range(8)

    def _slot(self, which: int) -> Mem:
        return self.slots + 8 * which

    def _locate(self, args: Reg, weights: Reg, col: Reg, consts: Reg) -> None:
        """Decode the step's index, set the first cursors, run the copy stage."""
        a, key, g, b = self.a, self.key, self.key.g, self.key.blocking
        index, scratch = a.load_argument("index"), a.load_argument("scratch")
        with a.scope(), a.section("locate the step"):
            image, strip, chunk, tmp = a.gpr("image"), a.gpr("strip"), a.gpr("chunk"), a.gpr("tmp")
            if self.ahead is not None:
                self._begin_ahead(args, index, self.ahead, tmp)
            self._split_index(index, image, strip, chunk, tmp)
            a.mov(self._slot(self.CHUNK), chunk)
            a.mov(self._slot(self.STRIP), strip)
            self._blocks_here(chunk, tmp)
            # Weights, constants and outputs of the chunk.
            a.imul(col, chunk, b.chunk * key.block_columns)
            a.imul(tmp, chunk, b.chunk * self.block_bytes)
            a.add(weights, tmp)
            a.imul(self.first_off, image, g.oh)
            a.imul(strip, strip, b.strip)
            a.add(self.first_off, strip)
            a.imul(self.first_off, self.first_off, g.ow * key.ldo)
            a.add(self.first_off, col)
            add_const(a, self.first_off, key.column0)
            # First source row of the strip, counted from the image's top edge.
            a.imul(strip, strip, g.sh)
            add_const(a, strip, -g.top)
            a.mov(tmp, strip)
            a.imul(image, image, g.h)
            a.add(tmp, image)
            a.imul(tmp, tmp, g.w * g.ic * SRC_BYTES[g.src])
            a.add(tmp, Mem(args, 8 * ARG_SRC))
            if b.copy:
                a.mov(self.first_src, scratch)
                regs = CopyRegs(strip, tmp, scratch, consts, chunk, image, index)
                CopyStage(a, key.tier, g, key.mac, self.lay, self.rows).emit(regs)
            else:
                a.mov(self.first_src, tmp)
            if self.source_step:
                a.mov(chunk, self._slot(self.CHUNK))
                a.imul(chunk, chunk, b.chunk * self.source_step)
                a.add(self.first_src, chunk)
        a.release(index, scratch)

    def _begin_ahead(self, args: Reg, index: Reg, ahead: Reg, end: Reg) -> None:
        """Find this step's share of what is fetched meanwhile."""
        a = self.a
        following, done = a.label("following"), a.label("share_found")
        a.mov(ahead, index)
        a.sub(ahead, Mem(args, 8 * ARG_AHEAD_FROM))
        a.jae(following)
        for first, share in ((ARG_AHEAD, ARG_AHEAD_SHARE), (ARG_NEXT, ARG_NEXT_SHARE)):
            if first == ARG_NEXT:
                a.jmp(done)
                a.bind(following)
            else:
                a.mov(ahead, index)
            a.mov(end, Mem(args, 8 * share))
            a.imul(ahead, end)
            a.add(ahead, Mem(args, 8 * first))
        a.bind(done)
        a.add(end, ahead)
        a.mov(self._slot(self.AHEAD_END), end)

    def _split_index(self, index: Reg, image: Reg, strip: Reg, chunk: Reg, tmp: Reg) -> None:
        """The step's image, strip and chunk; the index is lost."""
        key = self.key
        if key.columns_first:
            self._split(index, strip, key.strips, key.steps, tmp)
            self._split(index, image, key.g.images, key.steps, tmp)
            self.a.mov(chunk, index)
        else:
            self._split(index, chunk, key.chunks, key.steps, tmp)
            self._split(index, strip, key.strips, key.steps, tmp)
            self.a.mov(image, index)

    def _split(self, value: Reg, remainder: Reg, divisor: int, limit: int, tmp: Reg) -> None:
        """Remainder = value % divisor; value //= divisor."""
        a = self.a
        if divisor == 1:
            a.mov(remainder, 0)
            return
        div_const(a, tmp, value, divisor, limit)
        a.mov(remainder, tmp)
        a.imul(remainder, remainder, -divisor)
        a.add(remainder, value)
        a.mov(value, tmp)

    def _blocks_here(self, chunk: Reg, tmp: Reg) -> None:
        """Full column blocks of this chunk."""
        key, b = self.key, self.key.blocking
        last = key.full_blocks - (key.chunks - 1) * b.chunk
        self._by_last(chunk, key.chunks, b.chunk, last, tmp, self.BLOCKS)

    def _by_last(self, which: Reg, count: int, usual: int, last: int, tmp: Reg, slot: int) -> None:
        """Store `usual`, or `last` if this is the last of `count`."""
        a = self.a
        a.mov(tmp, last)
        if count > 1 and usual != last:
            done = a.label("last")
            a.cmp(which, count - 1)
            a.jz(done)
            a.mov(tmp, usual)
            a.bind(done)
        a.mov(self._slot(slot), tmp)

    @contextmanager
    def _slot_loop(self, which: int, *, may_be_zero: bool) -> Iterator[None]:
        """Repeat the body as often as a stack slot says, counting in the slot."""
        a, tmp = self.a, self.cur.ptr
        top, end = a.label("slot_loop"), a.label("slot_end")
        if may_be_zero:
            a.mov(tmp, self._slot(which))
            a.test(tmp, tmp)
            a.jz(end)
        a.bind(top)
        yield
        a.mov(tmp, self._slot(which))
        a.sub(tmp, 1)
        a.mov(self._slot(which), tmp)
        a.jnz(top)
        a.bind(end)

    @contextmanager
    def _only_last(self, which: int, count: int) -> Iterator[None]:
        """Run the body only in the last of `count` strips or chunks."""
        a = self.a
        skip = a.label("not_last")
        if count > 1:
            a.mov(self.cur.ptr, self._slot(which))
            a.cmp(self.cur.ptr, count - 1)
            a.jnz(skip)
        yield
        a.bind(skip)

    def _groups(self) -> None:
        """All groups, one after the other."""
        a, key, g = self.a, self.key, self.key.g
        if g.groups == 1:
            self._column_blocks()
            return
        a.mov(self.cur.ptr, g.groups)
        a.mov(self._slot(self.GROUP), self.cur.ptr)
        blocks = key.full_blocks
        with self._slot_loop(self.GROUP, may_be_zero=False):
            a.mov(self.cur.ptr, blocks)
            a.mov(self._slot(self.BLOCKS), self.cur.ptr)
            self._column_blocks()
            done = blocks * key.block_columns
            add_const(a, self.first_src, g.icg * (key.mac.element_bytes if key.blocking.copy else SRC_BYTES[g.src]))
            add_const(a, self.first_off, g.n - done)
            add_const(a, self.cur.col, key.padded_columns - done)
            panels = (key.padded_columns - done) // key.tier.lanes
            add_const(a, self.cur.weights, panels * self.panel_bytes)

    def _column_blocks(self) -> None:
        """Full column blocks of the chunk, then, in the last chunk, the tail block."""
        a, key, b = self.a, self.key, self.key.blocking
        lanes = key.tier.lanes
        if key.full_blocks:
            last = key.full_blocks - (key.chunks - 1) * b.chunk
            with self._slot_loop(self.BLOCKS, may_be_zero=last == 0):
                self._strip(b.nr, lanes)
                a.add(self.cur.weights, self.block_bytes)
                a.add(self.cur.col, key.block_columns)
                a.add(self.first_off, key.block_columns)
                add_const(a, self.first_src, self.source_step)
        tail = key.g.n - key.full_blocks * key.block_columns
        if tail:
            panels = -(-tail // lanes)
            with self._only_last(self.CHUNK, key.chunks):
                self._strip(panels, tail - (panels - 1) * lanes)

    def _strip(self, nr: int, valid: int) -> None:
        """All tiles of a column block, class of rows by class of rows; the cursors run on from one to the next."""
        a, key, g, cur = self.a, self.key, self.key.g, self.cur
        self._begin_strip(nr, valid)
        for rows in self.row_classes:
            self.rows_here = rows
            with self._rows_of_strip(rows):
                done = self._row(rows.size, nr, valid)
                add_const(a, cur.src, rows.size * g.sh * self.row_pitch - done * g.sw * self.pixel)
                add_const(a, cur.off, (rows.size * g.ow - done) * key.ldo)

    def _begin_strip(self, _nr: int, _valid: int) -> None:
        """Put the cursors on the strip's first tile."""
        self.a.mov(self.cur.src, self.first_src)
        self.a.mov(self.cur.off, self.first_off)

    @contextmanager
    def _rows_of_strip(self, rows: TileClass) -> Iterator[None]:
        """Repeat the body for the tile rows of a class that lie in this strip."""
        a, key = self.a, self.key
        if key.strips == 1:
            a.mov(self.cur.ptr, rows.count)
            a.mov(self._slot(self.DOWN_LEFT), self.cur.ptr)
            with self._slot_loop(self.DOWN_LEFT, may_be_zero=False) if rows.count > 1 else nullcontext():
                yield
            return
        per_strip = key.blocking.strip // key.blocking.th
        none = a.label("class_not_in_strip")
        with a.scope():
            first, last, bound = self.cur.ptr, self.cur.k, self.cur.outer
            a.mov(first, self._slot(self.STRIP))
            a.imul(first, first, per_strip)
            a.lea(last, Mem(first, per_strip))
            a.mov(bound, rows.first)
            a.cmp(first, bound)
            a.cmovl(first, bound)
            a.mov(bound, rows.first + rows.count)
            a.cmp(last, bound)
            a.cmovg(last, bound)
            a.sub(last, first)
            a.jle(none)
            a.mov(self._slot(self.DOWN_LEFT), last)
        with self._slot_loop(self.DOWN_LEFT, may_be_zero=False):
            yield
        a.bind(none)

    def _row(self, th: int, nr: int, valid: int) -> int:
        """Tiles along one row of outputs, class by class; the outputs that the cursors have passed."""
        a, g, cur = self.a, self.key.g, self.cur
        for columns in self.column_classes:
            self.columns_here = columns
            if columns.count > 1:
                a.mov(cur.ptr, columns.count)
                a.mov(self._slot(self.ALONG_LEFT), cur.ptr)
            with self._slot_loop(self.ALONG_LEFT, may_be_zero=False) if columns.count > 1 else nullcontext():
                self.emit_tile(th, columns.size, nr, valid)
                a.add(cur.src, columns.size * g.sw * self.pixel)
                a.add(cur.off, columns.size * self.key.ldo)
        return g.ow


class Nest(LoopNest):
    """The GEMM and convolution kernels: tiles multiply panels of weights."""

    def __init__(self, key: NestKey, features: frozenset[str] | None):
        super().__init__(key, features)
        self.seg = segments(key.g, key.mac, row_pitch=self.row_pitch, pixel_pitch=self.pixel)
        self.code = TileCode(key.tier, key.mac, key.spec, self.lay, self.seg, key.blocking, key.row_sums, key.ahead)
        self.panel_bytes = self.code.panel_bytes
        self.block_bytes = key.blocking.nr * self.panel_bytes
        self.two_taps = self.seg.inner > 1
        if key.skip_columns:
            self.column_classes = column_classes(key.g, key.blocking.tw)

    def emit_tile(self, th: int, tw: int, nr: int, valid: int) -> None:
        """Emit one register tile."""
        g = self.key.g
        rows = tile_offsets(th, tw, g.sh * self.row_pitch, g.sw * self.pixel)
        outs = tile_offsets(th, tw, g.ow * self.key.ldo, self.key.ldo)
        down = self.rows_here if self.key.skip_padding and g.padded and g.kh * g.kw > 1 else everything(th)
        taps = tile_taps(g, down, self.columns_here if self.key.skip_columns else everything(tw))
        emit_tile(self.a, self.code, self.cur, rows, outs, nr, valid, taps)
