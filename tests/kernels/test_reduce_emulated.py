"""Reductions: the kernels of every tier on the emulator, and the reference against exact sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.element_cases import TIERS, assert_same, emulate, random_array
from vnnigen.errors import ShapeError
from vnnigen.kernels.element.reduce import FUNCTIONS
from vnnigen.ops.reduce import Reduce

CASES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((1, 1), (1,)), ((3, 7), (1,)), ((2, 3, 50), (-1,)), ((5, 130), (1,)), ((2, 4, 64), (1, 2)), ((2, 1300), (1,)),
    ((3, 5, 33), (1,)), ((2, 4, 5, 19), (1, 2)), ((7, 40), (0,)), ((300,), (0,)),
]  # fmt: skip


@pytest.mark.parametrize("fn", FUNCTIONS)
@pytest.mark.parametrize("name", TIERS)
def test_reductions(name: str, fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    for i, (shape, axes) in enumerate(CASES):
        monkeypatch.setattr("vnnigen.kernels.element.common.STEP_BYTES", (1 << 16, 700)[i % 2])
        for special in (False, True):
            x = random_array(rng, shape, "f32") if special else rng.standard_normal(shape).astype(np.float32)
            op = Reduce(fn, axes, keepdims=i % 2 == 0, isa="reference")
            want = op(x)
            assert_same(emulate(op, name, (x,), skew=i % 3), want, (name, fn, shape, axes))
            if special:
                continue
            exact = getattr(np, fn)(x.astype(np.float64), axis=axes, keepdims=i % 2 == 0)
            np.testing.assert_allclose(want, exact, rtol=1e-5, atol=1e-5 * (1 if fn == "mean" else 100))


def test_axes_that_are_no_neighbours_are_refused() -> None:
    with pytest.raises(ShapeError, match="neighbours"):
        Reduce("sum", (0, 2))(np.zeros((2, 3, 4), np.float32))
