"""Which range of a histogram 8 bits shall cover.

KL follows S. Migacz, "8-bit Inference with TensorRT" (GTC 2017): of all ranges, take the one whose quantized
distribution tells least apart from the original one, elements beyond the range counted at its ends.  Two details are
those of later implementations: the bin of zero counts as its neighbour, as zeros of a Relu are exact in any scale and
would hide the rest (NVIDIA's pytorch-quantization, calib/histogram.py), and a probability of zero is smoothed (MXNet,
contrib/quantization.py).  The asymmetric variant moves the upper end first, then the lower one.
"""

from __future__ import annotations

import numpy as np

from vnnigen.kernels.types import F64
from vnnigen.quant.observers import Counts, Histogram, Range

_EPSILON = 1e-9  # for probabilities of zero
_CANDIDATES = 128  # ends that are tried


def percentile_range(histogram: Histogram, percentile: float, symmetric: bool) -> Range:
    """The range in which `percentile` per cent of the elements lie.

    As many are cut off below as above, or, if `symmetric`, the largest magnitudes. Zero is never cut off.
    """
    extent = histogram.range()
    cut = 1 - percentile / 100
    if histogram.width == 0 or cut <= 0:
        return extent
    one_sided = extent.low >= 0 or extent.high <= 0
    if symmetric or one_sided:
        reach = _quantile(histogram.used(folded=True)[0], 1 - cut) * histogram.width
        return _within(extent, -reach, reach)
    counts, first = histogram.used()
    low, high = (_quantile(counts, p) + first for p in (cut / 2, 1 - cut / 2))
    return _within(extent, min(low * histogram.width, 0.0), max(high * histogram.width, 0.0))


def _quantile(counts: Counts, p: float) -> float:
    """Where in units of bins a share `p` of the elements lies below, if each bin is evenly filled."""
    total = np.concatenate([[0], np.cumsum(counts)])
    return float(np.interp(p * float(total[-1]), total, np.arange(len(total))))


def kl_range(histogram: Histogram, symmetric: bool) -> Range:
    """The range that loses least information: of magnitudes with 128 levels if `symmetric`, else with 256.

    Values never negative (or never positive) have 256 levels for their one side in any case.
    """
    extent = histogram.range()
    if histogram.width == 0:
        return extent
    one_sided = extent.low >= 0 or extent.high <= 0
    if symmetric or one_sided:
        counts = _without_zero(histogram.used(folded=True)[0], 0)
        reach = _best_end(counts, 256 if one_sided and (not symmetric or extent.low >= 0) else 128) * histogram.width
        return _within(extent, -reach, reach)
    counts, first = histogram.used()
    counts = _without_zero(counts, -first)
    # Ends stay on their sides of zero.
    end = _best_end(counts, 256, least=-first + 1)
    from_end = _best_end(_clipped(counts, end)[::-1], 256, least=end + first)
    return _within(extent, (first + end - from_end) * histogram.width, (first + end) * histogram.width)


def _clipped(counts: Counts, end: int) -> Counts:
    """The counts of the first bins, those beyond added to the last one."""
    kept: Counts = counts[:end].copy()
    kept[-1] += counts[end:].sum()
    return kept


def _within(extent: Range, low: float, high: float) -> Range:
    return Range(max(extent.low, low), min(extent.high, high))


def _without_zero(counts: Counts, zero: int) -> Counts:
    """Counts with the neighbours' mean in the bin of zero."""
    beside = counts[[i for i in (zero - 1, zero + 1) if 0 <= i < len(counts)]]
    if not len(beside):
        return counts
    changed: Counts = counts.copy()
    changed[zero] = beside.mean()
    return changed


def _best_end(counts: Counts, levels: int, least: int = 1) -> int:
    """After how many of the bins to cut so that the divergence is smallest; of equals the last."""
    least = max(min(least, len(counts)), min(levels, len(counts)))
    step = max(1, (len(counts) - least) // _CANDIDATES)
    best, found = np.inf, len(counts)
    for end in range(len(counts), least - 1, -step):
        loss = divergence(counts.astype(np.float64), end, levels)
        if loss < best:
            best, found = loss, end
    return found


def divergence(counts: F64, end: int, levels: int) -> float:
    """The Kullback-Leibler divergence of `counts`, clipped to the first `end` bins, from its quantized form.

    The quantized form has `levels` levels of equally many bins; each spreads what lies in it evenly over its bins that
    hold anything.
    """
    inside = counts[:end]
    reference = inside.copy()
    reference[-1] += counts[end:].sum()
    total, kept = reference.sum(), inside.sum()
    if total == 0 or kept == 0:
        return float("inf") if total else 0.0
    starts = np.unique(np.arange(min(levels, end)) * end // min(levels, end))
    level = np.repeat(np.arange(len(starts)), np.diff(starts, append=end))
    filled = inside > 0
    sums, numbers = np.add.reduceat(inside, starts), np.add.reduceat(filled.astype(np.float64), starts)
    spread = np.where(filled, (sums / np.maximum(numbers, 1))[level], 0.0)
    p, q = reference / total, np.maximum(spread / kept, _EPSILON)
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / q[seen])))
