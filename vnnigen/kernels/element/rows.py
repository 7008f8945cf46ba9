"""Kernels over rows of elements: convert through the epilogue, look bytes up in a table, or just move them.

A tensor is seen as rows x columns, with a pitch of its own on either side; constants are per column.  A tensor
without gaps is cut into rows that suit the machine (`cuts`), so that a per-tensor scale is one row of constants that
all rows share, and channels that do not fill vectors are repeated until they do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.kernels.element.common import (
    SIZE,
    NoScratch,
    by_last,
    check_offsets,
    load_lanes,
    load_some,
    loop_or_skip,
    only_last,
    steps_of,
    store_some,
)
from vnnigen.kernels.emit_common import add_const, counted, set_mask
from vnnigen.kernels.emit_epilogue import emit_epilogue, epilogue_registers
from vnnigen.kernels.emit_store import Tile
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ConstLayout
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.types import DType

Reg = Any
#: Vectors of a row that a tile covers, and vectors of a tile, by vector width.
WIDE = 4
TILE = {512: 16, 256: 8}
#: Longest repetition of the channels' constants; longer ones would crowd the data out of the L1 cache.
MAX_PERIOD = 2048
VBMI = "avx512_vbmi"


@dataclass(frozen=True)
class Cut:
    """A part of a tensor: `rows` x `cols`, and its distance from the tensor's start in elements."""

    rows: int
    cols: int
    offset: int = 0


def cuts(rows: int, channels: int, width: int, *, per_channel: bool) -> tuple[Cut, ...]:
    """Cut a tensor without gaps into rows of whole tiles (`width` elements) and what is left over."""
    period = math.lcm(channels, width) if per_channel else width
    total = rows * channels
    if per_channel and (period > MAX_PERIOD or total < period):
        return (Cut(rows, channels),)
    whole, rest = divmod(total, period)
    parts = [Cut(whole, period)] if whole else []
    return (*parts, *([Cut(1, rest, total - rest)] if rest else []))


@dataclass(frozen=True)
class RowsKey(NoScratch):
    """What all kernels over rows depend on. Pitches and offsets count elements; `slot` holds the source's address."""

    op: str
    tier: TierCode
    src: DType
    out: DType
    rows: int
    cols: int
    src_pitch: int
    dst_pitch: int
    src_offset: int = 0
    dst_offset: int = 0
    slot: int = 0
    launch: int = 0

    @property
    def name(self) -> str:
        """The kernel's name: operation, types, tier."""
        return f"{self.op}-{self.src}{self.out}-{self.tier.name}"

    @property
    def unit(self) -> int:
        """Elements of a vector."""
        return self.tier.lanes

    @property
    def width(self) -> int:
        """Elements of a row that a full tile covers."""
        return min(WIDE, -(-self.cols // self.unit)) * self.unit

    @property
    def tile_rows(self) -> int:
        """Rows of a tile."""
        return max(1, min(self.rows, self.vectors * self.unit // self.width))

    @property
    def vectors(self) -> int:
        """Vectors of a tile."""
        return TILE[self.tier.bits]

    @property
    def split(self) -> tuple[int, int]:
        """Rows per step, and steps."""
        return steps_of(self.rows, self.cols * (SIZE[self.src] + SIZE[self.out]), self.tile_rows)

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.split[1]


@dataclass(frozen=True)
class ConvertKey(RowsKey):
    """Load, subtract the zero point (`has_init`), then the epilogue; constants repeat after `columns`."""

    spec: EpilogueSpec = None  # type: ignore[assignment]
    has_init: bool = False
    columns: int = 0

    @property
    def vectors(self) -> int:
        """Vectors of a tile: as many as the epilogue leaves registers for."""
        return min(TILE[self.tier.bits], self.tier.registers - epilogue_registers(self.spec, self.tier))

    @property
    def width(self) -> int:
        """Elements of a row that a full tile covers."""
        return min(WIDE, self.vectors, -(-self.cols // self.unit)) * self.unit

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _ConvertRows(self, features).build()


@dataclass(frozen=True)
class BytesKey(RowsKey):
    """Bytes to bytes: through a table of 256 (needs VPERMT2B) or unchanged."""

    table: bool = False

    @property
    def unit(self) -> int:
        """Bytes of a vector."""
        return self.tier.vector_bytes

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        if self.table and features is not None:
            features |= {VBMI}
        return _ByteRows(self, features).build()


class _Rows:
    """Emits the loops: steps > row tiles > column tiles. A subclass emits the tile."""

    def __init__(self, key: RowsKey, features: frozenset[str] | None) -> None:
        self.key = key
        check_offsets(f"{key.cols} elements", *(key.tile_rows * p * 4 for p in (key.src_pitch, key.dst_pitch)))
        self.a = a = Assembler(
            key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features
        )
        self.args, self.index = a.load_argument("args"), a.load_argument("index")
        a.release(a.load_argument("scratch"))
        self.src, self.off, self.col, self.ptr = a.gpr("src"), a.gpr("off"), a.gpr("col"), a.gpr("ptr")
        self.consts, self.down, self.along = a.gpr("consts"), a.gpr("tiles_down"), a.gpr("tiles_along")

    def setup(self) -> None:
        """Load what stays in registers."""

    def tile(self, th: int, count: int) -> None:
        """Emit a tile of `th` rows and `count` elements of each."""
        raise NotImplementedError

    def build(self) -> Code:
        """Emit everything and encode it."""
        a, key = self.a, self.key
        strip, steps = key.split
        th = key.tile_rows
        a.mov(self.consts, Mem(self.args, 8 * (ARG_CONSTS + 2 * key.launch)))
        self.setup()
        a.imul(self.src, self.index, strip * key.src_pitch * SIZE[key.src])
        a.add(self.src, Mem(self.args, 8 * key.slot))
        add_const(a, self.src, key.src_offset * SIZE[key.src])
        a.imul(self.off, self.index, strip * key.dst_pitch)
        add_const(a, self.off, key.dst_offset)
        last = (key.rows - (steps - 1) * strip) // th
        by_last(a, self.down, self.index, steps, strip // th, last)
        if key.rows >= th:
            loop_or_skip(a, self.down, lambda: self._row(th), may_be_zero=last == 0)
        if key.rows % th:
            only_last(a, self.index, steps, lambda: self._row(key.rows % th))
        a.ret()
        return a.finalize().encode()

    def _row(self, th: int) -> None:
        a, key = self.a, self.key
        full, tail = divmod(key.cols, key.width)
        a.mov(self.col, 0)
        if full:
            with counted(a, self.along, full):
                self.tile(th, key.width)
                a.add(self.src, key.width * SIZE[key.src])
                a.add(self.off, key.width)
                a.add(self.col, key.width)
        if tail:
            self.tile(th, tail)
        add_const(a, self.src, (th * key.src_pitch - full * key.width) * SIZE[key.src])
        add_const(a, self.off, th * key.dst_pitch - full * key.width)


class _ConvertRows(_Rows):
    """Tiles of 32-bit lanes that end in the epilogue."""

    key: ConvertKey

    def setup(self) -> None:
        """Set the mask of the last vector."""
        a, key = self.a, self.key
        self.mask = None
        if key.tier.masks and key.cols % key.unit:
            self.mask = a.kreg("tail")
            set_mask(a, self.mask, key.cols % key.unit, self.ptr)

    def tile(self, th: int, count: int) -> None:
        """Load, widen, subtract the zero point, run the epilogue."""
        a, key, lanes = self.a, self.key, self.key.tier.lanes
        nr = -(-count // lanes)
        valid = count - (nr - 1) * lanes
        lay = ConstLayout(key.columns)
        size = SIZE[key.src]
        with a.scope():
            acc = [[a.vec(key.tier.bits, f"v{i}_{j}") for j in range(nr)] for i in range(th)]
            for i, row in enumerate(acc):
                for j, v in enumerate(row):
                    mem = Mem(self.src, (i * key.src_pitch + j * lanes) * size)
                    load_lanes(a, key.tier, v, mem, key.src, valid if j == nr - 1 else lanes, self.mask)
                    if key.has_init:
                        a.vpaddd(v, v, Mem(self.consts, lay.init + 4 * j * lanes, index=self.col, scale=4))
            offsets = [i * key.dst_pitch for i in range(th)]
            emit_epilogue(
                Tile(
                    a, key.tier, key.spec, lay, acc, offsets, valid, self.args, self.consts, self.col, self.off,
                    self.ptr,
                )
            )  # fmt: skip


class _ByteRows(_Rows):
    """Tiles of bytes, moved or looked up."""

    key: BytesKey

    def setup(self) -> None:
        """Load the table and the mask of the last vector; from here on `col` is the destination's address."""
        a, key = self.a, self.key
        self.mask = None
        if key.tier.masks and key.cols % key.unit:
            self.mask = a.kreg("tail")
            set_mask(a, self.mask, key.cols % key.unit, self.ptr)
        self.quarters = [a.zmm(f"table{q}") for q in range(4)] if key.table else []
        for q, reg in enumerate(self.quarters):
            a.vmovups(reg, Mem(self.consts, 64 * q))
        self.upper = a.kreg("upper") if key.table else None
        a.mov(self.ptr, Mem(self.args, 8 * ARG_DST))

    def tile(self, th: int, count: int) -> None:
        """Move `count` bytes of `th` rows."""
        a, key, unit = self.a, self.key, self.key.unit
        with a.scope():
            regs = [a.vec(key.tier.bits, f"bytes{q}") for q in range(8)]
            pieces = [(i, j, min(unit, count - j)) for i in range(th) for j in range(0, count, unit)]
            for turn in range(0, len(pieces), len(regs)):
                group = list(zip(pieces[turn : turn + len(regs)], regs, strict=False))
                for (i, j, n), v in group:
                    load_some(a, key.tier, v, Mem(self.src, i * key.src_pitch + j), n, self.mask)
                for (i, j, n), v in group:
                    result = self._look_up(v) if key.table else v
                    store_some(a, key.tier, Mem(self.ptr, i * key.dst_pitch + j, index=self.off), result, n, self.mask)
                    if result is not v:
                        a.release(result)

    def _look_up(self, v: Reg) -> Reg:
        """The table's bytes at v: two halves of 128 by VPERMT2B, chosen by v's top bits."""
        a, t = self.a, self.quarters
        low = a.zmm("low")
        with a.scope():
            high = a.zmm("high")
            a.vmovaps(low, t[0])
            a.vmovaps(high, t[2])
            a.vpmovb2m(self.upper, v)
            a.vpermt2b(low, v, t[1])
            a.vpermt2b(high, v, t[3])
            a.vmovdqu8(low, high, mask=self.upper)
        return low
