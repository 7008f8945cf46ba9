"""Tiles of a transposition: rows of the source are loaded and converted, and leave as rows of the destination.

`DwordTile` converts values in 32-bit lanes: a vector of columns by as many rows as fill a vector of the output.  Four
rows of bytes (two of 16-bit values) become dwords that hold one column's values, dwords are transposed 4 x 4 within
128-bit lanes, and lanes are put together, so that whole vectors of output rows are stored.

`LaneTile` is for bytes and 16-bit values that need no arithmetic: they are interleaved without widening, in squares
that fill 128-bit lanes.  Either squares are cut from vectors of a row and leave as 16 bytes, or they are loaded as 16
bytes of rows that stand below each other in the destination, and leave as whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from vnnigen.isa.assembler import Assembler, Mem
from vnnigen.kernels.element.common import SIZE, load_lanes, load_some, store_some
from vnnigen.kernels.element.shuffles import Interleaver, dwords_4x4, lanes_4x4
from vnnigen.kernels.emit_common import load_bytes, set_mask, store_bytes
from vnnigen.kernels.emit_store import round_words
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.steps import S32_TOP

if TYPE_CHECKING:
    from vnnigen.kernels.element.transpose import TransposeKey

Reg = Any
LANE = 16  # bytes
#: Features that kernels may use beside those of their tier.
VBMI, BF16 = "avx512_vbmi", "avx512_bf16"


class TileCode:
    """What tiles share: loads and stores with masks, prefetching."""

    def __init__(self, key: TransposeKey) -> None:
        self.key, self.tier = key, key.tier
        self.src_pitch, self.dst_pitch = key.pitches
        self.masks: dict[int, Reg] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        raise NotImplementedError

    def setup(self, a: Assembler, r: dict[str, Reg]) -> None:
        """Load what stays in registers."""
        self.a, self.r = a, r

    def emit(self, rows: int, cols: int) -> None:
        """Emit a tile."""
        raise NotImplementedError

    def mask(self, count: int) -> Reg | None:
        """The mask of the lowest `count` elements, where the tier has masks."""
        return self.masks.get(count)

    def set_masks(self, counts: set[int]) -> None:
        """Prepare masks of the lowest elements."""
        if self.tier.masks:
            for count in sorted(counts - {0}):
                self.masks[count] = self.a.kreg(f"lowest{count}")
                set_mask(self.a, self.masks[count], count, self.r["tmp"])

    def vec(self, name: str) -> Reg:
        """A vector register."""
        return self.a.vec(self.tier.bits, name)

    def row(self, i: int) -> Mem:
        """Row i of the tile in the source."""
        return Mem(self.r["src"], i * self.src_pitch)

    def column(self, j: int, offset: int = 0) -> Mem:
        """Column j of the tile, a row of the destination."""
        return Mem(self.r["dst"], j * self.dst_pitch + offset)

    def fetch(self, mem: Mem) -> None:
        """Fetch what comes next of a row of the source: far apart, rows are too many streams for the hardware."""
        if self.key.fetches:
            self.a.prefetcht0(mem + max(64, self.key.tile[0] * SIZE[self.key.src]))

    def fetchw(self, j: int, offset: int = 0) -> None:
        """Fetch, to be written, the line of the destination that the next tile begins in this column's place."""
        if self.key.fetches:
            self.a.prefetchw(self.column(j, self.key.tile[0] * self.dst_pitch + offset))

    def store_lane(self, mem: Mem, reg: Reg, lane: int, size: int, temp: Reg) -> None:
        """Store the lowest `size` bytes of a 128-bit lane."""
        a = self.a
        extract = a.vextracti32x4 if self.tier.masks else a.vextracti128
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
        elif self.tier.masks:
            a.vmovdqu8(mem, low, mask=self.masks[size])
        else:
            store_bytes(a, mem, low, size)


class Values:
    """The arithmetic of a conversion on 32-bit lanes, and its constants.

    `along`: lanes are channels; else a vector belongs to one channel.
    """

    def __init__(self, tile: TileCode, *, along: bool) -> None:
        self.tile, self.along = tile, along
        self.lay = ConstLayout(tile.key.columns)
        self.fixed: dict[int, Reg] = {}
        self.bound: Reg | None = None

    def setup(self) -> None:
        """Load what stays in registers."""
        tile, spec = self.tile, self.tile.key.spec
        a, r = tile.a, tile.r
        if spec is None:
            return
        if spec.clamp_hi or tile.key.out == "s32":
            top = Mem(r["consts"], self.lay.scalars + 4 * spec.clamp_slot)
            self.bound = tile.vec("bound")
            a.vbroadcastss(self.bound, top if spec.clamp_hi else a.const(S32_TOP, align=4))
        if not tile.tier.masks:
            return
        arrays = [self.lay.zero_point] * spec.add_zp
        if not tile.key.per_channel or self.along:
            arrays += [self.lay.init] * tile.key.has_init + [self.lay.m] * spec.has_m + [self.lay.b] * spec.has_b
        for array in arrays:
            self.fixed[array] = tile.vec("constant")
        if not self._moving:
            self._load(self.fixed)
        elif spec.add_zp:
            self._load([self.lay.zero_point])

    @property
    def _moving(self) -> bool:
        """Whether registers hold constants of the tile's channels."""
        return self.tile.key.per_channel and self.along

    def begin_tile(self, first: int = 0) -> None:
        """Load the constants of the tile's channels from `first` on."""
        if self._moving:
            self._load([array for array in self.fixed if array != self.lay.zero_point], first)

    def _load(self, arrays: Iterable[int], first: int = 0) -> None:
        for array in arrays:
            self.tile.a.vmovups(self.fixed[array], self._memory(array, first))

    def _memory(self, array: int, i: int) -> Mem:
        """Where the constants of channel i of the tile are."""
        consts, key = self.tile.r["consts"], self.tile.key
        if not key.per_channel or array == self.lay.zero_point:
            return Mem(consts, array)
        return Mem(consts, array + 4 * i, index=self.tile.r["channel"], scale=4)

    def param(self, array: int, i: int) -> Any:
        """The constants for vector i of the tile; registers that it takes belong to the caller's scope."""
        if array in self.fixed:
            return self.fixed[array]
        key = self.tile.key
        if not key.per_channel or self.along or array == self.lay.zero_point:
            return self._memory(array, 0)
        mem = self._memory(array, i)
        if self.tile.tier.masks:
            return mem.broadcast()
        v = self.tile.vec("param")
        self.tile.a.vbroadcastss(v, mem)
        return v

    def _register(self, array: int, i: int) -> Reg:
        """The same in a register."""
        found = self.param(array, i)
        if not isinstance(found, Mem):
            return found
        v = self.tile.vec("param")
        load = self.tile.a.vbroadcastss if found.bcast else self.tile.a.vmovups
        load(v, self._memory(array, i) if found.bcast else found)
        return v

    def convert(self, v: Reg, i: int) -> None:
        """Convert vector i of the tile, as far as 32-bit lanes go: nothing is narrowed yet."""
        key, spec, a = self.tile.key, self.tile.key.spec, self.tile.a
        if spec is None:
            return
        with a.scope():
            if key.has_init:
                a.vpaddd(v, v, self.param(self.lay.init, i))
            if spec.acc == "s32":
                a.vcvtdq2ps(v, v)
            if spec.has_m and spec.has_b:
                a.vfmadd213ps(v, self._register(self.lay.m, i), self.param(self.lay.b, i))
            elif spec.has_m:
                a.vmulps(v, v, self.param(self.lay.m, i))
            elif spec.has_b:
                a.vaddps(v, v, self.param(self.lay.b, i))
            if self.bound is not None:
                a.vminps(v, self.bound, v)
            if key.out in ("u8", "s8", "s32"):
                a.vcvtps2dq(v, v)


class LaneTile(TileCode):
    """Squares of 16 bytes a row, interleaved in 128-bit lanes."""

    def __init__(self, key: TransposeKey) -> None:
        super().__init__(key)
        self.size = SIZE[key.src]
        #: Rows and columns of a square, squares in a vector.
        self.side, self.lanes = LANE // self.size, self.tier.bits // 128
        #: Whether a vector holds squares of a row: where fewer would be below each other than fit.
        self.beside = key.rows <= self.side
        #: Whether a tile is two columns of squares.
        self.double = key.tier.bits == 512 and not self.beside
        #: Whether registers hold all rows of a square and a temporary.
        self.roomy = self.tier.registers > self.side + 1

    @property
    def shape(self) -> tuple[int, int]:
        """Squares side by side, or one below the other (two columns of them where registers suffice)."""
        if self.beside:
            return self.side, self.side * self.lanes
        return self.side * self.lanes, self.side * (1 + self.double)

    def setup(self, a: Assembler, r: dict[str, Reg]) -> None:
        """Prepare masks."""
        super().setup(a, r)
        rows, cols = self.shape
        rest = self.key.cols % cols
        if not self.beside:
            rest %= self.side
        self.set_masks({self.key.rows % rows * self.size, rest * self.size})

    def emit(self, rows: int, cols: int) -> None:
        """Load, interleave, store."""
        if self.beside:
            self._in_parts(rows, cols, self._load_row)
        elif self.double and cols == 2 * self.side:
            self._two_squares(rows)
        else:
            for first in range(0, cols, self.side):
                with self.a.scope():
                    self._in_parts(rows, min(self.side, cols - first), self._load_lanes, first)

    def _in_parts(self, rows: int, cols: int, load: Callable[..., None], first: int = 0) -> None:
        """Squares from column `first` on; where registers are short, their left and right halves in turn."""
        for half in (None,) if self.roomy else (0, 1):
            with self.a.scope():
                squares = Interleaver(self.a, self.size, self.vec("temp"))
                self._fill(squares, half, lambda reg, i: load(reg, i, rows, cols, first))
                self._store(squares, rows, cols, first)

    def _fill(self, squares: Interleaver, half: int | None, load: Callable[[Reg, int], None]) -> None:
        """Give all rows; with `half`, rows i and i + side/2 together, and of these only the left or right half."""
        if half is None:
            regs = [self.vec(f"row{i}") for i in range(self.side)]
            for i in squares.order:
                load(regs[i], i)
                squares.give(i, regs[i])
            return
        for i in [i for i in squares.order if i < self.side // 2]:
            reg = self.vec(f"row{i}")
            load(reg, i)
            with self.a.scope():
                other = self.vec("other")
                load(other, i + self.side // 2)
                squares.merges()[half](reg, reg, other)
            squares.give(2 * i + half, reg, 1)

    def _two_squares(self, rows: int) -> None:
        """Squares below each other, twice, from vectors of 32 bytes of two rows, which exchange lanes.

        One row too many for the registers is loaded later.
        """
        a, last = self.a, self.side - 1
        squares = Interleaver(a, self.size, self.vec("temp"))
        left = [self.vec(f"left{i}") for i in range(self.side)]
        right = [self.vec(f"right{i}") for i in range(last)]
        for i in squares.order:
            if i == last:
                self._load_lanes(left[i], i, rows, self.side, 0)
            else:
                low, high = left[i], right[i]
                for k, reg in enumerate((low, low, high, high)):
                    at = k * self.side + i
                    if at < rows:
                        self.fetch(self.row(at))
                        if k % 2:
                            a.vinserti64x4(reg, reg, self.row(at), 1)
                        else:
                            a.vmovups(reg.ymm, self.row(at))
                a.vshufi32x4(squares.temp, low, high, 0xDD)
                a.vshufi32x4(low, low, high, 0x88)
                right[i], squares.temp = squares.temp, high
            squares.give(i, left[i])
        self._store(squares, rows, self.side, 0)
        other = Interleaver(a, self.size, squares.temp)
        right.append(squares.columns[0])
        for i in squares.order:
            if i == last:
                self._load_lanes(right[i], i, rows, self.side, self.side)
            other.give(i, right[i])
        self._store(other, rows, self.side, self.side)

    def _load_row(self, reg: Reg, i: int, rows: int, cols: int, _first: int) -> None:
        """Row i, if it is one."""
        if i < rows:
            self.fetch(self.row(i))
            load_some(self.a, self.tier, reg, self.row(i), cols * self.size, self.mask(cols * self.size))

    def _load_lanes(self, reg: Reg, i: int, rows: int, cols: int, first: int) -> None:
        """Row i of each square; rows outside the tile leave their lane as it is."""
        a, size = self.a, cols * self.size
        insert = a.vinserti32x4 if self.tier.masks else a.vinserti128
        for lane in range(self.lanes):
            at = lane * self.side + i
            if at >= rows:
                break
            mem = self.row(at) + first * self.size
            self.fetch(mem)
            with a.scope():
                low = reg.xmm if lane == 0 else a.xmm("piece") if size < LANE else mem
                if size < LANE and self.tier.masks:
                    a.vmovdqu8(low, mem, mask=self.mask(size), zero=True)
                elif size < LANE:
                    load_bytes(a, low, mem, size)
                elif lane == 0:
                    a.vmovups(low, mem)
                if lane:
                    insert(reg, reg, low, lane)

    def _store(self, squares: Interleaver, rows: int, cols: int, first: int) -> None:
        """Store the columns that there are, `cols` from `first` on."""
        size = rows * self.size
        for j, reg in sorted(squares.columns.items()):
            if not self.beside:
                if j < cols:
                    self.fetchw(first + j)
                    store_some(self.a, self.tier, self.column(first + j), reg, size, self.mask(size))
                continue
            for lane in range(self.lanes):
                at = self.side * lane + j
                if at < cols:
                    self.fetchw(at)
                    self.store_lane(self.column(at), reg, lane, size, squares.temp)


class Widen:
    """Bytes of a 128-bit lane as 32-bit lanes, by VPERMB."""

    def __init__(self, tile: TileCode) -> None:
        self.tile, self.signed = tile, tile.key.src == "s8"

    def setup(self) -> None:
        """Load the indices: u8 becomes the lowest byte of its lane, s8 the highest, to be shifted down."""
        a, at = self.tile.a, 3 if self.signed else 0
        self.places = [self.tile.vec(f"lane{k}") for k in range(4)]
        for k, reg in enumerate(self.places):
            index = np.zeros((LANE, 4), np.uint8)
            index[:, at] = LANE * k + np.arange(LANE)
            a.vmovups(reg, a.const(index))
        self.bytes = a.kreg("bytes")
        a.mov(self.tile.r["tmp"], 0x1111111111111111 << at)
        a.kmovq(self.bytes, self.tile.r["tmp"])

    def emit(self, dst: Reg, source: Reg, lane: int) -> None:
        """Widen a lane of `source`."""
        self.tile.a.vpermb(dst, self.places[lane], source, mask=self.bytes, zero=True)
        if self.signed:
            self.tile.a.vpsrad(dst, dst, 24)


class WidenTile(LaneTile):
    """Bytes that become f32: interleaved as they are, then each lane is a vector (VPERMB)."""

    def __init__(self, key: TransposeKey) -> None:
        super().__init__(key)
        self.double = False
        self.widen = Widen(self)
        self.values = Values(self, along=key.to_nhwc)

    def setup(self, a: Assembler, r: dict[str, Reg]) -> None:
        """Load the indices of VPERMB, constants and masks."""
        TileCode.setup(self, a, r)
        self.set_masks({self.key.rows % self.side, self.key.cols % self.shape[1]})
        self.values.setup()
        self.widen.setup()

    def _store(self, squares: Interleaver, rows: int, cols: int, first: int) -> None:
        """Widen, convert and store each column."""
        a = self.a
        for lane in range(self.lanes):
            # Lanes are columns of one vector of rows, or rows below each other of one column.
            self.values.begin_tile(0 if self.beside else self.side * lane)
            for j, reg in sorted(squares.columns.items()):
                at, top = (self.side * lane + j, 0) if self.beside else (j, self.side * lane)
                if at >= cols or top >= rows:
                    continue
                with a.scope():
                    v = self.vec("value")
                    self.widen.emit(v, reg, lane)
                    self.values.convert(v, at)
                    self.fetchw(at, 4 * top)
                    whole = rows - top >= self.side
                    a.vmovups(self.column(at, 4 * top), v, **({} if whole else {"mask": self.mask(rows - top)}))


class DwordTile(TileCode):
    """A vector of columns, converted in 32-bit lanes."""

    def __init__(self, key: TransposeKey) -> None:
        super().__init__(key)
        #: Rows that a dword of the output holds.
        self.per = 4 // SIZE[key.out]
        self.values = Values(self, along=not key.to_nhwc)

    @property
    def shape(self) -> tuple[int, int]:
        """As many rows as fill a vector of the output, a vector of columns."""
        return self.tier.lanes * self.per, self.tier.lanes

    def setup(self, a: Assembler, r: dict[str, Reg]) -> None:
        """Prepare masks and constants."""
        super().setup(a, r)
        rows, cols = self.shape
        self.set_masks({self.key.cols % cols, self.key.rows % rows * SIZE[self.key.out]})
        self.values.setup()
        if BF16 in self.key.extras:
            self.order = self.vec("order")
            a.vmovups(self.order, a.const(np.arange(32, dtype=np.int16).reshape(2, 16).T.copy()))

    def emit(self, rows: int, cols: int) -> None:
        """Load and convert dwords, transpose them, store."""
        count = -(-rows // self.per)
        self.values.begin_tile()
        # Up to four dwords a lane says it all; else lanes are put together, of which some may hold anything.
        units = [self.vec(f"unit{u}") for u in range(4 if count <= 4 else self.tier.lanes)]
        for u in range(count):
            load = {1: self._row, 2: self._pair, 4: self._quad}[self.per]
            load(units[u], u * self.per, min(self.per, rows - u * self.per), cols)
        with self.a.scope():
            temps = [self.vec(f"turn{i}") for i in range(2)]
            for first in range(0, len(units), 4):
                dwords_4x4(self.a, units[first : first + 4], temps)
            (self._store_lanes if count <= 4 else self._store_vectors)(units, temps, rows, cols)

    def _row(self, v: Reg, i: int, _count: int, cols: int) -> None:
        """Load a row of the tile as 32-bit lanes and convert it, up to the conversion to s32."""
        self.fetch(self.row(i))
        load_lanes(self.a, self.tier, v, self.row(i), self.key.src, cols, self.mask(cols))
        self.values.convert(v, i)

    def _pair(self, dst: Reg, first: int, count: int, cols: int) -> None:
        """Two rows of bf16 as dwords."""
        a = self.a
        with a.scope():
            v = [dst, *(self.vec(f"row{i}") for i in range(1, count))]
            for i, reg in enumerate(v):
                self._row(reg, first + i, 1, cols)
            if BF16 in self.key.extras:
                a.vcvtne2ps2bf16(dst, v[-1], dst)
                a.vpermw(dst, self.order, dst)
                return
            for i, reg in enumerate(v):
                a.vpmovzxwd(reg, round_words(a, self.tier, reg))
                if i:
                    a.vpslld(reg, reg, 16)
                    a.vpor(dst, dst, reg) if self.tier.bits == 256 else a.vpord(dst, dst, reg)

    def _quad(self, dst: Reg, first: int, count: int, cols: int) -> None:
        """Four rows of bytes as dwords: in each 128-bit lane a 4 x 4 matrix of bytes, transposed by VPSHUFB."""
        a, key = self.a, self.key
        pack = a.vpackuswb if key.out == "u8" else a.vpacksswb
        with a.scope():
            v = [dst, *(self.vec(f"row{i}") for i in range(1, count))]
            for i, reg in enumerate(v):
                self._row(reg, first + i, 1, cols)
            for low in range(0, count, 2):
                a.vpackssdw(v[low], v[low], v[min(low + 1, count - 1)])
                if key.spec is not None and key.spec.add_zp:
                    a.vpaddsw(v[low], v[low], self.values.param(self.values.lay.zero_point, 0))
            pack(dst, dst, v[2] if count > 2 else dst)
            order = np.arange(16, dtype=np.uint8).reshape(4, 4).T
            a.vpshufb(dst, dst, a.const(np.tile(order.ravel(), self.tier.vector_bytes // 16)))

    def _store_lanes(self, units: list[Reg], temps: list[Reg], rows: int, cols: int) -> None:
        """Dword i of lane l of the tile's columns: 16 bytes or less of column 4 * l + i."""
        for i, reg in enumerate(units):
            for lane in range(self.tier.bits // 128):
                at = 4 * lane + i
                if at < cols:
                    self.fetchw(at)
                    self.store_lane(self.column(at), reg, lane, rows * SIZE[self.key.out], temps[0])

    def _store_vectors(self, units: list[Reg], temps: list[Reg], rows: int, cols: int) -> None:
        """Put the lanes of each column together and store them."""
        a, tier, lanes = self.a, self.tier, self.tier.bits // 128
        size = rows * SIZE[self.key.out]
        for i in range(4):
            columns = units[i::4]
            if tier.bits == 512:
                lanes_4x4(a, tier, columns, temps)
            else:
                a.vperm2i128(temps[0], *columns, 0x31)
                a.vperm2i128(columns[0], *columns, 0x20)
                columns = [columns[0], temps[0]]
            for lane in range(lanes):
                at = 4 * lane + i
                if at < cols:
                    self.fetchw(at)
                    store_some(a, tier, self.column(at), columns[lane], size, self.mask(size))
