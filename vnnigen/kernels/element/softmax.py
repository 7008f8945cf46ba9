"""Softmax of f32 along rows: largest element, exponentials and their sum, then the product with 1/sum.

    m = the largest element of the row (NaNs aside)
    e = exp(-(m - x)), as `approx` does it: relative error below (4 + m - x) * 2**-24, 0 from m - x = 88 on
    s = the sum of e: 16 partial sums, of every 16th element in order, then halves added to halves
    y = e * (1/s), both operations rounded to f32

A row with a NaN, +inf or nothing but -inf gives NaN throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.kernels import emit_approx
from vnnigen.kernels.approx import EXP_MINUS, Bits, Scalar, evaluate
from vnnigen.kernels.element.common import NoScratch, by_last, check_offsets, load_lanes, steps_of
from vnnigen.kernels.emit_common import counted, lane_mask, set_mask
from vnnigen.kernels.layout import ARG_DST, ARG_SRC
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.types import F32

Reg = Any
#: Partial sums of a row, whatever the vectors' width.
PARTS = 16


@lru_cache
def _lowered_exp(evex: bool) -> emit_approx.Lowered:
    return emit_approx.lower(EXP_MINUS, evex)


def softmax_reference(x: F32) -> F32:
    """Softmax of [rows, n] as every kernel must compute it."""
    rows, n = x.shape
    with np.errstate(all="ignore"):
        largest = np.full((rows, 1), -np.inf, np.float32)
        largest = np.maximum(largest, np.where(np.isnan(x), -np.inf, x).max(axis=1, keepdims=True)).astype(np.float32)
        e = evaluate(EXP_MINUS, largest - x, np.empty(0, np.float32))
        padded = np.zeros((rows, -(-n // PARTS) * PARTS), np.float32)
        padded[:, :n] = e
        sums = np.zeros((rows, PARTS), np.float32)
        for part in range(0, n, PARTS):
            sums = sums + padded[:, part : part + PARTS]
        while sums.shape[1] > 1:
            half = sums.shape[1] // 2
            sums = sums[:, :half] + sums[:, half:]
        y: F32 = e * (np.float32(1) / sums)
    return y


@dataclass(frozen=True)
class SoftmaxKey(NoScratch):
    """Everything the code depends on: `rows` of `n` elements."""

    tier: TierCode
    rows: int
    n: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"softmax-f32-{self.tier.name}"

    @property
    def split(self) -> tuple[int, int]:
        """Rows per step, and steps."""
        return steps_of(self.rows, 8 * self.n, 1)

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.split[1]

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _Softmax(self, features).build()


class _Softmax:
    """Emits one key. A turn of each loop is PARTS elements."""

    def __init__(self, key: SoftmaxKey, features: frozenset[str] | None) -> None:
        self.key = key
        check_offsets(f"{key.n} elements", 4 * key.n)
        self.per = PARTS // key.tier.lanes
        self.full, self.tail = divmod(key.n, PARTS)
        self.a = a = Assembler(
            key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features
        )
        self.args, self.index = a.load_argument("args"), a.load_argument("index")
        names = ("src", "dst", "rows", "at", "count", "tmp")
        self.r: dict[str, Reg] = {name: a.gpr(name) for name in names}
        self.mask: Reg | None = None

    def _vec(self, name: str) -> Reg:
        return self.a.vec(self.key.tier.bits, name)

    def build(self) -> Code:
        """Emit everything and encode it."""
        a, key, r = self.a, self.key, self.r
        share, steps = key.split
        for pointer, slot in (("src", ARG_SRC), ("dst", ARG_DST)):
            a.imul(r[pointer], self.index, share * key.n * 4)
            a.add(r[pointer], Mem(self.args, 8 * slot))
        by_last(a, r["rows"], self.index, steps, share, key.rows - (steps - 1) * share)
        if key.tier.masks and self.tail:
            self.mask = a.kreg("tail")
            set_mask(a, self.mask, self.tail, r["tmp"])
        self.acc = [self._vec(f"acc{i}") for i in range(self.per)]
        self.low, self.factor = self._vec("minus_infinity"), self._vec("factor")
        a.vmovups(self.low, a.const(np.full(PARTS, -np.inf, np.float32)))
        self.temps = [self._vec(f"exp{i}") for i in range(self._lowered.registers)]
        self.v = [self._vec(f"v{i}") for i in range(self.per)]
        with a.loop(r["rows"]):
            self._row()
            a.add(r["src"], 4 * key.n)
            a.add(r["dst"], 4 * key.n)
        a.ret()
        return a.finalize().encode()

    @property
    def _lowered(self) -> emit_approx.Lowered:
        return _lowered_exp(self.key.tier.masks)

    def _row(self) -> None:
        a = self.a
        for v in self.acc:
            a.vmovaps(v, self.low)
        self._pass(self._largest)
        self._reduce(a.vmaxps)
        a.vmovaps(self.factor, self.acc[0])
        for v in self.acc:
            a.vxorps(v, v, v)
        self._pass(self._exponentials)
        self._reduce(a.vaddps)
        a.vmovups(self.factor, a.const(np.ones(PARTS, np.float32)))
        a.vdivps(self.factor, self.factor, self.acc[0])
        self._pass(self._scale)

    def _pass(self, body: Callable[[list[int]], None]) -> None:
        """Run over the row; the body gets the live lanes of each vector of a turn, and `at` the offset."""
        a, r, lanes = self.a, self.r, self.key.tier.lanes
        a.mov(r["at"], 0)
        if self.full:
            with counted(a, r["count"], self.full):
                body([lanes] * self.per)
                a.add(r["at"], 4 * PARTS)
        if self.tail:
            counts = [max(0, min(lanes, self.tail - i * lanes)) for i in range(self.per)]
            body([n for n in counts if n])

    def _mem(self, base: str, i: int) -> Mem:
        return Mem(self.r[base], i * self.key.tier.vector_bytes, index=self.r["at"])

    def _largest(self, counts: list[int]) -> None:
        a, lanes = self.a, self.key.tier.lanes
        for i, n in enumerate(counts):
            v = self.v[i]
            load_lanes(a, self.key.tier, v, self._mem("src", i), "f32", n, self.mask)
            if n < lanes:
                self._keep(v, self.low, n)
            # The second source is taken where the first is NaN, or both are equal.
            a.vmaxps(self.acc[i], v, self.acc[i])

    def _keep(self, v: Reg, other: Reg, count: int) -> None:
        """Put `other` into all but the lowest `count` lanes of v."""
        a = self.a
        if self.key.tier.masks:
            a.vblendmps(v, other, v, mask=self.mask)
        else:
            with a.scope():
                lanes = self._vec("live")
                a.vmovups(lanes, lane_mask(a, count))
                a.vblendvps(v, other, v, lanes)

    def _exponentials(self, counts: list[int]) -> None:
        a, tier = self.a, self.key.tier

        def memory(place: Bits | Scalar, one: bool) -> Any:
            assert isinstance(place, Bits)
            if tier.masks or one:
                mem = a.const(np.uint32(place.bits), align=4)
                return mem if one else mem.broadcast()
            return a.const(np.full(tier.lanes, place.bits, np.uint32))

        for i, n in enumerate(counts):
            v = self.v[i]
            load_lanes(a, tier, v, self._mem("src", i), "f32", n, self.mask)
            a.vsubps(v, self.factor, v)
            emit_approx.emit(a, self._lowered, v, self.temps, memory)
            if n < tier.lanes:
                with a.scope():
                    zero = self._vec("zero")
                    a.vxorps(zero, zero, zero)
                    self._keep(v, zero, n)
            a.vaddps(self.acc[i], self.acc[i], v)
            self._store(i, n)

    def _scale(self, counts: list[int]) -> None:
        a = self.a
        for i, n in enumerate(counts):
            load_lanes(a, self.key.tier, self.v[i], self._mem("dst", i), "f32", n, self.mask)
            a.vmulps(self.v[i], self.v[i], self.factor)
            self._store(i, n)

    def _store(self, i: int, count: int) -> None:
        a, v, mem = self.a, self.v[i], self._mem("dst", i)
        if count == self.key.tier.lanes:
            a.vmovups(mem, v)
        elif self.key.tier.masks:
            a.vmovups(mem, v, mask=self.mask)
        else:
            with a.scope():
                lanes = self._vec("live")
                a.vmovups(lanes, lane_mask(a, count))
                a.vmaskmovps(mem, lanes, v)

    def _reduce(self, op: Callable[[Reg, Reg, Reg], None]) -> None:
        """Combine all lanes of the accumulators, lane k with lane k + 8, 4, 2, 1; all lanes of acc[0] get it."""
        a, acc, t = self.a, self.acc[0], self.v[0]
        if self.key.tier.bits == 512:
            a.vshufi32x4(t, acc, acc, 0b01001110)
            op(acc, acc, t)
            a.vshufi32x4(t, acc, acc, 0b10110001)
        else:
            op(acc, acc, self.acc[1])
            a.vperm2i128(t, acc, acc, 1)
        op(acc, acc, t)
        a.vpshufd(t, acc, 0b01001110)
        op(acc, acc, t)
        a.vpshufd(t, acc, 0b10110001)
        op(acc, acc, t)
