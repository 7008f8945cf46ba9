"""Which columns may use VPMADDUBSW: the rule, against the instruction itself, and how columns become launches."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import Case
from tests.kernels.emulation import emulate, lower
from vnnigen.kernels.layout import MAX_LAUNCHES
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.kernels.packed import plan_runs
from vnnigen.kernels.packing import Run, chain_runs, safe_columns


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
