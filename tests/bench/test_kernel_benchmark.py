"""The kernel benchmark's bookkeeping, with made-up measurements: tables, means, the JSON file. Nothing is timed."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import kernel_report, kernels, roofline, shapes
from benchmarks.kernel_report import Group, geometric_mean, summarize, target_of
from benchmarks.kernels import Effort, Peers, groups_of
from benchmarks.peers import blas, process, pytorch
from benchmarks.shapes import SUITES, Item, items_of, quick
from vnnigen.bench.problem_string import ConvShape, GemmShape, parse_conv
from vnnigen.ops.explanation import Explanation

GROUP = Group("int8", "avx512_vnni", "full", 1)
MACS = {"resnet50": 4.09e9, "mobilenet": 0.30e9, "vgg": 19.5e9}


def row(ratio: float | None, bound: str = "compute", name: str = "x", **more: Any) -> dict[str, Any]:
    item = Item("cubes", name, GemmShape(8, 8, 8), "relu")
    found = {"why_not": "not there"} if ratio is None else {"gops": 10.0, "ratio": ratio, "ratio_best": 2 * ratio}
    ours = {"gops": 10 * (ratio or 1), "ms_median": 1.0, "pct_peak": 50.0, "pct_bandwidth": 40.0, "chains": {"vnni": 8}}
    return kernels.describe(item, GROUP) | {"bound": bound, "ours": ours, "peers": {"onednn": found}} | more


# Shapes


@pytest.mark.parametrize(("suite", "count"), [("resnet50", 23), ("mobilenet", 30), ("vgg", 9), ("ssd", 39)])
def test_convolutions_are_distinct(suite: str, count: int) -> None:
    items = SUITES[suite]([1])
    assert len(items) == count == len({item.shape for item in items}) == len({item.name for item in items})
    assert all(isinstance(item.shape, ConvShape) for item in items)


@pytest.mark.parametrize("suite", MACS)
def test_networks_have_the_published_multiplications(suite: str) -> None:
    walk = {"resnet50": shapes._resnet50, "mobilenet": shapes._mobilenet_v2, "vgg": shapes._vgg19}[suite]
    assert sum(s.ops for s, _ in walk()) / 2 == pytest.approx(MACS[suite], rel=0.02)


@pytest.mark.parametrize("walk", [shapes._resnet50, shapes._mobilenet_v2, shapes._vgg19, shapes._ssd_mobilenet])
def test_strides_and_padding_give_the_next_image(walk: Any) -> None:
    for shape, _ in walk():
        for axis in (shape.h, shape.w):
            assert axis.out == math.ceil(axis.size / axis.stride)
            assert max(axis.pad_before, axis.pad_after) < axis.kernel


def test_batches_scale_convolutions_and_rows() -> None:
    assert {item.batch for item in SUITES["resnet50"]([1, 16])} == {1, 16}
    assert {item.shape.m for item in SUITES["bert"]([1, 16])} == {128, 2048}  # type: ignore[union-attr]
    assert len(SUITES["cubes"]([1, 16])) == len(SUITES["cubes"]([1]))


def test_a_shape_of_two_suites_is_measured_once() -> None:
    items = items_of(["dlrm", "widedeep"], [1])
    assert len(items) == len({item.shape for item in items}) < len(SUITES["dlrm"]([1])) + len(SUITES["widedeep"]([1]))
    assert next(item.suite for item in items if item.shape == GemmShape(128, 512, 1024)) == "dlrm"


def test_quick_is_a_sample_of_every_kind() -> None:
    found = quick(items_of(list(SUITES), [1]))
    assert {item.name for item in found} == set(shapes._QUICK)
    assert {item.suite for item in found} >= {"resnet50", "mobilenet", "vgg", "bert", "cubes", "gemv"}


# Groups and the command line


def test_chains_are_measured_with_both_kinds_of_weights() -> None:
    found = [(g.tier, g.weights) for g in groups_of(["int8"], ["avx512", "avx512_vnni"], [1])]
    assert found == [("avx512", "safe"), ("avx512", "full"), ("avx512_vnni", "full")]
    assert [g.weights for g in groups_of(["f32"], None, [1])] == ["full", "full"]


def test_command_line() -> None:
    words = ["--tiers=avx2,amx_int8", "--dtypes=int8", "--shapes=all", "--batch=1,16", "--threads=1,all,1"]
    arguments = kernels.parser().parse_args(words)
    assert arguments.tiers == ["avx2", "amx_int8"]
    assert arguments.shapes == list(SUITES)
    assert arguments.batch == [1, 16]
    assert arguments.threads[0] == 1
    assert len(arguments.threads) == len(set(arguments.threads)) <= 2
    assert kernels.parser().parse_args(["--dtypes", "all"]).dtypes == ["int8", "f32", "bf16"]


@pytest.mark.parametrize("words", [["--tiers", "sse2"], ["--shapes", "lenet"], ["--peers", "mkl"]])
def test_command_line_refuses_unknown_names(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.parser().parse_args(words)
    assert "not one of" in capsys.readouterr().err


def test_every_target_is_a_group_that_is_measured() -> None:
    groups = {(g.dtype, g.tier, g.weights) for g in groups_of(kernels.TIERS_OF, None, [1])}
    assert set(kernel_report.TARGETS) <= groups


@pytest.mark.parametrize(("dot", "target"), [(123.0, 1.6), (480.0, None), (None, 1.6)])
def test_bf16_has_a_target_where_its_instruction_is_slow(
    dot: float | None, target: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_report, "peak_for", lambda _tier, steps: dot if "bf16" in steps else 247.0)
    assert target_of(Group("bf16", "avx512_bf16", "full", 1)) == target


# Means


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.floats(0.1, 10))
def test_geometric_mean(values: list[float], factor: float) -> None:
    mean = geometric_mean(values)
    assert mean is not None
    assert min(values) * 0.999 <= mean <= max(values) * 1.001
    assert geometric_mean(v * factor for v in values) == pytest.approx(mean * factor)
    assert geometric_mean(1 / v for v in values) == pytest.approx(1 / mean)


def test_geometric_mean_of_nothing() -> None:
    assert geometric_mean([]) is None


def test_summary_keeps_memory_bound_rows_apart() -> None:
    rows = [row(0.5), row(2.0), row(0.25, "memory"), row(None), {"why_not": "no kernel"}]
    found = summarize(rows, GROUP, "onednn")
    assert found is not None
    assert (found["compute_rows"], found["memory_rows"], found["below_floor"]) == (2, 1, 1)
    assert found["geomean"] == pytest.approx(1.0)
    assert found["geomean_best"] == pytest.approx(2.0)
    assert found["memory_geomean"] == pytest.approx(0.25)
    assert (found["least"], found["target"], found["met"]) == (0.5, 1.1, False)
    assert found["pct_bandwidth_geomean"] == pytest.approx(40)


def test_summary_of_a_peer_without_rows() -> None:
    assert summarize([row(1.0)], GROUP, "fbgemm") is None
    only_memory = summarize([row(1.0, "memory")], GROUP, "onednn")
    assert only_memory is not None
    assert only_memory["geomean"] is None
    assert only_memory["met"] is None


# Roofline


@pytest.mark.parametrize(
    ("dtype", "out", "expected"),
    [("u8s8", "u8", 6 + 12 + 8), ("f32", "f32", 4 * 26), ("bf16", "bf16", 2 * 26), ("u8s8", "s32", 6 + 12 + 32)],
)
def test_bytes_of_a_product(dtype: str, out: str, expected: int) -> None:
    assert roofline.bytes_touched(GemmShape(2, 4, 3), dtype, out) == expected


def test_bytes_of_a_convolution_count_a_groups_weights_once() -> None:
    shape = parse_conv("g8mb2ic8ih4oc8oh4kh3ph1")
    assert roofline.bytes_touched(shape, "u8s8", "u8") == 2 * 16 * 8 + 8 * 9 + 2 * 16 * 8


def test_bound_is_by_the_balance() -> None:
    assert roofline.is_memory_bound(9.9, 1000, 100)
    assert not roofline.is_memory_bound(10.1, 1000, 100)
    assert not roofline.is_memory_bound(0.1, None, 100)


def test_bandwidth_loop_reads_what_it_should() -> None:
    assert roofline.read_bandwidth(1 << 14) > 0
    assert roofline.read_bandwidth(100) > 0  # less than one turn of the loop


# Peers


class FakeJob:
    impl, by_cpu = "fake", False

    def sample(self, calls: int) -> int:
        return 50_000 * calls

    def drop(self) -> None:
        FakePeer.dropped += 1


class Halved(FakeJob):
    """Twice as fast."""

    def sample(self, calls: int) -> int:
        return 25_000 * calls


class FakePeer:
    version = "1.2"
    started: list[tuple[str, int]]
    dropped = 0
    closed = 0

    def __init__(self, tier: str, threads: int) -> None:
        if tier == "avx2":
            raise process.PeerError("not on avx2")
        FakePeer.started.append((tier, threads))

    def prepare(self, shape: Any, dtype: str, out: str, post_ops: str = "") -> FakeJob:
        if dtype != "u8s8":
            raise process.PeerError(f"no {dtype}")
        return FakeJob()

    def close(self) -> None:
        FakePeer.closed += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    FakePeer.started, FakePeer.dropped, FakePeer.closed = [], 0, 0
    monkeypatch.setattr(kernels, "PEERS", {"onednn": FakePeer})


@pytest.mark.usefixtures("fake")
def test_a_peers_process_is_started_once_and_ended() -> None:
    item = Item("cubes", "8^3", GemmShape(8, 8, 8))
    with Peers(["onednn"]) as peers:
        for group in (GROUP, GROUP, Group("int8", "avx512", "safe", 2)):
            peers.prepare("onednn", group, item)
        for _ in range(2):
            with pytest.raises(process.PeerError, match="not on avx2"):
                peers.prepare("onednn", Group("int8", "avx2", "safe", 1), item)
        assert peers.versions() == {"onednn": "1.2"}
    assert FakePeer.started == [("avx512_vnni", 1), ("avx512", 2)]
    assert FakePeer.closed == 2


def test_blas_runs_without_the_systems_caps() -> None:
    base = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_L2_SIZE": "512", "HOME": "/"}
    assert blas.environment(base, "avx512", 2) == {"HOME": "/", "OPENBLAS_NUM_THREADS": "2"}
    assert blas.environment({"HOME": "/"}, "avx2", 1)["OPENBLAS_CORETYPE"] == "Haswell"


@pytest.mark.parametrize(
    ("text", "fits"),
    [("ic3ih224oc64oh112kh7sh2ph3", True), ("ic3ih300oc32oh150kh3sh2ph0", False), ("ic3ih300oc32oh300kh3ph1", True)],
)
def test_pytorch_takes_padding_that_it_can_express(text: str, fits: bool) -> None:
    assert pytorch._fits(parse_conv(text).h) is fits


ANSWERS = """
import sys
print("ready 7")
for line in sys.stdin:
    print("ok 3 k" if "good" in line else "ok 50 40" if "run 3" in line else "error no")
"""


def test_a_process_answers_and_refuses() -> None:
    with process.PeerProcess([sys.executable, "-u", "-c", ANSWERS], {}) as peer:
        assert peer.ready == ["ready", "7"]
        job = peer.job("good")
        assert (job.number, job.impl) == (3, "k")
        assert job.sample(9) == 50
        job.by_cpu = True
        assert job.sample(9) == 40
        with pytest.raises(process.PeerError, match="no"):
            peer.ask("bad")


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(process.PeerError, match="ended with status 3"):
        process.PeerProcess([sys.executable, "-c", "raise SystemExit(3)"], {})


# The whole


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("dtype", ["int8", "f32", "bf16"])
@pytest.mark.parametrize("shape", [GemmShape(5, 24, 16), parse_conv("ic8ih5oc16oh5kh3ph1")], ids=["gemm", "conv"])
def test_our_call_computes_what_the_operator_does(shape: Any, dtype: str) -> None:
    group = Group(dtype, kernels.TIERS_OF[dtype][0], "full", 1)
    if kernels.tiers.why_not(group.tier) is not None:
        pytest.skip(f"no {group.tier} here")
    ours = kernels.our_kernel(Item("cubes", "x", shape, "relu"), group)
    operator, x, out = inspect.getclosurevars(ours.run).nonlocals["keep"]
    expected = operator(x)
    out[...] = 0
    ours.run()
    assert out.tobytes() == expected.tobytes()
    assert sum(ours.chains.values()) >= expected.shape[-1]


@pytest.mark.usefixtures("fake")
def test_a_row_compares_with_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group("int8", "avx512", "safe", 1)
    ours = kernels.Ours(lambda: None, Explanation("gemm", "x", "", (), ()))
    monkeypatch.setattr(kernels, "our_kernel", lambda *_: ours)
    monkeypatch.setattr(kernels, "our_figures", lambda *_: {"bound": "compute", "ours": {}})
    with Peers(["onednn"]) as peers:
        found = kernels.measure_row(Item("cubes", "x", GemmShape(8, 8, 8)), group, peers, Effort(3, 1e-4))
    peer = found["peers"]["onednn"]
    # The job says that a call takes 50 us, whatever the clock here does meanwhile.
    assert 50e-3 <= peer["ms_median"] < 1
    assert peer["gops"] == pytest.approx(found["ops"] / peer["ms_median"] * 1e-6)
    assert peer["ratio"] > 1
    assert FakePeer.dropped == 1


def test_several_threads_are_sampled_awake() -> None:
    calls: list[int] = []

    class Counting(FakeJob):
        def sample(self, calls_: int) -> int:
            calls.append(calls_)
            return 7 * calls_

    assert kernels.Awake(Counting(), warm_up=1e-4, settle=0).sample(5) == 35
    assert len(calls) >= 2
    assert set(calls) == {5}


@pytest.mark.usefixtures("fake")
def test_ratios_of_turns_of_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "our_kernel", lambda *_: kernels.Ours(lambda: None, Explanation("g", "x", "", (), ())))
    monkeypatch.setattr(kernels, "InProcess", lambda _run: Halved())
    monkeypatch.setattr(kernels, "Awake", lambda job: job)
    monkeypatch.setattr(kernels, "read_bandwidth", lambda *_: 100.0)
    monkeypatch.setattr(kernels, "peak_for", lambda *_: 1e5)
    with Peers(["onednn"]) as peers:
        item = Item("cubes", "x", GemmShape(64, 64, 64))
        found = kernels.measure_row(item, Group("int8", "avx512", "safe", 2), peers, Effort(3, 1e-3))
    assert found["peers"]["onednn"]["ratio"] == pytest.approx(2, rel=0.3)
    assert found["ours"]["ms_median"] == pytest.approx(25e-3, rel=0.3)
    assert found["ours"]["pct_peak"] == pytest.approx(100 * found["ours"]["gops"] / 1e5)


def test_the_processors_time_is_for_one_thread() -> None:
    assert Effort(clock="cpu").clock_of(GROUP) == "cpu"
    assert Effort(clock="cpu").clock_of(Group("int8", "avx512_vnni", "full", 2)) == "wall"


def a_run(monkeypatch: pytest.MonkeyPatch, path: Path | None) -> dict[str, Any]:
    monkeypatch.setattr(kernels, "context", lambda: {"machine": {"name": "test"}, "load": [0, 0, 0]})
    levels = {"L1": 400.0, "memory": 20.0}
    monkeypatch.setattr(
        kernels, "ceilings", lambda n: {"peaks_gops": {"vpdpbusd zmm": 1000.0}, "bandwidths_gbs": levels}
    )
    monkeypatch.setattr(kernels.tiers, "why_not", lambda tier: "no tiles" if tier.startswith("amx") else None)
    monkeypatch.setattr(kernels, "measure_row", lambda item, *_: row(1.5, name=item.name, problem=str(item.shape)))
    arguments = argparse.Namespace(
        shapes=["bert", "gemv"], batch=[1], quick=False, rounds=3, threads=[1], dtypes=["int8"],
        tiers=["avx512_vnni", "amx_int8"], peers=["onednn"], json=path, clock="wall", wait=0,
    )  # fmt: skip
    return kernels.measure_all(arguments, Console(width=140, quiet=True))


def test_json_holds_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    result = a_run(monkeypatch, path)
    read = json.loads(path.read_text())
    assert read["schema"] == "vnnigen-kernels/1"
    assert len(read["rows"]) == len(items_of(["bert", "gemv"], [1]))
    assert {"suite", "problem", "dtype", "tier", "weights", "threads", "ops", "intensity"} <= set(read["rows"][0])
    assert read["skipped"] == {"int8 on amx_int8, 1 thread": "no tiles"}
    assert read["summary"][0]["geomean"] == pytest.approx(1.5)
    assert read["summary"][0]["met"] is True
    assert [r["problem"] for r in read["rows"]] == [r["problem"] for r in result["rows"]]
    assert read["rows"][0]["intensity"] == pytest.approx(result["rows"][0]["intensity"], rel=1e-4)
    assert len(path.read_text().splitlines()) < len(read["rows"]) + 20


def test_several_threads_wait_for_free_cpus() -> None:
    two, seen = Group("int8", "avx512_vnni", "full", 2), iter([1.5, 1.0, 0.0])
    assert kernels.too_busy(GROUP, 0, lambda: 9.0) is None
    assert kernels.too_busy(two, 60, lambda: next(seen)) is None
    assert "1.5 CPUs" in (kernels.too_busy(two, 0, lambda: 1.5) or "")


def test_busy_cpus_are_between_none_and_all() -> None:
    assert 0 <= kernels.others_cpus(0.05) <= (os.cpu_count() or 1)


def test_tables_show_ratios_and_bounds() -> None:
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    rows = [row(1.25, name="fast"), row(0.5, "memory", name="thin"), row(None, name="alone")]
    rows.append(kernels.describe(Item("cubes", "none", GemmShape(1, 1, 1)), GROUP) | {"why_not": "no kernel"})
    console.print(kernel_report.rows_table(GROUP, rows, ["onednn"]))
    console.print(kernel_report.summary_table([summarize(rows, GROUP, "onednn") or {}]))
    lines = console.export_text().splitlines()
    fast, thin, alone, none = (next(x for x in lines if f" {name} " in x) for name in ("fast", "thin", "alone", "none"))
    assert "1.25" in fast
    assert " 50 " in fast
    assert " 40 " in thin
    assert " 50 " not in thin
    assert "-" in alone
    assert "no kernel" in none


def test_chart_is_drawn_as_png_and_svg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = list(kernel_report.charts(a_run(monkeypatch, None)))
    assert [name for name, _ in found] == ["roofline-int8-1"]
    assert found[0][1].peaks == {"vpdpbusd zmm": 1000.0}
    png, svg = roofline.draw(found[0][1], tmp_path / "chart")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
