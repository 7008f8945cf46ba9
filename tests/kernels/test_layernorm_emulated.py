"""Layer normalization: the kernels of every tier on the emulator, and the reference against exact arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vnnigen as v
from tests.kernels.element_cases import TIERS, assert_same, emulate, random_array
from vnnigen.kernels.types import NUMPY
from vnnigen.ops.layernorm import LayerNorm

SHAPES = [(1, 1), (3, 7), (2, 16), (2, 3, 50), (1, 130), (9, 64), (5, 200), (2, 1300)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("out", ["f32", "bf16", "u8", "s8"])
@pytest.mark.parametrize("name", TIERS)
def test_layer_norm(name: str, out: Any, residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    for i, shape in enumerate(SHAPES):
        monkeypatch.setattr("vnnigen.kernels.element.common.STEP_BYTES", (1 << 16, 700)[i % 2])
        n = shape[-1]
        y: dict[str, Any] = {"y_scale": 0.03, "y_zero_point": 5} if out in ("u8", "s8") else {}
        ops: tuple[v.PostOp, ...] = ((), (v.ReLU(),), (v.GELU(),))[i % 3]
        scale, bias = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
        op = LayerNorm(
            scale, None if i == 2 else bias, residual=residual, out_dtype=NUMPY[out], post_ops=ops, isa="reference",
            **y,
        )  # fmt: skip
        sources = [(rng.standard_normal(shape) * 3 + 5).astype(np.float32) for _ in range(1 + residual)]
        sources[0][..., 0] = random_array(rng, shape[:-1], "f32")
        assert_same(emulate(op, name, sources, skew=i % 3), op(*sources), (name, out, shape, residual))


@pytest.mark.parametrize("n", [1, 5, 64, 333, 768, 5000])
def test_the_error_is_within_its_bound(n: int) -> None:
    rng = np.random.default_rng(4)
    for offset in (0, 3, 1000):
        x = (rng.standard_normal((20, n)) + offset).astype(np.float32)
        scale, bias = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
        got = LayerNorm(scale, bias, isa="reference")(x).astype(np.float64)
        exact = x.astype(np.float64)
        deviation = np.sqrt(exact.var(axis=1, keepdims=True) + 1e-5)
        z = (exact - exact.mean(axis=1, keepdims=True)) / deviation
        want = z * scale + bias
        e = (n / 64 + 10) * 2.0**-24
        reach = 2 * np.abs(z) + 2 * np.abs(exact).mean(axis=1, keepdims=True) / deviation
        assert (np.abs(got - want) <= np.abs(scale) * e * reach + 2.0**-23 * np.abs(want) + 1e-12).all()
