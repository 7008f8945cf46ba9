"""Kernels on this machine's tiers against the reference, bit for bit, at sizes that cut through every blocking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import vnnigen as v
from tests.kernels.cases import TIERS, Case, assert_same_bits, expected, out_shape, random_numbers, seeded
from tests.kernels.emulation import fine_grid
from vnnigen.errors import ShapeError

INT8_HERE = [
    pytest.param(t, marks=pytest.mark.skipif(t not in v.tiers(), reason=f"no {t} here")) for t in ("amx_int8", *TIERS)
]
HERE = INT8_HERE[1:]
RANDOM = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = v.num_threads()
    yield
    v.set_num_threads(before)


def check(case: Case, tier: str) -> None:
    op = case.operator("reference")
    x = case.source()
    tensors = case.tensors(out_shape(op, case))
    got = case.operator(tier)(x, tensors=tensors)
    assert_same_bits(got, expected(case, op, x, tensors), (case, tier))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    if draw(st.integers(0, 2)) == 0:
        k = draw(st.integers(1, 300))
        shape = Case((draw(st.integers(1, 200)), k), (draw(st.integers(1, 300)), k))
    else:
        size = st.integers(1, 24)
        kh, kw = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        groups = draw(st.sampled_from((1, 1, 1, 2, 3, 0)))
        if groups == 0:
            groups, icg, ocg = draw(st.integers(2, 200)), 1, 1
        else:
            icg, ocg = draw(st.integers(1, 40)), draw(st.integers(1, 140 // groups))
        pads = st.tuples(st.integers(0, 3), st.integers(0, 3))
        shape = Case(
            (draw(st.integers(1, 3)), draw(size), draw(size), groups * icg), (groups * ocg, icg, kh, kw),
            stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
            dilation=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
            padding=draw(st.tuples(pads, pads)), groups=groups,
        )  # fmt: skip
    return random_numbers(shape, lambda options: draw(st.sampled_from(options)))


@pytest.mark.parametrize("tier", HERE)
@RANDOM
@given(case=cases(), threads=st.sampled_from((1, 2)), fine=st.booleans())
def test_random_problems(tier: str, case: Case, threads: int, fine: bool) -> None:
    v.set_num_threads(threads)
    try:
        out_shape(case.operator("reference"), case)
    except ShapeError:
        assume(False)
    if fine:
        with fine_grid(1000, 4096):
            check(case, tier)
    else:
        check(case, tier)


NETWORK = [
    Case((1, 28, 28, 3), (64, 3, 7, 7), stride=2, padding=3, note="stem"),
    Case((1, 14, 14, 64), (64, 64, 3, 3), padding=1, note="3x3"),
    Case((2, 7, 7, 128), (256, 128, 1, 1), note="1x1"),
    Case((1, 14, 14, 96), (192, 96, 1, 1), stride=2, note="1x1-stride"),
    Case((1, 28, 28, 144), (144, 1, 3, 3), groups=144, padding=1, note="depthwise"),
    Case((1, 29, 29, 96), (96, 1, 5, 5), groups=96, padding=2, stride=2, note="depthwise-5x5"),
    Case((1, 14, 14, 128), (128, 4, 3, 3), groups=32, padding=1, note="grouped"),
    Case((1, 1024), (1000, 1024), note="classifier"),
    Case((128, 768), (768, 768), note="transformer"),
]


@pytest.mark.parametrize("src", ["u8", "s8", "f32"])
@pytest.mark.parametrize("shape", NETWORK, ids=lambda c: c.note)
@pytest.mark.parametrize("tier", INT8_HERE)
def test_layers_of_networks(tier: str, shape: Case, src: str) -> None:
    if (tier, src) == ("amx_int8", "f32"):
        pytest.skip("tiles multiply no f32")
    case = random_numbers(shape, seeded(len(shape.note)), src)
    if src == "f32" and np.prod(shape.w[1:]) > 300:
        case = replace(case, w=(16, *shape.w[1:]), groups=min(case.groups, 16))  # the exact FMA order takes long
        if shape.groups > 1:
            return
    check(case, tier)


@pytest.mark.parametrize("src", ["u8", "s8"])
@pytest.mark.parametrize("tier", HERE)
def test_extreme_operands_at_every_k(tier: str, src: str) -> None:
    """Source and weights at their ends, K from 1 to 260, against NumPy's int64.

    Columns 0..2 hold +127, -127, -128: VPMADDUBSW would saturate. Columns 64.. hold what is just safe for it.
    """
    safe = [(127, -128), (64, 64), (-64, -64), (100, 28), (-128, 0), (0, 127), (-100, -28)]
    high, low = (255, 0) if src == "u8" else (127, -128)
    for k in range(1, 261):
        w = np.zeros((k, 64 + len(safe)), np.int8)
        w[:, :3] = (127, -127, -128)
        w[0::2, 64:] = [pair[0] for pair in safe]
        w[1::2, 64:] = np.array([pair[1] for pair in safe], np.int8)
        x = np.full((4, k), high, np.uint8 if src == "u8" else np.int8)
        x[1] = low
        x[2, 0::2] = low
        x[3, 1::2] = low
        op = v.GemmInt8(w, out_dtype=np.int32, isa=tier)
        assert np.array_equal(op(x), x.astype(np.int64) @ w.astype(np.int64)), k
        if tier in ("avx512", "avx2") and k > 1:
            chains = [(r["columns"], r["chain"]) for r in op.explain().to_dict()["kernels"]]
            first = 64 if tier == "avx512" else 32
            assert chains == [((0, first), "exact"), ((first, 64 + len(safe)), "fast")]


@pytest.mark.parametrize("tier", HERE)
@settings(deadline=None, max_examples=30)
@given(m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 3000), seed=st.integers(0, 99))
def test_f32_is_close_to_float64(tier: str, m: int, n: int, k: int, seed: int) -> None:
    """Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1: |error| <= gamma_k * sum |a||b|."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    got = v.gemm_f32(a, b, isa=tier).astype(np.float64)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    gamma = k * 2.0**-24 / (1 - k * 2.0**-24)
    bound = gamma * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64))
    assert (np.abs(got - exact) <= bound * 1.001).all()


@pytest.mark.skipif(len(v.tiers()) < 3, reason="needs two generated tiers")
@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_f32_is_the_same_on_every_generated_tier(case: Case) -> None:
    case = replace(case, src="f32", out="f32", bias="f32", post_ops=lambda: (), sums=())
    try:
        out_shape(case.operator("reference"), case)
    except ShapeError:
        assume(False)
    x = case.source()
    results = [case.operator(t)(x) for t in TIERS if t in v.tiers()]
    for other in results[1:]:
        assert_same_bits(other, results[0], case)


@pytest.mark.parametrize("src", ["u8", "f32"])
@pytest.mark.parametrize("tier", INT8_HERE)
def test_threads_change_nothing(tier: str, src: str) -> None:
    if (tier, src) == ("amx_int8", "f32"):
        pytest.skip("tiles multiply no f32")
    out = "f32" if src == "f32" else "u8"
    for shape in (
        Case((2, 31, 29, 40), (72, 40, 3, 3), padding=1), Case((1, 56, 56, 64), (64, 1, 3, 3), groups=64, padding=1),
        Case((500, 100), (600, 100)),
    ):  # fmt: skip
        case = replace(shape, src=src, out=out, weights="mixed")
        op, x = case.operator(tier), case.source()
        v.set_num_threads(1)
        one = op(x)
        assert max(k["grid_steps"] for k in op.explain().to_dict()["kernels"]) > 1
        for threads in (2, 3, 2) * 5:
            v.set_num_threads(threads)
            assert_same_bits(op(x), one, (case, threads))


@pytest.mark.parametrize("tier", INT8_HERE)
def test_the_callers_rounding_mode_does_not_matter(tier: str) -> None:
    """Kernels run under MXCSR 0x1F80 whatever the caller's; his comes back untouched, exception flags included."""
    from vnnigen.runtime import native

    case = Case((9, 50), (40, 50), bias="f32", out="f32")
    op, x = case.operator(tier), case.source()
    want = op(x)
    before = native.lib.vg_get_mxcsr()
    strange = 0xFF80  # round towards zero, flush to zero; all exceptions masked
    try:
        native.lib.vg_set_mxcsr(strange)
        got = op(x)
        after = native.lib.vg_get_mxcsr()
    finally:
        native.lib.vg_set_mxcsr(before)
    assert after == strange
    assert_same_bits(got, want, case)


@pytest.mark.parametrize("tier", INT8_HERE)
def test_tensors_in_place_and_shared(tier: str) -> None:
    """A Sum may read `out` itself, or the same array twice."""
    case = Case((20, 30), (40, 30))
    x, w = case.source(), case.weight_values().T
    y0: Any = case.rng.integers(0, 256, (20, 40)).astype(np.uint8)
    arguments: Any = {
        "a_scale": 0.02, "b_scale": 0.02, "y_scale": 0.3, "post_ops": (v.Sum(0.5, 9), v.ReLU(), v.Sum(0.25, 3)),
    }  # fmt: skip
    want = v.GemmInt8(w, **arguments, isa="reference")(x, tensors=(y0, y0))
    op = v.GemmInt8(w, **arguments, isa=tier)
    assert_same_bits(op(x, tensors=(y0, y0)), want, tier)
    out = y0.copy()
    assert op(x, out=out) is out
    assert_same_bits(out, want, tier)
