"""Softmax of f32 along rows: largest element, exponentials and their sum, then the product with 1/sum.

    m = the largest element of the row (NaNs aside)
    e = exp(-(m - x)) * 2**-k with 2**k >= n, as `approx` does it; 0 from m - x = (126 - k) ln 2 - 0.05 on
    s = the sum of e: 16 partial sums, of every 16th element in order, then halves added to halves
    y = e * (1/s), both operations rounded to f32

The factor 2**-k changes no other bit of y; with it nothing on the way is a denormal number, with which arithmetic is
slow. The relative error of e is below (3 + 17/16 (m - x)) * 2**-24; where e is 0 instead, y would be below n * 2**-124.
A row with a NaN, +inf or nothing but -inf gives NaN throughout.

It is bound by arithmetic, not by memory: 16 elements take 15 vector instructions besides loads and stores, 7 of them
multiplications. So several vectors are worked on in step (see `emit_approx.emit_together`), and the sums over lanes of
several rows are combined in one register.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.kernels import emit_approx
from vnnigen.kernels.approx import Bits, Scalar, Table, evaluate, exp_end, exp_minus
from vnnigen.kernels.element.common import NoScratch, by_last, check_offsets, load_lanes, loop_or_skip, steps_of
from vnnigen.kernels.emit_common import counted, lane_mask, set_mask
from vnnigen.kernels.layout import ARG_DST, ARG_SRC
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.types import F32

Reg = Any
#: Partial sums of a row, whatever the vectors' width.
PARTS = 16
#: Rows that are worked on together, by vector width, and the most bytes that they may read and write: most of the L1.
TOGETHER = {512: 4, 256: 1}
#: Vectors that are worked on in step.
WIDTH = {512: 6, 256: 2}
L1_BYTES = 40 << 10


def _power(n: int) -> int:
    """The least k with 2**k >= n."""
    return (n - 1).bit_length()


def softmax_reference(x: F32) -> F32:
    """Softmax of [rows, n] as every kernel must compute it."""
    rows, n = x.shape
    with np.errstate(all="ignore"):
        largest = np.full((rows, 1), -np.inf, np.float32)
        largest = np.maximum(largest, np.where(np.isnan(x), -np.inf, x).max(axis=1, keepdims=True)).astype(np.float32)
        below = largest - x
        e = evaluate(exp_minus(_power(n)), below, np.empty(0, np.float32))
        e = np.where(below > exp_end(_power(n)), np.float32(0), e)
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
    def together(self) -> int:
        """Rows that are worked on together."""
        most = TOGETHER[self.tier.bits]
        return most if self.rows >= most and 8 * self.n * most <= L1_BYTES else 1

    @property
    def split(self) -> tuple[int, int]:
        """Rows per step, and steps."""
        return steps_of(self.rows, 8 * self.n, self.together)

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.split[1]

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _Softmax(self, features).build()


@dataclass(frozen=True)
class _Piece:
    """A vector of a turn: its distance from the turn's start in bytes, live lanes, row of its pass, accumulator."""

    disp: int
    count: int
    row: int
    acc: int


class _Softmax:
    """Emits one key. Groups of rows go through three passes, of which each takes one or some of the rows at a time."""

    def __init__(self, key: SoftmaxKey, features: frozenset[str] | None) -> None:
        self.key = key
        check_offsets(f"{key.n} elements", 4 * key.n * key.together)
        self.per = PARTS // key.tier.lanes
        vectors = -(-key.n // key.tier.lanes)
        #: Rows of a pass.
        self.abreast = max(r for r in (1, 2, 4) if r == 1 or (r <= key.together and r * vectors <= WIDTH[512]))
        self.a = a = Assembler(
            key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features
        )
        self.args, self.index = a.load_argument("args"), a.load_argument("index")
        names = ("src", "dst", "rows", "at", "count", "tmp")
        self.r: dict[str, Reg] = {name: a.gpr(name) for name in names}
        self.mask: Reg | None = None

    def _vec(self, name: str) -> Reg:
        return self.a.vec(self.key.tier.bits, name)

    def _splat(self, value: np.float32 | float) -> Mem:
        return self.a.const(np.full(PARTS, value, np.float32))

    def build(self) -> Code:
        """Emit everything and encode it."""
        a, key, r = self.a, self.key, self.r
        share, steps = key.split
        for pointer, slot in (("src", ARG_SRC), ("dst", ARG_DST)):
            a.imul(r[pointer], self.index, share * key.n * 4)
            a.add(r[pointer], Mem(self.args, 8 * slot))
        by_last(a, r["rows"], self.index, steps, share, key.rows - (steps - 1) * share)
        if key.tier.masks and key.n % key.tier.lanes:
            self.mask = a.kreg("tail")
            set_mask(a, self.mask, key.n % key.tier.lanes, r["tmp"])
        self._registers()
        if key.together > 1:
            self._groups()
        else:
            with a.loop(r["rows"]):
                self._rows(1)
        a.ret()
        return a.finalize().encode()

    def _registers(self) -> None:
        """Accumulators, the vectors of a turn with their temporaries, and as many constants as still fit."""
        a, tier, n = self.a, self.key.tier, self.key.n
        program = exp_minus(_power(n))
        places = [s for op in program.operations for s in op.sources if isinstance(s, (Bits, Table))]
        resident = sorted(dict.fromkeys(places), key=lambda s: isinstance(s, Bits))
        temps = emit_approx.lower(program, tier.masks, frozenset(resident)).registers + 1
        width = WIDTH[tier.bits] // self.abreast * self.abreast
        self.packed = self._vec("packed")
        self.factor = [self._vec(f"factor{i}") for i in range(self.abreast)]
        self.acc = [self._vec(f"acc{i}") for i in range(self.key.together * self.per)]
        self.v = [[self._vec(f"v{i}_{t}") for t in range(temps)] for i in range(width)]
        self.near = [a.kreg(f"near{i}") if tier.masks else self._vec(f"far{i}") for i in range(width)]
        free = tier.registers - 1 - len(self.factor) - len(self.acc) - width * temps - (0 if tier.masks else width + 1)
        self.constants: dict[Any, Reg] = {}
        for place in resident[:free]:
            self.constants[place] = self._vec("constant")
            bits = place.bits if isinstance(place, Table) else (place.bits,)
            a.vmovups(self.constants[place], a.const(np.resize(np.array(bits, np.uint32), tier.lanes)))
        self.code = emit_approx.lower(program, tier.masks, frozenset(self.constants))

    def _groups(self) -> None:
        """All rows of a step: as many together as there may be, what is left one by one."""
        a, r, together = self.a, self.r, self.key.together
        top, end, single = a.label("group"), a.label("end"), a.label("single")
        a.bind(top)
        a.cmp(r["rows"], together)
        a.jb(single)
        self._rows(together)
        a.sub(r["rows"], together)
        a.jnz(top)
        a.jmp(end)
        a.bind(single)
        loop_or_skip(a, r["rows"], lambda: self._rows(1), may_be_zero=False)
        a.bind(end)

    def _rows(self, rows: int) -> None:
        """A group: three passes over it, with sums over lanes between them."""
        a, n, r = self.a, self.key.n, self.r
        portions = [range(first, first + min(rows, self.abreast)) for first in range(0, rows, self.abreast)]
        for portion in portions:
            self._maxima(portion)
        self._reduce(a.vmaxps, rows)
        a.vmovaps(self.packed, self.acc[0])
        for portion in portions:
            self._spread(portion, rows)
            for acc in self.acc[portion.start * self.per : portion.stop * self.per]:
                a.vxorps(acc, acc, acc)
            self._pass(portion, self._exponentials)
        self._reduce(a.vaddps, rows)
        a.vmovups(self.packed, self._splat(1))
        a.vdivps(self.packed, self.packed, self.acc[0])
        for portion in portions:
            self._spread(portion, rows)
            self._pass(portion, self._scale)
        a.add(r["src"], 4 * n * rows)
        a.add(r["dst"], 4 * n * rows)

    def _pass(self, rows: range, body: Callable[[list[_Piece]], None]) -> None:
        """Run over the rows; the body gets the vectors of a turn, whose start is `at`."""
        a, r, n = self.a, self.r, self.key.n
        width = PARTS * (len(self.v) // self.per // len(rows))
        full, tail = divmod(n, width)
        a.mov(r["at"], 0)
        if full:
            with counted(a, r["count"], full):
                body(self._pieces(rows, width))
                a.add(r["at"], 4 * width)
        if tail:
            body(self._pieces(rows, tail))

    def _pieces(self, rows: range, width: int) -> list[_Piece]:
        lanes = self.key.tier.lanes
        return [
            _Piece(
                4 * (row * self.key.n + at), min(lanes, width - at), row - rows.start,
                row * self.per + at // lanes % self.per,
            )
            for at in range(0, width, lanes)
            for row in rows
        ]  # fmt: skip

    def _mem(self, base: str, piece: _Piece) -> Mem:
        return Mem(self.r[base], piece.disp, index=self.r["at"])

    def _load(self, v: Reg, piece: _Piece) -> None:
        """Load a part of the source, minus infinity behind its end."""
        a, tier, mem = self.a, self.key.tier, self._mem("src", piece)
        if piece.count == tier.lanes:
            a.vmovups(v, mem)
        elif tier.masks:
            a.vmovups(v, self._splat(-np.inf))
            a.vmovups(v, mem, mask=self.mask)
        else:
            with a.scope():
                lanes = self._vec("live")
                a.vmovups(lanes, lane_mask(a, piece.count))
                a.vmaskmovps(v, lanes, mem)
                a.vorps(v, v, self._dead(piece.count))

    def _dead(self, count: int) -> Mem:
        """Minus infinity behind the lowest `count` lanes, zero in them."""
        values = np.zeros(self.key.tier.lanes, np.float32)
        values[count:] = -np.inf
        return self.a.const(values)

    def _maxima(self, rows: range) -> None:
        """The largest elements of rows, over several independent maxima: one is late by its latency every time."""
        a = self.a
        largest = [(temps[0], temps[1]) for temps in self.v]

        def body(pieces: list[_Piece]) -> None:
            for piece, (v, acc) in zip(pieces, largest, strict=False):
                self._load(v, piece)
                # The second source is taken where the first is NaN, or both are equal.
                a.vmaxps(acc, v, acc)

        pieces = self._pieces(rows, min(self.key.n, PARTS * (len(self.v) // self.per // len(rows))))
        for _, (_, acc) in zip(pieces, largest, strict=False):
            a.vmovups(acc, self._splat(-np.inf))
        self._pass(rows, body)
        for i, (piece, (_, acc)) in enumerate(zip(pieces, largest, strict=False)):
            first = i < len(rows) * self.per
            a.vmaxps(self.acc[piece.acc], acc, acc if first else self.acc[piece.acc])
        for missing in range(len(pieces), len(rows) * self.per):
            a.vmovaps(self.acc[missing], self.acc[0])

    def _exponentials(self, pieces: list[_Piece]) -> None:
        a, tier = self.a, self.key.tier
        end = exp_end(_power(self.key.n))

        def memory(place: Bits | Scalar, one: bool) -> Any:
            assert isinstance(place, Bits)
            if tier.masks or one:
                mem = a.const(np.uint32(place.bits), align=4)
                return mem if one else mem.broadcast()
            return a.const(np.full(tier.lanes, place.bits, np.uint32))

        used = self.v[: len(pieces)]
        for i, (piece, (v, *_)) in enumerate(zip(pieces, used, strict=True)):
            self._load(v, piece)
            # The next group comes into the L1 cache meanwhile, for its maxima are bound by memory.
            a.prefetcht0(self._mem("src", piece) + 4 * self.key.n * self.key.together)
            a.vsubps(v, self.factor[piece.row], v)
            # "Not above" lets NaN through; "above" takes what is behind the end, whatever has become of it.
            a.vcmpps(self.near[i], v, self._splat(end), 26 if tier.masks else 30)
        emit_approx.emit_together(a, self.code, used, memory, self.constants, self.near if tier.masks else ())
        for i, (piece, (v, *_)) in enumerate(zip(pieces, used, strict=True)):
            if not tier.masks:
                a.vandnps(v, self.near[i], v)
            a.vaddps(self.acc[piece.acc], self.acc[piece.acc], v)
            self._store(v, piece)

    def _scale(self, pieces: list[_Piece]) -> None:
        a = self.a
        for piece, (v, *_) in zip(pieces, self.v, strict=False):
            load_lanes(a, self.key.tier, v, self._mem("dst", piece), "f32", piece.count, self.mask)
            a.vmulps(v, v, self.factor[piece.row])
            self._store(v, piece)

    def _store(self, v: Reg, piece: _Piece) -> None:
        a, mem = self.a, self._mem("dst", piece)
        if piece.count == self.key.tier.lanes:
            a.vmovups(mem, v)
        elif self.key.tier.masks:
            a.vmovups(mem, v, mask=self.mask)
        else:
            with a.scope():
                lanes = self._vec("live")
                a.vmovups(lanes, lane_mask(a, piece.count))
                a.vmaskmovps(mem, lanes, v)

    def _reduce(self, op: Callable[[Reg, Reg, Reg], None], rows: int) -> None:
        """Combine all lanes of each row, lane k with lane k + 8, 4, 2, 1.

        acc[0] gets the result of one row in all lanes, of four rows one in each 128 bits.
        """
        a, acc, t = self.a, self.acc[0], self.v[0][0]
        if rows == 4:
            for low, high in ((0, 1), (2, 3), (0, 2)):
                x, y = self.acc[low], self.acc[high]
                first, second = (0x44, 0xEE) if low + 1 == high else (0x88, 0xDD)
                a.vshufi32x4(t, x, y, second)
                a.vshufi32x4(x, x, y, first)
                op(x, x, t)
        elif self.key.tier.bits == 512:
            for control in (0b01001110, 0b10110001):
                a.vshufi32x4(t, acc, acc, control)
                op(acc, acc, t)
        else:
            op(acc, acc, self.acc[1])
            a.vperm2i128(t, acc, acc, 1)
            op(acc, acc, t)
        for control in (0b01001110, 0b10110001):
            a.vpshufd(t, acc, control)
            op(acc, acc, t)

    def _spread(self, portion: range, rows: int) -> None:
        """Give each row of a portion its own result of a reduction."""
        for row, factor in zip(portion, self.factor, strict=False):
            if rows == 1:
                self.a.vmovaps(factor, self.packed)
            else:
                self.a.vshufi32x4(factor, self.packed, self.packed, row * 0x55)
