"""Rows of a table by their numbers, as embeddings are looked up: bounds are checked by the kernel, rows are copied.

An index below zero counts from the end. One that is out of range never becomes an address: row 0 is copied instead, and
the step that met it says so in its word of `status`, which all steps write: one more than its position, else zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.kernels.element.common import (
    NoScratch,
    by_last,
    check_offsets,
    load_some,
    steps_of,
    store_some,
)
from vnnigen.kernels.emit_common import counted, div_const, set_mask
from vnnigen.kernels.layout import ARG_DST, ARG_SRC, ARG_TENSORS
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.types import Array

Reg = Any
ARG_INDICES, ARG_STATUS = ARG_TENSORS, ARG_TENSORS + 1
#: Vectors that are in flight.
VECTORS = 8


@dataclass(frozen=True)
class GatherKey(NoScratch):
    """Everything the code depends on: `outer` tables of `rows` rows of `row_bytes` bytes, and `count` indices."""

    tier: TierCode
    outer: int
    rows: int
    row_bytes: int
    count: int
    index: Literal["s32", "s64"]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"gather-{self.index}-{self.tier.name}"

    @property
    def split(self) -> tuple[int, int]:
        """Indices per step, and steps per table."""
        return steps_of(self.count, 2 * self.row_bytes, 1)

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.outer * self.split[1]

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _Gather(self, features).build()


class _Gather:
    """Emits one key."""

    def __init__(self, key: GatherKey, features: frozenset[str] | None) -> None:
        self.key = key
        check_offsets(f"{key.row_bytes} bytes", key.row_bytes, key.rows, key.count * 8)
        self.a = a = Assembler(
            key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features
        )
        self.args, self.index = a.load_argument("args"), a.load_argument("index")
        a.release(a.load_argument("scratch"))
        names = ("src", "dst", "indices", "position", "left", "row", "wrong", "tmp", "part", "along")
        self.r: dict[str, Reg] = {name: a.gpr(name) for name in names}

    def build(self) -> Code:
        """Emit everything and encode it."""
        a, key, r = self.a, self.key, self.r
        each, parts = key.split
        a.mov(r["part"], self.index)
        a.mov(r["src"], Mem(self.args, 8 * ARG_SRC))
        a.mov(r["dst"], Mem(self.args, 8 * ARG_DST))
        if key.outer > 1:
            table = r["row"]
            div_const(a, table, self.index, parts, key.steps)
            a.imul(r["tmp"], table, -parts)
            a.add(r["part"], r["tmp"])
            a.imul(r["tmp"], table, key.rows)
            a.imul(r["tmp"], r["tmp"], key.row_bytes)
            a.add(r["src"], r["tmp"])
            a.imul(r["tmp"], table, key.count)
            a.imul(r["tmp"], r["tmp"], key.row_bytes)
            a.add(r["dst"], r["tmp"])
        a.imul(r["position"], r["part"], each)
        a.imul(r["tmp"], r["position"], key.row_bytes)
        a.add(r["dst"], r["tmp"])
        a.mov(r["indices"], Mem(self.args, 8 * ARG_INDICES))
        a.mov(r["wrong"], 0)
        self._registers()
        by_last(a, r["left"], r["part"], parts, each, key.count - (parts - 1) * each)
        with a.loop(r["left"]):
            self._find()
            self._copy()
            a.add(r["position"], 1)
        a.mov(r["tmp"], Mem(self.args, 8 * ARG_STATUS))
        a.mov(Mem(r["tmp"], index=self.index, scale=8), r["wrong"])
        a.ret()
        return a.finalize().encode()

    def _registers(self) -> None:
        """Vectors, and the mask of the last one of a row."""
        a, tier = self.a, self.key.tier
        self.v = [a.vec(tier.bits, f"v{i}") for i in range(VECTORS)]
        rest = self.key.row_bytes % tier.vector_bytes
        self.mask = None
        if tier.masks and rest:
            self.mask = a.kreg("tail")
            set_mask(a, self.mask, rest, self.r["tmp"])

    def _find(self) -> None:
        """Make `row` the address of the next row to copy."""
        a, key, r = self.a, self.key, self.r
        size = 4 if key.index == "s32" else 8
        at = Mem(r["indices"], index=r["position"], scale=size)
        if size == 4:
            a.movsxd(r["row"], at.sized(32))
        else:
            a.mov(r["row"], at)
        positive, inside = a.label("positive"), a.label("inside")
        a.test(r["row"], r["row"])
        a.jns(positive)
        a.add(r["row"], key.rows)
        a.bind(positive)
        # As an unsigned number, a negative one is too large as well.
        a.cmp(r["row"], key.rows)
        a.jb(inside)
        a.mov(r["row"], 0)
        a.lea(r["wrong"], Mem(r["position"], 1))
        a.bind(inside)
        a.imul(r["row"], r["row"], key.row_bytes)
        a.add(r["row"], r["src"])

    def _copy(self) -> None:
        """Copy a row; `dst` moves on to the next one."""
        a, key, r = self.a, self.key, self.r
        wide = VECTORS * key.tier.vector_bytes
        full, rest = divmod(key.row_bytes, wide)
        if full:
            with counted(a, r["along"], full):
                self._piece(wide)
                a.add(r["row"], wide)
                a.add(r["dst"], wide)
        if rest:
            self._piece(rest)
            a.add(r["dst"], rest)

    def _piece(self, count: int) -> None:
        """Copy up to VECTORS vectors."""
        a, tier, r = self.a, self.key.tier, self.r
        unit = tier.vector_bytes
        pieces = [(at, min(unit, count - at), v) for at, v in zip(range(0, count, unit), self.v, strict=False)]
        for at, n, v in pieces:
            load_some(a, tier, v, Mem(r["row"], at), n, self.mask)
        for at, n, v in pieces:
            store_some(a, tier, Mem(r["dst"], at), v, n, self.mask)


def gather_reference(x: Array, indices: Array, parts: tuple[int, int], status: Array) -> Array:
    """Rows of x [outer, rows, ...] by `indices` (flat), and the status words of the steps, as every kernel must."""
    rows = x.shape[1]
    wrapped = np.where(indices < 0, indices + rows, indices)
    wrong = (wrapped < 0) | (wrapped >= rows)
    each, steps = parts
    for step in range(steps):
        bad = np.flatnonzero(wrong[step * each : (step + 1) * each])
        status.reshape(x.shape[0], steps)[:, step] = step * each + bad[-1] + 1 if len(bad) else 0
    y: Array = x[:, np.where(wrong, 0, wrapped)]
    return y
