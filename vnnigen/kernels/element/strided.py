"""Kernels over tensors with any strides: sources and a destination seen as blocks of rows.

Whatever the number of dimensions, neighbours that lie alike in all operands are merged first (`collapse`); what is left
becomes columns (the innermost loop, vectors), rows, a loop around them, and a table of blocks for all the rest.  An
entry of the table says how far the operands' blocks lie from the operands' starts, so the code depends on the inner
strides alone, and broadcast operands (stride 0), slices and permutations are all the same to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.kernels.element.common import SIZE, STEP_BYTES, NoScratch, by_last, check_offsets, loop_or_skip
from vnnigen.kernels.emit_common import add_const, counted
from vnnigen.kernels.layout import ARG_CONSTS, ARG_SRC, ARG_TENSORS
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.packing import aligned
from vnnigen.kernels.types import DType

Reg = Any
#: Vectors of a row that a tile covers.
WIDE = 4
#: Longer rows are cut into rows of a tile each: what a tile covers is then in one piece, not in the same cache sets.
LONGEST = 1024
#: Rows that hold less than this are worked on in a loop of the code, not as blocks of the table.
SMALL_BLOCK = 4096

Strides = tuple[int, ...]
#: A dimension: its length, and each operand's stride in elements.
Dim = tuple[int, Strides]
Count = Callable[[int], int]


def dense(shape: Sequence[int]) -> Strides:
    """Strides of a tensor without gaps, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def broadcast_strides(shape: Sequence[int], to: Sequence[int]) -> Strides:
    """Strides of a tensor without gaps that is broadcast to another shape: 0 where it repeats."""
    own = (0,) * (len(to) - len(shape)) + dense(shape)
    lengths = (1,) * (len(to) - len(shape)) + tuple(shape)
    return tuple(0 if n == 1 else s for n, s in zip(lengths, own, strict=True))


def collapse(shape: Sequence[int], strides: Sequence[Strides]) -> list[Dim]:
    """Drop dimensions of length 1 and merge those that lie alike in all operands."""
    dims: list[Dim] = []
    for n, *each in zip(shape, *strides, strict=True):
        if n == 1:
            continue
        if dims and all(outer == n * inner for outer, inner in zip(dims[-1][1], each, strict=True)):
            dims[-1] = (dims[-1][0] * n, tuple(each))
        else:
            dims.append((n, tuple(each)))
    return dims


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of rows. `mid`, `row` and `col` are strides per operand, the destination's last.

    Lines of `table`: the operands' distances in elements, how often `rows` rows are worked on (`mid` apart), and how
    many more single rows follow.
    """

    cols: int
    rows: int
    mid: Strides
    row: Strides
    col: Strides
    table: npt.NDArray[np.int64]
    per_step: int


def blocks(dims: list[Dim], operands: int, unit: int, tile_rows: Count, row_bytes: Count) -> list[Blocks]:
    """Cut collapsed dimensions into blocks, one `Blocks` per launch.

    `unit` is the number of elements of a vector; `tile_rows(cols)` says how many rows a tile has, `row_bytes(cols)`
    what reading and writing a row costs.
    """
    zero = (0,) * operands
    dims = dims or [(1, (*zero[:-1], 1))]
    *outer, (n, col) = dims
    cut = WIDE * unit
    if n <= LONGEST // 16 * unit:
        return [_blocks(outer, n, col, zero, tile_rows, row_bytes)]
    whole, rest = divmod(n, cut)
    far = tuple(cut * s for s in col)
    parts = [_blocks([*outer, (whole, far)], cut, col, zero, tile_rows, row_bytes)]
    if rest:
        parts.append(_blocks(outer, rest, col, tuple(whole * s for s in far), tile_rows, row_bytes))
    return parts


def _blocks(outer: list[Dim], cols: int, col: Strides, offset: Strides, tile_rows: Count, row_bytes: Count) -> Blocks:
    zero = (0,) * len(col)
    outer = [(1, zero)] * (2 - len(outer)) + outer
    *rest, (rows, row) = outer
    bytes_of_row = row_bytes(cols)
    if rows * cols < SMALL_BLOCK or rows == 1:
        *rest, (count, mid) = rest
        tail = 0
    else:
        together = min(tile_rows(cols), rows)
        count, tail = divmod(rows, together)
        mid, rows = tuple(together * s for s in row), together
    each = min(count, max(1, STEP_BYTES // max(1, rows * bytes_of_row)))
    distances = np.array([offset], np.int64)
    for n, strides in (*rest, (-(-count // each), tuple(each * s for s in mid))):
        distances = (distances[:, None] + np.arange(n)[:, None] * np.array(strides, np.int64)).reshape(-1, len(col))
    counts = np.full(-(-count // each), each, np.int64)
    tails = np.zeros_like(counts)
    counts[-1], tails[-1] = count - each * (len(counts) - 1), tail
    times = len(distances) // len(counts)
    table = np.column_stack([distances, np.tile(counts, times), np.tile(tails, times)])
    per_step = max(1, STEP_BYTES // max(1, (each * rows + tail) * bytes_of_row))
    return Blocks(cols, rows, mid, row, col, table, min(per_step, len(table)))


@dataclass(frozen=True)
class StridedKey(NoScratch):
    """What all such kernels depend on. `kinds` are the types of the sources and, last, of the destination.

    Distances in the table, `table_at` bytes into the constants, are in bytes for sources and in elements for the
    destination. A source is in slot ARG_SRC or, from the second on, ARG_TENSORS.
    """

    op: str
    tier: TierCode
    kinds: tuple[DType, ...]
    cols: int
    rows: int
    mid: Strides
    row: Strides
    col: Strides
    entries: int
    per_step: int
    table_at: int
    launch: int = 0
    first_slot: int = 0

    @property
    def name(self) -> str:
        """The kernel's name: operation, types, tier."""
        return f"{self.op}-{''.join(dict.fromkeys(self.kinds))}-{self.tier.name}"

    @property
    def unit(self) -> int:
        """Elements of a vector."""
        return self.tier.lanes

    @property
    def vectors(self) -> int:
        """Vectors of a tile."""
        return 16 if self.tier.masks else 8

    @property
    def width(self) -> int:
        """Elements of a row that a full tile covers."""
        return min(WIDE, self.vectors, -(-self.cols // self.unit)) * self.unit

    @property
    def tile_rows(self) -> int:
        """Rows of a tile."""
        return max(1, min(self.rows, self.vectors * self.unit // self.width))

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return -(-self.entries // self.per_step)

    def size(self, operand: int) -> int:
        """Bytes of an element of an operand."""
        return SIZE[self.kinds[operand]]


def make_launches(
    key: StridedKey, parts: Sequence[Blocks], consts: npt.NDArray[np.uint8], offsets: Strides | None = None
) -> list[tuple[Any, npt.NDArray[np.uint8]]]:
    """Launches (key, constants) of all parts: `key` with their strides; `consts` with their tables behind.

    `offsets` says how far the operands' first elements are from their starts.
    """
    launches = []
    for i, part in enumerate(parts):
        table = part.table.copy()
        if offsets is not None:
            table[:, : len(offsets)] += np.array(offsets, np.int64)
        for operand in range(len(key.kinds) - 1):
            table[:, operand] *= key.size(operand)
        block = aligned(len(consts) + table.nbytes)
        block[: len(consts)] = consts
        block[len(consts) :] = table.view(np.uint8).reshape(-1)
        own = replace(
            key, cols=part.cols, rows=part.rows, mid=part.mid, row=part.row, col=part.col, entries=len(table),
            per_step=part.per_step, table_at=len(consts), launch=key.launch + i,
        )  # fmt: skip
        launches.append((own, block))
    return launches


class Strided:
    """Emits the loops: blocks of a step > repetitions > row tiles > column tiles. A subclass emits the tile."""

    def __init__(self, key: StridedKey, features: frozenset[str] | None) -> None:
        """Allocate registers."""
        self.key = key
        self.sources = len(key.kinds) - 1
        reach = [key.rows * r + m + key.cols * c for r, m, c in zip(key.row, key.mid, key.col, strict=True)]
        check_offsets(f"{key.cols} elements", *(abs(d) * 4 for d in reach))
        self.a = a = Assembler(
            key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features
        )
        self.args, self.left = a.load_argument("args"), a.load_argument("index")
        a.release(a.load_argument("scratch"))
        self.src = [a.gpr(f"src{i}") for i in range(self.sources)]
        self.off, self.consts, self.entry = a.gpr("off"), a.gpr("consts"), a.gpr("entry")
        self.again, self.down, self.along, self.ptr = (a.gpr(n) for n in ("again", "down", "along", "ptr"))

    def setup(self) -> None:
        """Load what stays in registers."""

    def tile(self, th: int, count: int) -> None:
        """Emit a tile of `th` rows and `count` elements of each."""
        raise NotImplementedError

    def build(self) -> Code:
        """Emit everything and encode it."""
        a, key = self.a, self.key
        line = 8 * (self.sources + 3)
        a.mov(self.consts, Mem(self.args, 8 * (ARG_CONSTS + 2 * key.launch)))
        self.setup()
        a.imul(self.entry, self.left, key.per_step * line)
        a.add(self.entry, self.consts)
        add_const(a, self.entry, key.table_at)
        a.mov(self.ptr, self.left)
        by_last(a, self.left, self.ptr, key.steps, key.per_step, key.entries - (key.steps - 1) * key.per_step)
        with a.loop(self.left):
            for i, src in enumerate(self.src):
                a.mov(src, Mem(self.entry, 8 * i))
                slot = key.first_slot + i
                a.add(src, Mem(self.args, 8 * (ARG_SRC if slot == 0 else ARG_TENSORS + slot - 1)))
            a.mov(self.off, Mem(self.entry, 8 * self.sources))
            a.mov(self.again, Mem(self.entry, 8 * self.sources + 8))
            loop_or_skip(a, self.again, self._rows, may_be_zero=True)
            a.mov(self.again, Mem(self.entry, 8 * self.sources + 16))
            loop_or_skip(a, self.again, lambda: self._tiles(1), may_be_zero=True)
            a.add(self.entry, line)
        a.ret()
        return a.finalize().encode()

    def _move(self, strides: Strides, times: int) -> None:
        """Move all cursors."""
        for i, src in enumerate(self.src):
            add_const(self.a, src, strides[i] * times * self.key.size(i))
        add_const(self.a, self.off, strides[-1] * times)

    def _rows(self) -> None:
        """All rows of a repetition; the cursors move on to the next one."""
        key = self.key
        th = key.tile_rows
        full, rest = divmod(key.rows, th)
        with counted(self.a, self.down, full):
            self._tiles(th)
        if rest:
            self._tiles(rest)
        self._move(tuple(m - key.rows * r for m, r in zip(key.mid, key.row, strict=True)), 1)

    def _tiles(self, th: int) -> None:
        """`th` rows from their beginning to their end; the cursors move on to the next rows."""
        key = self.key
        full, tail = divmod(key.cols, key.width)
        if full:
            with counted(self.a, self.along, full):
                self.tile(th, key.width)
                self._move(key.col, key.width)
        if tail:
            self.tile(th, tail)
        self._move(tuple(th * r - full * key.width * c for r, c in zip(key.row, key.col, strict=True)), 1)
