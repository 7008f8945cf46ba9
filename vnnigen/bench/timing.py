"""Paired timing: candidates are measured alternately in one run, so that drift and neighbours hit all alike.

A sample repeats a callable often enough to last about 2 ms, so that the timer's resolution and the loop's own
cost (some 30 ns a turn) do not matter. Rounds run the candidates in forward and reverse order by turns. The
figures are the median, the minimum, and for two candidates the median of the per-round ratios.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from vnnigen.errors import VnnigenError

Clock = Callable[[], int]


@dataclass(frozen=True)
class Samples:
    """Seconds per call of one candidate, one entry per round."""

    seconds: tuple[float, ...]
    repeat: int

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Least seconds per call."""
        return min(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """Samples of all candidates, round by round."""

    samples: Mapping[str, Samples]

    def __getitem__(self, name: str) -> Samples:
        """Return the samples of one candidate."""
        return self.samples[name]

    def speedup(self, name: str, base: str) -> float:
        """How many times faster `name` is than `base`: median over rounds of the ratio within a round."""
        pairs = zip(self.samples[base].seconds, self.samples[name].seconds, strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)


def compare(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 11,
    min_sample: float = 2e-3,
    warm_up: float = 20e-3,
    clock: Clock = time.perf_counter_ns,
) -> Comparison:
    """Time all `candidates` alternately, `rounds` samples each of at least about `min_sample` seconds.

    Each candidate is first run for about `warm_up` seconds, at least once (so that lazy compilation is over).
    `clock` returns nanoseconds. Raises VnnigenError if there is nothing to measure.
    """
    if not candidates or rounds < 1:
        raise VnnigenError(
            f"nothing to time: {len(candidates)} candidates, {rounds} rounds; at least 1 of each is needed"
        )
    repeats = {name: _calibrate(fn, min_sample, warm_up, clock) for name, fn in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    with _gc_paused():
        for _ in range(rounds):
            for name in order:
                elapsed = _run(candidates[name], repeats[name], clock)
                seconds[name].append(max(elapsed, 1) / repeats[name] * 1e-9)
            order.reverse()
    return Comparison({name: Samples(tuple(seconds[name]), repeats[name]) for name in candidates})


def _calibrate(fn: Callable[[], object], min_sample: float, warm_up: float, clock: Clock) -> int:
    """Warm up and return how many calls make a sample of `min_sample` seconds."""
    fn()
    repeat, spent = 1, 0.0
    while True:
        elapsed = _run(fn, repeat, clock) * 1e-9
        spent += elapsed
        if spent >= warm_up and elapsed >= min_sample / 4:
            return max(1, math.ceil(repeat * min_sample / elapsed))
        if elapsed < min_sample:
            repeat *= 2


def _run(fn: Callable[[], object], repeat: int, clock: Clock) -> int:
    """Nanoseconds that `repeat` calls take."""
    turns = itertools.repeat(None, repeat)
    start = clock()
    for _ in turns:
        fn()
    return clock() - start


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Keep the garbage collector from running inside a sample."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
