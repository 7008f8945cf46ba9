"""Sum, mean and largest element of f32 rows.

The sum is made of 64 partial sums, of every 64th element in order, then halves added to halves, as in `layernorm`; a
mean is its product with f32(1/n). So a sum is within (n/64 + 7) * 2**-24 of the sum of magnitudes. The largest element
of a row with NaNs is that of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.kernels.element.common import NoScratch, by_last, check_offsets, load_lanes, steps_of
from vnnigen.kernels.element.layernorm import PARTS, row_sums, total_lanes
from vnnigen.kernels.emit_common import counted, lane_mask, set_mask
from vnnigen.kernels.layout import ARG_DST, ARG_SRC
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.types import F32

Reg = Any
ReduceFn = Literal["sum", "mean", "max"]
FUNCTIONS: tuple[ReduceFn, ...] = ("sum", "mean", "max")


def reduce_reference(x: F32, fn: ReduceFn) -> F32:
    """Reduce x [rows, n] to [rows] as every kernel must."""
    with np.errstate(all="ignore"):
        if fn == "max":
            y: F32 = np.where(np.isnan(x), np.float32(-np.inf), x).max(axis=1)
            return y
        total = row_sums(x, lambda part, sums: sums + part)[:, 0]
        return total if fn == "sum" else total * np.float32(1 / x.shape[1])


@dataclass(frozen=True)
class ReduceKey(NoScratch):
    """Everything the code depends on: `rows` of `n` elements."""

    fn: ReduceFn
    tier: TierCode
    rows: int
    n: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"reduce_{self.fn}-f32-{self.tier.name}"

    @property
    def split(self) -> tuple[int, int]:
        """Rows per step, and steps."""
        return steps_of(self.rows, 4 * self.n, 1)

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.split[1]

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _Reduce(self, features).build()


class _Reduce:
    """Emits one key: rows of a step > turns of PARTS elements."""

    def __init__(self, key: ReduceKey, features: frozenset[str] | None) -> None:
        self.key = key
        check_offsets(f"{key.n} elements", 4 * key.n)
        self.a = a = Assembler(
            key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features
        )
        self.args, self.index = a.load_argument("args"), a.load_argument("index")
        self.src, self.dst, self.rows, self.count, self.tmp = (
            a.gpr(n) for n in ("src", "dst", "rows", "count", "tmp")
        )  # fmt: skip
        self.op = a.vmaxps if key.fn == "max" else a.vaddps

    def build(self) -> Code:
        """Emit everything and encode it."""
        a, key, lanes = self.a, self.key, self.key.tier.lanes
        share, steps = key.split
        for pointer, slot, size in ((self.src, ARG_SRC, 4 * key.n), (self.dst, ARG_DST, 4)):
            a.imul(pointer, self.index, share * size)
            a.add(pointer, Mem(self.args, 8 * slot))
        by_last(a, self.rows, self.index, steps, share, key.rows - (steps - 1) * share)
        self.mask = None
        if key.tier.masks and key.n % lanes:
            self.mask = a.kreg("tail")
            set_mask(a, self.mask, key.n % lanes, self.tmp)
        self.acc = [a.vec(key.tier.bits, f"acc{i}") for i in range(PARTS // lanes)]
        self.t, self.neutral = a.vec(key.tier.bits, "t"), a.vec(key.tier.bits, "neutral")
        a.vmovups(self.neutral, a.const(np.full(lanes, -np.inf if key.fn == "max" else 0, np.float32)))
        with a.loop(self.rows):
            self._row()
            a.add(self.dst, 4)
        a.ret()
        return a.finalize().encode()

    def _row(self) -> None:
        a, key = self.a, self.key
        full, tail = divmod(key.n, PARTS)
        for v in self.acc:
            a.vmovaps(v, self.neutral)
        if full:
            with counted(a, self.count, full):
                self._turn(PARTS)
                a.add(self.src, 4 * PARTS)
        if tail:
            self._turn(tail)
            a.add(self.src, 4 * tail)
        total_lanes(a, key.tier, self.acc, self.t, self.op)
        if key.fn == "mean":
            a.vmulps(self.acc[0].xmm, self.acc[0].xmm, a.const(np.full(4, 1 / key.n, np.float32)))
        a.vmovss(Mem(self.dst), self.acc[0].xmm)

    def _turn(self, count: int) -> None:
        a, tier = self.a, self.key.tier
        for i in range(-(-count // tier.lanes)):
            lanes = min(tier.lanes, count - i * tier.lanes)
            mem = Mem(self.src, 4 * i * tier.lanes)
            if lanes < tier.lanes and self.key.fn == "max":
                self._load_part(mem, lanes)
            else:
                load_lanes(a, tier, self.t, mem, "f32", lanes, self.mask)
            # The second source is taken where the first is NaN.
            self.op(self.acc[i], self.t, self.acc[i])

    def _load_part(self, mem: Mem, lanes: int) -> None:
        """The last elements of a row, minus infinity behind them."""
        a, tier = self.a, self.key.tier
        if tier.masks:
            a.vmovaps(self.t, self.neutral)
            a.vmovups(self.t, mem, mask=self.mask)
            return
        with a.scope():
            live = a.vec(tier.bits, "live")
            a.vmovups(live, lane_mask(a, lanes))
            a.vmaskmovps(self.t, live, mem)
            a.vblendvps(self.t, self.neutral, self.t, live)
