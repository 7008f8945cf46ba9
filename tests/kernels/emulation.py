"""Run an operator's kernels on the emulator, for any tier, on any host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

import vnnigen as v
from tests.kernels.cases import Case, assert_same_bits, expected, out_shape
from vnnigen.isa.assembler import Code
from vnnigen.isa.emulator import Emulator, Stats
from vnnigen.isa.memory import Memory
from vnnigen.kernels import blocking, winograd
from vnnigen.kernels.families import FAMILIES
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ARG_SLOTS, ARG_SRC, ARG_TENSORS, ARG_WEIGHTS
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.kernels.packed import suited
from vnnigen.runtime.compiled import generate

_generate = lru_cache(maxsize=64)(generate)


@dataclass(frozen=True)
class Lowered:
    """An operator lowered for a tier and an input: packed weights, and one key and its code per launch."""

    op: v.Operator
    packed: Any
    keys: tuple[Any, ...]
    codes: tuple[Code, ...]
    y_shape: tuple[int, ...]


def lower(
    op: v.Operator, x_shape: tuple[int, ...], src: Any, tier: str, family_name: str | None = None, *,
    narrow: bool = False,
) -> Lowered:  # fmt: skip
    """Pack and generate for `tier`, without asking whether this machine has it. `op` is of the reference tier.

    The kernel family is the named one, or the first that does not object; `narrow` weights stay bytes where they can,
    whatever the shape.
    """
    weights, code = op._weights, TIER_CODE[tier]
    fit = [f for f in FAMILIES if f.why_not(weights, code) is None]
    family = next(f for f in fit if family_name in (None, f.name))
    packed = family.pack(op._op, weights, code, src, op._q.x_zp, op._prepare(src).epilogue)
    problem = op._problem(x_shape, src)
    g = op._geometry(problem)
    packed = packed if narrow else suited(packed, g)
    keys = packed.keys_for(g)
    return Lowered(op, packed, keys, tuple(_generate(key) for key in keys), op._y_shape(problem))


@dataclass(frozen=True)
class Emulated:
    """The output, and what each launch executed, over all steps of its grid."""

    y: np.ndarray[Any, Any]
    stats: tuple[Stats, ...]


def emulate(
    low: Lowered,
    x: np.ndarray[Any, Any],
    y_dtype: Any,
    tensors: Sequence[np.ndarray[Any, Any]] = (),
    *,
    skew: int = 0,
    in_place: bool = False,
) -> Emulated:
    """Run every step of every launch, in an order that no kernel may depend on.

    Each operand is a buffer of exactly its size; only `out` and scratch may be written; addresses of what a
    caller provides are off by `skew` elements from 64-byte alignment. Scratch and out begin as garbage, but
    `in_place`, out is the first tensor.
    """
    mem = Memory()
    out = tensors[0] if in_place else np.full(low.y_shape, 0x5A, np.dtype(y_dtype))
    args = np.zeros(ARG_SLOTS, np.int64)
    args[ARG_SRC] = mem.map("x", x, skew=skew * x.itemsize)
    args[ARG_DST] = mem.map("out", out, writable=True, skew=skew * out.itemsize)
    for i, t in enumerate(tensors):
        own = in_place and i == 0
        args[ARG_TENSORS + i] = args[ARG_DST] if own else mem.map(f"tensor {i}", t, skew=skew * t.itemsize)
    for i, run in enumerate(low.packed.runs):
        args[ARG_WEIGHTS + 2 * i] = mem.map(f"weights {i}", run.weights)
        args[ARG_CONSTS + 2 * i] = mem.map(f"consts {i}", run.consts)
    address = mem.map("args", args)
    stats = []
    for i, (key, code) in enumerate(zip(low.keys, low.codes, strict=True)):
        scratch = mem.map(f"scratch {i}", np.full(key.scratch, 0xFF, np.uint8), writable=True)
        emulator = Emulator(code, mem, poison=True, tile_config=key.tile_config)
        total = Stats()
        for index in reversed(range(key.steps)):
            one = emulator.call(address, index, scratch)
            total.instructions += one.instructions
            total.counts += one.counts
        stats.append(total)
    return Emulated(mem.array("out"), tuple(stats))


def check_emulated(case: Case, tier: str, *, in_place: bool = False, family: str | None = None) -> Lowered:
    """Run a case on the emulator and compare it bit for bit with what must come out."""
    op = case.operator("reference")
    x = case.source()
    tensors = case.tensors(out_shape(op, case))
    want = expected(case, op, x, tensors)
    low = lower(op, case.x, case.src, tier, family)
    got = emulate(low, x, want.dtype, tensors, skew=case.seed % 5, in_place=in_place).y
    assert_same_bits(got, want, (case, tier, [key.name for key in low.keys]))
    return low


@contextmanager
def always_winograd() -> Iterator[None]:
    """Transform every convolution whose weights allow it, and cut images into strips early."""
    old = winograd.pays, winograd.NEAR_ROOM, winograd.FAR_ROOM
    winograd.pays = lambda g, _tier, _mac: g.groups == 1  # type: ignore[misc,assignment]
    winograd.NEAR_ROOM = winograd.FAR_ROOM = 40 << 10
    try:
        yield
    finally:
        winograd.pays, winograd.NEAR_ROOM, winograd.FAR_ROOM = old  # type: ignore[misc]


@contextmanager
def never_winograd() -> Iterator[None]:
    """The usual kernels for all convolutions."""
    old = winograd.pays
    winograd.pays = lambda _g, _tier, _mac: False  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        winograd.pays = old  # type: ignore[misc]


@contextmanager
def fine_grid(step_macs: int = 64, strip_bytes: int = 256) -> Iterator[None]:
    """Cut problems into steps, strips and chunks as if they were large."""
    old = blocking.MIN_STEP_MACS, blocking.STRIP_BYTES
    blocking.MIN_STEP_MACS, blocking.STRIP_BYTES = step_macs, strip_bytes
    blocking.choose_blocking.cache_clear()
    try:
        yield
    finally:
        blocking.MIN_STEP_MACS, blocking.STRIP_BYTES = old
        blocking.choose_blocking.cache_clear()
