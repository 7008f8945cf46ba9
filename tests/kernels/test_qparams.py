"""Quantization parameters: checks, choice, and conversion."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vnnigen.errors import DTypeError, QuantizationError, ShapeError
from vnnigen.kernels.qparams import check_scale, check_zero_point, choose_qparams, dequantize, quantize


@pytest.mark.parametrize(
    ("value", "n", "shape"),
    [
        (1, None, ()),
        (0.5, 3, ()),
        ([1, 2, 3], 3, (3,)),
        (np.float32(2), None, ()),
        (ml_dtypes.bfloat16(2), None, ()),
    ],
)
def test_good_scales(value: object, n: int | None, shape: tuple[int, ...]) -> None:
    scale = check_scale(value, "w_scale", n)
    assert scale.dtype == np.float64
    assert scale.shape == shape


@pytest.mark.parametrize(
    ("value", "n", "error"),
    [
        (0.0, None, QuantizationError),
        (-1.0, None, QuantizationError),
        (math.nan, None, QuantizationError),
        (math.inf, None, QuantizationError),
        ([1.0, -2.0, 1.0], 3, QuantizationError),
        ([1.0, 2.0], 3, QuantizationError),
        ([1.0], None, QuantizationError),
        (np.ones((3, 1)), 3, QuantizationError),
        ("1", None, DTypeError),
        (None, None, DTypeError),
        (True, None, DTypeError),
        (1j, None, DTypeError),
    ],
)
def test_bad_scales_name_the_argument(value: object, n: int | None, error: type[Exception]) -> None:
    with pytest.raises(error, match="w_scale"):
        check_scale(value, "w_scale", n)


@pytest.mark.parametrize(
    ("value", "dtype", "n", "error"),
    [
        (0, "u8", None, None),
        (255, "u8", None, None),
        (256, "u8", None, QuantizationError),
        (-1, "u8", None, QuantizationError),
        (-128, "s8", None, None),
        (128, "s8", None, QuantizationError),
        (2**63, "s32", None, QuantizationError),
        (10**30, "u8", None, DTypeError),
        ([1, 2], "s8", 2, None),
        ([1, 200], "s8", 2, QuantizationError),
        ([1, 2, 3], "s8", 2, QuantizationError),
        (1.0, "u8", None, DTypeError),
        (True, "u8", None, DTypeError),
        (None, "u8", None, DTypeError),
        (np.uint64(3), "u8", None, None),
    ],
)
def test_zero_points(value: object, dtype: str, n: int | None, error: type[Exception] | None) -> None:
    if error is None:
        assert check_zero_point(value, dtype, "x_zero_point", n).dtype == np.int32
    else:
        with pytest.raises(error, match="x_zero_point"):
            check_zero_point(value, dtype, "x_zero_point", n)


# --- quantize and dequantize ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "zp", "dtype", "expected"),
    [
        (0.25, 0, np.uint8, 0),  # ties to even
        (0.75, 0, np.uint8, 2),
        (1.25, 0, np.uint8, 2),
        (-0.25, 7, np.uint8, 7),
        (0.75, 1, np.uint8, 3),  # the zero point is added after rounding
        (1e9, 3, np.uint8, 255),
        (-1e9, 3, np.uint8, 0),
        (math.inf, 3, np.int8, 127),
        (-math.inf, 3, np.int8, -128),
        (math.nan, 3, np.uint8, 0),
        (math.nan, 3, np.int8, -128),
        (1e30, 0, np.int32, 2**31 - 1),
        (-1e30, 0, np.int32, -(2**31)),
        (2.0**29 + 0.5, 0, np.int32, 2**30 + 1),  # float64 all the way
    ],
)
def test_quantize(x: float, zp: int, dtype: type, expected: int) -> None:
    got = quantize(x, 0.5, zp, dtype=dtype)
    assert got.dtype == dtype
    assert got == expected


def test_quantize_divides_in_f32() -> None:
    """0.35 / 0.1 is just below 3.5 but rounds to it in f32: ONNX QuantizeLinear gives 4."""
    x, scale = np.float32(0.35), np.float32(0.1)
    assert float(x) / float(scale) < 3.5
    assert quantize(x, scale) == 4


def test_per_channel() -> None:
    x = np.ones((2, 3, 2), np.float32)
    q = quantize(x, [0.5, 0.25, 0.125], [0, 1, 2], dtype=np.int8, axis=1)
    assert q[0, :, 0].tolist() == [2, 5, 10]
    assert (dequantize(q, [0.5, 0.25, 0.125], [0, 1, 2], axis=1) == x).all()
    assert (dequantize(q, [0.5, 0.25, 0.125], [0, 1, 2], axis=-2) == x).all()


@given(
    arrays(np.uint8, st.integers(1, 20)) | arrays(np.int8, st.integers(1, 20)),
    st.floats(1e-30, 1e30), st.integers(0, 127),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_round_trip(q: np.ndarray, scale: float, zp: int) -> None:
    np.testing.assert_array_equal(quantize(dequantize(q, scale, zp), scale, zp, dtype=q.dtype), q)


def test_dequantize_rounds_once() -> None:
    q = np.array([2**31 - 1, -(2**31)], np.int32)
    got = dequantize(q, 0.1)
    assert got.tolist() == (q.astype(np.float64) * 0.1).astype(np.float32).tolist()
    assert dequantize(np.array([0], np.uint8), 0.5, 255).tolist() == [-127.5]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: quantize([1.0], 0.0), QuantizationError),
        (lambda: quantize([1.0], 1e-60), QuantizationError),
        (lambda: quantize([1.0], [1.0, 2.0]), QuantizationError),
        (lambda: quantize([1.0], [1.0, 2.0], axis=0), QuantizationError),
        (lambda: quantize([1.0], 1.0, axis=1), ShapeError),
        (lambda: quantize([1.0], 1.0, 300), QuantizationError),
        (lambda: quantize([1.0], 1.0, 0.5), DTypeError),
        (lambda: quantize([1.0], 1.0, dtype=np.int16), DTypeError),
        (lambda: quantize(["a"], 1.0), DTypeError),
        (lambda: dequantize(np.zeros(2, np.float32), 1.0), DTypeError),
        (lambda: dequantize(np.zeros(2, np.uint8), -1.0), QuantizationError),
        (lambda: dequantize(np.zeros(2, np.uint8), 1.0, -1), QuantizationError),
    ],
)
def test_bad_arguments(call: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        call()  # type: ignore[operator]


# --- choose_qparams ---------------------------------------------------------------------------------------

# The last step may lie beyond the largest f32: stay away from there.
finite = st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "symmetric", "scale", "zp"),
    [
        (0.0, 255.0, np.uint8, False, 1.0, 0),
        (-128.0, 127.0, np.uint8, False, 1.0, 128),
        (-128.0, 127.0, np.int8, False, 1.0, 0),
        (0.0, 255.0, np.int8, False, 1.0, -128),
        (-100.6, 154.4, np.uint8, False, 1.0, 101),
        (-100.4, 154.6, np.int8, False, 1.0, -28),
        (51.0, 255.0, np.uint8, False, 1.0, 0),  # widened to contain zero
        (-255.0, -51.0, np.uint8, False, 1.0, 255),
        (-127.0, 50.0, np.int8, True, 1.0, 0),
        (0.0, 127.0, np.int8, True, 1.0, 0),
        (0.0, 255.0, np.uint8, True, 1.0, 0),
        (-127.0, 3.0, np.uint8, True, 1.0, 128),
        (0.0, 0.0, np.uint8, False, 1.0, 0),
        (0.0, 0.0, np.int8, True, 1.0, 0),
    ],
)
def test_choices(low: float, high: float, dtype: type, symmetric: bool, scale: float, zp: int) -> None:
    for got in (
        choose_qparams(low, high, dtype=dtype, symmetric=symmetric),
        choose_qparams([low, high, (low + high) / 2], dtype=dtype, symmetric=symmetric),
    ):
        assert got == (scale, zp)
        assert type(got.scale) is float
        assert type(got.zero_point) is int


@given(
    arrays(np.float32, st.integers(1, 30), elements=finite),
    st.sampled_from([np.uint8, np.int8]), st.booleans(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_chosen_parameters_cover_the_data(x: np.ndarray, dtype: type, symmetric: bool) -> None:
    scale, zp = choose_qparams(x, dtype=dtype, symmetric=symmetric)
    assert scale > 0
    assert np.float32(scale) == scale
    assert dequantize(quantize(np.zeros(1, np.float32), scale, zp, dtype=dtype), scale, zp)[0] == 0.0
    error = np.abs(dequantize(quantize(x, scale, zp, dtype=dtype), scale, zp).astype(np.float64) - x.astype(np.float64))
    # Half a step of rounding and, at an end of an asymmetric range, half of the zero point's.
    assert (error <= scale * (0.5 if symmetric else 1.0) * 1.0001).all()


def test_choice_per_channel() -> None:
    x = np.array([[0.0, 255.0], [-12.7, 1.0], [0.0, 0.0]], np.float32)
    got = choose_qparams(x, dtype=np.int8, symmetric=True, axis=0)
    np.testing.assert_allclose(got.scale, [255 / 127, 0.1, 1.0], rtol=1e-6)
    assert got.zero_point.tolist() == [0, 0, 0]
    ends = choose_qparams(x.min(1), x.max(1), dtype=np.int8, symmetric=True)
    assert (ends.scale == got.scale).all()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: choose_qparams([]), ShapeError),
        (lambda: choose_qparams([1.0, math.nan]), QuantizationError),
        (lambda: choose_qparams([1.0, math.inf]), QuantizationError),
        (lambda: choose_qparams(1.0, 0.0), QuantizationError),
        (lambda: choose_qparams([1.0], [1.0, 2.0]), ShapeError),
        (lambda: choose_qparams([1.0], axis=1), ShapeError),
        (lambda: choose_qparams(0.0, 1.0, axis=0), ShapeError),
        (lambda: choose_qparams([1.0], dtype=np.int32), DTypeError),
    ],
)
def test_bad_ranges(call: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        call()  # type: ignore[operator]
