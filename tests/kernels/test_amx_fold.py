"""Folded pixels and spread rows: convolutions of few channels on tiles, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import Case, random_numbers, seeded
from tests.kernels.emulation import emulate, fine_grid, lower
from tests.kernels.test_amx_pipeline import candidates, run, run_all
from vnnigen.kernels.amx_fold import fold_geometry, fold_of, fold_weights, spread_geometry, spread_of, spread_weights
from vnnigen.kernels.geometry import conv_geometry
from vnnigen.kernels.packed import Weights
from vnnigen.kernels.problem import ConvProblem

STEMS = [
    Case((1, 20, 21, 3), (18, 3, 7, 7), stride=2, padding=3, note="7x7"),
    Case((2, 17, 19, 3), (33, 3, 3, 3), stride=2, padding=((0, 1), (1, 0)), note="3x3"),
    Case((1, 19, 16, 2), (20, 2, 5, 5), stride=3, padding=2, note="stride 3"),
    Case((1, 12, 14, 4), (16, 4, 2, 2), stride=2, note="no overlap"),
    Case((1, 13, 40, 1), (20, 1, 5, 3), stride=4, padding=1, note="wider stride than filter"),
    Case((1, 30, 3, 3), (7, 3, 3, 3), stride=2, note="one column"),
    Case((1, 9, 70, 6), (70, 6, 3, 5), stride=2, padding=((2, 1), (2, 2)), note="wide"),
]


def weights_of(case: Case) -> Weights:
    return case.operator("reference")._weights


@pytest.mark.parametrize("case", STEMS, ids=lambda c: c.note)
def test_folded_convolutions(case: Case) -> None:
    assert fold_of(weights_of(case)) > 1
    for seed, src in enumerate(("u8", "s8")):
        run_all(replace(random_numbers(case, seeded(seed), src), w_zp=False))
    with fine_grid(1000, 512):
        run_all(replace(case, x_zp=7, bias="s32"))


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(5, 20), st.integers(5, 20)), channels=st.integers(1, 4), kernel=st.integers(2, 5),
    stride=st.integers(2, 4), pad=st.tuples(st.integers(0, 2), st.integers(0, 2)), seed=st.integers(0, 99),
)  # fmt: skip
def test_folding_is_the_same_convolution(
    size: tuple[int, int], channels: int, kernel: int, stride: int, pad: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-9, 9, (1, *size, channels))
    w = rng.integers(-9, 9, (3, channels, kernel, kernel))
    p = ConvProblem(1, *size, channels, 3, kernel, kernel, stride=(stride, stride), pad=(pad, pad))
    case = Case((1, *size, channels), w.shape, stride=stride)
    folded = fold_weights(replace(weights_of(case), values=w), stride).values
    g = fold_geometry(conv_geometry(p), stride)
    # The tuner's source has the folded geometry's size, and must hold the original's bytes.
    assert g.h * g.w * g.ic >= size[0] * size[1] * channels
    rows, columns = stride * (g.oh - 1 + g.kh), stride * (g.ow - 1 + g.kw)
    padded = np.full((rows + kernel, columns + kernel, channels), 77)  # what added taps meet does not matter
    filled = np.pad(x[0], (pad, pad, (0, 0)))
    padded[: filled.shape[0], : filled.shape[1]] = filled[: len(padded), : padded.shape[1]]
    blocks = padded[:rows, :columns].reshape(rows // stride, stride, columns // stride, stride, channels)
    pixels = blocks.transpose(0, 2, 1, 3, 4).reshape(rows // stride, columns // stride, -1)
    for y in range(p.oh):
        for c in range(p.ow):
            got = np.einsum("hwc,ochw->o", pixels[y : y + g.kh, c : c + g.kw], folded)
            window = filled[y * stride : y * stride + kernel, c * stride : c * stride + kernel]
            assert (got == np.einsum("hwc,ochw->o", window, w)).all()


def test_a_folded_stem_takes_fewer_products() -> None:
    case = Case((1, 16, 32, 3), (16, 3, 7, 7), stride=2, padding=3)
    key = candidates(case)[0]
    assert (key.g.kh, key.steps_of_run.size, key.steps_of_run.count) == (4, 48, 1)
    (got,) = run(case, [key])
    assert got.stats[0].counts["tdpbusd"] == 8 * 4


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 9, 9, 3), (8, 3, 3, 3), note="stride 1"),
        Case((1, 9, 9, 64), (8, 64, 3, 3), stride=2, note="rows fill a tile"),
        Case((1, 9, 9, 3), (8, 3, 3, 3), stride=(2, 1), note="two strides"),
        Case((1, 9, 9, 3), (8, 3, 3, 3), stride=2, dilation=2, note="dilation"),
        Case((1, 9, 9, 6), (8, 3, 3, 3), stride=2, groups=2, note="groups"),
        Case((1, 9, 9, 4), (8, 4, 3, 3), stride=2, src="bf16", out="f32", weights="small", note="bf16"),
        Case((9, 9), (8, 9), note="gemm"),
    ],
    ids=lambda c: c.note,
)
def test_what_is_not_folded(case: Case) -> None:
    assert fold_of(weights_of(case)) == 1
    tier = "amx_bf16" if case.src == "bf16" else "amx_int8"
    assert lower(case.operator("reference"), case.x, case.src, tier).packed.fold == 1


# --- spread rows ------------------------------------------------------------------------------------------

BF16 = {"src": "bf16", "out": "f32", "weights": "small"}
SPREAD = [
    Case((1, 20, 21, 3), (18, 3, 7, 7), stride=2, padding=3, note="7x7", **BF16),
    Case((2, 9, 10, 3), (33, 3, 3, 3), padding=((0, 1), (1, 0)), note="3x3", **BF16),
    Case((1, 11, 35, 1), (20, 1, 5, 5), padding=2, note="one channel", **BF16),
    Case((1, 9, 12, 5), (16, 5, 2, 3), stride=(2, 3), dilation=(2, 1), note="strides", **BF16),
    Case((1, 13, 3, 7), (7, 7, 3, 3), note="one column", **BF16),
]


@pytest.mark.parametrize("case", SPREAD, ids=lambda c: c.note)
def test_spread_convolutions(case: Case) -> None:
    assert spread_of(weights_of(case)) == 32
    run_all(case)
    with fine_grid(1000, 512):
        run_all(replace(case, bias="f32", out="bf16"))


def test_what_spreads() -> None:
    for case, elements in (
        (SPREAD[0], 32),
        (Case((1, 9, 9, 4), (8, 4, 3, 3), note="whole dwords", **BF16), 0),
        (Case((1, 9, 9, 11), (8, 11, 3, 3), note="longer than a tile's row", **BF16), 0),
        (Case((1, 9, 9, 3), (8, 3, 3, 3), dilation=2, note="dilation along the row", **BF16), 0),
        (Case((1, 9, 9, 6), (8, 3, 3, 3), groups=2, note="groups", **BF16), 0),
        (Case((1, 9, 9, 3), (8, 3, 3, 3), note="int8"), 0),
        (Case((9, 9), (8, 9), note="gemm", **BF16), 0),
    ):
        assert spread_of(weights_of(case)) == elements, case.note


def test_spreading_reads_nothing_beside_a_window() -> None:
    """NaN right beside a window leaves its output alone: what fills pixels up is zeros, not the next pixels."""
    case = SPREAD[1]
    x = case.source()
    x[:, :, 5] = np.nan
    low = lower(case.operator("reference"), case.x, "bf16", "amx_bf16")
    y = emulate(low, x, np.float32).y
    for column in range(y.shape[2]):  # one pixel of padding on the left
        assert np.isnan(y[:, :, column]).all() == (4 <= column <= 6)
        assert np.isnan(y[:, :, column]).any() == (4 <= column <= 6)


def test_spreading_is_the_same_convolution() -> None:
    case = SPREAD[0]
    w = weights_of(case)
    spread, g = (
        spread_weights(w, 32).values,
        conv_geometry(ConvProblem(1, 20, 21, 3, 18, 7, 7, stride=(2, 2), pad=((3, 3), (3, 3)), src="bf16", dst="f32")),
    )
    after = spread_geometry(g, 32)
    assert spread.shape == (18, 32, 7, 1)
    assert (after.kh, after.kw, after.sh, after.sw, after.ic, after.w) == (7, 1, 2, 1, 32, g.ow)
    assert after.h * after.w * after.ic >= 20 * 21 * 3  # the tuner's source holds the original's bytes
