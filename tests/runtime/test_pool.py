from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.helpers import STORE_INDEX, Kernel, Launch, RawCode, address, lib, x86_only
from vnnigen.runtime import threads
from vnnigen.runtime.codemem import load


@pytest.fixture(autouse=True)
def fresh_pool() -> Iterator[None]:
    lib.vg_pool_trim(1)
    yield
    threads.set_num_threads(None)


@pytest.mark.parametrize("nthreads", [2, 3, 5])
def test_that_many_threads_work_at_once(nthreads: int) -> None:
    """Each unit waits for all the others: this passes only if nthreads units run at the same time."""
    barrier = threading.Barrier(nthreads)
    identities = set()

    def unit(args: object, index: int, scratch: object) -> None:
        barrier.wait(timeout=30)
        identities.add(threading.get_native_id())

    assert Kernel([Launch(unit, nthreads)]).call(nthreads=nthreads) == 0
    assert len(identities) == nthreads
    assert threading.get_native_id() in identities
    assert lib.vg_pool_size() == nthreads - 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU only")
def test_a_helper_leaves_the_callers_cpu() -> None:
    mine, cpus = threading.get_native_id(), os.sched_getaffinity(0)
    caller = min(cpus)
    seen: dict[int, list[int]] = {}

    def unit(args: object, index: int, scratch: object) -> None:
        barrier.wait(timeout=30)
        me = threading.get_native_id()
        last = Path(f"/proc/self/task/{me}/stat").read_text().rpartition(")")[2].split()[36]  # proc(5): processor
        seen.setdefault(me, []).append(int(last))

    barrier = threading.Barrier(2)
    kernel = Kernel([Launch(unit, 2)])
    assert kernel.call(nthreads=2) == 0
    (helper,) = set(seen) - {mine}
    try:
        os.sched_setaffinity(mine, {caller})
        for _ in range(5):
            # Put the helper where the caller is, free to go.
            os.sched_setaffinity(helper, {caller})
            os.sched_setaffinity(helper, cpus)
            assert kernel.call(nthreads=2) == 0
            assert seen[helper][-1] != caller
            assert os.sched_getaffinity(helper) == cpus
        os.sched_setaffinity(helper, {caller})
        assert kernel.call(nthreads=2) == 0
        assert os.sched_getaffinity(helper) == {caller}  # it stays where it must
    finally:
        os.sched_setaffinity(mine, cpus)


@pytest.mark.parametrize(("count", "nthreads"), [(1, 8), (50, 1)])
def test_inline_calls_start_no_thread(count: int, nthreads: int) -> None:
    identities = set()
    unit = Launch(lambda a, i, s: identities.add(threading.get_native_id()), count)
    assert Kernel([unit]).call(nthreads=nthreads) == 0
    assert identities == {threading.get_native_id()}
    assert lib.vg_pool_size() == 0


def test_no_more_threads_than_units() -> None:
    assert Kernel([Launch(lambda a, i, s: None, 3)]).call(nthreads=8) == 0
    assert lib.vg_pool_size() == 2


@given(counts=st.lists(st.integers(0, 3000), min_size=1, max_size=4), nthreads=st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_every_index_runs_exactly_once(counts: list[int], nthreads: int) -> None:
    # One byte per unit and launch; units of one launch are never shared, so += 1 is not a race.
    hits = [np.zeros(count, np.uint8) for count in counts]

    def adder(tag: int) -> Launch:
        def unit(args: object, index: int, scratch: object) -> None:
            hits[tag][index] += 1

        return Launch(unit, counts[tag])

    assert Kernel([adder(tag) for tag in range(len(counts))]).call(nthreads=nthreads) == 0
    for hit in hits:
        assert (hit == 1).all()


def test_launches_are_separated_by_a_barrier() -> None:
    done = []

    def slow(args: object, index: int, scratch: object) -> None:
        time.sleep(0.002)
        done.append(index)

    late: list[int] = []
    kernel = Kernel([Launch(slow, 16), Launch(lambda a, i, s: late.append(len(done)), 16)])
    assert kernel.call(nthreads=4) == 0
    assert late == [16] * 16


@x86_only
def test_concurrent_callers_all_get_their_results() -> None:
    code = load(RawCode("store", STORE_INDEX))

    def caller(seed: int) -> int:
        rng = np.random.default_rng(seed)
        wrong = 0
        for _ in range(300):
            out = np.full(int(rng.integers(1, 500)), -1, np.int64)
            if Kernel([Launch(code.address, len(out))]).call([address(out)], int(rng.integers(1, 5))) != 0:
                wrong += 1
            wrong += int((out != np.arange(len(out))).any())
            if rng.integers(20) == 0:
                time.sleep(0.0002)  # long enough for the pool to fall asleep
        return wrong

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(caller, range(6))) == 0


def test_second_caller_runs_inline_while_the_pool_is_taken() -> None:
    inside = threading.Event()
    leave = threading.Event()

    def hold(args: object, index: int, scratch: object) -> None:
        inside.set()
        assert leave.wait(30)

    holder = threading.Thread(target=lambda: Kernel([Launch(hold, 2)]).call(nthreads=2))
    holder.start()
    assert inside.wait(30)
    identities = set()
    unit = Launch(lambda a, i, s: identities.add(threading.get_native_id()), 20)
    try:
        assert Kernel([unit]).call(nthreads=2) == 0
    finally:
        leave.set()
        holder.join()
    assert identities == {threading.get_native_id()}


def test_nested_call_runs_inline() -> None:
    trouble = []
    ran = []

    def outer(args: object, index: int, scratch: object) -> None:
        me = threading.get_native_id()
        who = set()
        nested = Launch(lambda a, i, s: who.add(threading.get_native_id()), 10)
        code = Kernel([nested]).call(nthreads=4)
        ran.append(index)
        if code != 0 or who != {me}:
            trouble.append((index, code, who))

    assert Kernel([Launch(outer, 12)]).call(nthreads=3) == 0
    assert sorted(ran) == list(range(12))
    assert trouble == []


def test_set_num_threads_ends_surplus_threads_and_the_pool_still_works() -> None:
    kernel = Kernel([Launch(lambda a, i, s: None, 100)])
    kernel.call(nthreads=6)
    assert lib.vg_pool_size() == 5
    threads.set_num_threads(8)
    assert lib.vg_pool_size() == 5
    threads.set_num_threads(3)
    assert lib.vg_pool_size() <= 2
    hits = np.zeros(100, np.uint8)

    def unit(args: object, index: int, scratch: object) -> None:
        hits[index] += 1

    assert Kernel([Launch(unit, 100)]).call(nthreads=threads.num_threads()) == 0
    assert (hits == 1).all()
    assert lib.vg_pool_size() == 2


def test_trimming_while_others_call() -> None:
    stop = threading.Event()
    wrong = []

    def caller() -> None:
        while not stop.is_set():
            hits = np.zeros(40, np.uint8)

            def unit(args: object, index: int, scratch: object, hits: np.ndarray = hits) -> None:
                hits[index] += 1

            Kernel([Launch(unit, 40)]).call(nthreads=4)
            if (hits != 1).any():
                wrong.append(hits)

    workers = [threading.Thread(target=caller) for _ in range(2)]
    for worker in workers:
        worker.start()
    for n in range(60):
        lib.vg_pool_trim(1 + n % 4)
    stop.set()
    for worker in workers:
        worker.join()
    assert wrong == []


SCRIPT = """
import os, sys, threading
from tests.runtime.helpers import Kernel, Launch, lib
hits = []
kernel = Kernel([Launch(lambda a, i, s: hits.append(i), 50)])
assert kernel.call(nthreads=4) == 0
"""


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT + body]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("asleep", [False, True])
def test_call_after_fork(asleep: bool) -> None:
    body = """
import time
if ASLEEP: time.sleep(0.01)
pid = os.fork()
if pid == 0:
    size = lib.vg_pool_size()
    hits.clear()
    barrier = threading.Barrier(3)
    together = Kernel([Launch(lambda a, i, s: barrier.wait(timeout=30), 3)])
    ok = size == 0 and kernel.call(nthreads=4) == 0 and sorted(hits) == list(range(50))
    ok = ok and together.call(nthreads=3) == 0 and lib.vg_pool_size() == 3 and not barrier.broken
    os._exit(0 if ok else 1)
_, status = os.waitpid(pid, 0)
assert status == 0, status
hits.clear()
assert kernel.call(nthreads=4) == 0 and sorted(hits) == list(range(50))
print("fine")
"""
    done = run_script(body.replace("ASLEEP", str(asleep)))
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


def test_fork_while_another_thread_holds_the_pool() -> None:
    done = run_script("""
inside, leave = threading.Event(), threading.Event()
def hold(a, i, s):
    inside.set()
    leave.wait(30)
holder = threading.Thread(target=lambda: Kernel([Launch(hold, 2)]).call(nthreads=2))
holder.start()
inside.wait(30)
pid = os.fork()
if pid == 0:
    hits.clear()
    ok = kernel.call(nthreads=3) == 0 and sorted(hits) == list(range(50)) and lib.vg_pool_size() == 2
    lib.vg_pool_trim(1)
    os._exit(0 if ok else 1)
_, status = os.waitpid(pid, 0)
leave.set()
holder.join()
assert status == 0, status
print("fine")
""")
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


@pytest.mark.parametrize("end", ["", "import time; time.sleep(0.01)", "sys.exit(0)"])
def test_process_exits_cleanly_with_a_live_pool(end: str) -> None:
    done = run_script(end)
    assert (done.returncode, done.stderr) == (0, "")
