"""The NumPy references against loops over Python integers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vnnigen.errors import QuantizationError
from vnnigen.kernels import reference
from vnnigen.kernels.epilogue import fold, reference_epilogue
from vnnigen.kernels.post_ops import Clip, ReLU, Sum
from vnnigen.kernels.problem import ConvProblem, GemmProblem
from vnnigen.kernels.reference import (
    conv_f32_reference,
    conv_int8_reference,
    gemm_f32_reference,
    gemm_int8_reference,
)
from vnnigen.kernels.types import NUMPY


def naive_conv(p: ConvProblem, x: np.ndarray, w: np.ndarray, x_zp: int, w_zp: list[int], bias: list[int]) -> list:
    """Return the accumulators, flat, from the definition; taps outside the image see the zero point."""
    totals = []
    xs, ws = x.tolist(), w.tolist()
    for image, oy, ox, oc in itertools.product(*map(range, p.y_shape)):
        total = bias[oc]
        first = oc // p.ocg * p.icg
        for c, i, j in itertools.product(range(p.icg), range(p.kh), range(p.kw)):
            iy = oy * p.stride[0] + i * p.dilation[0] - p.pad[0][0]
            ix = ox * p.stride[1] + j * p.dilation[1] - p.pad[1][0]
            inside = 0 <= iy < p.ih and 0 <= ix < p.iw
            value = xs[image][iy][ix][first + c] if inside else x_zp
            total += (value - x_zp) * (ws[oc][c][i][j] - w_zp[oc])
        totals.append(total)
    return totals


@st.composite
def conv_problems(draw: st.DrawFn, src: st.SearchStrategy[str]) -> ConvProblem:
    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    icg, ocg = number(1, 3), number(1, 3)
    kernel, stride, dilation = ((number(1, 3), number(1, 3)) for _ in range(3))
    pad = ((number(0, 2), number(0, 2)), (number(0, 2), number(0, 2)))
    extent = [(kernel[i] - 1) * dilation[i] + 1 - sum(pad[i]) for i in range(2)]
    ih, iw = (max(1, extent[i]) + number(0, 3) for i in range(2))
    source = draw(src)
    return ConvProblem(
        number(1, 2), ih, iw, icg * groups, ocg * groups, *kernel, stride, dilation, pad, groups, source,
        "f32" if source == "f32" else "s32",
    )  # fmt: skip


@given(conv_problems(st.sampled_from(["u8", "s8"])), st.integers(0, 127), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_conv_is_the_definition(p: ConvProblem, x_zp: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = (0, 256) if p.src == "u8" else (-128, 128)
    x = rng.integers(low, high, p.x_shape).astype(NUMPY[p.src])
    w = rng.integers(-128, 128, p.w_shape).astype(np.int8)
    w_zp = rng.integers(-128, 128, p.oc)
    bias = rng.integers(-(10**6), 10**6, p.oc).astype(np.int32)
    got = conv_int8_reference(
        p, x, w, fold(n=p.oc, out="s32"), x_zero_point=x_zp, w_zero_point=w_zp, bias=bias
    )  # fmt: skip
    assert got.dtype == np.int32
    assert got.shape == p.y_shape
    assert got.ravel().tolist() == naive_conv(p, x, w, x_zp, w_zp.tolist(), bias.tolist())


@given(conv_problems(st.just("f32")), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_conv_f32_is_the_definition(p: ConvProblem, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-99, 99, p.x_shape).astype(np.float32)
    w = rng.integers(-99, 99, p.w_shape).astype(np.float32)
    bias = rng.integers(-99, 99, p.oc).astype(np.float32)
    got = conv_f32_reference(p, x, w, fold(n=p.oc, bias_f32=bias, out="f32", acc="f32"))
    assert got.dtype == np.float32
    assert got.ravel().tolist() == naive_conv(p, x, w, 0, [0] * p.oc, bias.tolist())


@pytest.mark.parametrize("groups", [1, 4])
def test_blocks_of_rows_join(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p = ConvProblem(2, 9, 7, 8, 8, 3, 3, (2, 1), (1, 2), ((1, 2), (2, 1)), groups, "u8", "s32")
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, p.x_shape).astype(np.uint8)
    w = rng.integers(-128, 128, p.w_shape).astype(np.int8)
    whole = conv_int8_reference(p, x, w, fold(n=8, out="s32"))
    monkeypatch.setattr(reference, "_PATCH_BYTES", 1)
    assert (conv_int8_reference(p, x, w, fold(n=8, out="s32")) == whole).all()


@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 20), st.sampled_from(["u8", "s8"]),
    st.integers(0, 127), st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_gemm_is_the_definition(m: int, n: int, k: int, src: str, a_zp: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = (0, 256) if src == "u8" else (-128, 128)
    a = rng.integers(low, high, (m, k)).astype(NUMPY[src])
    b = rng.integers(-128, 128, (k, n)).astype(np.int8)
    b_zp = rng.integers(-128, 128, n)
    bias = rng.integers(-(10**6), 10**6, n).astype(np.int32)
    got = gemm_int8_reference(
        GemmProblem(m, n, k, src, "s32"), a, b, fold(n=n, out="s32"),
        a_zero_point=a_zp, b_zero_point=b_zp, bias=bias,
    )  # fmt: skip
    expected = (a.astype(object) - a_zp) @ (b.astype(object) - b_zp) + bias
    assert got.dtype == np.int32
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("w", [127, -127, -128])
def test_extremes_of_long_sums(w: int) -> None:
    """Sums of full-range products: past 2**24 they must leave float32, and the last bit must be right."""
    for k in (1, 260, 517, 518, 520, 1000, 5000, 65791):
        a = np.full((1, k), 255, np.uint8)
        a[0, 0] = 254
        b = np.full((k, 1), w, np.int8)
        got = gemm_int8_reference(GemmProblem(1, 1, k, "u8", "s32"), a, b, fold(n=1, out="s32"))
        assert got.item() == (k * 255 - 1) * w


def test_too_long_sums_are_refused() -> None:
    k = 70000
    a, b = np.zeros((1, k), np.uint8), np.full((k, 1), 127, np.int8)
    with pytest.raises(QuantizationError, match="K too large"):
        gemm_int8_reference(GemmProblem(1, 1, k, "u8", "s32"), a, b, fold(n=1, out="s32"))
    x, w = np.zeros((1, 1, 1, k), np.uint8), np.full((1, k, 1, 1), 127, np.int8)
    with pytest.raises(QuantizationError, match="K too large"):
        conv_int8_reference(ConvProblem(1, 1, 1, k, 1, 1, 1, dst="s32"), x, w, fold(n=1, out="s32"))


@pytest.mark.parametrize("out", ["u8", "s8", "f32"])
def test_the_epilogue_follows(out: str) -> None:
    rng = np.random.default_rng(2)
    p = ConvProblem(1, 5, 5, 4, 6, 3, 3, pad=((1, 1), (1, 1)), dst=out)
    x = rng.integers(0, 256, p.x_shape).astype(np.uint8)
    w = rng.integers(-128, 128, p.w_shape).astype(np.int8)
    residual = rng.integers(0, 256, p.y_shape).astype(np.uint8)
    before = rng.integers(0, 100, p.y_shape).astype(NUMPY[out])
    quantized = {} if out == "f32" else {"y_scale": 0.1, "y_zero_point": 5}
    e = fold(
        n=6, x_scale=0.01, w_scale=np.linspace(0.01, 0.02, 6), bias_f32=np.ones(6, np.float32),
        post_ops=(Sum(0.1, 128, residual), ReLU(), Sum(0.5), Clip(0, 20)), out=out, **quantized,
    )  # fmt: skip
    got = conv_int8_reference(p, x, w, e, x_zero_point=100, tensors=(residual, before))
    acc = np.array(naive_conv(p, x, w, 100, [0] * 6, [0] * 6), np.int32).reshape(p.y_shape)
    assert got.dtype == NUMPY[out]
    assert (got == reference_epilogue(acc, e, (residual, before))).all()
    assert len(np.unique(got)) > 10  # the constants above exercise more than the clamps


def test_f32_follows_ieee() -> None:
    a = np.array([[np.inf, 1.0], [np.nan, 1.0], [3e38, 3e38]], np.float32)
    b = np.array([[1.0], [10.0]], np.float32)
    got = gemm_f32_reference(GemmProblem(3, 1, 2, "f32", "f32"), a, b, fold(n=1, out="f32", acc="f32"))
    np.testing.assert_array_equal(got, np.array([[np.inf], [np.nan], [np.inf]], np.float32))
    exact = gemm_f32_reference(
        GemmProblem(1, 1, 3, "f32", "f32"),
        np.array([[1e8, 1.0, -1e8]], np.float32), np.ones((3, 1), np.float32),
        fold(n=1, bias_f32=np.array([0.5], np.float32), post_ops=[ReLU()], out="f32", acc="f32"),
    )  # fmt: skip
    assert exact.tolist() == [[1.5]]
