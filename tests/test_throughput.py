"""Near-4x, checked: how many multiply-accumulates an arithmetic instruction does, and what that gives in time.

The first part counts on the emulator, on every host. The second measures where AVX512-VNNI is; the figure itself
belongs to the benchmarks.
"""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import vnnigen as v
from tests.kernels.cases import Case
from tests.kernels.emulation import emulate, lower

# Vector instructions that only move data; widening bytes is how the exact chain copies its source, once per row.
MOVES = {"vmovups", "vmovaps", "vmovdqu", "vmovdqu8", "vbroadcastss", "vpmovzxbw", "vzeroupper"}


def macs_per_instruction(tier: str, src: str, weights: str, shape: tuple[int, int, int]) -> Fraction:
    """Run a GEMM on the emulator and divide its multiply-accumulates by its arithmetic vector instructions.

    The output is the accumulator itself, so nothing but multiplication is arithmetic; sizes fill every vector.
    """
    m, n, k = shape
    case = Case((m, k), (n, k), src=src, out="f32" if src == "f32" else "s32", weights=weights)
    op, x = case.operator("reference"), case.source()
    low = lower(op, case.x, case.src, tier)  # type: ignore[arg-type]
    result = emulate(low, x, np.float32 if src == "f32" else np.int32)
    counts = sum((stats.counts for stats in result.stats), start=type(result.stats[0].counts)())
    arithmetic = sum(count for name, count in counts.items() if name.startswith("v") and name not in MOVES)
    return Fraction(m * n * k, arithmetic)


SHAPES = [(13, 64, 64), (30, 192, 48)]


@pytest.mark.parametrize("shape", SHAPES)
def test_macs_per_arithmetic_instruction_avx512(shape: tuple[int, int, int]) -> None:
    """64 for VPDPBUSD, 16 for VFMADD231PS: 4x. 64/3 for the fast chain: 4/3. 32/2 for the exact chain: 1x."""
    f32 = macs_per_instruction("avx512", "f32", "full", shape)
    assert f32 == 16
    assert macs_per_instruction("avx512_vnni", "f32", "full", shape) == 16
    vnni = macs_per_instruction("avx512_vnni", "u8", "full", shape)
    assert vnni == 64
    assert vnni / f32 == 4
    fast = macs_per_instruction("avx512", "u8", "safe", shape)
    assert fast == Fraction(64, 3)
    assert fast / f32 == Fraction(4, 3)
    assert macs_per_instruction("avx512", "u8", "full", shape) / f32 == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_macs_per_arithmetic_instruction_avx2(shape: tuple[int, int, int]) -> None:
    f32 = macs_per_instruction("avx2", "f32", "full", shape)
    assert f32 == 8
    assert macs_per_instruction("avx_vnni", "u8", "full", shape) / f32 == 4
    assert macs_per_instruction("avx2", "u8", "safe", shape) / f32 == Fraction(4, 3)
    assert macs_per_instruction("avx2", "u8", "full", shape) / f32 == 1


def test_instructions_in_all() -> None:
    """Loads and loop control must not eat the advantage: all instructions of both kernels, at equal sizes."""
    totals = {}
    for src in ("u8", "f32"):
        case = Case((28, 64), (192, 64), src=src, out="f32" if src == "f32" else "s32")
        low = lower(case.operator("reference"), case.x, src, "avx512_vnni")  # type: ignore[arg-type]
        result = emulate(low, case.source(), np.float32 if src == "f32" else np.int32)
        totals[src] = sum(stats.instructions for stats in result.stats)
    assert totals["f32"] / totals["u8"] > 3


@pytest.mark.skipif("avx512_vnni" not in v.tiers(), reason="no AVX512-VNNI here")
def test_measured_ratio() -> None:
    """int8 against f32, one thread, interleaved, best of 5 rounds."""
    size = 768
    rng = np.random.default_rng(0)
    a8 = rng.integers(0, 256, (size, size)).astype(np.uint8)
    b8 = rng.integers(-128, 128, (size, size)).astype(np.int8)
    a32, b32 = a8.astype(np.float32), b8.astype(np.float32)
    int8 = v.GemmInt8(b8, a_scale=0.02, b_scale=0.01, y_scale=10.0, post_ops=v.ReLU(), isa="avx512_vnni")
    f32 = v.GemmF32(b32, post_ops=v.ReLU(), isa="avx512_vnni")
    threads = v.num_threads()
    v.set_num_threads(1)
    out8, out32 = np.empty((size, size), np.uint8), np.empty((size, size), np.float32)

    def shortest(op: v.Operator, x: Any, out: Any, calls: int) -> float:
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            op(x, out)
            times.append(time.perf_counter() - start)
        return min(times)

    try:
        int8(a8, out8), f32(a32, out32)  # generation, first touch
        rounds = [(shortest(f32, a32, out32, 3), shortest(int8, a8, out8, 6)) for _ in range(5)]
    finally:
        v.set_num_threads(threads)
    slow, fast = (min(times) for times in zip(*rounds, strict=True))
    assert slow / fast >= 3.5, f"f32 took {slow * 1e3:.2f} ms, int8 {fast * 1e3:.2f} ms"
