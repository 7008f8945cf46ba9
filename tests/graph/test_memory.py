"""Placing buffers in an arena: nothing that lives together overlaps, little is wasted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vnnigen.graph.memory import ALIGNMENT, Lifetime, merge, peak, place

lifetimes = st.lists(
    st.builds(lambda size, first, length: Lifetime(size, first, first + length), st.integers(1, 5000),
              st.integers(0, 12), st.integers(0, 8)),
    max_size=24,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(lifetimes)
def test_what_lives_together_does_not_overlap(lives: list[Lifetime]) -> None:
    offsets, end = place(lives)
    for i, a in enumerate(lives):
        assert offsets[i] % ALIGNMENT == 0
        assert offsets[i] + a.size <= end
        for j in range(i):
            b = lives[j]
            if a.first <= b.last and b.first <= a.last:
                assert offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i]


@settings(max_examples=200, deadline=None)
@given(lifetimes)
def test_the_arena_is_between_the_peak_and_the_sum(lives: list[Lifetime]) -> None:
    _, end = place(lives)
    rounded = [Lifetime(-(-a.size // ALIGNMENT) * ALIGNMENT, a.first, a.last) for a in lives]
    assert peak(lives) <= end <= sum(a.size for a in rounded)
    assert peak(rounded) <= end


def test_a_chain_needs_two_buffers() -> None:
    lives = [Lifetime(1024, i, i + 1) for i in range(10)]
    assert place(lives)[1] == 2048
    assert peak(lives) == 2048


def test_the_smallest_gap_is_taken() -> None:
    # Steps 0..2: three buffers; two end, leaving gaps of 640 and 256 bytes below the one that stays.
    lives = [Lifetime(1024, 0, 9), Lifetime(640, 0, 1), Lifetime(512, 0, 9), Lifetime(256, 0, 1), Lifetime(192, 0, 9)]
    late = Lifetime(256, 2, 9)
    offsets, end = place([*lives, late])
    assert end == place(lives)[1]
    assert offsets[-1] == offsets[3] or offsets[-1] == offsets[1]


@pytest.mark.parametrize(
    ("wish", "merged"),
    [
        ((1, 1, 0), {1: 0}),
        ((2, 1, 0), {}),  # not where the result begins
        ((1, 2, 0), {}),  # another size
        ((1, 1, 3), {}),  # the input is read later
    ],
)
def test_what_may_be_merged(wish: tuple[int, int, int], merged: dict[int, int]) -> None:
    lives = {0: Lifetime(64, 0, 1), 1: Lifetime(64, 1, 3), 2: Lifetime(128, 1, 3), 3: Lifetime(64, 0, 2)}
    assert merge(lives, [wish]) == merged


def test_chains_of_merged_buffers_have_one_root() -> None:
    lives = {i: Lifetime(64, i, i + 1) for i in range(4)}
    assert merge(lives, [(1, 1, 0), (2, 2, 1), (3, 3, 2)]) == {1: 0, 2: 0, 3: 0}


def test_an_input_is_given_away_once() -> None:
    lives = {0: Lifetime(64, 0, 1), 1: Lifetime(64, 1, 3), 2: Lifetime(64, 1, 3)}
    assert merge(lives, [(1, 1, 0), (1, 2, 0)]) == {1: 0}
