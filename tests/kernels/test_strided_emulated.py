"""Kernels over strided tensors on the emulator: bit-identical to the reference, no access outside operands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vnnigen as v
from tests.kernels.element_cases import TIERS, assert_same, emulate, random_array
from vnnigen.kernels.element.binary import FUNCTIONS
from vnnigen.kernels.types import NUMPY
from vnnigen.ops.broadcast import BinaryOp

EMULATED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
ZERO_POINTS = {"u8": (0, 256), "s8": (-128, 128)}
PAIRS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((1,), (1,)), ((3, 7), (3, 7)), ((4, 65), (65,)), ((4, 65), (4, 1)), ((3, 5), ()), ((), (2, 70)),
    ((2, 5, 3, 19), (2, 1, 1, 19)), ((2, 3, 4, 33), (2, 1, 1, 33)), ((9000,), (9000,)), ((2, 1, 5), (1, 33, 1)),
    ((1, 9), (7, 1)), ((2, 3, 1, 2, 3), (1, 3, 4, 1, 3)), ((40, 130), (130,)), ((1, 2, 3, 4, 1, 2), (2, 1, 3, 1, 5, 1)),
]  # fmt: skip


def numbers(rng: np.random.Generator, name: str, kind: str, *, required: bool = False) -> dict[str, Any]:
    """A scale and a zero point, where the type has them."""
    if kind not in ZERO_POINTS:
        return {}
    zero_point = int(rng.integers(*ZERO_POINTS[kind])) if rng.random() < 0.7 else 0
    return {f"{name}_scale": float(rng.uniform(0.1, 2)), f"{name}_zero_point": zero_point}


@pytest.mark.parametrize("fn", FUNCTIONS)
@pytest.mark.parametrize("name", TIERS)
def test_binary_functions(name: str, fn: Any) -> None:
    rng = np.random.default_rng(1)
    kinds = ("f32", "u8", "s8", "bf16")
    for i, (a_shape, b_shape) in enumerate(PAIRS):
        for kind_a, kind_b, out in (("f32", "f32", "f32"), (kinds[i % 4], kinds[i // 2 % 4], kinds[(i + 1) % 4])):
            q = {**numbers(rng, "a", kind_a), **numbers(rng, "b", kind_b), **numbers(rng, "y", out)}
            ops: tuple[v.PostOp, ...] = ((), (v.ReLU(),), (v.Sigmoid(),))[i % 3]
            a, b = random_array(rng, a_shape, kind_a), random_array(rng, b_shape, kind_b)
            op = BinaryOp(fn, NUMPY[out], post_ops=ops, isa="reference", **q)
            got = emulate(op, name, (a, b), skew=i % 3)
            assert_same(got, op(a, b), (name, fn, a_shape, b_shape, kind_a, kind_b, out, ops))


@EMULATED
@given(data=st.data())
def test_binary_functions_of_any_shape(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 16)))
    y = [*data.draw(st.lists(st.integers(1, 6), min_size=0, max_size=5)), data.draw(st.integers(1, 70))]
    a_shape, b_shape = (tuple(1 if data.draw(st.integers(0, 3)) == 0 else n for n in y) for _ in range(2))
    b_shape = b_shape[data.draw(st.integers(0, len(b_shape))) :]
    kind_a, kind_b, out = (data.draw(st.sampled_from(("u8", "s8", "f32", "bf16"))) for _ in range(3))
    fn, name = data.draw(st.sampled_from(FUNCTIONS)), data.draw(st.sampled_from(TIERS))
    q = {**numbers(rng, "a", kind_a), **numbers(rng, "b", kind_b), **numbers(rng, "y", out)}
    a, b = random_array(rng, a_shape, kind_a), random_array(rng, b_shape, kind_b)
    op = BinaryOp(fn, NUMPY[out], isa="reference", **q)
    assert_same(emulate(op, name, (a, b)), op(a, b), (name, fn, a_shape, b_shape, kind_a, kind_b, out))
