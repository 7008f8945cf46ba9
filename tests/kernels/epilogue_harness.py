"""Kernels of nothing but an epilogue: accumulators come from memory, so that any bit pattern can be tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from tests.runtime.helpers import Kernel, Launch, address
from vnnigen.isa import tiers
from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.isa.emulator import Emulator
from vnnigen.isa.memory import Memory
from vnnigen.kernels.emit_epilogue import emit_epilogue, epilogue_registers
from vnnigen.kernels.emit_store import Tile
from vnnigen.kernels.epilogue import Epilogue, EpilogueSpec
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ARG_SLOTS, ARG_SRC, ARG_TENSORS, ConstLayout
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.kernels.packing import fill_constants
from vnnigen.kernels.types import NUMPY
from vnnigen.runtime import codemem

GAP = 3
"""Elements between rows of the output, which must stay as they were."""


@dataclass(frozen=True)
class Shape:
    """A tile: rows of `nr` vectors, the last with `valid` live lanes."""

    rows: int
    nr: int
    valid: int

    def columns(self, lanes: int) -> int:
        return (self.nr - 1) * lanes + self.valid


@lru_cache(maxsize=64)
def build(tier: str, spec: EpilogueSpec, shape: Shape) -> Code:
    """An epilogue that gets as many registers as `epilogue_registers` says, and no more."""
    code = TIER_CODE[tier]
    a = Assembler("epilogue", (Arg("args", "ptr"), Arg("index"), Arg("scratch", "ptr")), tiers.tier(tier).features)
    args = a.load_argument("args")
    consts, col, off, ptr = (a.gpr(n) for n in ("consts", "col", "off", "ptr"))
    a.mov(consts, Mem(args, 8 * ARG_CONSTS))
    a.mov(col, 0)
    a.mov(off, 0)
    a.mov(ptr, Mem(args, 8 * ARG_SRC))
    acc = [[a.vec(code.bits, f"acc{i}_{j}") for j in range(shape.nr)] for i in range(shape.rows)]
    for i, row in enumerate(acc):
        for j, v in enumerate(row):
            a.vmovups(v, Mem(ptr, (i * shape.nr + j) * code.vector_bytes))
    while a.available_vectors() > epilogue_registers(spec, code):
        a.vec(code.bits, "taken")
    columns = shape.columns(code.lanes)
    offsets = [i * (columns + GAP) for i in range(shape.rows)]
    lay = ConstLayout(shape.nr * code.lanes)
    emit_epilogue(Tile(a, code, spec, lay, acc, offsets, shape.valid, args, consts, col, off, ptr))
    a.ret()
    return a.finalize().encode()


def run(
    tier: str, epilogue: Epilogue, shape: Shape, acc: np.ndarray, tensors: Sequence[np.ndarray] = (), *, hardware: bool
) -> np.ndarray:
    """Apply the epilogue to `acc` [rows, columns]; `tensors` have its shape. Fails where a gap is written."""
    code = TIER_CODE[tier]
    columns = shape.columns(code.lanes)
    full = np.zeros((shape.rows, shape.nr * code.lanes), acc.dtype)
    full[:, :columns] = acc
    consts = fill_constants(
        ConstLayout(shape.nr * code.lanes), groups=1, columns=slice(None), start=np.zeros((1, columns), np.int32),
        epilogue=epilogue, pad=np.zeros(1, np.uint8), w_zp=None,
    )  # fmt: skip
    dtype = np.dtype(NUMPY[epilogue.spec.out])
    store = np.dtype(f"u{dtype.itemsize}")
    out = np.frombuffer(b"\x5a" * (shape.rows * (columns + GAP) * store.itemsize), store).copy()
    # Rows as far apart as the output's, the last one without a gap behind it.
    wide = [np.pad(t.view(f"u{t.itemsize}"), ((0, 0), (0, GAP))).ravel()[:-GAP] for t in tensors]
    binary = build(tier, epilogue.spec, shape)
    args = np.zeros(ARG_SLOTS, np.int64)
    if hardware:
        loaded = _load(binary)
        for slot, array in ((ARG_SRC, full), (ARG_DST, out), (ARG_CONSTS, consts)):
            args[slot] = address(array)
        for i, t in enumerate(wide):
            args[ARG_TENSORS + i] = address(t)
        assert Kernel([Launch(loaded.address, 1)], [int(x) for x in args]).call() == 0
    else:
        out = _emulate(binary, full, out, consts, wide)
    got = out.reshape(shape.rows, columns + GAP)
    assert (got[:, columns:] == np.frombuffer(b"\x5a" * store.itemsize, store)[0]).all(), "wrote beyond the tile"
    return got[:, :columns].copy().view(dtype)


_load = lru_cache(maxsize=64)(codemem.load)


def _emulate(binary: Code, acc: Any, out: Any, consts: Any, tensors: Sequence[Any]) -> np.ndarray:
    mem = Memory()
    args = np.zeros(ARG_SLOTS, np.int64)
    args[ARG_SRC] = mem.map("acc", acc)
    args[ARG_DST] = mem.map("out", out, writable=True, skew=out.itemsize)
    args[ARG_CONSTS] = mem.map("consts", consts)
    for i, t in enumerate(tensors):
        args[ARG_TENSORS + i] = mem.map(f"tensor {i}", t, skew=t.itemsize)
    Emulator(binary, mem, poison=True).call(mem.map("args", args), 0, 0)
    return mem.array("out").copy()


def assert_same(got: np.ndarray, want: np.ndarray, what: object) -> None:
    """Equal bit for bit; for a NaN any NaN will do in f32, as the payload is unspecified."""
    assert got.dtype == want.dtype
    bits = f"u{got.itemsize}"
    wrong = got.view(bits) != want.view(bits)
    if got.dtype.kind == "f" or got.dtype == NUMPY["bf16"]:
        wrong &= ~(np.isnan(got.astype(np.float32)) & np.isnan(want.astype(np.float32)))
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise AssertionError(f"{what}: {wrong.sum()} of {got.size} differ, first at {at}: {got[at]} for {want[at]}")
