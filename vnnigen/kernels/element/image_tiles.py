"""Tiles of images: two to four channels, bytes on at least one side, with the permutations of bytes of AVX512-VBMI.

A tile is a vector of pixels as bytes: one vector a channel, or as many vectors in which channels are neighbours.
VPERMT2B makes the one of the other.  What is f32 in the source is quantized and packed before, what is f32 in the
destination is widened after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vnnigen.isa.assembler import Assembler, Mem
from vnnigen.kernels.element.common import SIZE
from vnnigen.kernels.element.shuffles import gather
from vnnigen.kernels.element.transpose_tiles import TileCode, Values, Widen
from vnnigen.kernels.types import DType

if TYPE_CHECKING:
    from vnnigen.isa.registers import Vec
    from vnnigen.kernels.element.transpose import TransposeKey

PIXELS = 64
#: 32-bit lanes of a vector; a vector of bytes is made of four of them.
LANES = 16
#: Where VPACKSSDW and VPACKUSWB of four vectors leave byte k of the 64: four of each vector in every 128-bit lane.
PACKED = np.arange(PIXELS).reshape(4, 4, 4).transpose(1, 0, 2).argsort(axis=None)


def takes_images(src: DType, out: DType, channels: int, *, converts: bool) -> bool:
    """Whether tiles are for these: bytes as they are, quantized to or widened from f32."""
    names = ("u8", "s8")
    kinds = (src in names and (out == "f32" or not converts)) or (src == "f32" and out in names)
    return 2 <= channels <= 4 and kinds


class ImageValues(Values):
    """Constants are vectors: one per channel, or periodic ones where channels are neighbours."""

    def __init__(self, tile: TileCode) -> None:
        super().__init__(tile, along=False)

    def param(self, array: int, i: int) -> Any:
        """The constants for vector i."""
        if array in self.fixed:
            return self.fixed[array]
        return Mem(self.tile.r["consts"], array + 64 * (i if self.tile.key.per_channel else 0))


class ImageTile(TileCode):
    """A vector of pixels of all channels."""

    def __init__(self, key: TransposeKey) -> None:
        super().__init__(key)
        self.n = key.channels
        self.values = ImageValues(self)
        self.widen = Widen(self)

    @property
    def shape(self) -> tuple[int, int]:
        """Pixels of a vector of bytes, all channels."""
        return (self.n, PIXELS) if self.key.to_nhwc else (PIXELS, self.n)

    def setup(self, a: Assembler, r: dict[str, Vec]) -> None:
        """Prepare masks and constants."""
        super().setup(a, r)
        key, rest = self.key, self.key.pixels % PIXELS
        planes, pixels = (key.src, key.out) if key.to_nhwc else (key.out, key.src)
        units = {1: 64, 4: LANES}
        self.set_masks({rest % units[SIZE[planes]], rest * self.n % units[SIZE[pixels]]})
        self.values.setup()
        if key.out == "f32":
            self.widen.setup()

    def emit(self, rows: int, cols: int) -> None:
        """Load bytes, permute them, store."""
        to_nhwc, n = self.key.to_nhwc, self.n
        pixels = cols if to_nhwc else rows
        loaded = []
        for i in range(n):
            at, count = (i * self.src_pitch, pixels) if to_nhwc else (PIXELS * i * SIZE[self.key.src], n * pixels)
            loaded.append(self._load(i, at, min(PIXELS, count - (0 if to_nhwc else PIXELS * i))))
        place = PACKED if self.key.src == "f32" else np.arange(PIXELS)
        for i in range(n):
            elements = [(k % n, k // n) for k in range(PIXELS * i, PIXELS * (i + 1))]
            at, count = PIXELS * i * SIZE[self.key.out], n * pixels - PIXELS * i
            if not to_nhwc:
                elements = [divmod(k * n + i, PIXELS) for k in range(PIXELS)]
                at, count = i * self.dst_pitch, pixels
            if count <= 0:
                continue
            with self.a.scope():
                v = self.vec("moved")
                gather(self.a, self.tier, v, loaded, [(c, int(place[p])) for c, p in elements], size=1)
                self._store(v, i, at, min(PIXELS, count))

    def _vector(self, i: int, quarter: int) -> int:
        """Which vector of constants belongs to a quarter of the 64 elements of vector i."""
        interleaved = self.key.to_nhwc == (self.key.out == "f32")
        return (4 * i + quarter) % self.n if interleaved else i

    def _load(self, i: int, at: int, count: int) -> Vec:
        """Load 64 elements, quantized where they are f32 (in the order `PACKED`); `count` of them exist."""
        a, key = self.a, self.key
        first: Vec = self.vec("bytes")
        if key.src != "f32":
            if count > 0:
                self._move(first, Mem(self.r["src"], at), count, 1, load=True)
            return first
        with a.scope():
            v = [first, *(self.vec(f"quarter{q}") for q in range(1, 4))]
            for q, reg in enumerate(v):
                if count > LANES * q:
                    self._move(reg, Mem(self.r["src"], at + 64 * q), min(LANES, count - LANES * q), 4, load=True)
                    self.values.convert(reg, self._vector(i, q))
            for low in (0, 2):
                a.vpackssdw(v[low], v[low], v[low + 1])
                if key.spec is not None and key.spec.add_zp:
                    a.vpaddsw(v[low], v[low], self.values.param(self.values.lay.zero_point, 0))
            (a.vpackuswb if key.out == "u8" else a.vpacksswb)(first, first, v[2])
        return first

    def _store(self, v: Vec, i: int, at: int, count: int) -> None:
        """Store 64 elements, widened where they are to be f32."""
        if self.key.out != "f32":
            self._move(v, Mem(self.r["dst"], at), count, 1, load=False)
            return
        for q in range(-(-count // LANES)):
            with self.a.scope():
                value = self.vec("value")
                self.widen.emit(value, v, q)
                self.values.convert(value, self._vector(i, q))
                self._move(value, Mem(self.r["dst"], at + 64 * q), min(LANES, count - LANES * q), 4, load=False)

    def _move(self, v: Vec, mem: Mem, count: int, size: int, *, load: bool) -> None:
        """Load or store the lowest `count` elements of a vector."""
        a = self.a
        move = a.vmovdqu8 if size == 1 else a.vmovups
        options = {} if count * size == 64 else {"mask": self.mask(count)} | ({"zero": True} if load else {})
        move(v, mem, **options) if load else move(mem, v, **options)
