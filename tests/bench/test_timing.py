"""Paired timing against a fake clock, so that every figure is known."""

import gc

import pytest

from vnnigen.bench.timing import compare
from vnnigen.errors import VnnigenError


class FakeWork:
    """Callables that advance a fake clock by known amounts and log who ran."""

    def __init__(self):
        self.now = 0
        self.log = []

    def clock(self):
        return self.now

    def task(self, name, cost_ns):
        costs = iter(cost_ns) if hasattr(cost_ns, "__iter__") else None

        def run():
            self.log.append(name)
            self.now += next(costs) if costs else cost_ns

        return run


def test_medians_ratios_and_repeats():
    work = FakeWork()
    result = compare({"fast": work.task("fast", 10_000), "slow": work.task("slow", 35_000)}, rounds=5, clock=work.clock)
    assert result["fast"].median == pytest.approx(10e-6)
    assert result["fast"].best == pytest.approx(10e-6)
    assert result["fast"].repeat == 200
    assert result["slow"].repeat == 58
    assert len(result["slow"].seconds) == 5
    assert result.speedup("fast", "slow") == pytest.approx(3.5)


def test_rounds_alternate_their_order():
    work = FakeWork()
    ms = 1_000_000
    compare({"a": work.task("a", 5 * ms), "b": work.task("b", 5 * ms)}, rounds=4, warm_up=0, clock=work.clock)
    assert work.log[-8:] == list("abbaabba")


def test_drift_cancels_in_paired_ratio():
    """A machine that becomes slower during the run changes the times, not the ratio within a round."""
    work = FakeWork()

    def drifting(factor):
        def run():
            work.now += int(factor * (3_000_000 + work.now // 10))

        return run

    result = compare({"a": drifting(1), "b": drifting(2)}, rounds=9, warm_up=0, clock=work.clock)
    assert result.speedup("a", "b") == pytest.approx(2, rel=0.2)
    assert result["a"].best < result["a"].median


def test_slow_callable_runs_once_a_sample():
    work = FakeWork()
    result = compare({"x": work.task("x", 50_000_000)}, rounds=3, clock=work.clock)
    assert result["x"].repeat == 1
    assert len(work.log) == 1 + 1 + 3  # first call, warm-up, samples


@pytest.mark.parametrize(("candidates", "rounds"), [({}, 3), ({"a": int}, 0)])
def test_nothing_to_time(candidates, rounds):
    with pytest.raises(VnnigenError, match="nothing to time"):
        compare(candidates, rounds=rounds)


def test_garbage_collector_is_restored():
    seen = []
    work = FakeWork()
    task = work.task("x", 5_000_000)

    def run():
        seen.append(gc.isenabled())
        task()

    assert gc.isenabled()
    compare({"x": run}, rounds=2, warm_up=0, clock=work.clock)
    assert gc.isenabled()
    assert seen[-2:] == [False, False]
