"""Copies between strides on the emulator, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.element_cases import TIERS, assert_same, emulate
from vnnigen.ops.permute import ConcatAxis, Expand, Pad, Slice, Transpose, Upsample

EMULATED = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
DTYPES = (np.uint8, np.int16, np.int32, np.int64)


def numbers(shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
    return (
        np.random.default_rng(5)
        .integers(0, 256, (*shape, np.dtype(dtype).itemsize))
        .astype(np.uint8)
        .view(dtype)[..., 0]
    )


TRANSPOSES = [
    ((3, 7), (1, 0)), ((2, 5, 19), (0, 2, 1)), ((2, 9, 3, 40), (0, 2, 1, 3)), ((2, 9, 3, 40), (0, 2, 3, 1)),
    ((2, 3, 4, 5, 6), (4, 1, 3, 0, 2)), ((2, 3, 2, 2, 5, 7), (0, 1, 4, 2, 5, 3)), ((70, 3, 66), (2, 0, 1)),
    ((4, 4), (0, 1)), ((1, 130, 35), (0, 2, 1)), ((6, 3, 1), (2, 1, 0)), ((1,), (0,)), ((33, 20, 3), (1, 0, 2)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TIERS)
def test_transpositions(name: str, dtype: Any) -> None:
    for i, (shape, axes) in enumerate(TRANSPOSES):
        x = numbers(shape, dtype)
        op = Transpose(axes, isa="reference")
        want = np.ascontiguousarray(np.transpose(x, axes))
        assert_same(op(x), want, (shape, axes))
        assert_same(emulate(op, name, (x,), skew=i % 3), want, (name, shape, axes))


SLICES = [
    ((5, 70), (slice(1, 4), slice(3, 68))), ((40, 9), (slice(None, None, -3), slice(None, None, 2))),
    ((2, 9, 5, 3), (slice(None), slice(2, 5))), ((2, 6, 33), (slice(None), slice(None), slice(30, 2, -4))),
    ((3000,), (slice(1, 2999),)), ((300,), (slice(None, None, -1),)), ((9, 7), (slice(0, 9, 2), slice(5, 6))),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TIERS)
def test_slices(name: str, dtype: Any) -> None:
    for shape, slices in SLICES:
        x = numbers(shape, dtype)
        op = Slice(slices, isa="reference")
        want = np.ascontiguousarray(x[slices])
        assert_same(op(x), want, (shape, slices))
        assert_same(emulate(op, name, (x,)), want, (name, shape, slices))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TIERS)
def test_concatenations_on_any_axis(name: str, dtype: Any) -> None:
    for axis in range(-3, 3):
        shapes = [[3, 4, 5] for _ in range(6)]
        for i, shape in enumerate(shapes):
            shape[axis] = 1 + 7 * i
        x = [numbers(shape, dtype) for shape in shapes]
        op = ConcatAxis(axis, isa="reference")
        assert_same(op(x), np.concatenate(x, axis), axis)
        assert_same(emulate(op, name, x), np.concatenate(x, axis), (name, axis))


EXPANSIONS = [((1,), (70,)), ((3, 1), (3, 40)), ((2, 1, 9), (4, 2, 5, 9)), ((5,), (1,)), ((1, 1, 3), (2, 6, 1))]
PADS: list[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]] = [
    ((5,), ((3, 70),)), ((4, 6), ((0, 2), (1, 0))), ((2, 3, 4, 5), ((0, 0), (1, 2), (2, 1), (0, 0))),
    ((2, 3, 40), ((1, 1), (0, 3), (5, 6))), ((6, 9), ((-1, 2), (3, -4))), ((3, 3), ((0, 0), (0, 0))),
]  # fmt: skip
FACTORS = [((2, 3, 4, 5), (1, 2, 2, 1)), ((1, 2, 3, 70), (1, 3, 2, 1)), ((2, 3, 5, 6), (1, 1, 2, 4)), ((9,), (7,))]


def pad(x: np.ndarray[Any, Any], pads: Any, value: float) -> np.ndarray[Any, Any]:
    """NumPy's, with crops."""
    x = x[tuple(slice(max(0, -lo), n - max(0, -hi)) for n, (lo, hi) in zip(x.shape, pads, strict=True))]
    return np.pad(x, [(max(0, lo), max(0, hi)) for lo, hi in pads], constant_values=value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TIERS)
def test_expansions_pads_and_repetitions(name: str, dtype: Any) -> None:
    for shape, to in EXPANSIONS:
        x = numbers(shape, dtype)
        want = np.ascontiguousarray(np.broadcast_to(x, np.broadcast_shapes(shape, to)))
        assert_same(Expand(to, isa="reference")(x), want, (shape, to))
        assert_same(emulate(Expand(to, isa="reference"), name, (x,)), want, (name, shape, to))
    for shape, pads in PADS if dtype is not np.int64 else ():
        x = numbers(shape, dtype)
        want = pad(x, pads, 7)
        assert_same(Pad(pads, 7, isa="reference")(x), want, (shape, pads))
        assert_same(emulate(Pad(pads, 7, isa="reference"), name, (x,)), want, (name, shape, pads))
    for shape, factors in FACTORS:
        x = numbers(shape, dtype)
        want = x
        for axis, factor in enumerate(factors):
            want = np.repeat(want, factor, axis)
        assert_same(Upsample(factors, isa="reference")(x), want, (shape, factors))
        assert_same(emulate(Upsample(factors, isa="reference"), name, (x,)), want, (name, shape, factors))


@EMULATED
@given(data=st.data())
def test_transpositions_of_any_shape(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 6))
    shape = data.draw(st.lists(st.integers(1, 6), min_size=rank, max_size=rank))
    shape[data.draw(st.integers(0, rank - 1))] = data.draw(st.integers(1, 70))
    axes = data.draw(st.permutations(range(rank)))
    x = numbers(shape, data.draw(st.sampled_from(DTYPES)))
    op = Transpose(axes, isa="reference")
    want = np.ascontiguousarray(np.transpose(x, axes))
    assert_same(emulate(op, data.draw(st.sampled_from(TIERS)), (x,)), want, (shape, axes))
