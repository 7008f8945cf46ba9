"""Which columns may use VPMADDUBSW: the rule, against the instruction itself, and how columns become launches."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import Case, assert_same_bits, expected
from tests.kernels.emulation import emulate, fine_grid, lower
from vnnigen.kernels.geometry import gemm_geometry
from vnnigen.kernels.layout import MAX_LAUNCHES
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.kernels.packed import is_thin, plan_runs
from vnnigen.kernels.packing import Run, chain_runs, safe_columns
from vnnigen.kernels.problem import GemmProblem


def saturates(w0: int, w1: int) -> bool:
    """Whether VPMADDUBSW saturates for some u8 pair: products of one sign add up, so the corners tell."""
    return any(not -32768 <= x0 * w0 + x1 * w1 <= 32767 for x0, x1 in product((0, 255), repeat=2))


def test_the_rule_is_exact_for_every_pair() -> None:
    values = np.arange(-128, 128, dtype=np.int8)
    pairs = np.stack(np.meshgrid(values, values, indexing="ij"), -1).reshape(1, -1, 2)
    safe = safe_columns(pairs)
    expected = [not saturates(int(a), int(b)) for a, b in pairs[0]]
    assert safe.tolist() == expected
    assert 0 < safe.sum() < safe.size


def test_one_bad_pair_spoils_a_column_in_every_group() -> None:
    k = np.zeros((2, 3, 8), np.int8)
    k[1, 2, 4:6] = 127, 127
    assert safe_columns(k).tolist() == [True, True, False]
    k[1, 2, 4:6] = 0
    k[1, 2, 5:7] = 127, 127  # neighbours, but not a pair
    assert safe_columns(k).all()


@settings(deadline=None)
@given(safe=st.lists(st.booleans(), min_size=1, max_size=200), block=st.integers(1, 70))
def test_runs_cover_all_columns_once(safe: list[bool], block: int) -> None:
    runs = chain_runs(np.array(safe), block)
    assert 1 <= len(runs) <= MAX_LAUNCHES
    assert runs[0].start == 0
    assert runs[-1].stop == len(safe)
    for run in runs:
        assert run.start < run.stop
        assert run.start % block == 0
        # What is unsafe never runs on the fast chain.
        assert not run.safe or all(safe[run.start : run.stop])
    for left, right in pairwise(runs):
        assert left.stop == right.start
        assert left.safe != right.safe


def test_too_many_changes_go_to_the_exact_chain() -> None:
    safe = np.array([True] * 9 + [False] + [True] + [False] + [True] * 2 + [False] + [True] * 3)
    runs = chain_runs(safe, 1)
    # The shortest safe runs gave way.
    assert runs == (Run(0, 9, True), Run(9, 15, False), Run(15, 18, True))


@pytest.mark.parametrize("tier", ["avx512", "avx2"])
def test_mixed_weights_run_as_several_launches(tier: str) -> None:
    case = Case((6, 10), (250, 10), weights="mixed", out="s32", w_zp=True)
    op, x = case.operator("reference"), case.source()
    low = lower(op, case.x, "u8", tier)
    assert [key.mac.name for key in low.keys] == ["fast", "exact", "fast", "exact"]
    assert [(r.run.start, r.run.stop) for r in low.packed.runs] == [(0, 64), (64, 128), (128, 192), (192, 250)]
    assert np.array_equal(emulate(low, x, np.int32).y, op(x))


@pytest.mark.parametrize("tier", ["avx512_vnni", "avx_vnni"])
def test_vnni_needs_no_chains(tier: str) -> None:
    weights = Case((6, 10), (400, 10), weights="mixed").operator("reference")._weights
    assert [(r.start, r.stop, m.name) for r, m in plan_runs(weights, TIER_CODE[tier])] == [(0, 400, "vnni")]


@pytest.mark.parametrize("tier", ["avx512", "avx2"])
def test_a_pair_that_only_padding_completes_is_safe(tier: str) -> None:
    """An odd run of K ends in a pair with a zero; runs of different taps must not be paired."""
    for groups, dilation in ((1, 1), (2, 1), (1, 2)):
        case = Case((1, 6, 6, groups), (2 * groups, 1, 2, 2), groups=groups, dilation=dilation, out="s32")
        op = case.operator("reference")
        op._weights.values[...] = 127
        low = lower(op, case.x, "u8", tier)
        # One channel a tap: merged runs pair neighbouring taps, others meet zeros.
        assert [key.mac.name for key in low.keys] == ["exact" if op._weights.merged else "fast"]
        x = np.full(case.x, 255, np.uint8)
        assert np.array_equal(emulate(low, x, np.int32).y, op(x))


NARROW = (
    Case((1, 40), (70, 40)), Case((1, 37), (33, 37), src="s8"), Case((7, 9), (17, 9), src="s8", out="s32"),
    Case((1, 5, 4, 3), (19, 3, 3, 3), padding=1), Case((1, 5, 5, 6), (10, 3, 3, 3), groups=2, padding=1, src="s8"),
    Case((1, 1, 1, 1), (1, 1, 1, 1), out="s32"),
)  # fmt: skip


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("case", NARROW, ids=str)
@pytest.mark.parametrize("tier", ["avx512", "avx2"])
def test_weights_that_stay_bytes(tier: str, case: Case, fine: bool) -> None:
    """The exact chain widens them when it loads them: the same results from half the bytes."""
    with fine_grid() if fine else nullcontext():
        op, x = case.operator("reference"), case.source()
        op._weights.values.reshape(-1)[: op._weights.k] = 127  # unsafe, if there is a pair
        want = expected(case, op, x, [])
        low = lower(op, case.x, case.src, tier, narrow=True)
        if op._weights.k == 1:
            assert low.keys[0].mac.name == "fast"
            return
        assert [key.mac.narrow for key in low.keys] == [True]
        assert_same_bits(emulate(low, x, want.dtype, skew=1).y, want, (case, tier))
        wide = low.packed.wide
        assert not any(run.mac.narrow for run in wide.runs)
        assert sum(run.weights.nbytes for run in low.packed.runs) * 2 == sum(run.weights.nbytes for run in wide.runs)


@pytest.mark.parametrize("tier", ["avx512", "avx2"])
def test_zero_points_need_words(tier: str) -> None:
    """A weight less its zero point is no s8."""
    case = Case((1, 40), (70, 40), w_zp=True)
    low = lower(case.operator("reference"), case.x, "u8", tier, narrow=True)
    assert [key.mac.narrow for key in low.keys] == [False]


@pytest.mark.parametrize("tier", ["avx512", "avx2"])
def test_few_pixels_take_bytes(tier: str) -> None:
    """The more weights, the more pixels must share the widening of each; packing again is put off until then."""
    code = TIER_CODE[tier]
    most = []
    for n, k in ((64, 64), (1024, 1024), (4096, 4096)):
        thin = [is_thin(gemm_geometry(GemmProblem(m, n, k)), code) for m in range(1, 100)]
        assert thin == sorted(thin, reverse=True)
        most.append(sum(thin))
    assert most == sorted(most)
    assert 0 < most[-1] < 99
    op = Case((1, 1024), (1024, 1024)).operator("reference")
    low = lower(op, (1, 1024), "u8", tier)
    assert low.keys[0].mac.narrow
    assert "wide" not in vars(low.packed)
    assert not lower(op, (300, 1024), "u8", tier).keys[0].mac.narrow
