"""The memory of a plan: buffers that live at different times share addresses in one arena.

Pure functions of lifetimes.  Offsets are found greedily, largest buffer first, each in the smallest gap that is free
for as long as it lives ("greedy by size", Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
Inference", 2020, section 5.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `size` bytes, in use from step `first` to step `last`, both included."""

    size: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are in use at some step."""
        return self.first <= other.last and other.first <= self.last


def place(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Offsets, multiples of 64, at which buffers that are in use together do not overlap, and the arena's bytes."""
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    end = 0
    for i in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, lifetimes[i].first)):
        size = _aligned(lifetimes[i].size)
        taken = sorted((offsets[j], _aligned(lifetimes[j].size)) for j in placed if lifetimes[j].meets(lifetimes[i]))
        offsets[i] = _best_gap(taken, size)
        placed.append(i)
        end = max(end, offsets[i] + size)
    return offsets, end


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _best_gap(taken: Iterable[tuple[int, int]], size: int) -> int:
    """Where `size` bytes fit between (offset, size) ranges in order: the smallest gap, else the end."""
    best, smallest, end = -1, -1, 0
    for offset, length in taken:
        gap = offset - end
        if gap >= size and (smallest < 0 or gap < smallest):
            best, smallest = end, gap
        end = max(end, offset + length)
    return end if best < 0 else best


def peak(lifetimes: Iterable[Lifetime]) -> int:
    """The most bytes that are in use at one step: no arena can be smaller."""
    change: dict[int, int] = {}
    for life in lifetimes:
        change[life.first] = change.get(life.first, 0) + life.size
        change[life.last + 1] = change.get(life.last + 1, 0) - life.size
    now = most = 0
    for step in sorted(change):
        now += change[step]
        most = max(most, now)
    return most


def merge(lifetimes: Mapping[int, Lifetime], wishes: Sequence[tuple[int, int, int]]) -> dict[int, int]:
    """Which buffers become one: a step's result takes the place of an input that nobody reads after it.

    `wishes` are (step, result, input); one is granted where the input ends and the result begins at that step and both
    have one size. Gives the buffer that stands for each merged one; chains are resolved.
    """
    stands: dict[int, int] = {}
    ends = {i: life.last for i, life in lifetimes.items()}

    def final(i: int) -> int:
        while i in stands:
            i = stands[i]
        return i

    for step, result, source in wishes:
        root = final(source)
        fits = result in lifetimes and root in lifetimes and result not in stands and root != result
        if fits and lifetimes[result].first == step == ends[root] and lifetimes[result].size == lifetimes[root].size:
            stands[result] = root
            ends[root] = ends[result]
    return {i: final(i) for i in stands}
