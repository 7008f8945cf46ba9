"""What pooling does with an element: maxima of bytes and floats, sums of bytes and floats.

A body keeps accumulators of a block's vectors in numbered slots and knows nothing of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Assembler, Mem
from vnnigen.kernels.element.common import SIZE, load_lanes, load_some, store_some
from vnnigen.kernels.element.pooling import PoolProblem, PoolTables, lowest
from vnnigen.kernels.element.shuffles import lanes_4x4
from vnnigen.kernels.emit_common import set_mask
from vnnigen.kernels.emit_epilogue import emit_epilogue, epilogue_registers
from vnnigen.kernels.emit_store import Tile, splat
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.layout import ARG_DST, ConstLayout
from vnnigen.kernels.mac import TierCode

Reg = Any


#: Bytes that stay in the L1 cache for sure.
L1_BYTES = 32 << 10


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
    mode: str
    tie_counts: tuple[int, ...]


class Body:
    """What all bodies share. `unit` is the channels of a vector, `vectors` those of a full block."""

    bytes_in = False

    def __init__(self, a: Assembler, code: BodyCode, r: dict[str, Reg], args: Reg) -> None:
        tier, p = code.tier, code.p
        self.a, self.code, self.tier, self.p, self.spec, self.flush = a, code, tier, p, code.spec, code.flush
        self.r, self.args, self.tables = r, args, PoolTables.of(p)
        self.unit = tier.vector_bytes if self.bytes_in else tier.lanes
        self.mask: Reg | None = None
        self.most = self.room()
        most = min(self._widest(), p.c // self.unit, self.most)
        self.vectors = max((v for v in range(1, most + 1) if self.fits(v, min(2, p.ow))), default=1)

    def _widest(self) -> int:
        """Vectors of a block: many where outputs have no neighbours, to keep as many loads in flight.

        Few where windows share most of their columns, and so their rows: a block's are to stay in the L1 cache.
        """
        p = self.p
        if p.ow == 1:
            return 16
        rows = 4 * self.unit * (p.kernel[0] * p.w * SIZE[p.src] + p.ow * SIZE[self.spec.out])
        return 2 if p.by_columns and rows > L1_BYTES else 4

    @property
    def block(self) -> int:
        """Channels of a full block."""
        return self.vectors * self.unit

    def room(self) -> int:
        """Slots x vectors that there are registers for: an element, a constant, and what the epilogue takes."""
        return self.tier.registers - 2 - epilogue_registers(self.spec, self.tier)

    def fits(self, vectors: int, outputs: int) -> bool:
        """Whether there are accumulators for so many neighbouring outputs."""
        p = self.p
        columns = {t * p.stride[1] + k * p.dilation[1] for t in range(outputs) for k in range(p.kernel[1])}
        return vectors * (len(columns) if p.by_columns else outputs) <= self.most

    def setup(self) -> None:
        """Load what stays in registers: the mask of the last vector."""
        rest = self.p.c % self.unit
        if self.tier.masks and rest:
            self.mask = self.a.kreg("tail")
            set_mask(self.a, self.mask, rest, self.r["ptr"])

    def vec(self, name: str) -> Reg:
        """A vector register."""
        return self.a.vec(self.tier.bits, name)

    def start(self, b: Block, slots: list[int]) -> None:
        """Allocate accumulators in the current scope."""
        self.b = b
        self.slots = {s: self.allocate(s) for s in slots}
        self.temp = self.vec("element")

    def allocate(self, slot: int) -> list[Reg]:
        """Allocate the accumulators of a slot."""
        return [self.vec(f"acc{slot}_{j}") for j in range(self.b.vectors)]

    def clear(self, slots: list[int]) -> None:
        """Set slots to the value of no taps."""
        for slot in dict.fromkeys(slots):
            for v in self.slots[slot]:
                self.reset(v)

    def reset(self, v: Reg) -> None:
        """Set an accumulator to the value of no taps; the default is zero."""
        self.a.vpxor(v.xmm, v.xmm, v.xmm) if v.index < 16 else self.a.vpxord(v, v, v)

    def combine(self, slot: int, sources: list[int]) -> None:
        """Put what some slots have together into one of them."""
        if not sources:
            self.clear([slot])
            return
        old = self.slots[sources[0]]
        for source in sources[1:]:
            for dst, x, y in zip(self.slots[slot], old, self.slots[source], strict=True):
                self.join(dst, x, y)
            old = self.slots[slot]
        if len(sources) == 1 and sources[0] != slot:
            for dst, x in zip(self.slots[slot], old, strict=True):
                self.a.vmovaps(dst, x)

    def join(self, dst: Reg, old: Reg, new: Reg) -> None:
        """Combine two accumulators, of earlier and of later taps."""
        raise NotImplementedError

    def keep(self, slots: list[int]) -> None:
        """Name the slots that hold the outputs."""
        self.acc = [self.slots[s] for s in slots]

    def count(self, j: int) -> int:
        """Live elements of vector j."""
        return self.b.valid if j == self.b.vectors - 1 else self.unit

    def tap(self, mem: Mem, old: list[int], new: Sequence[int] = ()) -> None:
        """Take the elements at `mem` into some slots, and make them the first ones of others."""
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

    def reset(self, v: Reg) -> None:
        """Start from the lowest value."""
        self.a.vmovaps(v, self.low)

    def tap(self, mem: Mem, old: list[int], new: Sequence[int] = ()) -> None:
        """Take the maximum; a whole vector for one slot comes from memory directly."""
        for j in range(self.b.vectors):
            source: Any = mem + j * self.unit
            firsts = [self.slots[s][j] for s in new]
            if firsts or len(old) > 1 or self.count(j) != self.unit:
                x = firsts[0] if firsts else self.temp
                load_some(self.a, self.tier, x, source, self.count(j), self.mask)
                source = x
            for v in firsts[1:]:
                self.a.vmovaps(v, source)
            for s in old:
                self.op(self.slots[s][j], self.slots[s][j], source)

    def join(self, dst: Reg, old: Reg, new: Reg) -> None:
        """Take the maximum."""
        self.op(dst, old, new)

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

    def reset(self, v: Reg) -> None:
        """Start from minus infinity."""
        self.a.vmovaps(v, self.low)

    def tap(self, mem: Mem, old: list[int], new: Sequence[int] = ()) -> None:
        """VMAXPS gives its second source for NaNs and equals: that is the old maximum."""
        for j in range(self.b.vectors):
            self.load(self.temp, mem, j)
            for s in (*old, *new):
                v = self.slots[s][j]
                self.a.vmaxps(v, self.temp, self.low if s in new else v)

    def join(self, dst: Reg, old: Reg, new: Reg) -> None:
        """Take the maximum, the old one where both are equal."""
        self.a.vmaxps(dst, new, old)

    def load(self, x: Reg, mem: Mem, j: int) -> None:
        """Load vector j as f32."""
        source = mem + j * self.unit * SIZE[self.p.src]
        load_lanes(self.a, self.tier, x, source, self.p.src, self.count(j), self.mask)

    def finish(self, offsets: list[int], columns: list[int | None]) -> None:
        """Store floats."""
        self.store(self.acc, offsets, self.b.valid)


class SumFloat(MaxFloat):
    """Sums of f32 and bf16, times the reciprocal count."""

    def setup(self) -> None:
        """Only the mask."""
        Body.setup(self)

    def reset(self, v: Reg) -> None:
        """Start from zero."""
        Body.reset(self, v)

    def tap(self, mem: Mem, old: list[int], new: Sequence[int] = ()) -> None:
        """Add; a whole vector of f32 for one slot comes from memory directly."""
        for j in range(self.b.vectors):
            source: Any = mem + j * self.unit * SIZE[self.p.src]
            firsts = [self.slots[s][j] for s in new]
            if firsts or len(old) > 1 or self.p.src != "f32" or self.count(j) != self.unit:
                source = firsts[0] if firsts else self.temp
                self.load(source, mem, j)
            for v in firsts[1:]:
                self.a.vmovaps(v, source)
            for s in old:
                self.a.vaddps(self.slots[s][j], self.slots[s][j], source)

    def join(self, dst: Reg, old: Reg, new: Reg) -> None:
        """Add."""
        self.a.vaddps(dst, old, new)

    def finish(self, offsets: list[int], columns: list[int | None]) -> None:
        """Scale, then the epilogue. Adding zero makes +0 of a sum of no taps but -0, wherever summing started."""
        with self.a.scope():
            zero = self.vec("zero")
            self.a.vxorps(zero, zero, zero)
            for t, row in enumerate(self.acc):
                if t == 0 or columns[t] != columns[t - 1]:
                    self.a.vbroadcastss(self.temp, self.by_count(self.tables.factors, columns[t]))
                for v in row:
                    self.a.vfmadd213ps(v, self.temp, zero)
        self.a.release(self.temp)
        self.store(self.acc, offsets, self.b.valid)


class SumBytes(Body):
    """Sums of bytes (s8 shifted to u8) in 16 bits: all of a word, and its upper byte; the lower follows.

    A word of two bytes is added as it is, modulo 2**16, and its upper byte once more on its own: three instructions
    for two channels' bytes, without shuffles. The lower byte's sum is the difference. Both fit for 256 taps, after
    which they are emptied into 32-bit sums.
    """

    bytes_in = True

    def room(self) -> int:
        """Besides two sums: an element, the shift, four wide sums, the epilogue (bytes come interleaved: less)."""
        need = 2 if self.spec.out in ("u8", "s8") else epilogue_registers(self.spec, self.tier)
        most = (self.tier.registers - 6 - need) // 2
        return min(most, {512: 3, 256: 1}[self.tier.bits]) if self.flush else most

    def setup(self) -> None:
        """Also keep the shift from s8 to u8 at hand."""
        super().setup()
        self.flip = None
        if self.p.src == "s8":
            self.flip = self.vec("flip")
            self.a.vmovups(self.flip, self.a.const(np.full(self.tier.vector_bytes, 0x80, np.uint8)))

    def start(self, b: Block, slots: list[int]) -> None:
        """Allocate wide sums too where they are needed."""
        super().start(b, slots)
        self.wide: list[list[Reg]] = []
        if self.flush:
            self.wide = [[self.vec(f"wide{j}_{q}") for q in range(4)] for j in range(b.vectors)]
            for quad in self.wide:
                for v in quad:
                    self.reset(v)

    def allocate(self, slot: int) -> list[Reg]:
        """Sums of words, then those of upper bytes."""
        return super().allocate(slot) + [self.vec(f"upper{slot}_{j}") for j in range(self.b.vectors)]

    def tap(self, mem: Mem, old: list[int], new: Sequence[int] = ()) -> None:
        """Add words and upper bytes."""
        a, n = self.a, self.b.vectors
        with a.scope():
            high = self.vec("high")
            for j in range(n):
                x = self.slots[new[0]][j] if new else self.temp
                top = self.slots[new[0]][n + j] if new else high
                load_some(a, self.tier, x, mem + j * self.unit, self.count(j), self.mask)
                if self.flip is not None:
                    a.vxorps(x, x, self.flip)
                a.vpsrlw(top, x, 8)
                for s in new[1:]:
                    a.vmovaps(self.slots[s][j], x)
                    a.vmovaps(self.slots[s][n + j], top)
                for s in old:
                    a.vpaddw(self.slots[s][j], self.slots[s][j], x)
                    a.vpaddw(self.slots[s][n + j], self.slots[s][n + j], top)

    def join(self, dst: Reg, old: Reg, new: Reg) -> None:
        """Add."""
        self.a.vpaddw(dst, old, new)

    def _widen(self, word: Reg, upper: Reg, out: list[Reg]) -> None:
        """Turn 16-bit sums into four vectors of 32-bit sums, interleaved (see `depthwise`); clobbers the sums."""
        a, t = self.a, self.temp
        a.vpsllw(t, upper, 8)
        a.vpsubw(word, word, t)
        a.vpunpcklwd(out[1], word, upper)
        a.vpunpckhwd(out[3], word, upper)
        self.reset(t)
        a.vpunpcklwd(out[0], out[1], t)
        a.vpunpckhwd(out[1], out[1], t)
        a.vpunpcklwd(out[2], out[3], t)
        a.vpunpckhwd(out[3], out[3], t)

    def empty(self) -> None:
        """Add the 16-bit sums to the wide ones."""
        a = self.a
        n = self.b.vectors
        for j in range(n):
            with a.scope():
                fresh = [self.vec(f"fresh{q}") for q in range(4)]
                self._widen(self.slots[0][j], self.slots[0][n + j], fresh)
                for total, part in zip(self.wide[j], fresh, strict=True):
                    a.vpaddd(total, total, part)
        self.clear([0])

    def finish(self, offsets: list[int], columns: list[int | None]) -> None:
        """Average in 16 bits where that is exact, else in f32."""
        (self._finish_words if self.code.mode else self._finish_floats)(offsets, columns)

    def _finish_words(self, offsets: list[int], columns: list[int | None]) -> None:
        """Ties cost half of what averaging does: whole windows are spared them where their number of taps is odd."""
        a, kh = self.a, self.p.kernel[0]
        if not self.code.tie_counts:
            self._average_all(offsets, columns, ties=False)
        elif any(c is None or c * kh in self.code.tie_counts for c in columns):
            self._average_all(offsets, columns, ties=True)
        elif not self.code.rows_vary:
            self._average_all(offsets, columns, ties=False)
        else:
            part, end = a.label("part_of_rows"), a.label("averaged")
            a.cmp(self.r["rows"], kh)
            a.jnz(part)
            self._average_all(offsets, columns, ties=False)
            a.jmp(end)
            a.bind(part)
            self._average_all(offsets, columns, ties=True)
            a.bind(end)

    def _average_all(self, offsets: list[int], columns: list[int | None], *, ties: bool) -> None:
        """What `WordAverage` says, for lower and upper bytes; they are put together without a shuffle."""
        a, n, pitch = self.a, self.b.vectors, 4 * (self.p.taps + 1)
        with a.scope():
            constants = [self.vec(f"word{i}") for i in range(3 if ties else 2)]
            a.mov(self.r["ptr"], Mem(self.args, 8 * ARG_DST))
            for t, (row, offset) in enumerate(zip(self.acc, offsets, strict=True)):
                if t == 0 or columns[t] != columns[t - 1]:
                    table = self.by_count(self.tables.words, columns[t])
                    for i, v in enumerate(constants):
                        a.vbroadcastss(v, table + i * pitch)
                    if ties and not self.tier.masks:
                        a.vxorps(constants[2], constants[2], self._word(0x8000))
                for j, (word, upper) in enumerate(zip(row[:n], row[n:], strict=True)):
                    a.vpsllw(self.temp, upper, 8)
                    a.vpsubw(word, word, self.temp)
                    for v in (word, upper):
                        self._average(v, constants)
                    a.vpsllw(upper, upper, 8)
                    a.vorps(word, word, upper)
                    if self.flip is not None:
                        a.vxorps(word, word, self.flip)
                    mem = Mem(self.r["ptr"], offset + j * self.unit, index=self.r["off"])
                    store_some(a, self.tier, mem, word, self.count(j), self.mask)

    def _word(self, value: int) -> Mem:
        """A 16-bit constant in every place."""
        return splat(self.a, self.tier, np.int32(value * 0x10001 - (value >> 15 << 32)))

    def _average(self, v: Reg, constants: list[Reg]) -> None:
        a, rest = self.a, self.temp
        add, times, *ties = constants
        a.vpaddw(v, v, add)
        if not ties:
            a.vpmulhuw(v, v, times)
            return
        a.vpmullw(rest, v, times)
        a.vpmulhuw(v, v, times)
        if self.tier.masks:
            with a.scope():
                tie = a.kreg("tie")
                a.vpcmpuw(tie, rest, ties[0], 1)
                (a.vpandnd if self.code.mode == "odd" else a.vpandd)(rest, v, self._word(1))
                a.vpsubw(v, v, rest, mask=tie)
            return
        # A comparison without signs: both have their upper bit turned.
        a.vpxor(rest, rest, self._word(0x8000))
        a.vpcmpgtw(rest, ties[0], rest)
        a.vpand(rest, rest, self._word(1))
        if self.code.mode == "odd":
            a.vpandn(rest, v, rest)
        else:
            a.vpand(rest, rest, v)
        a.vpsubw(v, v, rest)

    def _finish_floats(self, offsets: list[int], columns: list[int | None]) -> None:
        """Subtract the zero points, scale, then the epilogue, one vector of bytes after the other."""
        a = self.a
        for t, offset in enumerate(offsets):
            for j in range(self.b.vectors):
                with a.scope():
                    quad = self.wide[j] if self.flush else [self.vec(f"sum{q}") for q in range(4)]
                    if not self.flush:
                        self._widen(self.acc[t][j], self.acc[t][self.b.vectors + j], quad)
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
