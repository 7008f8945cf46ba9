"""Generated packing: the second operand of a product of two activations becomes panels at run time.

What `packing.pack_panels` does once for weights, these kernels do at every call: b, [k, n] or its transpose, becomes
`panel[dword of K][column][K elements of the dword]`, filled up with zeros.  Rows of b are interleaved (bytes by fours,
words by pairs); rows of the transpose are dwords of K already, so that a transposition in registers puts them in
place.  On the way the columns are summed, for what the zero point of a and the shift of s8 add to every product, and
the accumulators' start values are written into the constant block that the multiplying kernel reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.kernels.element.common import (
    SIZE,
    STEP_BYTES,
    NoScratch,
    by_last,
    check_offsets,
    load_some,
    loop_or_skip,
    only_last,
)
from vnnigen.kernels.element.shuffles import dwords_4x4, lanes_4x4
from vnnigen.kernels.emit_common import counted, div_const, load_bytes, set_mask
from vnnigen.kernels.layout import ARG_CONSTS, ARG_WEIGHTS
from vnnigen.kernels.mac import ONES8, ONES16, TierCode
from vnnigen.kernels.packing import aligned
from vnnigen.kernels.types import DType

Reg = Any
#: Argument slots behind those of the first launch, which is the only one with weights: the address of b, the packing
#: kernel's own constants, and the distance in bytes of every matrix of b from the first (s64).
ARG_B = ARG_CONSTS + 1
ARG_PACK = ARG_B + 1
ARG_B_TABLE = ARG_PACK + 1

#: Panels that rows of b are packed into at a time.
GROUP = 4
_WIDEN = {("u8", "s16"): "vpmovzxbw", ("s8", "s16"): "vpmovsxbw", ("bf16", "f32"): "vpmovzxwd"}
_PER = {"s8": 4, "s16": 2, "bf16": 2, "f32": 1}

# Offsets in the packing kernel's constants: 32 words, 16 dwords, then a dword for each column.
_B_ZERO_POINT, _A_ZERO_POINT, STARTS = 0, 64, 128


def pack_constants(start: NDArray[np.int32], a_zero_point: int, b_zero_point: int) -> NDArray[np.uint8]:
    """What a packing kernel needs of a quantized product.

    `start` holds the accumulators' start values (of all panels' columns) without `a_zero_point * (sum of a column)`,
    which the kernel subtracts; `b_zero_point` is subtracted from what is packed as words.
    """
    out = aligned(STARTS + start.nbytes)
    out[_B_ZERO_POINT:_A_ZERO_POINT].view(np.int16)[:] = b_zero_point
    out[_A_ZERO_POINT:STARTS].view(np.int32)[:] = a_zero_point
    out[STARTS:].view(np.int32)[:] = start
    return out


@dataclass(frozen=True)
class PackKey(NoScratch):
    """Key of a packing kernel for `batches` matrices b of type `src`, `pitch` bytes from row to row.

    Rows are K's, or with `transposed` the columns'. `element` is what the multiplication takes: "s8" (u8 is shifted by
    -128 into it), "s16" (less the zero point), "bf16" or "f32"; `dwords` counts those of the packed K. `init` is None
    or where, in constant blocks `consts_stride` bytes apart, the start values go.
    """

    tier: TierCode
    src: DType
    element: str
    transposed: bool
    k: int
    n: int
    pitch: int
    dwords: int
    batches: int
    consts_stride: int = 0
    init: int | None = None

    @property
    def name(self) -> str:
        """The kernel's name: types, orientation, tier."""
        types = self.src if self.src == self.element else f"{self.src}{self.element}"
        return f"pack-{types}-{'nk' if self.transposed else 'kn'}-{self.tier.name}"

    @property
    def per(self) -> int:
        """Elements of K in a dword."""
        return _PER[self.element]

    @property
    def elements(self) -> int:
        """Elements of a vector, as packed."""
        return self.tier.lanes * self.per

    @property
    def panels(self) -> int:
        """Panels of one matrix."""
        return -(-self.n // self.tier.lanes)

    @property
    def panel_bytes(self) -> int:
        """Bytes from one panel to the next."""
        return self.dwords * self.tier.vector_bytes

    @property
    def stride(self) -> int:
        """Bytes from one packed matrix to the next."""
        return -(-self.panels * self.panel_bytes // 64) * 64

    @property
    def group(self) -> int:
        """Panels packed at a time."""
        return 1 if self.transposed else GROUP

    @property
    def groups(self) -> int:
        """Groups of panels of one matrix, the last one perhaps not full."""
        return -(-self.panels // self.group)

    @property
    def chunk(self) -> int:
        """Groups of panels that one step packs."""
        per_step = max(1, STEP_BYTES // (self.group * self.panel_bytes))
        return -(-self.groups // -(-self.groups // per_step))

    @property
    def chunks(self) -> int:
        """Steps of one matrix."""
        return -(-self.groups // self.chunk)

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.batches * self.chunks

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _kernel(self, features)


class PackCode:
    """Emits the packing of a run of groups of panels.

    Its user sets the cursors: `src` and `dst` at the first group, `consts` at the kernel's constants, and, where
    columns are summed, `start` and `init` at the start values before and after. It calls `prepare`, then `groups`.
    """

    def __init__(self, a: Assembler, key: PackKey, take: Callable[[str], Reg]) -> None:
        """Get general registers from `take`."""
        self.a, self.key, self.tier = a, key, key.tier
        self.size = SIZE[key.src]
        self.widen = _WIDEN.get((key.src, key.element))
        self.flip = key.src == "u8" and key.element == "s8"
        self.centre = key.element == "s16"
        self.columns = key.group * self.tier.lanes
        self.source_step = self.columns * (key.pitch if key.transposed else self.size)
        self.src, self.dst, self.at, self.to = take("src"), take("dst"), take("at"), take("to")
        self.init, self.consts, self.start = take("init"), take("consts"), take("start")
        self.count, self.left = take("count"), take("groups_left")
        self.mask: Reg | None = None

    def groups(self, chunk: Reg, per_chunk: int, chunks: int) -> None:
        """Pack the groups of number `chunk` of `chunks` chunks."""
        a, key = self.a, self.key
        full, tail = divmod(key.n, self.columns)
        last = full - (chunks - 1) * per_chunk
        by_last(a, self.left, chunk, chunks, per_chunk, last)

        def step() -> None:
            self._group(self.columns)
            a.add(self.src, self.source_step)
            a.add(self.dst, key.group * key.panel_bytes)
            if key.init is not None:
                a.add(self.init, 4 * self.columns)
                a.add(self.start, 4 * self.columns)

        if full:
            loop_or_skip(a, self.left, step, may_be_zero=last == 0)
        if tail:
            only_last(a, chunk, chunks, lambda: self._group(tail))

    def prepare(self) -> None:
        """Load what stays in registers."""
        a, key = self.a, self.key
        partial = (key.k if key.transposed else key.n) % key.elements
        if partial and self.tier.masks:
            self.mask = a.kreg("partial")
            set_mask(a, self.mask, partial if self.widen else partial * self.size, self.at)
        if key.per == 2 and not key.transposed and self.tier.masks:
            # Lanes 0 and 1 of two registers, taking turns; then lanes 2 and 3.
            self.orders = [a.vec(512, f"order{panel}") for panel in range(2)]
            for panel, order in enumerate(self.orders):
                starts = [8 * panel + 4 * lane + 16 * half for lane in range(2) for half in range(2)]
                a.vmovups(order, a.const(np.array([s + q for s in starts for q in range(4)], dtype=np.int32)))
        if self.centre:
            self.zero_point = a.vec(self.tier.bits, "b_zero_point")
            a.vmovups(self.zero_point, Mem(self.consts, _B_ZERO_POINT))
        if key.init is not None:
            self.ones = a.vec(self.tier.bits, "ones")
            ones: NDArray[Any] = ONES16 if key.element == "s16" else ONES8
            a.vmovups(self.ones, a.const(ones[: self.tier.vector_bytes // ones.itemsize]))

    # One group of panels.

    def _group(self, columns: int) -> None:
        """Pack `columns` columns, and finish their start values."""
        a, key = self.a, self.key
        panels = -(-columns // self.tier.lanes)
        with a.scope(), a.section(f"pack {columns} columns"):
            self.sums: list[Reg] = []
            if key.init is not None:
                self.sums = [a.vec(self.tier.bits, f"sum{j}") for j in range(panels)]
            for s in self.sums:
                self._zero(s)
            a.mov(self.at, self.src)
            a.mov(self.to, self.dst)
            done = self._transposed(columns) if key.transposed else self._rows(columns)
            self._fill(key.dwords - done, panels)
            for j, s in enumerate(self.sums):
                with a.scope():
                    start = a.vec(self.tier.bits, "start")
                    a.vmovups(start, Mem(self.start, j * self.tier.vector_bytes))
                    a.vpmulld(s, s, Mem(self.consts, _A_ZERO_POINT))
                    a.vpsubd(start, start, s)
                    a.vmovups(Mem(self.init, j * self.tier.vector_bytes), start)

    def _fill(self, dwords: int, panels: int) -> None:
        """Zeros up to the packed K's length."""
        a = self.a
        if dwords == 0:
            return
        with a.scope(), counted(a, self.count, dwords):
            zero = a.vec(self.tier.bits, "zero")
            self._zero(zero)
            for j in range(panels):
                a.vmovups(Mem(self.to, j * self.key.panel_bytes), zero)
            a.add(self.to, self.tier.vector_bytes)

    def _rows(self, columns: int) -> int:
        """Interleave rows of b, `per` at a time; returns the dwords of K written."""
        a, key = self.a, self.key
        full, tail = divmod(key.k, key.per)
        if full:
            with counted(a, self.count, full):
                self._interleave(columns, key.per)
                a.add(self.at, key.per * key.pitch)
                a.add(self.to, self.tier.vector_bytes)
        if tail:
            self._interleave(columns, tail)
            a.add(self.to, self.tier.vector_bytes)
        return full + bool(tail)

    def _interleave(self, columns: int, rows: int) -> None:
        """One dword of K of `columns` columns, from `rows` rows of b."""
        a, key = self.a, self.key
        for first in range(0, columns, key.elements):
            valid = min(key.elements, columns - first)
            with a.scope():
                r = [a.vec(self.tier.bits, f"row{i}") for i in range(key.per)]
                t = [a.vec(self.tier.bits, f"t{i}") for i in range(2)]
                for i, v in enumerate(r):
                    if i < rows:
                        self._load(v, Mem(self.at, i * key.pitch + first * self.size), valid)
                    else:
                        self._zero(v)
                {4: self._bytes, 2: self._words, 1: lambda *_: None}[key.per](r, t)
                for j, v in enumerate(r[: -(-valid // self.tier.lanes)]):
                    self._store(first // self.tier.lanes + j, 0, v, t[0])

    def _bytes(self, r: list[Reg], t: list[Reg]) -> None:
        """Four rows of bytes into four panels' dwords."""
        a = self.a
        a.vpunpckhbw(t[0], r[0], r[1])
        a.vpunpcklbw(r[0], r[0], r[1])
        a.vpunpckhbw(t[1], r[2], r[3])
        a.vpunpcklbw(r[2], r[2], r[3])
        a.vpunpckhwd(r[1], r[0], r[2])
        a.vpunpcklwd(r[0], r[0], r[2])
        a.vpunpcklwd(r[2], t[0], t[1])
        a.vpunpckhwd(r[3], t[0], t[1])
        # Register q now holds, in lane l, the columns 4q to 4q + 3 of the 16 of lane l.
        lanes_4x4(a, self.tier, r, t)

    def _words(self, r: list[Reg], t: list[Reg]) -> None:
        """Two rows of words into two panels' dwords."""
        a = self.a
        a.vpunpcklwd(t[0], r[0], r[1])
        a.vpunpckhwd(t[1], r[0], r[1])
        if self.tier.masks:
            for v, order in zip(r, self.orders, strict=True):
                a.vmovaps(v, t[0])
                a.vpermt2d(v, order, t[1])
            return
        a.vperm2i128(r[0], t[0], t[1], 0x20)
        a.vperm2i128(r[1], t[0], t[1], 0x31)

    def _transposed(self, columns: int) -> int:
        """Transpose rows of dwords, a square of them at a time; returns the dwords of K written."""
        a, key = self.a, self.key
        lanes, vb = self.tier.lanes, self.tier.vector_bytes
        full, tail = divmod(key.k, key.elements)
        dwords = -(-tail // key.per)
        if full:
            with counted(a, self.count, full):
                self._square(columns, key.elements, lanes)
                a.add(self.at, key.elements * self.size)
                a.add(self.to, lanes * vb)
        if tail:
            self._square(columns, tail, dwords)
            a.add(self.to, dwords * vb)
        return full * lanes + dwords

    def _square(self, columns: int, valid: int, dwords: int) -> None:
        """`valid` elements of `columns` rows become `dwords` vectors of a panel."""
        a, lanes = self.a, self.tier.lanes
        with a.scope():
            r = [a.vec(self.tier.bits, f"row{i}") for i in range(lanes)]
            t = [a.vec(self.tier.bits, f"t{i}") for i in range(2)]
            for i, v in enumerate(r):
                if i < columns:
                    self._load(v, Mem(self.at, i * self.key.pitch), valid)
                else:
                    self._zero(v)
            for first in range(0, lanes, 4):
                dwords_4x4(a, r[first : first + 4], t)
            # Register 4i + q now holds, in lane l, dword 4l + q of the rows 4i to 4i + 3.
            for q in range(4):
                if self.tier.masks:
                    lanes_4x4(a, self.tier, r[q::4], t)
                else:
                    a.vperm2i128(t[0], r[q], r[4 + q], 0x31)
                    a.vperm2i128(r[q], r[q], r[4 + q], 0x20)
                    a.vmovaps(r[4 + q], t[0])
            for d in range(dwords):
                self._store(0, d, r[d], t[0])

    # Single vectors.

    def _zero(self, v: Reg) -> None:
        self.a.vpxor(v.xmm, v.xmm, v.xmm) if not self.tier.masks else self.a.vpxord(v, v, v)

    def _load(self, v: Reg, mem: Mem, valid: int) -> None:
        """Load `valid` elements as they are multiplied; the others become zeros and are not read."""
        a, key = self.a, self.key
        full = valid == key.elements
        if self.widen is None:
            load_some(a, self.tier, v, mem, valid * self.size, self.mask)
        else:
            widen = getattr(a, self.widen)
            if full:
                widen(v, mem)
            elif self.tier.masks:
                widen(v, mem, mask=self.mask, zero=True)
            else:
                load_bytes(a, v.xmm, mem, valid * self.size)
                widen(v, v.xmm)
            if key.src == "bf16":
                a.vpslld(v, v, 16)
        xor, and_ = (a.vpxord, a.vpandd) if self.tier.masks else (a.vpxor, a.vpand)
        if self.flip:
            xor(v, v, a.const(np.full(self.tier.vector_bytes, 0x80, np.uint8)))
        if self.centre:
            a.vpsubw(v, v, self.zero_point)
        if not full and (self.flip or self.centre):
            keep = np.zeros(self.tier.vector_bytes, np.uint8)
            keep[: valid * (self.tier.vector_bytes // key.elements)] = 0xFF
            and_(v, v, a.const(keep))

    def _store(self, panel: int, dword: int, v: Reg, temp: Reg) -> None:
        """Store a dword of K of a panel and add it to the columns' sums."""
        a = self.a
        a.vmovups(Mem(self.to, panel * self.key.panel_bytes + dword * self.tier.vector_bytes), v)
        if not self.sums:
            return
        if self.key.element == "s16":
            a.vpmaddwd(temp, v, self.ones)
            a.vpaddd(self.sums[panel], self.sums[panel], temp)
        else:
            a.vpdpbusd(self.sums[panel], self.ones, v)


def _kernel(key: PackKey, features: frozenset[str] | None) -> Code:
    """A kernel that packs: its steps are chunks of matrices."""
    a = Assembler(key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features)
    a.release(a.load_argument("scratch"))
    args, index = a.load_argument("args"), a.load_argument("index")
    code, chunk = PackCode(a, key, a.gpr), a.gpr("chunk")
    rows = key.tier.lanes if key.transposed else key.per
    many = key.batches > 1
    check_offsets(
        f"{key.pitch} bytes", rows * key.pitch, code.source_step * key.chunk, key.stride * many,
        key.group * key.panel_bytes * key.chunk, key.consts_stride * many,
    )  # fmt: skip
    with a.section("locate the step"):
        _locate(a, key, code, args, index, chunk)
    code.prepare()
    code.groups(chunk, key.chunk, key.chunks)
    a.ret()
    return a.finalize().encode()


def _locate(a: Assembler, key: PackKey, code: PackCode, args: Reg, index: Reg, chunk: Reg) -> None:
    """Decode the step's index into a matrix and a chunk of it; set the cursors."""
    batch = index
    a.mov(chunk, 0)
    if key.chunks > 1:
        batch = code.count
        div_const(a, batch, index, key.chunks, key.steps)
        a.imul(chunk, batch, -key.chunks)
        a.add(chunk, index)
    a.mov(code.src, Mem(args, 8 * ARG_B))
    a.mov(code.dst, Mem(args, 8 * ARG_WEIGHTS))
    if key.batches > 1:
        a.mov(code.at, Mem(args, 8 * ARG_B_TABLE))
        a.add(code.src, Mem(code.at, index=batch, scale=8))
        a.imul(code.at, batch, key.stride)
        a.add(code.dst, code.at)
    if key.init is not None:
        a.mov(code.init, Mem(args, 8 * ARG_CONSTS))
        a.imul(code.at, batch, key.consts_stride)
        a.add(code.init, code.at)
        a.add(code.init, key.init)
    a.mov(code.consts, Mem(args, 8 * ARG_PACK))
    a.lea(code.start, Mem(code.consts, STARTS))
    if key.chunks > 1:
        moves = [(code.src, code.source_step), (code.dst, key.group * key.panel_bytes)]
        moves += [(r, 4 * code.columns) for r in (code.init, code.start) if key.init is not None]
        for cursor, step in moves:
            a.imul(code.at, chunk, key.chunk * step)
            a.add(cursor, code.at)
