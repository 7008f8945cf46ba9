"""Running element operators' kernels on the emulator: every operand a buffer of exactly its size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from vnnigen.isa.emulator import Emulator
from vnnigen.isa.memory import Memory
from vnnigen.isa.tiers import tier
from vnnigen.kernels.element.plan import code_tier
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ARG_SLOTS, ARG_SRC, ARG_TENSORS
from vnnigen.kernels.types import NUMPY
from vnnigen.ops.element_base import Call, ElementOperator, ElementPlan

Array = np.ndarray[Any, Any]
TIERS = ("avx512", "avx2")


class Recorded:
    """Stands in for a bound kernel: launches that are run on the emulator instead."""

    def __init__(self, launches: Sequence[tuple[Any, Any]]) -> None:
        self.launches = tuple(launches)
        self.keys = tuple(key for key, _ in launches)
        self.runs = tuple(run for _, run in launches)


def random_array(rng: np.random.Generator, shape: Sequence[int], kind: str, spread: float = 50) -> Array:
    """Any byte; integers and reals over some orders of magnitude, with a few special values."""
    if kind in ("u8", "s8"):
        return rng.integers(0, 256, shape).astype(np.uint8).view(NUMPY[kind])
    values = rng.standard_normal(shape) * spread ** rng.uniform(-1, 2, shape)
    if kind == "s32":
        return np.where(rng.random(shape) < 0.1, rng.integers(-(2**31), 2**31, shape), values).astype(np.int32)
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 3e9, -3e9, 1e-40, 0.5, 1.5])
    values = np.where(rng.random(shape) < 0.1, rng.choice(special, shape), values)
    return values.astype(np.float32).astype(NUMPY[kind])


def assert_same(got: Array, want: Array, what: object) -> None:
    """Equal bit for bit; NaNs count as equal to each other."""
    assert got.dtype == want.dtype, what
    assert got.shape == want.shape, what
    if got.dtype.kind in "iu":
        wrong = got != want
    else:
        bits = np.uint32 if got.itemsize == 4 else np.uint16
        a, b = np.ascontiguousarray(got), np.ascontiguousarray(want)
        wrong = (a.view(bits) != b.view(bits)) & ~(np.isnan(a.astype(np.float32)) & np.isnan(b.astype(np.float32)))
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise AssertionError(f"{what}: {wrong.sum()} of {got.size} differ, first at {at}: {got[at]} for {want[at]}")


def emulate(
    op: ElementOperator, name: str, sources: Sequence[Array], out: Array | None = None, tensors: Sequence[Array] = (),
    *, skew: int = 0, vbmi: bool = False, extras: frozenset[str] = frozenset(), writes: Sequence[int] = (),
    plan: Callable[..., ElementPlan] | None = None,
) -> Array:  # fmt: skip
    """Compute with the kernels of tier `name`; reads and writes outside operands are errors of the emulator.

    `writes` are numbers of sources that kernels write too: they are written back. `plan` replaces the operator's own.
    """
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Call, "of", classmethod(lambda cls, launches, s=(0,): cls(Recorded(launches), s)))
        m.setattr(op, "_tier", code_tier(tier(name).vector_bits))
        m.setattr(op, "_vbmi", vbmi)
        m.setattr(op, "_extras", extras)
        made = (plan or op._plan)(tuple(x.shape for x in sources), tuple(x.dtype for x in sources))
    mem = Memory()
    first = np.full(made.y_shape, 0x5A, made.y_dtype) if out is None else out
    y = mem.map("out", first, writable=True, skew=skew * first.itemsize)
    addresses = [mem.map(f"source {i}", x, writable=i in writes, skew=skew * x.itemsize) for i, x in enumerate(sources)]
    others = [y if t is out else mem.map(f"tensor {i}", t) for i, t in enumerate(tensors)]
    for n, call in enumerate(made.calls):
        args = np.zeros(ARG_SLOTS, np.int64)
        args[ARG_SRC], args[ARG_DST] = addresses[call.sources[0]], y
        for i, address in enumerate([*(addresses[s] for s in call.sources[1:]), *others]):
            args[ARG_TENSORS + i] = address
        launches = call.bound.launches  # type: ignore[attr-defined]
        for i, (_, run) in enumerate(launches):
            args[ARG_CONSTS + 2 * i] = mem.map(f"constants {n}.{i}", run.consts)
        block = mem.map(f"args {n}", args)
        for key, _ in launches:
            emulator = Emulator(key.build(tier(key.tier.name).features), mem, poison=True)
            scratch = 0
            if key.scratch:
                scratch = mem.map(f"scratch {n}", np.full(key.scratch, 0xA5, np.uint8), writable=True)
            for index in reversed(range(key.steps)):
                emulator.call(block, index, scratch)
    for i in writes:
        sources[i][...] = mem.array(f"source {i}")
    return mem.array("out")
