"""Generated packing against NumPy's, on the emulator: every tier, type, orientation and tail."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from vnnigen.errors import EmulatorError, ShapeError
from vnnigen.isa.emulator import Emulator
from vnnigen.isa.memory import Memory
from vnnigen.kernels import pack_kernel
from vnnigen.kernels.layout import ARG_CONSTS, ARG_SLOTS, ARG_WEIGHTS
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.kernels.pack_kernel import ARG_B, ARG_B_TABLE, ARG_PACK, PackKey, pack_constants
from vnnigen.kernels.packing import pack_panels
from vnnigen.runtime.compiled import generate

Array = np.ndarray[Any, Any]
# (tier, type of b, what is multiplied): every pair that a dispatched kernel can ask for.
WAYS = [
    *[(tier, src, "s8") for tier in ("amx_int8", "avx512_vnni", "avx_vnni") for src in ("s8", "u8")],
    *[(tier, src, "s16") for tier in ("avx512", "avx2") for src in ("s8", "u8")],
    *[(tier, "bf16", "bf16") for tier in ("amx_bf16", "avx512_bf16")],
    *[(tier, src, "f32") for tier in ("avx512", "avx2") for src in ("bf16", "f32")],
]
SIZES = {"s8": 1, "u8": 1, "bf16": 2, "f32": 4}


def random_b(rng: np.random.Generator, shape: tuple[int, ...], src: str) -> Array:
    if src in ("bf16", "f32"):
        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16 if src == "bf16" else np.float32)
    low = -128 if src == "s8" else 0
    return rng.integers(low, low + 256, shape).astype(np.int8 if src == "s8" else np.uint8)


def as_packed(b: Array, key: PackKey, zero_point: int) -> Array:
    """A matrix of b, [k, n], as [n, K] in the type that is multiplied, K filled up with zeros."""
    wide: Array
    if key.element == "s8":
        wide = (b.astype(np.int16) - (128 if key.src == "u8" else 0)).astype(np.int8)
    elif key.element == "s16":
        wide = b.astype(np.int16) - np.int16(zero_point)
    else:
        wide = b.view(np.uint16) if key.element == "bf16" else b.astype(np.float32)
    return np.pad(wide.T, ((0, 0), (0, key.dwords * key.per - key.k)))


def run(key: PackKey, stored: Array, at: Array, consts: Array, skew: int) -> tuple[Array, Array]:
    """Pack on the emulator; b, the packed matrices and the constant blocks are buffers of exactly their sizes."""
    mem = Memory()
    args = np.zeros(ARG_SLOTS, np.int64)
    args[ARG_B] = mem.map("b", stored, skew=skew * stored.itemsize)
    args[ARG_WEIGHTS] = mem.map("packed", np.full(key.batches * key.stride, 0x5A, np.uint8), writable=True)
    blocks = np.full(max(1, key.batches * key.consts_stride), 0x5A, np.uint8)
    args[ARG_CONSTS] = mem.map("consts", blocks, writable=True)
    args[ARG_PACK] = mem.map("pack consts", consts)
    args[ARG_B_TABLE] = mem.map("b table", at)
    address, scratch = mem.map("args", args), mem.map("scratch", np.zeros(1, np.uint8))
    emulator = Emulator(generate(key), mem, poison=True)
    for index in reversed(range(key.steps)):
        emulator.call(address, index, scratch)
    return mem.array("packed"), mem.array("consts")


def check(
    way: tuple[str, str, str], transposed: bool, k: int, n: int, *, batches: int = 1, gap: int = 0, extra: int = 0,
    sums: bool = True, seed: int = 0,
) -> None:  # fmt: skip
    """Pack random matrices and compare every byte. `gap` elements lie between rows, `extra` dwords are asked for."""
    tier, src, element = way
    rng = np.random.default_rng(seed)
    rows, length = (n, k) if transposed else (k, n)
    stored = random_b(rng, (batches, rows, length + gap), src)
    # The last gap is not there.
    flat = stored.reshape(-1)[: stored.size - gap]
    sums = sums and element in ("s8", "s16")
    per = {"s8": 4, "s16": 2, "bf16": 2, "f32": 1}[element]
    key = PackKey(
        TIER_CODE[tier], src, element, transposed, k, n, (length + gap) * SIZES[src], -(-k // per) + extra,  # type: ignore[arg-type]
        batches, 64 * 50 if sums else 0, 192 if sums else None,
    )  # fmt: skip
    a_zp, b_zp = int(rng.integers(-255, 256)), int(rng.integers(-128, 256)) if element == "s16" else 0
    lanes = key.tier.lanes
    start = rng.integers(-(2**31), 2**31, key.panels * lanes).astype(np.int32)
    # Matrices in another order than they lie in.
    order = rng.permutation(batches)
    at = order.astype(np.int64) * (stored.nbytes // batches)
    packed, consts = run(key, flat, at, pack_constants(start, a_zp, b_zp), seed % 5)
    if sums:
        assert batches * key.consts_stride == len(consts)
        assert key.consts_stride >= 192 + 4 * len(start)
    for i in range(batches):
        matrix = stored[order[i] if batches > 1 else 0, :, :length]
        columns = as_packed(matrix.T if transposed else matrix, key, b_zp)
        want = pack_panels(columns[None], per, lanes)
        got = packed[i * key.stride :][: len(want)]
        assert np.array_equal(got, want), (way, transposed, k, n, i)
        if sums:
            sum_of_columns = np.pad(columns.astype(np.int64).sum(axis=1), (0, len(start) - n))
            exact = start.astype(np.int64) - a_zp * sum_of_columns
            wrapped = (exact & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
            block = consts[i * key.consts_stride :][: key.consts_stride]
            assert np.array_equal(block[192:][: wrapped.nbytes].view(np.int32), wrapped), (way, transposed, k, n, i)
            untouched = np.r_[block[:192], block[192 + wrapped.nbytes :]]
            assert (untouched == 0x5A).all()


BOTH = pytest.mark.parametrize("transposed", [False, True], ids=["kn", "nk"])
ALL = pytest.mark.parametrize("way", WAYS, ids="-".join)


@ALL
@BOTH
def test_every_tail_of_columns(way: tuple[str, str, str], transposed: bool) -> None:
    for n in (*range(1, 18), 31, 32, 33, 63, 64, 65, 100):
        check(way, transposed, 5 + n % 4, n, seed=n)


@ALL
@BOTH
def test_every_tail_of_k(way: tuple[str, str, str], transposed: bool) -> None:
    for k in (*range(1, 19), 31, 32, 33, 63, 64, 65, 66, 67, 130):
        check(way, transposed, k, 9 + k % 3, seed=k)


@ALL
@BOTH
def test_gaps_batches_and_longer_k(way: tuple[str, str, str], transposed: bool) -> None:
    for seed in range(4):
        check(way, transposed, 7 + seed, 19, gap=1 + 3 * seed, seed=seed)
        check(way, transposed, 6 + seed, 21, batches=3, gap=seed, extra=seed, seed=seed)
        check(way, transposed, 9, 5, batches=2, extra=20, sums=False, seed=seed)


@ALL
@BOTH
def test_matrices_in_several_steps(
    way: tuple[str, str, str], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a tail group, with a last step that is shorter, or has the tail only."""
    lanes = TIER_CODE[way[0]].lanes
    group = lanes * (1 if transposed else pack_kernel.GROUP)
    monkeypatch.setattr(pack_kernel, "STEP_BYTES", 2 * 4 * group * 4)  # two groups of four dwords
    per = {"s8": 4, "s16": 2}.get(way[2], 1)
    for i, n in enumerate((4 * group, 3 * group, 2 * group + 1, 3 * group + lanes - 1, 5 * group)):
        check(way, transposed, 4 * per - i % 2, n, batches=1 + i % 3, seed=i)


def test_a_row_more_than_there_is_would_be_noticed() -> None:
    """The buffers are exact: a kernel for one row (or column) more leaves b."""
    for tier in ("avx512_vnni", "avx_vnni"):
        for transposed in (False, True):
            key = PackKey(TIER_CODE[tier], "s8", "s8", transposed, 8, 16, 8 if transposed else 16, 2, 1)
            b = np.zeros(8 * 16 - 1, np.int8)
            with pytest.raises(EmulatorError, match="buffer 'b'"):
                run(key, b, np.zeros(1, np.int64), np.zeros(256, np.uint8), 0)


def test_pitches_beyond_32_bits() -> None:
    with pytest.raises(ShapeError, match="32-bit"):
        generate(PackKey(TIER_CODE["avx2"], "f32", "f32", True, 4, 8, 1 << 29, 4, 1))
