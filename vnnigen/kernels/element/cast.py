"""Conversion of 64-bit integers to f32: exact below 2**24 in magnitude, within two ulp of the exact number elsewhere.

With the halves low and high as s32, `v = fma(f32(high) - f32(low >> 31), 2**32, f32(low))`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.isa.assembler import Code, Mem
from vnnigen.kernels.element.common import Run, load_some, store_some
from vnnigen.kernels.element.strided import Strided, StridedKey, blocks, collapse, make_launches
from vnnigen.kernels.emit_common import set_mask
from vnnigen.kernels.fma import fma32
from vnnigen.kernels.layout import ARG_DST
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.packing import aligned
from vnnigen.kernels.types import F32

Reg = Any
UPPER = np.float32(2.0**32)


def cast_reference(x: npt.NDArray[np.int64]) -> F32:
    """Convert as every kernel must."""
    low = (x & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    high = (x >> 32).astype(np.float32) - (low >> 31).astype(np.float32)
    return fma32(high, UPPER, low.astype(np.float32))


@dataclass(frozen=True)
class CastKey(StridedKey):
    """Rows of 64-bit integers, seen as twice as many halves."""

    @property
    def vectors(self) -> int:
        """Vectors of a tile."""
        return 4

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _Cast(self, features).build()


def cast_launches(count: int, tier: TierCode) -> list[tuple[Any, Run]]:
    """Launches that convert `count` integers."""
    none = (0, 0)
    key = CastKey("cast", tier, ("s32", "f32"), 1, 1, none, none, none, 1, 1, 0)

    def tile_rows(cols: int) -> int:
        return replace(key, cols=cols, rows=1 << 20).tile_rows

    parts = blocks(collapse((count,), [(2,), (1,)]) or [(1, (2, 1))], 2, tier.lanes, tile_rows, lambda cols: 12 * cols)
    return [(k, Run(c)) for k, c in make_launches(key, parts, aligned(64))]


class _Cast(Strided):
    """Vectors of low and of high halves, from two vectors of integers."""

    key: CastKey

    def setup(self) -> None:
        """Set the masks of the last vectors."""
        a, key = self.a, self.key
        rest, size = key.cols % key.unit, key.tier.vector_bytes
        self.masks: dict[int, Reg] = {}
        for count in {min(8 * rest, size), max(8 * rest - size, 0), 4 * rest} - {0, size} if key.tier.masks else ():
            self.masks[count] = a.kreg(f"lowest{count}")
            set_mask(a, self.masks[count], count, self.ptr)
        self.dst = a.gpr("dst")
        a.mov(self.dst, Mem(self.args, 8 * ARG_DST))
        self.order, self.upper = (a.vec(key.tier.bits, n) for n in ("order", "upper"))
        # VSHUFPS takes pairs of both sources' halves in turn, from each 128-bit lane.
        lanes = key.tier.bits // 128
        dwords = np.arange(4 * lanes).reshape(lanes, 2, 2).transpose(1, 0, 2).astype(np.int32)
        a.vmovups(self.order, a.const(dwords))
        a.vmovups(self.upper, a.const(np.full(key.tier.lanes, UPPER, np.float32)))

    def tile(self, th: int, count: int) -> None:
        """Convert `count` integers of `th` rows."""
        for i in range(th):
            for j in range(0, count, self.key.unit):
                self._vector(i, j, min(self.key.unit, count - j))

    def _vector(self, i: int, j: int, n: int) -> None:
        a, key, size = self.a, self.key, self.key.tier.vector_bytes
        with a.scope():
            first, second, low, sign = (a.vec(key.tier.bits, name) for name in ("first", "second", "low", "sign"))
            mem = Mem(self.src[0], 4 * (i * key.row[0] + 2 * j))
            head, rest = min(8 * n, size), max(8 * n - size, 0)
            load_some(a, key.tier, first, mem, head, self.masks.get(head))
            if rest:
                load_some(a, key.tier, second, mem + size, rest, self.masks.get(rest))
            else:
                a.vmovaps(second, first)
            a.vshufps(low, first, second, 0x88)
            a.vshufps(first, first, second, 0xDD)
            a.vpsrad(sign, low, 31)
            for v in (low, first, sign):
                a.vcvtdq2ps(v, v)
            a.vsubps(first, first, sign)
            a.vfmadd231ps(low, first, self.upper)
            a.vpermd(low, self.order, low)
            out = Mem(self.dst, 4 * (i * key.row[1] + j), index=self.off, scale=4)
            store_some(a, key.tier, out, low, 4 * n, self.masks.get(4 * n))
