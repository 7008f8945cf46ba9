"""Functions beside the activations: accuracy, limits, the same bits on every tier."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.kernels.element_cases import TIERS, assert_same, emulate, random_array
from tests.kernels.test_post_ops_nonlinear import sweep
from vnnigen.errors import QuantizationError
from vnnigen.kernels.approx import PROGRAMS, evaluate
from vnnigen.kernels.post_ops import Function
from vnnigen.ops.element import Convert

NONE = np.empty(0, np.float32)
_erf = np.frompyfunc(math.erf, 1, 1)


def _softplus(x: Any) -> Any:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _mish(x: Any) -> Any:
    n = np.exp(np.minimum(x, 300))
    n = n * (n + 2)
    return x * (n / (n + 2))


#: name -> (the function in float64, ulp that it may be off)
EXACT: dict[str, tuple[Callable[[Any], Any], float]] = {
    "exp": (lambda x: np.exp(np.minimum(x, 300)), 2), "erf": (lambda x: _erf(x).astype(np.float64), 5),
    "softplus": (_softplus, 4), "mish": (_mish, 7), "sqrt": (lambda x: np.sqrt(np.abs(x)), 0.5),
    "rsqrt": (lambda x: 1 / np.sqrt(np.abs(x)), 1.5), "reciprocal": (lambda x: 1 / x, 0.5), "abs": (np.abs, 0),
    "square": (np.square, 0.5), "cube": (lambda x: x**3, 1.5),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_accuracy(name: str) -> None:
    exact, ulps = EXACT[name]
    x = sweep()
    if "sqrt" in name:
        x = np.abs(x)
    with np.errstate(all="ignore"):
        got = evaluate(PROGRAMS[name], x, NONE)
        want = exact(x.astype(np.float64))
        rounded = want.astype(np.float32)
        ulp = np.maximum(np.spacing(np.abs(rounded)).astype(np.float64), 2.0**-149)
        error = np.where(got == rounded, 0, np.abs(got - want))
        over = error - ulps * ulp - 2.0**-120
    over = np.where(np.isinf(rounded), error, over)
    at = np.nanargmax(over)
    assert not np.isnan(over).any()
    assert over[at] <= 0, f"{name}({x[at]}) is {got[at]}, {error[at] / ulp[at]:.2f} ulp off"


def test_limits() -> None:
    big = np.array([-np.inf, np.inf, np.nan], np.float32)
    limits = {
        "exp": (0, np.inf), "erf": (-1, 1), "softplus": (0, np.inf), "mish": (0, np.inf), "sqrt": (np.nan, np.inf),
        "rsqrt": (np.nan, 0), "reciprocal": (0, 0), "abs": (np.inf, np.inf), "square": (np.inf, np.inf),
        "cube": (-np.inf, np.inf),
    }  # fmt: skip
    for name, (low, high) in limits.items():
        got = evaluate(PROGRAMS[name], big, NONE)
        assert np.isnan(got[2]), name
        np.testing.assert_array_equal(got[:2], np.array([low, high], np.float32), name)
    assert not (evaluate(PROGRAMS["erf"], np.array([0.0, -0.0], np.float32), NONE)).any()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_gives_the_same_bits(tier: str, name: Any) -> None:
    rng = np.random.default_rng(1)
    for shape in ((3, 70), (5,)):
        x = random_array(rng, shape, "f32")
        for q in ({}, {"y_scale": 0.1, "y_zero_point": 3}):
            op = Convert(np.uint8 if q else np.float32, post_ops=Function(name), isa="reference", **q)
            assert_same(emulate(op, tier, (x,)), op(x), (tier, name, shape))


def test_another_name_is_refused() -> None:
    with pytest.raises(QuantizationError, match="one of exp"):
        Function("sin")  # type: ignore[arg-type]
