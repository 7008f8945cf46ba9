from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vnnigen.runtime.cache import KernelCache


def test_each_key_is_made_once_under_concurrency() -> None:
    cache: KernelCache[int, object] = KernelCache()
    made: list[int] = []
    start = threading.Barrier(16)

    def make(key: int) -> object:
        made.append(key)
        time.sleep(0.002)
        return object()

    def ask(seed: int) -> list[object]:
        start.wait(30)
        order = sorted(range(20), key=lambda key: (key * 7 + seed * 5) % 20)
        found = {key: cache.get(key, lambda key=key: make(key)) for key in order}
        return [found[key] for key in range(20)]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert sorted(made) == list(range(20))
    assert all(answer == answers[0] for answer in answers)
    assert len(cache) == 20


def test_failure_reaches_all_waiters_and_is_not_cached() -> None:
    cache: KernelCache[str, int] = KernelCache()
    attempts: list[int] = []
    arrived = threading.Semaphore(0)

    def fail() -> int:
        attempts.append(1)
        for _ in range(15):
            assert arrived.acquire(timeout=30)
        time.sleep(0.05)  # the others are about to wait
        raise ZeroDivisionError("no such kernel")

    def ask(leader: bool) -> str:
        if not leader:
            while not attempts:
                time.sleep(0.001)
            arrived.release()
        with pytest.raises(ZeroDivisionError, match="no such kernel") as caught:
            cache.get("key", fail)
        return str(caught.value)

    with ThreadPoolExecutor(16) as pool:
        assert len(list(pool.map(ask, [True] + [False] * 15))) == 16
    assert len(attempts) == 1
    assert len(cache) == 0
    assert cache.get("key", lambda: 5) == 5


def test_values_are_made_outside_the_lock() -> None:
    """Two keys at once: each factory waits until the other one runs too."""
    cache: KernelCache[str, str] = KernelCache()
    both = threading.Barrier(2)

    def make(name: str) -> str:
        both.wait(30)
        return name

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(cache.get, name, lambda name=name: make(name)) for name in "ab"]
        assert [future.result() for future in futures] == ["a", "b"]


def test_factory_may_ask_for_other_keys() -> None:
    cache: KernelCache[str, int] = KernelCache()
    assert cache.get("outer", lambda: 1 + cache.get("inner", lambda: 1)) == 2
    assert cache.get("inner", lambda: 99) == 1


def test_hit_does_not_call_the_factory() -> None:
    cache: KernelCache[str, None] = KernelCache()
    assert cache.get("none", lambda: None) is None  # None is a value like any other
    cache.get("none", lambda: pytest.fail("made twice"))
    assert "none" in cache
    assert "other" not in cache


def test_clear_while_a_value_is_being_made() -> None:
    cache: KernelCache[str, int] = KernelCache()
    making, go = threading.Event(), threading.Event()

    def slow() -> int:
        making.set()
        assert go.wait(30)
        return 1

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get, "key", slow)
        assert making.wait(30)
        assert "key" not in cache
        cache.clear()
        assert cache.get("key", lambda: 2) == 2
        go.set()
        assert first.result() == 1
    assert cache.get("key", lambda: 3) == 2


def test_interrupt_is_passed_on_and_forgotten() -> None:
    cache: KernelCache[str, int] = KernelCache()

    def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get("key", interrupted)
    assert cache.get("key", lambda: 1) == 1


def test_fork_while_another_thread_makes_a_value() -> None:
    script = """
import os, threading
from vnnigen.runtime.cache import KernelCache
cache = KernelCache()
making, go = threading.Event(), threading.Event()
def slow():
    making.set()
    go.wait(30)
    return 1
cache.get("done", lambda: 7)
thread = threading.Thread(target=lambda: cache.get("key", slow))
thread.start()
making.wait(30)
pid = os.fork()
if pid == 0:
    os._exit(0 if cache.get("key", lambda: 2) == 2 and cache.get("done", lambda: 0) == 7 else 1)
_, status = os.waitpid(pid, 0)
go.set()
thread.join()
assert status == 0 and cache.get("key", lambda: 3) == 1
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
