"""Peak loops: that each runs exactly the steps it is credited with, and that measured figures make sense."""

import numpy as np
import pytest

from vnnigen.isa.emulator import Emulator
from vnnigen.isa.features import features
from vnnigen.isa.memory import Memory
from vnnigen.runtime import peak
from vnnigen.runtime.peak import LOOPS, TILE_BITS, TILE_CONFIG, build, measure_peaks, peak_for

IDS = [f"{loop.name}-{loop.tier}" for loop in LOOPS]
MNEMONIC_OF_STEP = {
    "fma": "vfmadd231ps",
    "vnni": "vpdpbusd",
    "bf16": "vdpbf16ps",
    "fast": "vpmaddubsw",
    "exact": "vpmaddwd",
}


def usable(loop):
    return build(loop).features <= features()


@pytest.mark.parametrize("loop", LOOPS, ids=IDS)
def test_loop_executes_what_it_counts(loop):
    """In the emulator: steps per turn, and multiply-adds per step, agree with `ops_per_turn`."""
    mem = Memory()
    args = mem.map("args", np.array([3], np.int64))
    scratch = mem.map("scratch", np.zeros(8, np.int64), writable=True)
    tiles = loop.bits == TILE_BITS
    stats = Emulator(build(loop), mem, tile_config=TILE_CONFIG if tiles else None).call(args, 0, scratch)
    steps = stats.counts[loop.label if tiles else MNEMONIC_OF_STEP[loop.step]]
    # A 32-bit lane of a tile sums 64 bytes of K, or 32 values of bf16.
    tile_ops = {"tdpbusd": 2 * 64, "tdpbf16ps": 2 * 32}
    per_lane = tile_ops.get(loop.label) or {"fma": 2, "vnni": 8, "fast": 8, "exact": 4, "bf16": 4}[loop.step]
    assert steps * loop.bits // 32 * per_lane == 3 * loop.ops_per_turn
    for mnemonic in loop.label.split("+"):
        assert stats.counts[mnemonic] == steps
    overhead = stats.instructions - steps * len(loop.label.split("+"))
    assert overhead < 60  # set-up, and two instructions a turn


@pytest.mark.parametrize("loop", LOOPS, ids=IDS)
def test_loop_needs_no_more_than_its_tier(loop):
    code = build(loop)
    tier = next(t for t in peak.TIERS if t.name == loop.tier)
    assert code.features <= tier.features


def test_names_are_distinct():
    assert len({loop.name for loop in LOOPS}) == len(LOOPS)


@pytest.fixture(scope="module")
def peaks():
    return measure_peaks()


def test_every_loop_is_measured_or_explained(peaks):
    assert set(peaks) == {loop.name for loop in LOOPS}
    for loop in LOOPS:
        if usable(loop):
            assert peaks[loop.name].gops > 0.1
        else:
            assert "lacks" in peaks[loop.name].why_not


def test_second_call_is_cached(peaks, monkeypatch):
    monkeypatch.setattr(peak, "build", lambda loop: pytest.fail("measured again"))
    assert measure_peaks() == peaks


def test_peak_for_picks_the_loop_of_the_tier(monkeypatch):
    gops = {
        ("fma", 512): 200.0,
        ("fast", 512): 300.0,
        ("exact", 512): 150.0,
        ("vnni", 512): 800.0,
        ("vnni", 256): 400.0,
    }
    monkeypatch.setattr(peak, "_peak", lambda loop, threads: peak.Peak(loop.name, gops.get((loop.step, loop.bits))))
    assert peak_for("avx512_vnni", {"vnni": 64}) == pytest.approx(800)
    assert peak_for("avx_vnni", {"vnni": 64}) == pytest.approx(400)
    assert peak_for("avx512", {"fma": 1}) == pytest.approx(200)
    assert peak_for("avx512_vnni", {"fma": 1}) == pytest.approx(200)
    assert peak_for("avx512", {"exact": 3}) == pytest.approx(150)
    # half of the work at 300, half at 150: harmonic mean
    assert peak_for("avx512", {"fast": 32, "exact": 32}) == pytest.approx(200)
    # by the tier's usual step
    assert peak_for("avx512_vnni", {"winograd": 1}) == pytest.approx(800)
    assert peak_for("avx512", {"winograd": 1}) == pytest.approx(300)
    assert peak_for("avx2", {"fma": 1}) is None  # could not be measured
    assert peak_for("reference", {}) is None
