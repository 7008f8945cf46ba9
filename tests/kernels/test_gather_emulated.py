"""The gathering kernel on the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.element_cases import TIERS, assert_same, emulate, random_array
from vnnigen.ops.gather import Gather

CASES: list[tuple[tuple[int, ...], int, tuple[int, ...]]] = [
    ((10, 7), 0, (5,)), ((3, 768), 0, (2, 3)), ((4, 6, 5), 1, (3,)), ((4, 6), -1, (2, 2)), ((50, 65), 0, ()),
    ((2, 3, 4, 129), 2, (9,)), ((9,), 0, (4,)),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["u8", "f32", "bf16"])
@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("name", TIERS)
def test_rows_and_bounds(name: str, index: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    for step_bytes in (1 << 16, 600):
        monkeypatch.setattr("vnnigen.kernels.element.common.STEP_BYTES", step_bytes)
        for shape, axis, count in CASES:
            x = random_array(rng, shape, kind)
            rows = shape[axis]
            for wrong in (None, rows, -rows - 1, np.iinfo(index).max, np.iinfo(index).min):
                indices = rng.integers(-rows, rows, count).astype(index)
                if wrong is not None:
                    indices[(-1,) * len(count)] = wrong
                op = Gather(axis, isa="reference")
                status = np.full(op.status_words(shape, x.dtype, count), 99, np.int64)
                got = emulate(op, name, (x, indices, status), writes=[2])
                expected = np.full_like(status, 99)
                want = op._run((x, indices, expected), None)
                assert_same(got, want, (name, shape, axis, count, wrong))
                assert (status == expected).all()
                assert status.any() == (wrong is not None)
                if wrong is None:
                    assert_same(got, np.take(x, indices, axis), (shape, axis))
