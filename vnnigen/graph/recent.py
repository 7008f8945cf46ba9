"""A cache that keeps what was used last: a network that sees ever new shapes must not grow without bound."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from vnnigen.runtime.cache import KernelCache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class RecentCache(KernelCache[K, V]):
    """A `KernelCache` of at most `most` values: making another forgets the one that was asked for longest ago.

    Who has a value may go on using it; only the cache lets it go. Values that are being made do not count.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def get(self, key: K, factory: Callable[[], V]) -> V:
        """Return the value of `key`, calling `factory` if it is not there (any more). Raises what `factory` raises."""
        value = super().get(key, factory)
        with self._lock:
            future = self._futures.pop(key, None)
            if future is not None:  # to the end of the order; another thread may have forgotten it just now
                self._futures[key] = future
            made = [k for k, f in self._futures.items() if f.done()] if len(self._futures) > self._most else []
            for oldest in made[: max(len(made) - self._most, 0)]:
                del self._futures[oldest]
        return value
