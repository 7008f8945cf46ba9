"""Observers against everything at once: what they remember must not depend on how the samples were cut."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vnnigen.errors import QuantizationError
from vnnigen.quant.observers import Histogram, Mean, MinMax
from vnnigen.quant.ranges import divergence, kl_range, percentile_range

F32 = npt.NDArray[np.float32]
FINITE = st.floats(-1e6, 1e6, width=32)
BATCHES = st.lists(hnp.arrays(np.float32, st.integers(1, 30), elements=FINITE), min_size=1, max_size=6)


@given(BATCHES)
def test_minmax_of_batches_is_that_of_all(batches: list[F32]) -> None:
    observer = MinMax("v")
    for batch in batches:
        observer.update(batch)
    everything = np.concatenate(batches)
    assert observer.range() == (everything.min(), everything.max())


@given(hnp.arrays(np.float32, (4, 3, 5), elements=FINITE), st.integers(-3, 2))
def test_minmax_and_mean_per_channel(x: F32, axis: int) -> None:
    extent, mean = MinMax("v", axis), Mean(axis)
    for part in (x, x * 2):
        extent.update(part)
        mean.update(part)
    both = np.moveaxis(np.stack([x, x * 2]), axis if axis < 0 else axis + 1, 0).reshape(x.shape[axis], -1)
    np.testing.assert_array_equal(extent.lows, both.min(axis=1))
    np.testing.assert_array_equal(extent.highs, both.max(axis=1))
    np.testing.assert_allclose(mean.value(), both.mean(axis=1, dtype=np.float64), rtol=1e-6, atol=1e-6)


@settings(max_examples=60)
@given(BATCHES)
def test_histogram_of_growing_ranges_counts_what_one_pass_would(batches: list[F32]) -> None:
    bins = 16
    observer = Histogram("v", bins)
    for batch in batches:
        observer.update(batch)
    everything = np.concatenate(batches).astype(np.float64)
    assert observer.counts.sum() in (everything.size, 0)  # 0: all of it was zero
    if observer.width == 0:
        assert not everything.any()
        return
    reach = np.abs(everything).max()
    # The range is covered, and at least half of one side's bins are in use.
    assert bins / 2 * observer.width * (1 - 1e-6) <= max(reach, 1e-30) <= bins * observer.width * (1 + 1e-6)
    cumulative = np.cumsum(observer.counts)
    edges = (np.arange(-bins, bins) + 1) * observer.width
    slack = 1e-6 * observer.width  # of elements that lie on a border
    below = [(everything < edge - slack).sum() for edge in edges]
    above = [(everything < edge + slack).sum() for edge in edges]
    assert (cumulative[:-1] >= below[:-1]).all()
    assert (cumulative[:-1] <= above[:-1]).all()


def test_histogram_grows_over_many_orders_of_magnitude() -> None:
    observer = Histogram("v")
    for exponent in range(-30, 31, 6):
        observer.update(np.array([1, -1], np.float32) * np.float32(10.0**exponent))
    assert observer.counts.sum() == 22
    assert observer.range() == (np.float32(-1e30), np.float32(1e30))


def test_zeros_before_anything_else_are_counted() -> None:
    observer = Histogram("v")
    observer.update(np.zeros(7, np.float32))
    assert kl_range(observer, False) == (0, 0) == percentile_range(observer, 99, False)
    observer.update(np.ones(3, np.float32))
    assert observer.counts.sum() == 10


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [MinMax, Histogram])
def test_what_is_not_finite_is_refused_by_name(make: type[MinMax] | type[Histogram], bad: float) -> None:
    with pytest.raises(QuantizationError, match=r"'conv_7'.*NaN or infinity"):
        make("conv_7").update(np.array([1, bad], np.float32))


def test_errors_of_observers() -> None:
    with pytest.raises(QuantizationError, match="'v' was empty"):
        MinMax("v").range()
    observer = MinMax("v", axis=1)
    observer.update(np.ones((2, 3), np.float32))
    with pytest.raises(QuantizationError, match="'v' had 3 channels, now 4"):
        observer.update(np.ones((2, 4), np.float32))


# Ranges.


def histogram(x: npt.NDArray[np.floating]) -> Histogram:
    made = Histogram("v")
    for part in np.array_split(x.astype(np.float32), 5):
        made.update(part)
    return made


@pytest.mark.parametrize("symmetric", [False, True])
def test_kl_clips_heavy_tails(symmetric: bool) -> None:
    x = np.random.default_rng(0).standard_t(2, 200_000)
    low, high = kl_range(histogram(x), symmetric)
    assert 3 < high < np.abs(x).max() / 2
    assert 3 < -low < np.abs(x).max() / 2
    # It clips where no more than a few per mille lie.
    assert np.mean((x < low) | (x > high)) < 0.02


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 1), (-3, 5), (-1, 0)])
def test_kl_keeps_uniform_distributions(low: float, high: float, symmetric: bool) -> None:
    x = np.random.default_rng(1).uniform(low, high, 200_000)
    made = kl_range(histogram(x), symmetric)
    assert made.low == pytest.approx(low, abs=0.03 * (high - low))
    assert made.high == pytest.approx(high, abs=0.03 * (high - low))


def test_kl_looks_past_the_zeros_of_a_relu() -> None:
    rng = np.random.default_rng(2)
    x = np.maximum(rng.laplace(0, 1, 100_000), 0)
    x[:50_000] = 0
    x[-1] = 400  # one outlier
    low, high = kl_range(histogram(x), False)
    assert low == 0
    assert 4 < high < 40


@given(hnp.arrays(np.int64, st.integers(2, 60), elements=st.integers(0, 1000)), st.integers(1, 64), st.data())
def test_divergence_against_loops(counts: npt.NDArray[np.int64], levels: int, data: st.DataObject) -> None:
    end = data.draw(st.integers(1, len(counts)))
    made = divergence(counts.astype(np.float64), end, levels)
    inside, outside = counts[:end], counts[end:].sum()
    if inside.sum() == 0:
        assert made == (np.inf if outside else 0)
        return
    p = inside.astype(float)
    p[-1] += outside
    borders = sorted({i * end // min(levels, end) for i in range(min(levels, end))} | {end})
    q = np.zeros(end)
    for a, b in pairwise(borders):
        filled = [i for i in range(a, b) if inside[i]]
        for i in filled:
            q[i] = inside[a:b].sum() / len(filled)
    p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-9)
    assert made == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0), abs=1e-9)


@pytest.mark.parametrize("percentile", [90, 99, 99.9])
@pytest.mark.parametrize("symmetric", [False, True])
def test_percentiles(percentile: float, symmetric: bool) -> None:
    x = np.random.default_rng(3).normal(0.5, 1, 300_000)
    low, high = percentile_range(histogram(x), percentile, symmetric)
    assert np.mean((x >= low) & (x <= high)) * 100 == pytest.approx(percentile, abs=0.05)
    if symmetric:
        assert low == pytest.approx(-high)


def test_percentile_of_100_is_everything() -> None:
    x = np.random.default_rng(4).normal(size=1000).astype(np.float32)
    assert percentile_range(histogram(x), 100, False) == (x.min(), x.max())


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 200), elements=FINITE), st.booleans(), st.sampled_from([None, 60.0, 99.0]))
def test_ranges_lie_in_what_was_seen_and_cover_zero(x: F32, symmetric: bool, percentile: float | None) -> None:
    made = histogram(x)
    r = kl_range(made, symmetric) if percentile is None else percentile_range(made, percentile, symmetric)
    assert x.min() <= r.low <= max(0, x.min())
    assert min(0, x.max()) <= r.high <= x.max()
