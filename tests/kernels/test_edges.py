"""Convolutions leave out the pixels of a tile that a tap of the filter meets padding in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import vnnigen as v
from tests.kernels.cases import Case, assert_same_bits, expected
from tests.kernels.emulation import check_emulated, emulate, lower, never_winograd

TIERS = ("avx512", "avx2")
CASES = [
    Case((1, 4, 7, 32), (20, 32, 3, 3), padding=1, note="3x3"),
    Case((1, 3, 15, 33), (8, 33, 3, 3), padding=1, note="left, middle, right"),
    Case((1, 5, 9, 32), (40, 32, 3, 3), padding=1, stride=2, note="stride"),
    Case((1, 3, 6, 32), (8, 32, 1, 5), padding=((0, 0), (4, 1)), note="uneven"),
    Case((1, 2, 2, 32), (8, 32, 3, 3), padding=1, note="tiles over rows"),
    Case((1, 2, 2, 32), (8, 32, 2, 5), padding=((0, 1), (4, 4)), note="columns of nothing but padding"),
    Case((1, 3, 3, 32), (8, 32, 3, 3), padding=((0, 0), (5, 0)), note="a pixel of nothing but padding"),
    Case((2, 3, 5, 32), (8, 32, 3, 2), padding=((1, 1), (0, 1)), note="right only"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.note)
@pytest.mark.parametrize("tier", TIERS)
def test_the_same_bits(tier: str, case: Case) -> None:
    check_emulated(replace(case, src="f32", out="f32", bias="f32"), tier)


INTEGERS = (
    {}, {"x_zp": 7, "bias": "s32"}, {"src": "s8", "x_zp": -3, "weights": "safe", "out": "s32"},
    {"x_zp": 200, "w_zp": True, "out": "s32"}, {"weights": "mixed", "x_zp": 9, "w_zp": True},
)  # fmt: skip


@pytest.mark.parametrize("more", INTEGERS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.note)
@pytest.mark.parametrize("tier", ["avx512_vnni", "avx512", "avx2", "avx_vnni"])
def test_the_same_integers(tier: str, case: Case, more: dict[str, Any]) -> None:
    """What padding would add is in the start values, whatever the zero points."""
    with never_winograd():
        low = check_emulated(replace(case, **more), tier)
    for key in low.keys:
        assert key.skip_columns == (not key.row_sums and case.x[3] % key.mac.k_per_dword == 0)


@pytest.mark.parametrize("tier", ["avx512", "avx2"])
def test_bf16(tier: str) -> None:
    for case in CASES:
        check_emulated(replace(case, src="bf16", out="f32", weights="small"), tier)
    check_emulated(replace(CASES[0], src="bf16", out="f32", weights="small"), "avx512_bf16", family="dot")


@pytest.mark.parametrize(("tier", "multiply", "per"), [("avx512_vnni", "vpdpbusd", 4), ("avx512", "vpmaddwd", 2)])
def test_every_pixel_leaves_out_its_own(tier: str, multiply: str, per: int) -> None:
    """An image of 3x3 to 2x2, by steps of 2: each corner's window has 4 taps of 9 on the image."""
    case = Case((1, 3, 3, 64), (16, 64, 3, 3), padding=1, stride=2, out="s32", x_zp=5)
    low = check_emulated(case, tier)
    assert low.keys[0].blocking.mr == 4
    (stats,) = emulate(low, case.source(), np.int32).stats
    assert stats.counts[multiply] == 4 * 4 * 64 // per


@pytest.mark.parametrize(("tier", "vectors"), [("avx512", 1), ("avx2", 2)])
def test_fewer_multiplications(tier: str, vectors: int) -> None:
    """Of 7 pixels of a row, a filter of 3 meets padding in 2 of 21 places."""
    case = replace(CASES[0], x=(1, 1, 7, 32), w=(16, 32, 1, 3), padding=(0, 1), src="f32", out="f32")
    low = lower(case.operator("reference"), case.x, "f32", tier)
    (stats,) = emulate(low, case.source(), np.float32).stats
    assert stats.counts["vfmadd231ps"] == vectors * 19 * 32


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_meet_the_padding(tier: str, value: float) -> None:
    """0 * infinity is NaN, also where 0 is padding."""
    case = replace(CASES[0], src="f32", out="f32")
    w = case.weight_values()
    w[3, 5, 1, 0] = value
    op: Any = v.Conv2dF32(w, padding=1, isa="reference")
    x = case.source()
    low = lower(op, case.x, "f32", tier)
    assert not low.keys[0].skip_columns
    got = emulate(low, x, np.float32).y
    assert np.isnan(got[:, :, 0, 3]).all()
    others = np.arange(20) != 3
    want = expected(case, case.operator("reference"), x, ())
    assert_same_bits(np.ascontiguousarray(got[..., others]), np.ascontiguousarray(want[..., others]), tier)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    ("case", "skips"),
    [
        (CASES[0], True),
        (replace(CASES[0], padding=0), False),
        (replace(CASES[0], x=(1, 4, 7, 8), w=(20, 8, 3, 3)), False),
        (replace(CASES[0], groups=2, w=(20, 16, 3, 3)), False),
        (replace(CASES[0], dilation=2, padding=2), False),
        (replace(CASES[0], x=(1, 1, 200, 32)), False),
    ],
)
def test_only_where_it_pays(tier: str, case: Case, skips: bool) -> None:
    case = replace(case, src="f32", out="f32")
    assert lower(case.operator("reference"), case.x, "f32", tier).keys[0].skip_columns == skips
