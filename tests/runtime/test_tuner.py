"""The autotuner: what it measures and keeps, and what it makes of a cache that somebody else wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vnnigen as v
from tests.runtime.helpers import x86_only
from vnnigen.errors import ShapeError, VnnigenError
from vnnigen.kernels.blocking import Blocking
from vnnigen.runtime import compiled, tune_store, tuner
from vnnigen.runtime.tune_store import Entry, TuneWarning

BLOCKINGS = [Blocking(4, 1, nr, nr, 4, 8, 1, False) for nr in range(1, 7)]
Times = dict[Blocking, float]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own, and no memory of what other tests measured."""
    monkeypatch.setenv("VNNIGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("VNNIGEN_TUNE", "on")
    tuner._MEASURED_HERE.clear()
    yield tmp_path / "cache"
    tuner._MEASURED_HERE.clear()


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], list[Any]]:
    """Replace measuring by a function from a candidate's place to its seconds; gives the list of measurements."""
    measured: list[Any] = []

    def use(seconds: Callable[[int], float]) -> list[Any]:
        def times(calls: dict[Blocking, Callable[[], None]]) -> Times:
            for call in calls.values():
                call()
            measured.append(list(calls))
            return {b: seconds(i) for i, b in enumerate(calls)}

        monkeypatch.setattr(tuner, "time_alternately", times)
        return measured

    return use


def gemm(n: int = 200, **options: Any) -> v.Operator:
    w = np.random.default_rng(0).integers(-60, 61, (96, n), dtype=np.int8)
    return v.GemmInt8(w, None, a_scale=0.1, b_scale=0.1, y_scale=9.0, out_dtype=np.uint8, **options)


def source(m: int = 64) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(0, 256, (m, 96), dtype=np.uint8)


def blocking(op: v.Operator) -> Blocking:
    (kernel,) = op.explain().kernels
    return Blocking(**kernel.blocking)


def files(cache: Path) -> list[Path]:
    return [p for p in cache.rglob("*") if p.is_file()]


# What is chosen.


@x86_only
def test_the_fastest_candidate_is_used_and_remembered(cache: Path, fake_clock: Any) -> None:
    measured = fake_clock(lambda i: 1.0 - 0.1 * (i == 3))
    op = gemm()
    want = op(source())
    assert blocking(op) == measured[0][3] != measured[0][0]
    assert op.explain().tuning == "tuned (measured now)"
    (file,) = files(cache)
    assert file.is_relative_to(cache / "tune-v1")
    # Another operator, as in another process: nothing is measured again.
    tuner._MEASURED_HERE.clear()
    other = gemm()
    np.testing.assert_array_equal(other(source()), want)
    assert blocking(other) == measured[0][3]
    assert other.explain().tuning == "tuned (stored)"
    assert len(measured) == 1
    text = str(other.explain())
    assert "tuned (stored)" in text
    assert text.count(" us ") == len(measured[0])
    json.dumps(other.explain().to_dict())


@x86_only
def test_noise_does_not_replace_the_analytic_choice(fake_clock: Any) -> None:
    measured = fake_clock(lambda i: 1.0 - 0.01 * (i == 2))
    op = gemm()
    op(source())
    assert blocking(op) == measured[0][0]


@x86_only
@pytest.mark.parametrize("mode", ["load", "", " LOAD ", None])
def test_by_default_what_is_stored_is_used_and_nothing_measured(
    cache: Path, mode: str | None, fake_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = fake_clock(lambda i: 1.0 / (i + 1))
    tuned = gemm()
    tuned(source())
    if mode is None:
        monkeypatch.delenv("VNNIGEN_TUNE")
    else:
        monkeypatch.setenv("VNNIGEN_TUNE", mode)
    before = files(cache)
    known, unknown = gemm(), gemm(300)
    known(source())
    unknown(source())
    assert known.explain().tuning == "tuned (stored)"
    assert blocking(known) == blocking(tuned)
    assert unknown.explain().tuning == "analytic"
    assert len(measured) == 1
    assert files(cache) == before


@x86_only
def test_off_ignores_what_is_stored(cache: Path, fake_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = fake_clock(lambda i: 1.0 / (i + 1))
    gemm()(source())
    monkeypatch.setenv("VNNIGEN_TUNE", "off")
    op = gemm()
    op(source())
    assert op.explain().tuning == "analytic"
    assert blocking(op) == measured[0][0]


@x86_only
def test_loading_creates_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VNNIGEN_TUNE", "load")
    gemm()(source())
    assert not cache.exists()


@x86_only
def test_an_unknown_mode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VNNIGEN_TUNE", "always")
    with pytest.raises(VnnigenError, match=r"VNNIGEN_TUNE='always'.*off, load, on"):
        gemm()(source())


@x86_only
def test_the_number_of_threads_is_part_of_the_key(cache: Path, fake_clock: Any) -> None:
    measured = fake_clock(lambda i: 1.0)
    before = v.num_threads()
    try:
        for threads in (1, 2, 1):
            v.set_num_threads(threads)
            gemm()(source())
    finally:
        v.set_num_threads(before)
    assert len(measured) == 2
    assert len(files(cache)) == 2


@x86_only
def test_different_problems_have_different_entries(cache: Path, fake_clock: Any) -> None:
    fake_clock(lambda i: 1.0)
    gemm()(source())
    gemm()(source(32))
    gemm(post_ops=v.LeakyReLU(0.1))(source())
    gemm(300)(source())
    assert len(files(cache)) == 4


@x86_only
def test_callers_at_one_time_measure_once(fake_clock: Any) -> None:
    measured = fake_clock(lambda i: 1.0 / (i + 1))
    operators = [gemm() for _ in range(4)]
    results: list[Any] = []
    threads = [threading.Thread(target=lambda op=op: results.append(op(source()))) for op in operators]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(measured) == 1
    assert len({blocking(op) for op in operators}) == 1
    assert all(np.array_equal(r, results[0]) for r in results)


@x86_only
def test_a_candidate_that_cannot_be_generated_is_left_out(fake_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = fake_clock(lambda i: 1.0 / (i + 1))
    generate = compiled.compile_new
    seen = []

    def some(key: Any) -> Any:
        seen.append(key)
        if len(seen) % 2:
            return generate(key)
        raise ShapeError("too long")

    monkeypatch.setattr(tuner, "compile_new", some)
    op = gemm()
    op(source())
    assert len(measured[0]) == (len(seen) + 1) // 2 < len(seen)
    assert blocking(op) == measured[0][-1]


SUM = v.Sum(0.5, dtype=np.uint8)


@x86_only
@pytest.mark.parametrize("isa", [None, "avx512", "avx2"])
@pytest.mark.parametrize(
    "make",
    [
        lambda w, isa: v.Conv2dInt8(
            # Not 3x3, which would go by Winograd's algorithm on some tiers; there is nothing to tune about that.
            w.integers(-128, 128, (80, 24, 5, 3), dtype=np.int8), x_scale=0.1, w_scale=0.1, y_scale=9, padding=1,
            out_dtype=np.uint8, post_ops=SUM, isa=isa,
        ),
        lambda w, isa: v.Conv2dInt8(
            w.integers(-128, 128, (24, 1, 3, 3), dtype=np.int8), x_scale=0.1, w_scale=0.1, y_scale=9, padding=1,
            groups=24, out_dtype=np.int8, isa=isa,
        ),
        lambda w, isa: v.Conv2dF32(
            w.standard_normal((80, 12, 3, 3)).astype(np.float32), groups=2, stride=2, post_ops=v.ReLU(), isa=isa
        ),
    ],
    ids=["int8-sum", "depthwise", "f32-groups"],
)  # fmt: skip
def test_measuring_changes_no_result(make: Any, isa: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really measured: kernels of all kinds run on the tuner's operands and leave the caller's alone."""
    if isa is not None and isa not in v.tiers():
        pytest.skip(f"no {isa} here")
    rng = np.random.default_rng(3)
    op, plain = make(np.random.default_rng(0), isa), make(np.random.default_rng(0), isa)
    x = rng.integers(0, 256, (1, 13, 15, 24), dtype=np.uint8)
    if isinstance(op, v.Conv2dF32):
        x = x.astype(np.float32)
    kept = x.copy()
    shape = op._y_shape(op._problem(x.shape, "f32" if x.dtype == np.float32 else "u8"))
    tensors = (rng.integers(0, 256, shape, dtype=np.uint8),) if op._tensor_ops else ()
    held = len(compiled._CACHE)
    got = op(x, tensors=tensors)
    assert "measured now" in op.explain().tuning
    # Kernels that lost are not kept.
    assert len(compiled._CACHE) <= held + len(op.explain().kernels)
    monkeypatch.setenv("VNNIGEN_TUNE", "off")
    assert got.tobytes() == plain(x, tensors=tensors).tobytes()
    assert np.array_equal(x, kept)


# Measuring.


class Simulation:
    """Candidates that take a time of their own on a clock that only they move."""

    def __init__(self, seconds: dict[Blocking, float]) -> None:
        self.now = 0.0
        self.counts = dict.fromkeys(seconds, 0)
        self.calls = {b: self._call(b, s) for b, s in seconds.items()}

    def _call(self, b: Blocking, seconds: float) -> Callable[[], None]:
        def call() -> None:
            # The machine is disturbed for a while at the beginning.
            self.now += seconds * (5 if self.now < 2e-3 else 1)
            self.counts[b] += 1

        return call

    def clock(self) -> float:
        return self.now


def test_timing_takes_turns_and_drops_the_hopeless() -> None:
    sim = Simulation(dict(zip(BLOCKINGS, [2e-4, 1e-4, 1.05e-4, 4e-4], strict=False)))
    best = tuner.time_alternately(sim.calls, sim.clock)
    assert best == pytest.approx(dict(zip(BLOCKINGS, [2e-4, 1e-4, 1.05e-4, 4e-4], strict=False)))
    # The analytic choice stays for comparison, however slow it is.
    assert sim.counts[BLOCKINGS[0]] * 2e-4 > 1.8 * sim.counts[BLOCKINGS[3]] * 4e-4


def test_timing_of_slow_kernels_ends_early() -> None:
    sim = Simulation(dict.fromkeys(BLOCKINGS, 0.3))
    tuner.time_alternately(sim.calls, sim.clock)
    assert max(sim.counts.values()) <= 5


# The store.


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VNNIGEN_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tune_store.folder() == tmp_path / "own/tune-v1"
    monkeypatch.delenv("VNNIGEN_CACHE_DIR")
    assert tune_store.folder() == tmp_path / "xdg/vnnigen/tune-v1"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert tune_store.folder() == tmp_path / "home/.cache/vnnigen/tune-v1"


def test_the_machine_says_what_a_time_depends_on() -> None:
    one, two = (json.loads(tune_store.machine(n)) for n in (1, 2))
    assert one.pop("threads") != two.pop("threads")
    assert one == two
    assert {"vendor", "signature", "features", "caches", "generator"} <= set(one)


ENTRY = Entry(BLOCKINGS[1], tuple((b, 1e-6 * (i + 1)) for i, b in enumerate(BLOCKINGS)))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "machine" / "entry.json"
    tune_store.save(path, "a problem", ENTRY)
    return path


def load(path: Path) -> Entry | None:
    return tune_store.load(path, "a problem", BLOCKINGS)


def test_an_entry_comes_back(stored: Path) -> None:
    assert load(stored) == ENTRY
    assert load(stored.with_name("other.json")) is None
    assert [p.name for p in stored.parent.iterdir()] == ["entry.json"]


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        entry = json.loads(data)
        replaced = change(entry)
        return json.dumps(entry if replaced is None else replaced).encode()

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: b"", lambda d: d[: len(d) // 2], lambda d: b"\xff\x00" + d, lambda d: b"[" * 60000,
        lambda d: d + b" " * (1 << 16), lambda d: b"null", lambda d: b"[]", lambda d: d + d,
        edit(lambda e: e.update(format=2)), edit(lambda e: e.update(format="1")), edit(lambda e: e.pop("format")),
        edit(lambda e: e.update(problem="another")), edit(lambda e: e.pop("blocking")),
        edit(lambda e: e["blocking"].update(th=5)), edit(lambda e: e["blocking"].update(strip=1 << 40)),
        edit(lambda e: e["blocking"].update(copy=0)), edit(lambda e: e["blocking"].update(nr=2.0)),
        edit(lambda e: e["blocking"].update(mr=1)), edit(lambda e: e["blocking"].pop("nr")),
        edit(lambda e: e.update(blocking="4x1")), edit(lambda e: e.pop("measured")),
        edit(lambda e: e.update(measured={})), edit(lambda e: e["measured"].append(None)),
        edit(lambda e: e["measured"][0].update(seconds=float("nan"))),
        edit(lambda e: e["measured"][0].update(seconds=-1.0)), edit(lambda e: e["measured"][0].update(seconds="1")),
        edit(lambda e: e["measured"][0].update(blocking=None)),
    ],
)  # fmt: skip
def test_a_damaged_entry_is_ignored_with_a_warning(stored: Path, damage: Callable[[bytes], bytes]) -> None:
    stored.write_bytes(damage(stored.read_bytes()))
    with pytest.warns(TuneWarning, match="is ignored"):
        assert load(stored) is None


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_not_a_file_is_ignored(stored: Path, make: Callable[[Path], None]) -> None:
    stored.unlink()
    make(stored)
    with pytest.warns(TuneWarning, match="is ignored"):
        assert load(stored) is None


def test_a_loop_of_links_is_ignored(stored: Path) -> None:
    stored.unlink()
    stored.symlink_to(stored)
    with pytest.warns(TuneWarning, match="is ignored"):
        assert load(stored) is None


@x86_only
def test_a_hostile_entry_yields_the_analytic_kernel(
    cache: Path, fake_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry whose blocking no kernel may have: registers overflow, strips lie outside the image."""
    measured = fake_clock(lambda i: 1.0 / (i + 1))
    want = gemm()(source())
    (file,) = files(cache)
    entry = json.loads(file.read_text())
    entry["blocking"] |= {"th": 64, "nr": 40, "strip": 1 << 30}
    file.write_text(json.dumps(entry))
    monkeypatch.setenv("VNNIGEN_TUNE", "load")
    op = gemm()
    with pytest.warns(TuneWarning, match="none of the candidates"):
        np.testing.assert_array_equal(op(source()), want)
    assert op.explain().tuning == "analytic"
    # Tuning again repairs it.
    monkeypatch.setenv("VNNIGEN_TUNE", "on")
    tuner._MEASURED_HERE.clear()
    with pytest.warns(TuneWarning):
        gemm()(source())
    assert json.loads(file.read_text())["blocking"] == asdict(measured[0][-1])


@x86_only
def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, fake_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = fake_clock(lambda i: 1.0 / (i + 1))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VNNIGEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    op = gemm()
    with pytest.warns(TuneWarning, match="cannot be kept"):
        op(source())
    assert blocking(op) == measured[0][-1]
    with pytest.warns(TuneWarning):
        gemm()(source())
    assert len(measured) == 1  # remembered in the process


def test_a_full_disk_leaves_the_old_entry(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(TuneWarning, match="No space left"):
        tune_store.save(stored, "a problem", replace(ENTRY, blocking=BLOCKINGS[2]))
    assert load(stored) == ENTRY
    assert [p.name for p in stored.parent.iterdir()] == ["entry.json"]


_WRITER = """
import sys
from pathlib import Path
from tests.runtime.test_tuner import BLOCKINGS, ENTRY
from dataclasses import replace
from vnnigen.runtime import tune_store
me, folder = int(sys.argv[1]), Path(sys.argv[2])
for turn in range(60):
    tune_store.save(folder / "shared.json", "a problem", replace(ENTRY, blocking=BLOCKINGS[(me + turn) % 6]))
    tune_store.save(folder / f"own{me}-{turn % 5}.json", "a problem", ENTRY)
"""


def test_writers_at_one_time_lose_and_break_nothing(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", _WRITER, str(i), str(tmp_path)]) for i in range(3)
    ]
    reads = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(w.poll() is None for w in writers):
            entry = load(tmp_path / "shared.json")
            assert entry is None or entry.measured == ENTRY.measured
            reads += entry is not None
        assert [w.returncode for w in writers] == [0, 0, 0]
        assert reads
        names = {p.name for p in tmp_path.iterdir()} - {"cache"}
        assert names == {"shared.json"} | {f"own{i}-{j}.json" for i in range(3) for j in range(5)}
        assert all(load(tmp_path / name) is not None for name in names)
