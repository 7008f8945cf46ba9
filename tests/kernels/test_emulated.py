"""Every tier's kernels on the emulator, on any host: exact results, and no access outside an operand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import vnnigen as v
from tests.kernels.cases import POST_OPS, TIERS, Case, assert_same_bits, out_shape, random_numbers, seeded
from tests.kernels.emulation import check_emulated, emulate, fine_grid, lower
from vnnigen.errors import ShapeError

EMULATED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def tile_of(tier: str, case: Case) -> Any:
    """The blocking that a large problem of a case's kind gets."""
    return lower(case.operator("reference"), case.x, case.src, tier).keys[0]


def around(*sizes: int) -> list[int]:
    """Each size and its two neighbours, without zero."""
    return sorted({n + d for n in sizes for d in (-1, 0, 1) if n + d > 0})


# --- tile boundaries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("src", ["u8", "s8", "f32"])
@pytest.mark.parametrize("weights", ["safe", "full"])
@pytest.mark.parametrize("tier", TIERS)
def test_gemm_at_tile_boundaries(tier: str, weights: str, src: str) -> None:
    if src == "f32" and weights == "safe":
        pytest.skip("f32 weights are all of one kind")
    out = "f32" if src == "f32" else "u8"
    base = Case((256, 64), (512, 64), src=src, out=out, weights=weights)
    key = tile_of(tier, base)
    lanes, mr, nr = key.tier.lanes, key.blocking.mr, key.blocking.nr
    rows, columns = around(1, mr), around(1, lanes, nr * lanes)
    number = 0
    for m in rows:
        for n in columns:
            # One K for every pair, another each time; all of them meet all of both.
            for k in (1 + number % 9, 16 + number % 5):
                number += 1
                case = random_numbers(replace(base, x=(m, k), w=(n, k)), seeded(number), src)
                check_emulated(replace(case, weights=weights), tier)


@pytest.mark.parametrize("src", ["u8", "s8", "f32"])
@pytest.mark.parametrize("tier", TIERS)
def test_gemm_k_around_the_unrolled_loop(tier: str, src: str) -> None:
    """K at the ends of the unrolled loop, of a dword, and where the multiplication is written out whole."""
    out = "f32" if src == "f32" else "s32"
    for weights in ("safe", "full"):
        base = Case((30, 400), (96, 400), src=src, out=out, weights=weights)
        key = tile_of(tier, base)
        per, unroll = key.mac.k_per_dword, key.blocking.unroll
        whole = -(-200 // (key.blocking.mr * key.blocking.nr))
        sizes = {per * d + e for d in (1, unroll, 2 * unroll, 3 * unroll, whole) for e in (-1, 0, 1)}
        for k in sorted(s for s in sizes if s > 0):
            n = key.block_columns
            case = replace(base, x=(key.blocking.mr, k), w=(n, k))
            if src != "f32":
                case = replace(case, x_zp=3, w_zp=k % 2 == 0)
            check_emulated(case, tier)


# --- features ---------------------------------------------------------------------------------------------

SHAPES = [
    Case((1, 5, 6, 3), (7, 3, 3, 3), padding=1, note="3x3"),
    Case((1, 5, 6, 3), (7, 3, 3, 3), padding=((0, 2), (1, 0)), note="asymmetric"),
    Case((1, 9, 8, 4), (9, 4, 3, 2), stride=(2, 3), padding=((1, 0), (0, 1)), note="stride"),
    Case((1, 9, 9, 5), (6, 5, 3, 3), dilation=(2, 3), padding=(2, 3), note="dilation"),
    Case((2, 4, 5, 6), (9, 2, 2, 3), groups=3, padding=((0, 1), (1, 1)), note="groups"),
    Case((1, 6, 5, 66), (66, 1, 3, 3), groups=66, padding=1, note="depthwise"),
    Case((1, 7, 7, 35), (35, 1, 3, 3), groups=35, stride=2, padding=((1, 0), (0, 1)), note="depthwise-stride"),
    Case((1, 7, 9, 64), (64, 1, 3, 5), groups=64, dilation=(1, 2), note="depthwise-dilation"),
    Case((1, 7, 6, 10), (20, 1, 3, 3), groups=10, padding=1, note="depth-multiplier"),
    Case((2, 3, 3, 9), (35, 9, 1, 1), note="1x1"),
    Case((1, 5, 5, 9), (35, 9, 1, 1), stride=2, note="1x1-stride"),
    Case((1, 3, 3, 4), (5, 4, 1, 1), padding=2, note="1x1-padding"),
    Case((1, 1, 1, 1), (1, 1, 1, 1), note="one"),
    Case((1, 2, 2, 3), (4, 3, 5, 5), padding=3, note="wider than the image"),
    Case((1, 1, 30, 2), (3, 2, 1, 7), padding=(0, 3), note="row"),
    Case((1, 30, 1, 2), (3, 2, 7, 1), padding=(3, 0), note="column"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: c.note)
@pytest.mark.parametrize("tier", TIERS)
def test_convolutions(tier: str, shape: Case) -> None:
    for seed, src in enumerate(("u8", "s8", "f32", "s8")):
        check_emulated(random_numbers(shape, seeded(seed), src), tier)


@pytest.mark.parametrize("out", ["u8", "s8", "s32", "f32"])
@pytest.mark.parametrize("src", ["u8", "s8"])
@pytest.mark.parametrize("tier", TIERS)
def test_types_and_zero_points(tier: str, src: str, out: str) -> None:
    low, high = (0, 255) if src == "u8" else (-128, 127)
    y_low, y_high = {"u8": (0, 255), "s8": (-128, 127)}.get(out, (0, 0))
    for shape in (
        Case((1, 3, 3, 3), (9, 3, 2, 2), padding=((0, 1), (1, 0))),
        Case((1, 2, 2, 6), (9, 2, 2, 1), groups=3, padding=((1, 0), (0, 0))),
        Case((1, 2, 3, 18), (18, 1, 1, 2), groups=18, padding=((0, 0), (1, 0))),
    ):
        for x_zp, w_zp, y_zp, bias in (
            (low, False, y_high, "s32"), (high, True, y_low, None), (5, True, 0, "s32"), (0, False, 1, None),
        ):  # fmt: skip
            case = replace(
                shape, src=src, out=out, x_zp=x_zp, w_zp=w_zp, y_zp=y_zp if out in ("u8", "s8") else 0,
                bias="f32" if out != "s32" and x_zp == 5 else bias,
            )  # fmt: skip
            check_emulated(case, tier)


@pytest.mark.parametrize("chain", POST_OPS)
@pytest.mark.parametrize("tier", TIERS)
def test_post_ops(tier: str, chain: str) -> None:
    """Every chain, on full and tail vectors, for dense and depthwise kernels and every output."""
    post_ops, sums = POST_OPS[chain]
    for out in ("u8", "s8", "f32"):
        types = tuple(out if s == "out" else s for s in sums)
        for shape in (
            Case((3, 2), (37, 2), bias="f32"),
            Case((1, 2, 3, 70), (70, 1, 1, 2), groups=70, bias="s32"),
        ):
            case = replace(shape, out=out, post_ops=post_ops, sums=types, seed=7)
            check_emulated(case, tier)
            if types[:1] == (out,) and shape.is_gemm:
                check_emulated(case, tier, in_place=True)


# --- arithmetic at its ends -------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["u8", "s8"])
@pytest.mark.parametrize("tier", TIERS)
def test_ties_round_to_even(tier: str, out: str) -> None:
    """With scales of 1 and y_scale 2, every odd accumulator is a tie."""
    x = np.arange(256, dtype=np.uint8).reshape(-1, 1)
    w = np.array([[1, -1, 2, 3]], np.int8)
    dtype = np.uint8 if out == "u8" else np.int8
    op = v.GemmInt8(w, y_scale=2.0, y_zero_point=3, out_dtype=dtype, isa="reference")
    got = emulate(lower(op, x.shape, "u8", tier), x, dtype).y
    exact = np.rint(x.astype(np.int64) * w / 2) + 3
    assert np.array_equal(got, np.clip(exact, *((0, 255) if out == "u8" else (-128, 127))))


@pytest.mark.parametrize("zero_point", [0, 255, 100])
@pytest.mark.parametrize("y_scale", [1e-9, 1e-4, 1.0, 1e9])
@pytest.mark.parametrize("tier", TIERS)
def test_values_beyond_s32_saturate(tier: str, y_scale: float, zero_point: int) -> None:
    """A conversion that overflows gives INT_MIN, whichever side it left on; the result must not."""
    x = np.array([[0, 0], [255, 0], [0, 255], [255, 255]], np.uint8)
    w = np.array([[127, -128, 1, -1], [127, -128, -1, 1]], np.int8)
    for dtype in (np.uint8, np.int8):
        zp = zero_point if dtype is np.uint8 else zero_point - 128
        op = v.GemmInt8(w, y_scale=y_scale, y_zero_point=zp, out_dtype=dtype, isa="reference")
        low = lower(op, x.shape, "u8", tier)
        assert_same_bits(emulate(low, x, dtype).y, op(x), (tier, y_scale, zp))
        lo, hi = np.iinfo(dtype).min, np.iinfo(dtype).max
        plain = np.clip(np.rint((x.astype(np.int64) @ w) / y_scale) + zp, lo, hi)
        assert np.array_equal(op(x), plain)


@pytest.mark.parametrize("ops", [(), (v.ReLU(),), (v.Clip(-1, 2),), (v.LeakyReLU(0.5),), (v.Linear(-2, 1),)], ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_nan_and_infinity_from_a_sum(tier: str, ops: tuple[v.PostOp, ...]) -> None:
    strange = np.array([np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, -0.0, 2**31, -(2**31), 1], np.float32)
    tensor = np.resize(strange, (3, 37))
    x = np.arange(12, dtype=np.uint8).reshape(3, 4)
    w = seeded_weights((4, 37))
    for dtype in (np.uint8, np.int8, np.float32):
        scale = None if dtype is np.float32 else 0.5
        op = v.GemmInt8(
            w, y_scale=scale, out_dtype=dtype, post_ops=(v.Sum(1.0, dtype=np.float32), *ops), isa="reference"
        )
        want = op(x, tensors=(tensor,))
        got = emulate(lower(op, x.shape, "u8", tier), x, dtype, (tensor,)).y
        # Which of its NaNs an operation returns is not part of the contract.
        assert np.array_equal(got, want, equal_nan=dtype is np.float32)


@pytest.mark.parametrize("tier", TIERS)
def test_partial_sums_may_wrap(tier: str) -> None:
    """VPDPBUSD adds 128*w too much for a signed source, beyond s32; the start value takes it back."""
    k = 130_000
    x = np.full((1, k), 127, np.int8)
    for value in (127, -128, 64):
        w = np.full((k, 1), value, np.int8)
        op = v.GemmInt8(w, out_dtype=np.int32, isa="reference")
        got = emulate(lower(op, x.shape, "s8", tier), x, np.int32).y
        assert got.item() == 127 * value * k


def seeded_weights(shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("tier", TIERS)
def test_extreme_operands_at_every_k(tier: str) -> None:
    """u8 255 against s8 +127, -127 and -128: where VPMADDUBSW saturates. (The hardware tests take all K to 260.)"""
    for k in (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 260):
        x = np.full((2, k), 255, np.uint8)
        x[1, 1::2] = 0
        w = np.full((k, 4), (127, -127, -128, 127), np.int8)
        w[1::2, 3] = -128
        op = v.GemmInt8(w, out_dtype=np.int32, isa="reference")
        got = emulate(lower(op, x.shape, "u8", tier), x, np.int32).y
        assert np.array_equal(got, x.astype(np.int64) @ w.astype(np.int64)), k


# --- anything at all --------------------------------------------------------------------------------------


@st.composite
def small_cases(draw: st.DrawFn) -> Case:
    size = st.integers(1, 9)
    if draw(st.integers(0, 3)) == 0:
        k = draw(st.integers(1, 40))
        shape = Case((draw(st.integers(1, 20)), k), (draw(st.integers(1, 80)), k))
    else:
        kh, kw = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        groups = draw(st.sampled_from((1, 1, 2, 3, 0)))
        if groups == 0:
            groups, icg, ocg = draw(st.integers(2, 70)), 1, 1
        else:
            icg, ocg = draw(st.integers(1, 7)), draw(st.integers(1, 40 // groups))
        pads = st.tuples(st.integers(0, 2), st.integers(0, 2))
        shape = Case(
            (draw(st.integers(1, 2)), draw(size), draw(size), groups * icg), (groups * ocg, icg, kh, kw),
            stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
            dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 3))),
            padding=draw(st.tuples(pads, pads)), groups=groups,
        )  # fmt: skip
    return random_numbers(shape, lambda options: draw(st.sampled_from(options)))


@pytest.mark.parametrize("tier", TIERS)
@EMULATED
@given(case=small_cases(), fine=st.booleans())
def test_random_problems(tier: str, case: Case, fine: bool) -> None:
    try:
        out_shape(case.operator("reference"), case)
    except ShapeError:
        assume(False)
    if fine:
        with fine_grid():
            check_emulated(case, tier)
    else:
        check_emulated(case, tier)


# --- the grid ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_macs", [64, 4000])
@pytest.mark.parametrize("tier", TIERS)
def test_grids_of_many_steps(tier: str, step_macs: int) -> None:
    """Strips, chunks of columns, images and launches, as large problems have them."""
    steps = set()
    for number, shape in enumerate((
        Case((3, 11, 7, 3), (20, 3, 3, 2), padding=((2, 1), (0, 1)), stride=(2, 1), note="images"),
        Case((1, 23, 4, 5), (5, 5, 3, 1), padding=((1, 0), (0, 0)), note="strips"),
        Case((1, 2, 3, 8), (150, 8, 1, 1), note="chunks"),
        Case((2, 13, 3, 40), (40, 1, 3, 3), groups=40, padding=1, note="depthwise"),
        Case((1, 3, 5, 150), (150, 1, 1, 3), groups=150, note="depthwise chunks"),
        Case((1, 12, 7, 6), (20, 3, 2, 2), groups=2, note="groups"),
        Case((90, 5), (140, 5), note="gemm"),
    )):  # fmt: skip
        for src in ("u8", "s8", "f32"):
            with fine_grid(step_macs):
                case = random_numbers(shape, seeded(number), src)
                steps.add(check_emulated(case, tier).keys[0].steps)
    assert max(steps) > 10
