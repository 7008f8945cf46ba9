"""Rounding to bf16: the reference against exact arithmetic, the instruction and the integer path against it."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vnnigen as v
from tests.kernels.epilogue_harness import Shape, assert_same, build, run
from vnnigen.isa.tiers import why_not
from vnnigen.kernels.bf16 import round_to_bf16
from vnnigen.kernels.emit_epilogue import epilogue_registers
from vnnigen.kernels.epilogue import fold, reference_epilogue
from vnnigen.kernels.mac import TIER_CODE

TIERS = ("avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2")
PLACES = [(t, False) for t in TIERS] + [(t, True) for t in TIERS if why_not(t) is None]


def bits_of(*patterns: int) -> np.ndarray:
    return np.array(patterns, np.uint32).view(np.float32)


SPECIAL = bits_of(
    0, 1, 0x7FFFFF, 0x7F8000, 0x800000, 0x807FFF, 0x808000, 0x808001, 0x818000, 0x3F800000, 0x3F807FFF, 0x3F808000,
    0x3F808001, 0x3F818000, 0x3F817FFF, 0x3FFFFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001,
    0x7F80FFFF, 0x7FBFFFFF, 0x7FC00000, 0x7FC10001, 0x7FFFFFFF,
)  # fmt: skip
SPECIAL = np.concatenate([SPECIAL, (SPECIAL.view(np.uint32) | np.uint32(1 << 31)).view(np.float32)])


def all_tops() -> np.ndarray:
    """Every upper half with lower halves around the tie."""
    tops = np.arange(1 << 16, dtype=np.uint32) << 16
    return np.concatenate([tops | np.uint32(low) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)


def exact(x: float) -> float:
    """Round a finite f32 with integers only; denormals are zeros."""
    if abs(x) < 2.0**-126:
        return math.copysign(0.0, x)
    ulp = Fraction(2) ** (math.frexp(x)[1] - 8)
    rounded = round(Fraction(x) / ulp) * ulp  # half to even
    return math.copysign(math.inf, x) if abs(rounded) >= 2**128 else float(rounded)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=500, deadline=None)
def test_reference_rounds_exactly(x: float) -> None:
    got = float(round_to_bf16(np.float32(x)))
    assert got == exact(x)
    assert math.copysign(1, got) == math.copysign(1, x)


def test_reference_against_ml_dtypes() -> None:
    """Where VCVTNEPS2BF16 and IEEE agree: all but denormals and NaNs."""
    x = all_tops()
    x = x[np.isfinite(x) & (np.abs(x) >= 2.0**-126)]
    want = x.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(round_to_bf16(x).view(np.uint16), want.view(np.uint16))


@pytest.mark.parametrize(
    ("bits", "want"),
    [
        (0x7F800001, 0x7FC0),  # a signalling NaN with its payload below: made quiet, not infinite
        (0xFFBFFFFF, 0xFFFF),
        (0x7FC10001, 0x7FC1),
        (0x7F800000, 0x7F80),
        (0x7F7F8000, 0x7F80),  # halfway to 2**128
        (0x7F7F7FFF, 0x7F7F),
        (0x007FFFFF, 0x0000),  # the largest denormal: to zero, not up to 2**-126
        (0x807FFFFF, 0x8000),
        (0x00800000, 0x0080),
        (0x3F808000, 0x3F80),  # ties
        (0x3F818000, 0x3F82),
    ],
)
def test_reference_patterns(bits: int, want: int) -> None:
    assert int(round_to_bf16(bits_of(bits)).view(np.uint16)[0]) == want


def test_shape_and_type() -> None:
    y = round_to_bf16(np.ones((2, 0, 3), np.float32))
    assert y.shape == (2, 0, 3)
    assert y.dtype == ml_dtypes.bfloat16
    assert round_to_bf16(1.0).shape == ()


PLAIN = fold(n=1, out="bf16", acc="f32")


@pytest.mark.parametrize(("tier", "hardware"), PLACES)
def test_every_upper_half(tier: str, hardware: bool) -> None:
    """Bit for bit, NaNs too."""
    lanes = TIER_CODE[tier].lanes
    x = np.concatenate([SPECIAL, np.random.default_rng(0).permutation(all_tops())])
    shape = Shape(3, 2, lanes)
    size = 3 * shape.columns(lanes)
    for start in range(0, len(x) // (4 if hardware else 300), size):
        part = np.resize(x[start : start + size], (3, size // 3))
        got = run(tier, PLAIN, shape, part, hardware=hardware)
        np.testing.assert_array_equal(got.view(np.uint16), round_to_bf16(part).view(np.uint16))


@pytest.mark.parametrize(("tier", "hardware"), PLACES)
@pytest.mark.parametrize("nr", [1, 2, 3])
def test_tails(tier: str, hardware: bool, nr: int) -> None:
    lanes = TIER_CODE[tier].lanes
    rng = np.random.default_rng(nr)
    for valid in range(1, lanes + 1):
        shape = Shape(2, nr, valid)
        x = rng.standard_normal((2, shape.columns(lanes))).astype(np.float32)
        got = run(tier, PLAIN, shape, x, hardware=hardware)
        np.testing.assert_array_equal(got.view(np.uint16), round_to_bf16(x).view(np.uint16))


@pytest.mark.parametrize(("tier", "hardware"), PLACES)
@pytest.mark.parametrize("valid", [1, 5, 8])
def test_s32_accumulators_and_bf16_tensors(tier: str, hardware: bool, valid: int) -> None:
    """Requantization to bf16 has no y_scale; a bf16 tensor is widened exactly, denormals included."""
    lanes = TIER_CODE[tier].lanes
    shape = Shape(2, 2, valid)
    n = shape.columns(lanes)
    rng = np.random.default_rng(valid)
    acc = rng.integers(-(2**20), 2**20, (2, n), dtype=np.int32)
    tensor = round_to_bf16(rng.standard_normal((2, n)) * 3)
    tensor.view(np.uint16)[0, :1] = 0x0003
    e = fold(
        n=n, x_scale=0.02, w_scale=rng.random(n) + 0.1, bias_f32=rng.standard_normal(n).astype(np.float32),
        post_ops=(v.Sum(0.7, dtype="bf16"), v.LeakyReLU(0.1), v.Sum(-1.5)), out="bf16",
    )  # fmt: skip
    assert [s.tensor for s in e.spec.steps] == ["bf16", None, "bf16"]
    want = reference_epilogue(acc, e, (tensor, tensor))
    assert_same(run(tier, e, shape, acc, (tensor, tensor), hardware=hardware), want, (tier, valid))


def test_no_output_scale() -> None:
    with pytest.raises(v.QuantizationError, match="not for bf16"):
        fold(n=1, out="bf16", y_scale=0.5)


def test_instructions_and_registers() -> None:
    """The instruction where the tier has it; elsewhere a fourth register, on AVX2 only."""
    for tier in TIERS:
        listing = build(tier, PLAIN.spec, Shape(1, 3, 3)).listing
        assert ("vcvtne2ps2bf16" in listing and "vcvtneps2bf16" in listing) == (tier == "avx512_bf16")
        assert epilogue_registers(PLAIN.spec, TIER_CODE[tier]) == (4 if TIER_CODE[tier].bits == 256 else 3)
