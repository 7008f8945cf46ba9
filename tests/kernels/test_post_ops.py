"""Post-ops: their checks, what they lower to, and each step kind's reference and range."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.exact import exact_fma, round_to_f32
from vnnigen.errors import DTypeError, QuantizationError
from vnnigen.kernels.post_ops import Clip, LeakyReLU, Linear, PostOp, ReLU, Sum
from vnnigen.kernels.steps import STEP_RANGE, STEP_REFERENCE, STEP_SCALARS

U8 = np.zeros(1, np.uint8)
F32 = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("op", "s", "expected"),
    [
        (Sum(2.0), 4.0, [("sum", (8.0,))]),
        (Sum(0.5, 7, U8), 1.0, [("sum", (0.5,))]),
        (Linear(3.0, 2.0), 4.0, [("linear", (3.0, 8.0))]),
        (ReLU(), 4.0, [("max", (0.0,))]),
        (Clip(-1, 6), 4.0, [("max", (-4.0,)), ("min", (24.0,))]),
        (Clip(0, math.inf), 4.0, [("max", (0.0,)), ("min", (math.inf,))]),
        (LeakyReLU(0.25), 4.0, [("leaky", (0.25,))]),
        # NumPy's float32 would otherwise pull the product down to float32
        (Sum(np.float32(0.1)), 3.0, [("sum", (float(np.float32(0.1)) * 3.0,))]),
    ],
)
def test_lowering(op: PostOp, s: float, expected: list[tuple[str, tuple[float, ...]]]) -> None:
    steps = op.steps(s)
    assert [(step.kind, step.scalars) for step in steps] == expected
    assert all(type(c) is float for step in steps for c in step.scalars)
    assert op.piecewise_linear


def test_sum_carries_its_tensor_and_zero_point() -> None:
    (step,) = Sum(1.0, 5, U8).steps(1.0)
    assert step.tensor is U8
    assert step.zero_point == 5
    assert Sum().steps(1.0)[0].tensor is None


def test_post_ops_are_frozen_and_hashable() -> None:
    with pytest.raises(AttributeError):
        Linear(1.0, 2.0).alpha = 3.0  # type: ignore[misc]
    assert len({Linear(1.0, 2.0), Linear(1.0, 2.0), Sum(tensor=U8), Sum(tensor=U8)}) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_constants_must_be_finite(bad: float) -> None:
    for make in (
        lambda: Sum(bad),
        lambda: Linear(bad, 0.0),
        lambda: Linear(1.0, bad),
        lambda: LeakyReLU(bad),
    ):
        with pytest.raises(QuantizationError, match="finite"):
            make()


@pytest.mark.parametrize(
    ("lo", "hi"), [(1.0, 0.0), (math.nan, 1.0), (0.0, math.nan), (math.inf, math.inf), (-math.inf, -math.inf)]
)
def test_clip_bounds(lo: float, hi: float) -> None:
    with pytest.raises(QuantizationError, match="lo <= hi"):
        Clip(lo, hi)


@pytest.mark.parametrize("bad", ["1", None, 1j, True, [1.0]])
def test_constants_must_be_numbers(bad: object) -> None:
    for make in (lambda: Sum(bad), lambda: Linear(bad, 0.0), lambda: Clip(0.0, bad), lambda: LeakyReLU(bad)):
        with pytest.raises(DTypeError, match="must be a number"):
            make()


@pytest.mark.parametrize(
    ("dtype", "zero_point", "error"),
    [
        (np.uint8, 0, None),
        (np.uint8, 255, None),
        (np.uint8, 256, QuantizationError),
        (np.uint8, -1, QuantizationError),
        (np.int8, -128, None),
        (np.int8, 128, QuantizationError),
        (np.int32, 0, None),
        (np.int32, 1, QuantizationError),
        (np.float32, 1, QuantizationError),
        (np.int8, 1.0, DTypeError),
        (np.int8, True, DTypeError),
        (np.float64, 0, DTypeError),
        (np.uint16, 0, DTypeError),
    ],
)
def test_sum_zero_point(dtype: type, zero_point: int, error: type[Exception] | None) -> None:
    if error is None:
        Sum(1.0, zero_point, np.zeros(1, dtype))
    else:
        with pytest.raises(error):
            Sum(1.0, zero_point, np.zeros(1, dtype))


def test_sum_of_a_tensor_given_at_the_call() -> None:
    assert Sum(1.0, 200, dtype=np.uint8).steps(1.0)[0].dtype == "u8"
    assert Sum().steps(1.0)[0].dtype is None
    with pytest.raises(QuantizationError, match="zero_point 200"):
        Sum(1.0, 200, dtype=np.int8)
    with pytest.raises(DTypeError, match="Sum dtype"):
        Sum(dtype=np.float64)
    with pytest.raises(DTypeError, match="its own tensor"):
        Sum(tensor=U8, dtype=np.uint8)


def test_sum_needs_an_array() -> None:
    with pytest.raises(DTypeError, match="NumPy array"):
        Sum(tensor=[1, 2, 3])  # type: ignore[arg-type]


def test_every_kind_is_complete() -> None:
    assert STEP_RANGE.keys() <= STEP_REFERENCE.keys() == STEP_SCALARS.keys()


def run(kind: str, v: float, scalars: list[float], t: np.ndarray | None = None) -> float:
    with np.errstate(all="ignore"):
        result = STEP_REFERENCE[kind](np.array([v], np.float32), np.array(scalars, np.float32), t)
    assert result.dtype == np.float32
    return float(result[0])


@pytest.mark.parametrize(
    ("kind", "v", "scalars", "expected"),
    [
        ("max", -1.0, [0.0], 0.0),
        ("max", 2.0, [0.0], 2.0),
        ("max", math.nan, [3.0], 3.0),
        ("max", -math.inf, [3.0], 3.0),
        ("min", 7.0, [6.0], 6.0),
        ("min", math.inf, [6.0], 6.0),
        ("min", math.nan, [6.0], 6.0),
        ("leaky", -2.0, [0.25], -0.5),
        ("leaky", 2.0, [0.25], 2.0),
        ("leaky", -2.0, [-3.0], 6.0),
        ("leaky", math.nan, [0.25], math.nan),
        ("linear", 2.0, [3.0, -1.0], 5.0),
        ("linear", math.inf, [0.0, 1.0], math.nan),
    ],
)
def test_references(kind: str, v: float, scalars: list[float], expected: float) -> None:
    np.testing.assert_equal(run(kind, v, scalars), expected)


def test_a_bound_replaces_a_zero_of_either_sign() -> None:
    """As MAXPS and MINPS do: of two zeros, the second operand."""
    assert math.copysign(1, run("max", -0.0, [0.0])) == 1
    assert math.copysign(1, run("max", 0.0, [-0.0])) == -1
    assert math.copysign(1, run("min", 0.0, [-0.0])) == -1


def test_leaky_goes_by_the_sign_bit() -> None:
    """As VBLENDVPS does: a negative zero is multiplied too."""
    assert math.copysign(1, run("leaky", -0.0, [-2.0])) == 1
    assert math.copysign(1, run("leaky", 0.0, [-2.0])) == 1


small = st.floats(width=32, min_value=-(2.0**40), max_value=2.0**40)


@given(small, small, small)
@settings(max_examples=200, deadline=None)
def test_linear_rounds_once(v: float, alpha: float, beta: float) -> None:
    assert run("linear", v, [alpha, beta]) == exact_fma(v, alpha, beta)


@given(small, small, st.integers(-128, 127), st.integers(-128, 127))
@settings(max_examples=200, deadline=None)
def test_sum_of_s8_rounds_once(v: float, scale: float, t: int, zp: int) -> None:
    tensor = np.array([t], np.int8)
    assert run("sum", v, [scale, zp], tensor) == exact_fma(t - zp, scale, v)
    assert run("sum", v, [scale], tensor) == exact_fma(t, scale, v)


@given(small, small, st.integers(-(2**31), 2**31 - 1))
@settings(max_examples=200, deadline=None)
def test_sum_of_s32_rounds_the_tensor_then_the_sum(v: float, scale: float, t: int) -> None:
    expected = exact_fma(round_to_f32(Fraction(t)), scale, v)
    assert run("sum", v, [scale], np.array([t], np.int32)) == expected


def test_sum_of_s32_rounds_ties_to_even() -> None:
    assert run("sum", 0.0, [1.0], np.array([2**24 + 1], np.int32)) == 2**24
    assert run("sum", 0.0, [1.0], np.array([2**24 + 3], np.int32)) == 2**24 + 4


@given(st.sampled_from(sorted(STEP_RANGE)), small, small, st.floats(0, 1), small, small, st.integers(-128, 127))
@settings(max_examples=600, deadline=None)
def test_ranges_hold(kind: str, a: float, b: float, at: float, c0: float, c1: float, t: int) -> None:
    lo, hi = min(a, b), max(a, b)
    v = float(np.clip(np.float32(lo + (hi - lo) * at), lo, hi))
    scalars = np.array([c0, c1][: STEP_SCALARS[kind]], np.float32)
    low, high = STEP_RANGE[kind](lo, hi, scalars, (-128, 127))
    got = run(kind, v, scalars.tolist(), np.array([t], np.int8))
    room = 1e-6 * max(abs(low), abs(high)) + 1e-40
    assert low - room <= got <= high + room


def test_ranges_of_unbounded_values() -> None:
    inf = math.inf
    none = (0.0, 0.0)

    def after(kind: str, lo: float, hi: float, *c: float) -> tuple[float, float]:
        return STEP_RANGE[kind](lo, hi, np.array(c, np.float32), none)

    assert after("max", -inf, inf, 0.0) == (0.0, inf)
    assert after("min", 0.0, inf, 6.0) == (0.0, 6.0)
    assert after("linear", -inf, inf, 0.0, 3.0) == (3.0, 3.0)
    assert after("linear", -inf, 5.0, -2.0, 0.0) == (-10.0, inf)
    assert after("leaky", -inf, 5.0, -1.0) == (0.0, inf)
    assert after("leaky", -8.0, -4.0, 0.5) == (-4.0, -2.0)
