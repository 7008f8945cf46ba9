"""The networks that are measured, and the network benchmark's bookkeeping. Nothing is timed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

onnx = pytest.importorskip("onnx")

from benchmarks import network_report as report  # noqa: E402
from benchmarks import networks  # noqa: E402
from benchmarks.models import MODELS, build, others, samples  # noqa: E402
from benchmarks.models.net import LIFT, Net, Value, rectified, same_padding  # noqa: E402
from benchmarks.models.operations import operations  # noqa: E402
from benchmarks.peers import network_worker  # noqa: E402
from benchmarks.peers.networks import NetworkProcess, Place, Store, capped, interpreter, run_worker  # noqa: E402
from benchmarks.peers.process import PeerError  # noqa: E402
from vnnigen.errors import ModelError  # noqa: E402
from vnnigen.graph.evaluate import run_reference  # noqa: E402
from vnnigen.graph.importer import import_model  # noqa: E402

# Multiplications of one sample in 1e9, as the papers and model zoos count them.
GMACS = {
    "resnet50": 4.09, "resnet101": 7.80, "squeezenet": 0.82, "mobilenet_v2_seeded": 0.30, "ssd_mobilenet": 1.24,
    "ssd_vgg16": 31.4, "wide_deep": 0.00152,
}  # fmt: skip
PARAMETERS = {"resnet50": 25.6e6, "resnet101": 44.6e6, "squeezenet": 1.25e6, "mobilenet_v2_seeded": 3.5e6}
# Networks that NumPy computes in a few seconds.
LIGHT = ["squeezenet", "mobilenet_v2_seeded", "ssd_mobilenet", "wide_deep"]


# Models


@pytest.mark.parametrize("name", GMACS)
def test_arithmetic_is_what_is_published(name: str) -> None:
    assert operations(build(name, 1)) / 2e9 == pytest.approx(GMACS[name], rel=0.015)


@pytest.mark.parametrize("name", GMACS)
def test_operations_grow_with_the_batch(name: str) -> None:
    if name in LIGHT:
        assert operations(build(name, 3)) == 3 * operations(build(name, 1))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_what_is_published(name: str) -> None:
    model = build(name)
    onnx.checker.check_model(model, full_check=True)
    trained = sum(np.prod(t.dims) for t in model.graph.initializer)
    assert trained == pytest.approx(PARAMETERS[name], rel=0.02)  # with the statistics of batch norms


@pytest.mark.parametrize("name", LIGHT)
def test_outputs_live_and_depend_on_the_input(name: str) -> None:
    outputs = run_reference(import_model(build(name, 3)), MODELS[name].sampler(3, 1))
    declared = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in build(name, 3).graph.output}
    for output, values in outputs.items():
        assert list(values.shape) == declared[output]
        assert np.isfinite(values).all()
        flat = values.reshape(3, -1).astype(np.float64)
        between = (flat - flat.mean(axis=0)).std()
        assert between > 0.05 * flat.std() > 0, f"{output} hardly depends on the input"


def test_weights_are_the_same_every_time_and_differ_between_layers() -> None:
    first, again = build("squeezenet"), build("squeezenet")
    assert first.SerializeToString() == again.SerializeToString()
    raw = [t.raw_data for t in first.graph.initializer if len(t.raw_data) > 64]
    assert len(set(raw)) == len(raw)


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(ModelError, match=r"no network 'resnet18'.*resnet50"):
        build("resnet18")


def test_command_line_writes_a_model(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    command = [sys.executable, "-m", "benchmarks.models", "wide_deep", "-o", str(out), "--batch", "4"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert onnx.load_model(out).graph.output[0].type.tensor_type.shape.dim[0].dim_value == 4


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (0.5, 2.0), (-1.0, 0.25)])
def test_moments_of_relu(mean: float, variance: float) -> None:
    x = np.random.default_rng(0).normal(mean, variance**0.5, 1_000_000).clip(0)
    value = rectified(Value("x", (1,), mean, variance), "y")
    assert value.mean == pytest.approx(x.mean(), rel=0.02)
    assert value.variance == pytest.approx(x.var(), rel=0.02)


@pytest.mark.parametrize("groups", [1, 32])
def test_convolution_and_norm_keep_the_declared_moments(groups: int) -> None:
    net = Net("one", 4)
    x = net.relu(net.input("x", (32, 16, 16)))
    conv = net.conv(x, 32, 3, groups=groups, bias=False, pads=(0, 0))
    model = net.model({"raw": conv, "y": net.norm(conv)})
    feeds = {"x": np.random.default_rng(1).standard_normal((4, 32, 16, 16), dtype=np.float32)}
    y = run_reference(import_model(model), feeds)["y"]
    assert y.mean() == pytest.approx(LIFT, abs=0.25)
    assert 0.6 < y.std() < 1.7


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"), [(300, 3, 2, (0, 1)), (19, 3, 2, (1, 1)), (38, 1, 1, (0, 0))]
)
def test_padding_of_tensorflow(size: int, kernel: int, stride: int, pads: tuple[int, int]) -> None:
    assert same_padding(size, kernel, stride) == pads


# Samples


@pytest.mark.parametrize("name", ["resnet50", "wide_deep", "bert", "ssd_vgg16"])
def test_samples_fit_the_model_and_differ_by_seed(name: str) -> None:
    draw = MODELS[name].sampler
    first, again, other = draw(2, 0), draw(2, 0), draw(2, 1)
    for key, values in first.items():
        assert len(values) == 2
        np.testing.assert_array_equal(values, again[key])
        assert (values != other[key]).any()
        assert (values[0] != values[1]).any()


def test_categories_stay_in_their_rows_of_the_table() -> None:
    ids = samples.columns(500, 0)["categories"]
    assert (ids // others.BUCKETS == np.arange(others.CATEGORIES)).all()


# Processes


def test_a_worker_computes_and_complains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    # The worker with an engine that adds up its inputs.
    worker.write_text(
        f"import sys; sys.path.insert(0, {str(Path(network_worker.__file__).parent)!r})\n"
        "import network_worker as w\n"
        "class Sum:\n"
        "    version = 'sum-1'\n"
        "    def __init__(self, threads): pass\n"
        "    def load(self, model, precision, feeds, cache=None):\n"
        "        if model.endswith('bad.onnx'): raise ValueError('no such\\nmodel')\n"
        "        return lambda x: {'y': x['x'].sum(axis=1, keepdims=True)}\n"
        "w.ENGINES['vnnigen'] = Sum\n"
        "w.main()\n"
    )
    monkeypatch.setattr("benchmarks.peers.networks.WORKER", worker)
    inputs = tmp_path / "x.npz"
    np.savez(inputs, x=np.arange(6.0).reshape(3, 2))
    cpu = min(os.sched_getaffinity(0))
    with NetworkProcess("vnnigen", Place(1, (cpu,))) as process:
        assert process.version == "sum-1"
        job = process.load(tmp_path / "good.onnx", "f32", inputs)
        assert job.sample(3) > 0
        answers = process.answers(job, inputs, tmp_path / "answers.npz")
        np.testing.assert_array_equal(answers["y"], [[1], [5], [9]])
        with pytest.raises(PeerError, match="vnnigen cannot load it: ValueError: no such model"):
            process.load(tmp_path / "bad.onnx", "f32", inputs)
        job.drop()
        with pytest.raises(PeerError):
            job.sample(1)
    words = run_worker("vnnigen", Place(), "first", "good.onnx", "f32", str(inputs)).split()
    assert words[0] == "ok"
    assert int(words[3]) > 1 << 20
    with pytest.raises(PeerError, match=r"vnnigen cannot first bad\.onnx: ValueError: no such model"):
        run_worker("vnnigen", Place(), "first", "bad.onnx", "f32", str(inputs))


def test_interpreter_without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VNNIGEN_PEERS_PYTHON", sys.executable)
    with pytest.raises(PeerError, match=r"has no no_such_engine.*VNNIGEN_PEERS_PYTHON"):
        interpreter("no_such_engine")
    assert interpreter("vnnigen") == sys.executable


def test_caps_reach_both_libraries() -> None:
    assert capped(None) == {}
    assert capped("avx512_vnni") == {"VNNIGEN_MAX_ISA": "avx512_vnni", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}


def test_onnxruntime_is_not_compared_where_it_cannot_be_capped() -> None:
    with pytest.raises(PeerError, match="chooses its own instructions"):
        NetworkProcess("onnxruntime", Place(tier="avx2"))


def test_store_writes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = Store(tmp_path)
    path = store.model("wide_deep")
    stamp = path.stat().st_mtime_ns
    assert store.model("wide_deep").stat().st_mtime_ns == stamp
    assert store.operations("wide_deep") == operations(build("wide_deep", 1))
    with np.load(store.inputs("wide_deep", 5, 0)) as file:
        assert file["numeric"].shape == (5, 13)


# Measurements


class FakeJob:
    """Takes a known time, and counts how often it was asked."""

    def __init__(self, ns: int) -> None:
        self.ns, self.by_cpu, self.turns = ns, False, list[int]()

    def sample(self, calls: int) -> int:
        self.turns.append(calls)
        return self.ns * calls


def test_rounds_are_interleaved_and_samples_long_enough() -> None:
    jobs: Any = {("vnnigen", "int8"): FakeJob(1_000_000), ("openvino", "int8"): FakeJob(4_000_000)}
    effort = networks.Effort(rounds=7, min_sample=20e-3, clock="cpu")
    samples_of = networks.interleave(jobs, effort, 1)
    assert [samples_of[key].median for key in jobs] == pytest.approx([1e-3, 4e-3])
    assert [job.turns for job in jobs.values()] == [[1, 1, 1, *[20] * 7], [1, 1, 1, *[5] * 7]]
    assert all(job.by_cpu for job in jobs.values())


def test_the_budget_limits_rounds() -> None:
    jobs: Any = {("vnnigen", "int8"): FakeJob(500_000_000)}
    networks.interleave(jobs, networks.Effort(rounds=21, budget=2.5), 1)
    assert len(jobs["vnnigen", "int8"].turns) == 3 + 5


def test_processor_time_is_not_used_for_several_threads() -> None:
    assert networks.Effort(clock="cpu").by_cpu(1)
    assert not networks.Effort(clock="cpu").by_cpu(2)


def test_keys_leave_out_what_an_engine_has_not() -> None:
    keys = networks.keys_of(["vnnigen", "onnxruntime"], ["bf16", "f32"])
    assert keys == [("vnnigen", "bf16"), ("vnnigen", "f32"), ("onnxruntime", "f32")]


def test_agreement_of_equal_and_of_unlike_answers() -> None:
    rng = np.random.default_rng(0)
    want = {"y": rng.standard_normal((8, 10)).astype(np.float32) + 5}
    same = networks.agreement(want, want)
    assert same["cosine"] == pytest.approx(1)
    assert same["top1"] == 1
    noisy = networks.agreement(want, {"y": want["y"] + 0.1 * rng.standard_normal((8, 10)).astype(np.float32)})
    assert noisy["sqnr_db"] == pytest.approx(34, abs=1.5)  # 26 / 0.01
    assert noisy["sqnr_between_db"] == pytest.approx(20, abs=1.5)  # 1 / 0.01
    constant = networks.agreement(want, {"y": np.repeat(want["y"].mean(0, keepdims=True), 8, 0)})
    assert constant["sqnr_between_db"] == pytest.approx(0, abs=0.01)
    assert constant["sqnr_db"] > 10  # type: ignore[operator]


def test_agreement_takes_the_worst_output_and_needs_classes() -> None:
    want = {"boxes": np.ones((2, 3, 4)), "scores": np.arange(12.0).reshape(2, 3, 2)}
    got = {"boxes": np.ones((2, 3, 4)), "scores": want["scores"] + 1}
    found = networks.agreement(want, got)
    assert found["top1"] is None
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(np.square(want["scores"]).sum() / 12))


def test_peaks_obey_the_cap() -> None:
    assert networks.peak_of("bf16", "avx512_vnni", 1) is None
    f32, int8 = (networks.peak_of(p, "avx2", 1) for p in ("f32", "int8"))
    assert f32 is None or int8 is None or int8 > f32


# Report


def speed_row(name: str = "resnet50", **ratios: float) -> dict[str, Any]:
    figures = {"ours int8": {"ms_median": 2.0, "ms_min": 1.9, "gops": 500.0, "pct_peak": 50.0, "ratio": 1.0}}
    figures |= {k.replace("_", " "): {"ms_median": 2 * r, "gops": 1.0, "ratio": r} for k, r in ratios.items()}
    return {
        "model": name, "batch": 1, "threads": 1, "isa": None, "ops": 1, "clock": "cpu", "figures": figures,
        "int8_over_f32": 3.6,
    }  # fmt: skip


def start_row(engine: str, cold: float, cached: float, size: int) -> dict[str, Any]:
    figures = {"cold_s": cold, "cached_s": cached, "peak_bytes": size}
    return {"model": "resnet50", "engine": engine, "precision": "f32"} | figures


def test_targets_are_judged_by_the_worst_figures_that_exist() -> None:
    result: dict[str, Any] = {
        "speed": [speed_row(OpenVINO_int8=1.31, ORT_int8=1.5), speed_row("vgg19", OpenVINO_int8=0.9)],
        "headline": [{"model": "resnet50", "published": (3.9, 3.0), "ours": {"AVX512-VNNI": 3.6, "AMX": None}}],
        "start": [start_row("vnnigen", 1.5, 2.0, 300), start_row("openvino", 1.0, 1.0, 100)],
    }  # fmt: skip
    found = {(what, name): measured >= least for what, name, least, measured in report.verdicts(result)}
    assert found[("int8 against OpenVINO int8", "resnet50")]
    assert not found[("int8 against ONNX Runtime int8", "resnet50")]
    assert not found[("int8 against OpenVINO int8", "vgg19")]
    assert found[("int8 over f32 on AVX512-VNNI", "resnet50")]
    assert found[("starts/3 s, f32", "resnet50")]
    assert not found[("cached starts/1 s, f32", "resnet50")]
    assert not found[("memory allowed (1.5x OpenVINO's) by used, f32", "resnet50")]
    assert not any("AMX" in what for what, _ in found)


def test_tables_show_ratios_and_peers_times_without_ours() -> None:
    alone = speed_row("squeezenet")
    alone["figures"] = {"OpenVINO int8": {"ms_median": 2.5, "ratio": None}}
    alone["int8_over_f32"] = None
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(report.speed_table([speed_row(OpenVINO_int8=1.31), alone]))
    headline = [{"model": "resnet50", "published": (3.9, 3.0), "ours": {"AVX512-VNNI": 3.64, "AMX": None}}]
    console.print(report.headline_table(headline, ["AVX512-VNNI", "AMX"]))
    text = console.export_text()
    assert "1.31" in text
    assert "(2.50 ms)" in text
    assert "3.9x / 3.0x" in text
    assert "3.64x" in text


def test_command_line_refuses_unknown_names() -> None:
    with pytest.raises(SystemExit):
        networks.parser().parse_args(["--models", "resnet18"])
    with pytest.raises(SystemExit):
        networks.parser().parse_args(["--batch", "0"])
    assert networks.parser().parse_args(["--models", "all", "--threads", "1,2"]).threads == [1, 2]
