"""Conversion of 64-bit integers on the emulator."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.element_cases import TIERS, assert_same, emulate
from vnnigen.ops.cast import CastWide


def integers(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Of all magnitudes, both signs."""
    rng = np.random.default_rng(count)
    x = rng.integers(-(2**63), 2**63 - 1, count) >> rng.integers(0, 63, count)
    special = np.array([0, 1, -1, 2**31, -(2**31), 2**32, -(2**32), 2**31 - 1, 2**63 - 1, -(2**63)])
    return np.where(rng.random(count) < 0.2, rng.choice(special, count), x)


@pytest.mark.parametrize("name", TIERS)
def test_casts(name: str) -> None:
    for count in (*range(1, 36), 64, 129, 3001):
        x = integers(count)
        op = CastWide("reference")
        assert_same(emulate(op, name, (x,), skew=count % 3), op(x), (name, count))


def test_rounding() -> None:
    x = integers(1 << 16)
    got = CastWide("reference")(x)
    small = np.abs(x) < 1 << 24
    assert (got[small] == x[small]).all()
    assert (np.abs(got.astype(np.longdouble) - x) <= 2 * np.spacing(np.abs(x.astype(np.float32)))).all()
