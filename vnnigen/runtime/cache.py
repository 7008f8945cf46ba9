"""A cache of compiled kernels that compiles each key once, whoever asks and how many at once."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class KernelCache(Generic[K, V]):
    """Map keys to values made on demand.

    The first to ask for a key makes the value, outside the lock, so that different keys are made in
    parallel; everybody else who asks meanwhile waits for it. If making it fails, all of them get the error
    and the next one to ask tries again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[K, Future[V]] = {}
        _all_caches.add(self)

    def get(self, key: K, factory: Callable[[], V]) -> V:
        """Return the value of `key`, calling `factory` if it is not there yet.

        Raises whatever `factory` raises. `factory` may use the cache, but not for its own key.
        """
        future = self._futures.get(key)  # without the lock: the usual case is a hit
        if future is None:
            with self._lock:
                future = self._futures.get(key)
                mine = future is None
                if future is None:
                    future = self._futures[key] = Future()
            if mine:
                self._make(key, future, factory)
        return future.result()

    def _make(self, key: K, future: Future[V], factory: Callable[[], V]) -> None:
        try:
            future.set_result(factory())
        except BaseException as error:
            with self._lock:
                if self._futures.get(key) is future:  # clear() may have been faster
                    del self._futures[key]
            future.set_exception(error)

    def clear(self) -> None:
        """Forget all values; those being made are still handed to who waits for them."""
        with self._lock:
            self._futures.clear()

    def __len__(self) -> int:
        return len(self._futures)

    def __contains__(self, key: K) -> bool:
        """Tell whether the value of `key` is made."""
        future = self._futures.get(key)
        return future is not None and future.done()

    def _forget_unfinished(self) -> None:
        """After a fork: nobody in the child will ever finish what other threads had begun."""
        self._lock = threading.Lock()
        self._futures = {key: future for key, future in self._futures.items() if future.done()}


_all_caches: weakref.WeakSet[KernelCache[Any, Any]] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for cache in _all_caches:
        cache._forget_unfinished()


os.register_at_fork(after_in_child=_after_fork_in_child)
