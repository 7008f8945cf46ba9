"""What calibration remembers of a value: ranges, means, histograms. Memory does not depend on how much is seen."""

from __future__ import annotations

from math import ceil, log2
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vnnigen.errors import QuantizationError
from vnnigen.kernels.types import F64

Values = npt.NDArray[np.floating]
Counts = npt.NDArray[np.int64]
#: Bins of a histogram on each side of zero. When the range grows, at least half of them stay in use.
BINS = 4096
_TINY = 1e-30  # no histogram is narrower, so that its bins' width is a normal number


class Range(NamedTuple):
    """The real numbers that 8 bits shall cover."""

    low: float
    high: float


class MinMax:
    """The smallest and largest element seen, of a tensor or per index of `axis`; of `name`, for messages."""

    def __init__(self, name: str, axis: int | None = None) -> None:
        self.name, self.axis = name, axis
        self._low: F64 | None = None
        self._high: F64 | None = None

    def update(self, x: Values) -> None:
        """See more values. QuantizationError for NaN or infinity, or another number of channels than before."""
        if x.size == 0:
            return
        axes = None if self.axis is None else tuple(i for i in range(x.ndim) if i != self.axis % x.ndim)
        low, high = (np.asarray(f(x, axis=axes), np.float64) for f in (np.min, np.max))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise QuantizationError(f"value {self.name!r} contains NaN or infinity; calibrate with other samples")
        if self._low is None or self._high is None:
            self._low, self._high = low, high
        elif self._low.shape != low.shape:
            raise QuantizationError(f"value {self.name!r} had {self._low.size} channels, now {low.size}")
        else:
            self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)

    @property
    def lows(self) -> F64:
        """The smallest elements. QuantizationError if nothing was seen."""
        if self._low is None:
            raise QuantizationError(f"value {self.name!r} was empty in all samples")
        return self._low

    @property
    def highs(self) -> F64:
        """The largest elements."""
        if self._high is None:
            raise QuantizationError(f"value {self.name!r} was empty in all samples")
        return self._high

    def range(self) -> Range:
        """All that was seen."""
        return Range(float(self.lows.min()), float(self.highs.max()))


class Mean:
    """The mean element per index of `axis`."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self._sum: F64 = np.zeros(0)
        self._count = 0

    def update(self, x: Values) -> None:
        """See more values, with as many channels as before."""
        axis = self.axis % x.ndim
        total = x.sum(axis=tuple(i for i in range(x.ndim) if i != axis), dtype=np.float64)
        self._sum = total if self._count == 0 else self._sum + total
        self._count += x.size // max(x.shape[axis], 1)

    def value(self) -> F64:
        """The means."""
        return self._sum / max(self._count, 1)


class Histogram:
    """How often elements of each size were seen, in bins of one width on both sides of zero, and their range.

    When an element lies beyond the last bin, bins are merged in pairs until it does not: each count then is what
    counting everything again with the wider bins would give (but for elements that lie on a border of bins within
    rounding), and no second pass over the samples is needed.
    """

    def __init__(self, name: str, bins: int = BINS) -> None:
        self.extent = MinMax(name)
        self.width = 0.0
        self.counts: Counts = np.zeros(2 * bins, np.int64)  # bin bins + i holds [i * width, (i + 1) * width)
        self._bins = bins
        self._zeros = 0  # seen before anything else was

    def update(self, x: Values) -> None:
        """See more values. QuantizationError for NaN or infinity."""
        if x.size == 0:
            return
        self.extent.update(x)
        low, high = self.extent.range()
        reach = max(-low, high)
        if reach == 0:
            self._zeros += x.size
            return
        if self.width == 0:
            self.width = max(reach, _TINY) / self._bins
            self.counts[self._bins] += self._zeros
        if reach > self.width * self._bins:
            self._widen(reach)
        index = np.floor(x.reshape(-1).astype(np.float64) / self.width).astype(np.int64)
        np.clip(index, -self._bins, self._bins - 1, out=index)
        self.counts += np.bincount(index + self._bins, minlength=2 * self._bins)

    def _widen(self, reach: float) -> None:
        doublings = ceil(log2(reach / (self.width * self._bins)))
        self.width *= 2.0**doublings
        # Shifting a negative number rounds down, as bins left of zero need.
        merged = (np.arange(-self._bins, self._bins) >> min(doublings, 62)) + self._bins
        self.counts = np.bincount(merged, weights=self.counts, minlength=2 * self._bins).astype(np.int64)

    def range(self) -> Range:
        """All that was seen."""
        return self.extent.range()

    def used(self, folded: bool = False) -> tuple[Counts, int]:
        """The counts from the first to the last bin that may hold something, and the first one's number.

        Bin 0 starts at zero and is always among them. `folded` counts magnitudes.
        """
        low, high = self.extent.range()
        if self.width == 0:
            return np.array([self._zeros]), 0
        counts = self.counts
        if folded:
            counts = counts[self._bins :] + counts[self._bins - 1 :: -1]
            last = min(int(max(-low, high) / self.width), self._bins - 1)
            return counts[: last + 1], 0
        first = max(int(np.floor(min(low, 0.0) / self.width)), -self._bins)
        last = min(max(int(high / self.width), 0), self._bins - 1)
        return counts[self._bins + first : self._bins + last + 1], first
