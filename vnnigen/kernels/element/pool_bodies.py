"""What pooling does with an element: maxima of bytes and floats, sums of bytes and floats.

A body keeps accumulators for `outputs` x `vectors` and knows nothing of windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Assembler, Mem
from vnnigen.kernels.element.common import SIZE, load_lanes, load_some, store_some
from vnnigen.kernels.element.pooling import PoolProblem, PoolTables, lowest
from vnnigen.kernels.element.shuffles import lanes_4x4
from vnnigen.kernels.emit_common import set_mask
from vnnigen.kernels.emit_epilogue import emit_epilogue, epilogue_registers
from vnnigen.kernels.emit_store import Tile
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.layout import ARG_DST, ConstLayout
from vnnigen.kernels.mac import TierCode

Reg = Any


@dataclass(frozen=True)
class Block:
    """Channels of a tile: vectors, and live elements of the last one."""

    vectors: int
    valid: int


def sums_bytes(op: str, src: str) -> bool:
    """Whether a kernel adds bytes."""
    return op == "avgpool" and src in ("u8", "s8")


@dataclass(frozen=True)
class BodyCode:
    """What a body's code depends on; see `PoolKey`. `rows_vary`: not all windows have all their rows."""

    tier: TierCode
    p: PoolProblem
    spec: EpilogueSpec
    flush: bool
    has_start: bool
    rows_vary: bool


class Body:
    """What all bodies share. `unit` is the channels of a vector, `vectors` those of a full block."""

    #: Accumulator registers per vector and output, and how many of them there may be, by vector width.
    per_vector = 1
    room = {512: 16, 256: 8}  # noqa: RUF012
    bytes_in = False

    def __init__(self, a: Assembler, code: BodyCode, r: dict[str, Reg], args: Reg) -> None:
        tier, p = code.tier, code.p
        self.a, self.code, self.tier, self.p, self.spec, self.flush = a, code, tier, p, code.spec, code.flush
        self.r, self.args, self.tables = r, args, PoolTables.of(p)
        self.unit = tier.vector_bytes if self.bytes_in else tier.lanes
        most = self.room[tier.bits] // self.per_vector
        # Where outputs have no neighbours, more channels keep as many loads in flight.
        self.vectors = max(1, min(8 if p.ow == 1 else 4, most, p.c // self.unit))
        self.most = most
        self.mask: Reg | None = None

    @property
    def block(self) -> int:
        """Channels of a full block."""
        return self.vectors * self.unit

    def outputs(self, b: Block) -> int:
        """Outputs of a tile."""
        return max(1, min(8, self.most // b.vectors))

    def setup(self) -> None:
        """Load what stays in registers: the mask of the last vector."""
        rest = self.p.c % self.unit
        if self.tier.masks and rest:
            self.mask = self.a.kreg("tail")
            set_mask(self.a, self.mask, rest, self.r["ptr"])

    def vec(self, name: str) -> Reg:
        """A vector register."""
        return self.a.vec(self.tier.bits, name)

    def start(self, b: Block, outputs: int) -> None:
        """Allocate accumulators in the current scope and set them to their first value."""
        self.b = b
        self.acc = [[self.vec(f"acc{t}_{j}") for j in range(b.vectors)] for t in range(outputs)]
        self.temp = self.vec("element")
        for row in self.acc:
            for v in row:
                self.clear(v)

    def clear(self, v: Reg) -> None:
        """Set an accumulator to its first value; the default is zero."""
        self.a.vpxor(v.xmm, v.xmm, v.xmm) if v.index < 16 else self.a.vpxord(v, v, v)

    def count(self, j: int) -> int:
        """Live elements of vector j."""
        return self.b.valid if j == self.b.vectors - 1 else self.unit

    def tap(self, mem: Mem, users: list[int]) -> None:
        """Take the elements at `mem` into the outputs `users`."""
        raise NotImplementedError

    def empty(self) -> None:
        """Make room in accumulators that are about to overflow."""
        raise NotImplementedError

    def finish(self, offsets: list[int], columns: list[int | None]) -> None:
        """Store the outputs at these distances from `off`.

        `columns` of taps of each window, as many as `rows` says high; None: register `real` counts the taps.
        """
        raise NotImplementedError

    def by_count(self, table: int, columns: int | None) -> Mem:
        """The entry of a table for this number of taps."""
        if columns is None or self.code.rows_vary:
            if columns is not None:
                self.a.imul(self.r["real"], self.r["rows"], columns)
            return Mem(self.r["consts"], table, index=self.r["real"], scale=4)
        return Mem(self.r["consts"], table + 4 * columns * self.p.kernel[0])

    def store(self, acc: list[list[Reg]], offsets: list[int], valid: int, interleaved: bool = False) -> None:
        """Run the epilogue."""
        emit_epilogue(
            Tile(
                self.a, self.tier, self.spec, ConstLayout(0), acc, offsets, valid, self.args, self.r["consts"],
                self.r["consts"], self.r["off"], self.r["ptr"], interleaved,
            )
        )  # fmt: skip


class MaxBytes(Body):
    """Maxima of bytes, as they are."""

    bytes_in = True

    def setup(self) -> None:
        """Also keep the lowest value at hand."""
        super().setup()
        self.low = self.vec("low")
        value = np.full(self.tier.vector_bytes, int(lowest(self.p.src))).astype(np.int64).astype(np.uint8)
        self.a.vmovups(self.low, self.a.const(value))
        self.op: Callable[..., None] = self.a.vpmaxub if self.p.src == "u8" else self.a.vpmaxsb

    def clear(self, v: Reg) -> None:
        """Start from the lowest value."""
        self.a.vmovaps(v, self.low)

    def tap(self, mem: Mem, users: list[int]) -> None:
        """Take the maximum; a whole vector with one user comes from memory directly."""
        for j in range(self.b.vectors):
            source: Any = mem + j * self.unit
            if len(users) > 1 or self.count(j) != self.unit:
                load_some(self.a, self.tier, self.temp, source, self.count(j), self.mask)
                source = self.temp
            for t in users:
                self.op(self.acc[t][j], self.acc[t][j], source)

    def finish(self, offsets: list[int], columns: list[int | None]) -> None:
        """Store bytes."""
        self.a.mov(self.r["ptr"], Mem(self.args, 8 * ARG_DST))
        for row, offset in zip(self.acc, offsets, strict=True):
            for j, v in enumerate(row):
                mem = Mem(self.r["ptr"], offset + j * self.unit, index=self.r["off"])
                store_some(self.a, self.tier, mem, v, self.count(j), self.mask)


class MaxFloat(Body):
    """Maxima of f32 and bf16."""

    def setup(self) -> None:
        """Also keep minus infinity at hand."""
        super().setup()
        self.low = self.vec("low")
        self.a.vmovups(self.low, self.a.const(np.full(self.unit, -np.inf, np.float32)))

    def clear(self, v: Reg) -> None:
        """Start from minus infinity."""
        self.a.vmovaps(v, self.low)

    def tap(self, mem: Mem, users: list[int]) -> None:
        """VMAXPS gives its second source for NaNs and equals: that is the old maximum."""
        for j in range(self.b.vectors):
            self.load(mem, j)
            for t in users:
                self.a.vmaxps(self.acc[t][j], self.temp, self.acc[t][j])

    def load(self, mem: Mem, j: int) -> None:
        """Load vector j as f32."""
        source = mem + j * self.unit * SIZE[self.p.src]
        load_lanes(self.a, self.tier, self.temp, source, self.p.src, self.count(j), self.mask)

    def finish(self, offsets: list[int], columns: list[int | None]) -> None:
        """Store floats."""
        self.store(self.acc, offsets, self.b.valid)


class SumFloat(MaxFloat):
    """Sums of f32 and bf16, times the reciprocal count."""

    def setup(self) -> None:
        """Only the mask."""
        Body.setup(self)

    def clear(self, v: Reg) -> None:
        """Start from zero."""
        Body.clear(self, v)

    def tap(self, mem: Mem, users: list[int]) -> None:
        """Add."""
        for j in range(self.b.vectors):
            self.load(mem, j)
            for t in users:
                self.a.vaddps(self.acc[t][j], self.acc[t][j], self.temp)

    def finish(self, offsets: list[int], columns: list[int | None]) -> None:
        """Scale, then the epilogue."""
        for t, row in enumerate(self.acc):
            if t == 0 or columns[t] != columns[t - 1]:
                self.a.vbroadcastss(self.temp, self.by_count(self.tables.factors, columns[t]))
            for v in row:
                self.a.vmulps(v, v, self.temp)
        self.a.release(self.temp)
        self.store(self.acc, offsets, self.b.valid)


class SumBytes(Body):
    """Sums of bytes (s8 shifted to u8) in 16 bits: all of a word, and its upper byte; the lower follows.

    A word of two bytes is added as it is, modulo 2**16, and its upper byte once more on its own: three instructions
    for two channels' bytes, without shuffles. The lower byte's sum is the difference. Both fit for 256 taps, after
    which they are emptied into 32-bit sums.
    """

    bytes_in = True
    per_vector = 2
    room = {512: 16, 256: 8}  # noqa: RUF012

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Besides the sums: an element, the shift, four wide sums, the epilogue (bytes come interleaved: less).
        need = 2 if self.spec.out in ("u8", "s8") else epilogue_registers(self.spec, self.tier)
        self.most = min(self.most, (self.tier.registers - 6 - need) // 2)
        self.vectors = min(self.vectors, self.most)
        if self.flush:
            self.most = self.vectors = min(self.vectors, {512: 3, 256: 1}[self.tier.bits])

    def setup(self) -> None:
        """Also keep the shift from s8 to u8 at hand."""
        super().setup()
        self.flip = None
        if self.p.src == "s8":
            self.flip = self.vec("flip")
            self.a.vmovups(self.flip, self.a.const(np.full(self.tier.vector_bytes, 0x80, np.uint8)))

    def outputs(self, b: Block) -> int:
        """One output where sums must be emptied."""
        return 1 if self.flush else super().outputs(b)

    def start(self, b: Block, outputs: int) -> None:
        """Allocate sums of words and of upper bytes, and wide sums where needed."""
        super().start(b, outputs)
        self.upper = [[self.vec(f"upper{t}_{j}") for j in range(b.vectors)] for t in range(outputs)]
        for row in self.upper:
            for v in row:
                self.clear(v)
        self.wide: list[list[Reg]] = []
        if self.flush:
            self.wide = [[self.vec(f"wide{j}_{q}") for q in range(4)] for j in range(b.vectors)]
            for quad in self.wide:
                for v in quad:
                    self.clear(v)

    def tap(self, mem: Mem, users: list[int]) -> None:
        """Add words and upper bytes."""
        a = self.a
        with a.scope():
            high = self.vec("high")
            for j in range(self.b.vectors):
                load_some(a, self.tier, self.temp, mem + j * self.unit, self.count(j), self.mask)
                if self.flip is not None:
                    a.vxorps(self.temp, self.temp, self.flip)
                a.vpsrlw(high, self.temp, 8)
                for t in users:
                    a.vpaddw(self.acc[t][j], self.acc[t][j], self.temp)
                    a.vpaddw(self.upper[t][j], self.upper[t][j], high)

    def _widen(self, word: Reg, upper: Reg, out: list[Reg]) -> None:
        """Turn 16-bit sums into four vectors of 32-bit sums, interleaved (see `depthwise`); clobbers the sums."""
        a, t = self.a, self.temp
        a.vpsllw(t, upper, 8)
        a.vpsubw(word, word, t)
        a.vpunpcklwd(out[1], word, upper)
        a.vpunpckhwd(out[3], word, upper)
        Body.clear(self, t)
        a.vpunpcklwd(out[0], out[1], t)
        a.vpunpckhwd(out[1], out[1], t)
        a.vpunpcklwd(out[2], out[3], t)
        a.vpunpckhwd(out[3], out[3], t)

    def empty(self) -> None:
        """Add the 16-bit sums to the wide ones."""
        a = self.a
        for j in range(self.b.vectors):
            with a.scope():
                fresh = [self.vec(f"fresh{q}") for q in range(4)]
                self._widen(self.acc[0][j], self.upper[0][j], fresh)
                for total, part in zip(self.wide[j], fresh, strict=True):
                    a.vpaddd(total, total, part)
            self.clear(self.acc[0][j])
            self.clear(self.upper[0][j])

    def finish(self, offsets: list[int], columns: list[int | None]) -> None:
        """Subtract the zero points, scale, then the epilogue, one vector of bytes after the other."""
        a = self.a
        for t, offset in enumerate(offsets):
            for j in range(self.b.vectors):
                with a.scope():
                    quad = self.wide[j] if self.flush else [self.vec(f"sum{q}") for q in range(4)]
                    if not self.flush:
                        self._widen(self.acc[t][j], self.upper[t][j], quad)
                    self._scale(quad, columns[t])
                    self._store(quad, offset + j * self.unit, self.count(j))

    def _scale(self, quad: list[Reg], columns: int | None) -> None:
        a = self.a
        with a.scope():
            factor = self.by_count(self.tables.factors, columns)
            a.vbroadcastss(self.temp, factor)
            start = self.vec("start") if self.code.has_start else None
            if start is not None:
                a.vbroadcastss(start, factor + (self.tables.starts - self.tables.factors))
            for v in quad:
                if start is not None:
                    a.vpaddd(v, v, start)
                a.vcvtdq2ps(v, v)
                a.vmulps(v, v, self.temp)

    def _store(self, quad: list[Reg], offset: int, count: int) -> None:
        lanes = self.tier.lanes
        if self.spec.out in ("u8", "s8"):
            self.store([quad], [offset], count - 3 * lanes, interleaved=True)
            return
        with self.a.scope():
            t = [self.temp, self.vec("turn")]
            lanes_4x4(self.a, self.tier, quad, t)
        nr = -(-count // lanes)
        self.store([quad[:nr]], [offset], count - (nr - 1) * lanes)


BODIES: dict[tuple[str, str], type[Body]] = {
    **{("maxpool", src): MaxBytes for src in ("u8", "s8")},
    **{("maxpool", src): MaxFloat for src in ("f32", "bf16")},
    **{("avgpool", src): SumBytes for src in ("u8", "s8")},
    **{("avgpool", src): SumFloat for src in ("f32", "bf16")},
}
