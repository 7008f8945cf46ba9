"""Problem descriptors: argument forms, output sizes, refusals, and the accumulator bound."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vnnigen.errors import DTypeError, QuantizationError, ShapeError
from vnnigen.kernels.problem import (
    ConvProblem,
    GemmProblem,
    acc_bound,
    as_padding,
    as_pair,
    centered_weights,
)
from vnnigen.kernels.types import DTYPES, NUMPY, dtype_name, itemsize


@pytest.mark.parametrize(
    ("value", "expected"),
    [(2, (2, 2)), ((2, 3), (2, 3)), ([2, 3], (2, 3)), (np.int64(2), (2, 2)), ((np.uint8(1), 2), (1, 2))],
)
def test_pairs(value: object, expected: tuple[int, int]) -> None:
    got = as_pair(value, "stride")
    assert got == expected
    assert all(type(x) is int for x in got)


@pytest.mark.parametrize(
    "bad", [0, -1, True, np.True_, 1.0, "1", None, (1,), (1, 2, 3), (1, 0), (1, 1.5), (1, True), 2**31]
)
def test_bad_pairs(bad: object) -> None:
    with pytest.raises(ShapeError, match="stride"):
        as_pair(bad, "stride")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, ((0, 0), (0, 0))),
        (1, ((1, 1), (1, 1))),
        ((1, 2), ((1, 1), (2, 2))),
        (((1, 2), (3, 4)), ((1, 2), (3, 4))),
        ([[1, 2], [3, 4]], ((1, 2), (3, 4))),
        ((1, (2, 3)), ((1, 1), (2, 3))),
    ],
)
def test_padding(value: object, expected: object) -> None:
    assert as_padding(value) == expected


@pytest.mark.parametrize("bad", [-1, True, 1.0, "same", None, (1,), (1, 2, 3, 4), ((1, 2),), ((1, -1), (0, 0))])
def test_bad_padding(bad: object) -> None:
    with pytest.raises(ShapeError, match="padding"):
        as_padding(bad)


@given(
    st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4),
    st.integers(0, 4),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_output_size_counts_positions(size: int, k: int, stride: int, dilation: int, before: int, after: int) -> None:
    last = size + before + after - (k - 1) * dilation  # one past the last start of a window
    count = len(range(0, max(last, 0), stride))
    pad = (before, after)

    def make() -> ConvProblem:
        return ConvProblem.from_arguments(
            (1, size, 5, 3), (2, 3, k, 1), stride=(stride, 1), padding=(pad, 0), dilation=(dilation, 1)
        )

    if count == 0:
        with pytest.raises(ShapeError, match="empty"):
            make()
    else:
        assert make().y_shape == (1, count, 5, 2)


def test_properties() -> None:
    p = ConvProblem.from_arguments((2, 9, 8, 6), (4, 3, 3, 2), groups=2, stride=2, padding=1, src="s8", dst="f32")
    assert (p.icg, p.ocg, p.groups) == (3, 2, 2)
    assert p.x_shape == (2, 9, 8, 6)
    assert p.w_shape == (4, 3, 3, 2)
    assert p.y_shape == (2, 5, 5, 4)
    assert p.macs == 2 * 5 * 5 * 4 * 3 * 3 * 2
    assert (p.wei, p.acc) == ("s8", "s32")
    assert not p.depthwise
    assert p == ConvProblem(2, 9, 8, 6, 4, 3, 2, (2, 2), (1, 1), ((1, 1), (1, 1)), 2, "s8", "f32")
    assert len({p, p}) == 1
    assert ConvProblem.from_arguments((1, 3, 3, 8), (8, 1, 3, 3), groups=8).depthwise
    assert not ConvProblem.from_arguments((1, 3, 3, 8), (16, 1, 3, 3), groups=8).depthwise
    f32 = ConvProblem.from_arguments((1, 3, 3, 1), (1, 1, 1, 1), src="f32", dst="f32")
    assert (f32.wei, f32.acc, f32.depthwise) == ("f32", "f32", False)


X, W = (1, 8, 8, 4), (6, 4, 3, 3)


@pytest.mark.parametrize(
    ("x", "w", "arguments", "error", "match"),
    [
        ((8, 8, 4), W, {}, ShapeError, "x must have 4 dimensions"),
        (X, (6, 4, 3), {}, ShapeError, "w must have 4 dimensions"),
        ((0, 8, 8, 4), W, {}, ShapeError, "empty"),
        ((1, 8, 8, 0), (6, 0, 3, 3), {}, ShapeError, "empty"),
        (X, (0, 4, 3, 3), {}, ShapeError, "empty"),
        (X, (6, 5, 3, 3), {}, ShapeError, "x must have 5 channels"),
        (X, (6, 4, 3, 3), {"groups": 2}, ShapeError, "x must have 8 channels"),
        (X, (5, 2, 3, 3), {"groups": 2}, ShapeError, "groups=2 must divide"),
        (X, W, {"groups": 0}, ShapeError, "groups"),
        (X, W, {"groups": True}, ShapeError, "groups"),
        (X, W, {"stride": 0}, ShapeError, "stride"),
        (X, W, {"dilation": (1, 0)}, ShapeError, "dilation"),
        (X, W, {"dilation": 4}, ShapeError, "output would be empty"),
        (X, (6, 4, 9, 3), {}, ShapeError, "output would be empty"),
        (X, W, {"padding": 2**30}, ShapeError, "addressed"),
        (X, W, {"padding": ((2**31 - 1, 0), (0, 0))}, ShapeError, "addressed"),
        ((2**20, 2**20, 1, 1), (1, 1, 1, 1), {"dst": "f32"}, ShapeError, "addressed"),
        (X, W, {"src": "bf16", "dst": "u8"}, DTypeError, "bf16 source can give"),
        (X, W, {"src": "s32"}, DTypeError, "source type"),
        (X, W, {"src": "f32", "dst": "bf16"}, DTypeError, "f32 source can give"),
        (X, W, {"src": "f32", "dst": "u8"}, DTypeError, "f32 source can give f32"),
    ],
)
def test_conv_refusals(x: tuple, w: tuple, arguments: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ConvProblem.from_arguments(x, w, **arguments)


def test_gemm() -> None:
    p = GemmProblem.from_arguments((3, 5), (5, 7), src="s8", dst="s32", w_zero_point=True)
    assert p == GemmProblem(3, 7, 5, "s8", "s32", True)
    assert (p.macs, p.wei, p.acc) == (105, "s8", "s32")


@pytest.mark.parametrize(
    ("a", "b", "arguments", "error", "match"),
    [
        ((3,), (3, 2), {}, ShapeError, "2 dimensions"),
        ((3, 4), (5, 2), {}, ShapeError, "4 columns but b has 5 rows"),
        ((0, 4), (4, 2), {}, ShapeError, "empty"),
        ((3, 0), (0, 2), {}, ShapeError, "empty"),
        ((2**31, 1), (1, 1), {}, ShapeError, "m must be"),
        ((2**21, 1), (1, 2**20), {}, ShapeError, "output"),
        ((3, 4), (4, 2), {"src": "f32", "dst": "bf16"}, DTypeError, "can give"),
    ],
)
def test_gemm_refusals(a: tuple, b: tuple, arguments: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        GemmProblem.from_arguments(a, b, **arguments)


# --- accumulators -----------------------------------------------------------------------------------------


@given(
    arrays(np.int8, (2, 3)), st.sampled_from(["u8", "s8"]), st.integers(0, 127),
    st.lists(st.integers(-128, 127), min_size=2, max_size=2),
    st.lists(st.integers(-500, 500), min_size=2, max_size=2),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_bound_is_the_maximum(w: np.ndarray, src: str, x_zp: int, w_zp: list[int], bias: list[int]) -> None:
    ends = (0, 255) if src == "u8" else (-128, 127)
    got = acc_bound(w, src, x_zp, w_zero_point=w_zp, bias=np.array(bias, np.int32))
    assert got.dtype == np.float64
    for channel in range(2):
        largest = max(  # a linear function is largest at a corner
            abs(sum((x - x_zp) * (int(v) - w_zp[channel]) for x, v in zip(corner, w[channel], strict=True)))
            for corner in itertools.product(ends, repeat=3)
        )
        assert got[channel] == largest + abs(bias[channel])


def test_bound_over_either_axis() -> None:
    w = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    assert (acc_bound(w, "u8") == acc_bound(w.T, "u8", axis=1)).all()
    assert (acc_bound(w, "u8", w_zero_point=[1, 2, 3]) == acc_bound(w.T, "u8", w_zero_point=[1, 2, 3], axis=1)).all()
    assert (acc_bound(w.reshape(3, 2, 2, 1), "s8", -128) == acc_bound(w, "s8", -128)).all()


def test_bound_at_the_limit() -> None:
    """K = 66311 products of 255 * 127 are the most that fit; a bias takes its part of the room."""
    k = (2**31 - 1) // (255 * 127)
    w = np.full((1, k), 127, np.int8)
    room = 2**31 - 1 - k * 255 * 127
    assert acc_bound(w, "u8").tolist() == [k * 255 * 127]
    for bias in (room, -room):
        assert acc_bound(w, "u8", bias=np.array([bias], np.int32)).tolist() == [2**31 - 1]
    for bias in (room + 1, -(2**31)):
        with pytest.raises(QuantizationError, match="K too large"):
            acc_bound(w, "u8", bias=np.array([bias], np.int32))
    with pytest.raises(QuantizationError, match=r"K too large.*channel 1"):
        acc_bound(np.stack([np.zeros(k + 1, np.int8), np.full(k + 1, 127, np.int8)]), "u8")
    mixed = np.where(np.arange(2 * k) % 2, 127, -127).astype(np.int8)[None]
    assert acc_bound(mixed, "u8").tolist() == [k * 255 * 127]  # sums of one sign, not magnitudes


def test_centered_weights() -> None:
    w = np.array([[-128, 127], [0, 1]], np.int8)
    assert centered_weights(w, 127).tolist() == [[-255, 0], [-127, -126]]
    assert centered_weights(w, [-128, 1]).tolist() == [[0, 255], [-1, 0]]
    assert centered_weights(w, [-128, 1], axis=1).tolist() == [[0, 126], [128, 0]]
    assert centered_weights(w).dtype == np.int16


# --- types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_names_and_dtypes_correspond(name: str) -> None:
    assert dtype_name(NUMPY[name], "x") == name
    assert dtype_name(name, "x") == name
    assert itemsize(name) == NUMPY[name].itemsize


def test_names_of_other_forms() -> None:
    assert dtype_name(np.uint8, "x") == "u8"
    assert dtype_name("int8", "x") == "s8"
    assert math.prod(itemsize(name) for name in DTYPES) == 1 * 1 * 4 * 4 * 2


@pytest.mark.parametrize("bad", [np.float64, np.int16, "nonsense", 3, np.dtype([("a", "u1")]), np.dtype(">i4")])
def test_unknown_types(bad: object) -> None:
    with pytest.raises(DTypeError, match=r"x has type.*u8 \(uint8\)"):
        dtype_name(bad, "x")


def test_types_not_allowed_here() -> None:
    with pytest.raises(DTypeError, match=r"must be one of u8 \(uint8\), s8 \(int8\)"):
        dtype_name(np.float32, "x", ("u8", "s8"))
