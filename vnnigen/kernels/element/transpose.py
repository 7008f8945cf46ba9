"""Transposition of [batch, rows, cols] to [batch, cols, rows], fused with a conversion: NCHW to NHWC and back.

A tile is a vector of columns by as many rows as fill a vector of the output.  Values are converted along the rows;
then four rows of bytes become dwords that hold one column's four bytes, dwords are transposed 4 x 4 within 128-bit
lanes, and lanes are put together, so that vectors of one output row are stored.  Bytes that need no arithmetic are
interleaved without widening, 16 rows by a vector of bytes, and leave as lanes of 16 bytes.

To NHWC (few rows, far apart: channels) a step walks along columns and finishes all rows of a tile's columns; to NCHW
(many rows, the pixels) it takes groups of rows that fill whole cache lines of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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
from vnnigen.kernels.element.shuffles import dwords_4x4, lanes_4x4
from vnnigen.kernels.emit_common import add_const, counted, div_const, set_mask, store_bytes
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ARG_SRC, ConstLayout
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.steps import S32_TOP
from vnnigen.kernels.types import DType

Reg = Any
LANE = 16  # bytes


@dataclass(frozen=True)
class TransposeKey(NoScratch):
    """Everything the code depends on. `channels`: "rows", "cols", or "" where all share their constants.

    `spec` is None where elements stay what they are. `along` says what a step's share is made of: "cols" or "rows".
    """

    tier: TierCode
    batch: int
    rows: int
    cols: int
    src: DType
    out: DType
    spec: EpilogueSpec | None
    has_init: bool
    channels: str
    along: str

    @property
    def name(self) -> str:
        """The kernel's name: what moves, types, tier."""
        way = "nchw-nhwc" if self.along == "cols" else "nhwc-nchw"
        return f"reorder-{way}-{self.src}{self.out}-{self.tier.name}"

    @property
    def plain_bytes(self) -> bool:
        """Whether bytes are interleaved without widening: where rows of the output are far apart, it takes too many."""
        return self.spec is None and SIZE[self.src] == 1 and self.along == "cols"

    @property
    def tile_cols(self) -> int:
        """Columns of a tile."""
        return self.tier.vector_bytes if self.plain_bytes else self.tier.lanes

    @property
    def per_dword(self) -> int:
        """Rows that a dword of the output holds."""
        return 4 // SIZE[self.out]

    @property
    def tile_rows(self) -> int:
        """Rows of a tile."""
        return LANE if self.plain_bytes else self.tier.lanes * self.per_dword

    @property
    def group_rows(self) -> int:
        """Rows of a group: all, or what of the source stays in the L1 cache while its columns are taken in turn.

        Output rows are then written a few lines at a time, however many of them share a set of the cache.
        """
        if self.along == "cols":
            return self.rows
        return max(64, (1 << 14) // (self.cols * SIZE[self.src]) // 64 * 64)

    @property
    def split(self) -> tuple[int, int]:
        """Columns or rows per step, and steps per image."""
        both = SIZE[self.src] + SIZE[self.out]
        if self.along == "cols":
            return steps_of(self.cols, self.rows * both, 64)
        return steps_of(self.rows, self.cols * both, self.group_rows)

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.batch * self.split[1]

    @property
    def columns(self) -> int:
        """Columns of the constant block."""
        return {"rows": self.rows, "cols": self.cols, "": self.tier.lanes}[self.channels]

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _Transpose(self, features).build()


class _Transpose:
    """Emits one key."""

    def __init__(self, key: TransposeKey, features: frozenset[str] | None) -> None:
        self.key = key
        self.src_pitch, self.dst_pitch = key.cols * SIZE[key.src], key.rows * SIZE[key.out]
        check_offsets(f"{key.cols} or {key.rows} elements", 64 * self.src_pitch, 64 * self.dst_pitch)
        self.lay = ConstLayout(key.columns)
        self.a = a = Assembler(
            key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features
        )
        self.args, self.index = a.load_argument("args"), a.load_argument("index")
        a.release(a.load_argument("scratch"))
        names = ("consts", "src", "dst", "row", "col", "tmp", "groups", "cols", "rows")
        self.r: dict[str, Reg] = {name: a.gpr(name) for name in names}
        self.masks: dict[int, Reg] = {}
        self.fixed: dict[str, Reg] = {}

    # Loops.

    def build(self) -> Code:
        """Emit everything and encode it."""
        a, key, r = self.a, self.key, self.r
        share, parts = key.split
        a.mov(r["consts"], Mem(self.args, 8 * ARG_CONSTS))
        self._constants()
        image = r["groups"]
        if parts == 1:
            a.mov(image, self.index)
            a.mov(self.index, 0)
        else:
            div_const(a, image, self.index, parts, key.steps)
            a.imul(r["tmp"], image, -parts)
            a.add(self.index, r["tmp"])
        a.imul(r["src"], image, key.rows)
        a.imul(r["dst"], image, key.cols)
        for pointer, pitch, slot in (("src", self.src_pitch, ARG_SRC), ("dst", self.dst_pitch, ARG_DST)):
            a.imul(r[pointer], r[pointer], pitch)
            a.add(r[pointer], Mem(self.args, 8 * slot))
        a.mov(r["row"], 0)
        a.mov(r["col"], 0)
        mine = r["col"] if key.along == "cols" else r["row"]
        a.imul(mine, self.index, share)
        steps = (SIZE[key.src], self.dst_pitch) if key.along == "cols" else (self.src_pitch, SIZE[key.out])
        for pointer, step in zip(("src", "dst"), steps, strict=True):
            a.imul(r["tmp"], mine, step)
            a.add(r[pointer], r["tmp"])
        self._along_cols(share, parts) if key.along == "cols" else self._along_rows(share, parts)
        a.ret()
        return a.finalize().encode()

    def _along_cols(self, share: int, parts: int) -> None:
        """A range of columns, all rows of each."""
        key, a, tc = self.key, self.a, self.key.tile_cols
        last = (key.cols - (parts - 1) * share) // tc
        by_last(a, self.r["cols"], self.index, parts, share // tc, last)
        blocks, tail = divmod(key.rows, key.tile_rows)
        if key.cols >= tc:
            loop_or_skip(a, self.r["cols"], lambda: self._column(blocks, tail, tc), may_be_zero=last == 0)
        if key.cols % tc:
            only_last(a, self.index, parts, lambda: self._column(blocks, tail, key.cols % tc))

    def _along_rows(self, share: int, parts: int) -> None:
        """Groups of rows, all columns of each."""
        key, a = self.key, self.a
        group = key.group_rows
        last = (key.rows - (parts - 1) * share) // group
        by_last(a, self.r["groups"], self.index, parts, share // group, last)
        if key.rows >= group:
            loop_or_skip(a, self.r["groups"], lambda: self._group(group), may_be_zero=last == 0)
        if key.rows % group:
            only_last(a, self.index, parts, lambda: self._group(key.rows % group))

    def _group(self, count: int) -> None:
        """`count` rows, all columns; the cursors move on to the next rows."""
        a, key, r = self.a, self.key, self.r
        full, tail = divmod(key.cols, key.tile_cols)
        blocks = divmod(count, key.tile_rows)
        a.mov(r["col"], 0)
        if full:
            with counted(a, r["cols"], full):
                self._column(*blocks, key.tile_cols)
        if tail:
            self._column(*blocks, tail)
        add_const(a, r["src"], count * self.src_pitch - key.cols * SIZE[key.src])
        a.imul(r["tmp"], r["col"], self.dst_pitch)
        a.sub(r["dst"], r["tmp"])
        a.add(r["dst"], count * SIZE[key.out])
        a.add(r["row"], count)

    def _column(self, blocks: int, tail: int, cols: int) -> None:
        """All row blocks of `cols` columns; the cursors move on to the next columns."""
        a, key, r, rows = self.a, self.key, self.r, self.key.tile_rows
        if blocks:
            with counted(a, r["rows"], blocks):
                self._tile(rows, cols)
                a.add(r["src"], rows * self.src_pitch)
                a.add(r["dst"], rows * SIZE[key.out])
                a.add(r["row"], rows)
        if tail:
            self._tile(tail, cols)
        a.sub(r["row"], blocks * rows)
        a.add(r["col"], cols)
        a.mov(r["tmp"], blocks * rows * self.src_pitch - cols * SIZE[key.src])
        a.sub(r["src"], r["tmp"])
        a.add(r["dst"], cols * self.dst_pitch - blocks * rows * SIZE[key.out])

    # Tiles.

    def _constants(self) -> None:
        """Load what stays in registers: masks of partial vectors, upper bounds."""
        a, key, spec = self.a, self.key, self.key.spec
        if key.tier.masks:
            stores = key.rows % key.tile_rows * SIZE[key.out]
            for count in {key.cols % key.tile_cols, stores} - {0}:
                self.masks[count] = a.kreg(f"lowest{count}")
                set_mask(a, self.masks[count], count, self.r["tmp"])
        if spec is not None and spec.clamp_hi:
            self.fixed["bound"] = self._vec("bound")
            a.vbroadcastss(self.fixed["bound"], Mem(self.r["consts"], self.lay.scalars + 4 * spec.clamp_slot))
        if spec is not None and key.out == "s32":
            self.fixed["bound"] = self._vec("bound")
            a.vbroadcastss(self.fixed["bound"], a.const(S32_TOP, align=4))

    def _vec(self, name: str) -> Reg:
        return self.a.vec(self.key.tier.bits, name)

    def _tile(self, rows: int, cols: int) -> None:
        with self.a.scope():
            if self.key.plain_bytes:
                self._interleave_tile(rows, cols)
                return
            per = self.key.per_dword
            count = -(-rows // per)
            # Up to four dwords a lane says it all; else lanes are put together, of which some may hold anything.
            units = [self._vec(f"unit{u}") for u in range(4 if count <= 4 else self.key.tier.lanes)]
            for u in range(count):
                if per == 4:
                    self._quad(units[u], 4 * u, min(4, rows - 4 * u), cols)
                else:
                    self._row(units[u], u, cols)
            if count <= 4:
                self._finish(units, rows, cols)
            else:
                self._finish_wide(units, rows, cols)

    def _prefetch(self, mem: Mem) -> None:
        """Fetch a row's next cache line: far apart, rows are too many streams for the hardware to follow."""
        if self.key.along == "cols":
            self.a.prefetcht0(mem + 64)

    def _quad(self, dst: Reg, first: int, count: int, cols: int) -> None:
        """Four rows of bytes as dwords: in each 128-bit lane a 4 x 4 matrix of bytes, transposed by VPSHUFB."""
        a, key = self.a, self.key
        pack = a.vpackuswb if key.out == "u8" else a.vpacksswb
        zero_point = Mem(self.r["consts"], self.lay.zero_point)
        with a.scope():
            v = [dst, *(self._vec(f"row{i}") for i in range(1, count))]
            for i, reg in enumerate(v):
                self._row(reg, first + i, cols)
            for low in range(0, count, 2):
                a.vpackssdw(v[low], v[low], v[min(low + 1, count - 1)])
                if key.spec is not None and key.spec.add_zp:
                    a.vpaddsw(v[low], v[low], zero_point)
            pack(dst, dst, v[2] if count > 2 else dst)
            order = np.arange(16, dtype=np.uint8).reshape(4, 4).T
            a.vpshufb(dst, dst, a.const(np.tile(order.ravel(), key.tier.vector_bytes // 16)))

    def _row(self, v: Reg, i: int, cols: int) -> None:
        """Load a row of the tile as 32-bit lanes and convert it, up to the conversion to s32."""
        a, key, spec = self.a, self.key, self.key.spec
        mem = Mem(self.r["src"], i * self.src_pitch)
        self._prefetch(mem)
        load_lanes(a, key.tier, v, mem, key.src, cols, self.masks.get(cols))
        if spec is None:
            return
        with a.scope():
            if key.has_init:
                a.vpaddd(v, v, self._param(self.lay.init, i))
            if spec.acc == "s32":
                a.vcvtdq2ps(v, v)
            if spec.has_m:
                a.vmulps(v, v, self._param(self.lay.m, i))
            if "bound" in self.fixed:
                a.vminps(v, self.fixed["bound"], v)
            if key.out != "f32":
                a.vcvtps2dq(v, v)

    def _param(self, array: int, i: int) -> Any:
        """The constants for row i of the tile."""
        r, key = self.r, self.key
        if key.channels == "":
            return Mem(r["consts"], array)
        if key.channels == "cols":
            return Mem(r["consts"], array, index=r["col"], scale=4)
        mem = Mem(r["consts"], array + 4 * i, index=r["row"], scale=4)
        if key.tier.masks:
            return mem.broadcast()
        v = self._vec("param")
        self.a.vbroadcastss(v, mem)
        return v

    def _interleave_tile(self, rows: int, cols: int) -> None:
        """Bytes as they are: neighbouring rows are interleaved twice, which gives dwords of four rows."""
        halves = ((0, 1),) if self.key.tier.bits == 512 else ((0,), (1,))
        for some in halves:
            with self.a.scope():
                units = [[self._vec(f"unit{q}_{u}") for u in range(2 * len(some))] for q in range(4)]
                for q in range(-(-rows // 4)):
                    self._units(units[q], 4 * q, min(4, rows - 4 * q), cols, some)
                for u in range(2 * len(some)):
                    quarter = 2 * some[0] + u
                    self._finish([units[q][u] for q in range(4)], rows, cols, 16, 4 * quarter)

    def _units(self, units: list[Reg], first: int, count: int, cols: int, halves: tuple[int, ...]) -> None:
        """Dwords of rows first..first+3: unit u of all four holds columns 16*lane + 4*u of each lane."""
        a, key = self.a, self.key
        with a.scope():
            v = [self._vec(f"row{i}") for i in range(count)]
            for i, reg in enumerate(v):
                mem = Mem(self.r["src"], (first + i) * self.src_pitch)
                self._prefetch(mem)
                load_some(a, key.tier, reg, mem, cols, self.masks.get(cols))
            pairs = [(v[0], v[min(1, count - 1)]), (v[min(2, count - 1)], v[count - 1])]
            for n, half in enumerate(halves):
                merge = a.vpunpckhbw if half else a.vpunpcklbw
                low, high = units[2 * n], units[2 * n + 1]
                merge(low, *pairs[0])
                merge(high, *pairs[1])
                with a.scope():
                    t = self._vec("merged")
                    a.vpunpcklwd(t, low, high)
                    a.vpunpckhwd(high, low, high)
                    a.vmovaps(low, t)

    def _finish(self, units: list[Reg], rows: int, cols: int, per_lane: int = 4, column: int = 0) -> None:
        """Transpose dwords of four units and store lanes: up to 16 bytes of every column below `cols`.

        Dword i of a lane belongs to column `per_lane * lane + column + i`.
        """
        a, key = self.a, self.key
        with a.scope():
            t = [self._vec(f"turn{i}") for i in range(2)]
            dwords_4x4(a, units, t)
            for i, reg in enumerate(units):
                for lane in range(key.tier.bits // 128):
                    at = per_lane * lane + column + i
                    if at < cols:
                        mem = Mem(self.r["dst"], at * self.dst_pitch)
                        self._store_lane(mem, reg, lane, rows * SIZE[key.out], t[0])

    def _finish_wide(self, units: list[Reg], rows: int, cols: int) -> None:
        """Transpose dwords, put the lanes of each column together and store them."""
        a, tier, lanes = self.a, self.key.tier, self.key.tier.bits // 128
        size = rows * SIZE[self.key.out]
        with a.scope():
            t = [self._vec(f"turn{i}") for i in range(2)]
            for first in range(0, len(units), 4):
                dwords_4x4(a, units[first : first + 4], t)
            for i in range(4):
                columns = units[i::4]
                if tier.bits == 512:
                    lanes_4x4(a, tier, columns, t)
                else:
                    a.vperm2i128(t[0], *columns, 0x31)
                    a.vperm2i128(columns[0], *columns, 0x20)
                    columns = [columns[0], t[0]]
                for lane in range(lanes):
                    at = 4 * lane + i
                    if at < cols:
                        mem = Mem(self.r["dst"], at * self.dst_pitch)
                        store_some(a, tier, mem, columns[lane], size, self.masks.get(size))

    def _store_lane(self, mem: Mem, reg: Reg, lane: int, size: int, temp: Reg) -> None:
        """Store the lowest `size` bytes of a 128-bit lane."""
        a = self.a
        extract = a.vextracti32x4 if self.key.tier.masks else a.vextracti128
        if lane == 0:
            low = reg.xmm
        elif size == LANE:
            extract(mem, reg, lane)
            return
        else:
            low = temp.xmm
            extract(low, reg, lane)
        if size == LANE:
            a.vmovups(mem, low)
        elif self.key.tier.masks:
            a.vmovdqu8(mem, low, mask=self.masks[size])
        else:
            store_bytes(a, mem, low, size)
