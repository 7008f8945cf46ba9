"""The commands of whole networks, on small real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import vnnigen
from tests.cli.test_cli import run
from tests.graph import models
from vnnigen.bench import network as bench_network
from vnnigen.bench.engines import ENGINES
from vnnigen.graph.ir import TensorType

RNG = np.random.default_rng(3)
SAMPLES = RNG.standard_normal((12, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose batch varies, and samples."""
    models.onnx.save(models.small_cnn(), tmp_path / "net.onnx")
    np.savez(tmp_path / "cal.npz", SAMPLES)
    np.save(tmp_path / "x.npy", SAMPLES[:3])
    return tmp_path


def expected(folder: Path, precision: Any = "int8", **config: Any) -> Any:
    calibration = [SAMPLES[i : i + 1] for i in range(len(SAMPLES))] if precision == "int8" else None
    chosen = vnnigen.QuantConfig(**config) if config else None
    return vnnigen.compile(folder / "net.onnx", precision, calibration=calibration, config=chosen)(SAMPLES[:3])


@pytest.mark.parametrize(
    ("options", "precision", "config"),
    [
        ("--precision int8 --calib {}/cal.npz", "int8", {}),
        ("--precision int8 --calib {}/cal.npz --method entropy", "int8", {"method": "kl"}),
        (
            "--precision int8 --calib {}/cal.npz --activations symmetric --weights tensor --keep Linear=f32", "int8",
            {"activations": "symmetric", "weights": "tensor", "overrides": {"Linear": "f32"}},
        ),
        ("--precision bf16", "bf16", {}),
        ("", "f32", {}),
    ],
)  # fmt: skip
def test_compile_then_run(folder: Path, capsys: Any, options: str, precision: str, config: Any) -> None:
    out, y = folder / "net.vnni", folder / "y.npy"
    code, _, err = run(capsys, "compile", str(folder / "net.onnx"), "-o", str(out), *options.format(folder).split())
    assert (code, str(out) in err) == (0, True), err
    assert f"in {precision}" in err
    code, printed, _ = run(capsys, "run", str(out), "--input", str(folder / "x.npy"), "-o", str(y))
    assert code == 0
    np.testing.assert_array_equal(np.load(y), expected(folder, precision, **config))
    assert "float32[3, " in printed
    assert printed.count("row ") == 3


def test_run_takes_onnx_and_names(folder: Path, capsys: Any) -> None:
    name = next(iter(vnnigen.compile(folder / "net.onnx").inputs))
    np.savez(folder / "x.npz", **{name: SAMPLES[:3]})
    for given in (f"{name}={folder}/x.npy", f"{folder}/x.npz"):
        out = folder / "y.npz"
        code, _, err = run(capsys, "run", str(folder / "net.onnx"), "--input", given, "-o", str(out))
        assert (code, err) == (0, "")
        (value,) = np.load(out).values()
        np.testing.assert_array_equal(value, expected(folder, "f32"))


def test_bench_json_has_the_keys_of_the_kernel_bench(folder: Path, capsys: Any) -> None:
    line = f"bench model {folder}/net.onnx --precision int8 --batch 2 --vs f32 --rounds 2 --json"
    code, out, err = run(capsys, *line.split())
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert {"ms_median", "ms_min", "gops", "pct_peak", "isa", "kernel", "threads", "vs"} <= set(result)
    assert result["dtype"] == "int8"
    assert next(iter(result["shapes"].values())) == [2, 3, 16, 16]
    assert set(result["vs"]["f32"]) == {"version", "precision", "ms_median", "ms_min", "ratio"}
    assert result["gops"] > 0


class FakeEngine:
    """An engine that doubles its input, and says how it was called."""

    module = quantizer = "json"  # installed everywhere
    suffix, precisions = ".fake", ("int8", "f32")
    calls: ClassVar[list[Any]] = []

    def __init__(self, threads: int) -> None:
        self.version = f"Fake-{threads}"

    def quantize(self, model: str, samples: Any, out: str, transformer: bool = False) -> None:
        print("a progress bar")
        Path(out).write_text("quantized")
        self.calls.append(("quantize", Path(model).name, len(samples)))

    def load(self, model: str, precision: str, feeds: Any, cache: str | None = None) -> Any:
        if precision == "int8":
            assert Path(model).read_text() == "quantized"
        self.calls.append(("load", precision))
        return lambda x: {k: v * 2 for k, v in x.items()}


def test_bench_beside_engines(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(ENGINES, "fake", FakeEngine)
    FakeEngine.calls.clear()
    start = f"bench model {folder}/net.onnx --vs fake --rounds 2 --threads 2 "
    code, out, _ = run(capsys, *f"{start} --precision int8 --calib {folder}/cal.npz --json".split())
    assert code == 0
    assert json.loads(out)["vs"]["fake"]["precision"] == "int8"
    assert json.loads(out)["vs"]["fake"]["version"] == "Fake-2"
    assert FakeEngine.calls == [("quantize", "net.onnx", 12), ("load", "int8")]
    code, out, _ = run(capsys, *f"{start} --precision bf16".split())
    assert code == 0
    for text in ("fake: it has no bf16, so f32 was timed", "ratio", "Fake-2"):
        assert text in out


def test_explain(folder: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, *f"explain model {folder}/net.onnx --precision int8 --batch 4 --profile".split())
    assert code == 0
    assert "steps in" in out
    assert "[4, " in out
    assert " ms " in out
    code, out, _ = run(capsys, *f"explain model {folder}/net.onnx --json".split())
    assert json.loads(out)["native_calls"] >= 0


REFUSALS = {
    "no samples": ("compile {}/net.onnx -o {}/o.vnni --precision int8", "needs --calib"),
    "samples for f32": ("compile {}/net.onnx -o {}/o.vnni --calib {}/cal.npz", "--calib is for --precision int8"),
    "precision": ("compile {}/net.onnx -o {}/o.vnni --precision int4", "precision must be one of"),
    "method": ("compile {}/net.onnx -o {}/o.vnni --method best", "method must be one of"),
    "keep": ("compile {}/net.onnx -o {}/o.vnni --keep Conv", "expected NAME=VALUE"),
    "no folder": ("compile {}/net.onnx -o {}/no/o.vnni", "does not exist"),
    "no model": ("compile {}/no.onnx -o {}/o.vnni", "no.onnx"),
    "no input": ("run {}/net.onnx --input {}/no.npy", "cannot be read"),
    "damaged input": ("run {}/net.onnx --input {}/net.onnx", "cannot be read"),
    "unknown input": ("run {}/net.onnx --input q={}/x.npy", "no input 'q'"),
    "output": ("run {}/net.onnx --input {}/x.npy -o {}/y.txt", "go to a .npz file or .npy"),
    "damaged network": ("run {}/bad.vnni --input {}/x.npy", "bad.vnni"),
    "dim": ("bench model {}/net.onnx --dim batch=0", "a number from 1"),
    "unknown dim": ("bench model {}/net.onnx --dim q=3", "no input has a length named 'q'"),
    "engine": ("bench model {}/net.onnx --vs tensorflow", "known are f32, onnxruntime, openvino"),
    "engine of .vnni": ("bench model {}/good.vnni --vs openvino", "needs the ONNX file"),
    "tier": ("explain model {}/net.onnx --isa avx9", "avx9"),
}


@pytest.mark.parametrize(("line", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(folder: Path, capsys: Any, line: str, message: str) -> None:
    vnnigen.compile(folder / "net.onnx").save(folder / "good.vnni")
    (folder / "bad.vnni").write_bytes((folder / "good.vnni").read_bytes()[:-9])
    code, out, err = run(capsys, *line.replace("{}", str(folder)).split())
    assert (code, out) == (2, ""), err
    assert err.startswith("vnnigen: ")
    assert message in err
    assert not (folder / "o.vnni").exists()


def test_an_engine_that_is_missing(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(bench_network.importlib.util, "find_spec", lambda _: None)
    code, _, err = run(capsys, *f"bench model {folder}/net.onnx --vs onnxruntime".split())
    assert (code, err) == (2, "vnnigen: --vs onnxruntime needs 'onnxruntime': pip install onnxruntime\n")


def test_lengths_that_vary_are_asked_for(tmp_path: Path, capsys: Any) -> None:
    models.onnx.save(models.small_cnn(size="side"), tmp_path / "net.onnx")
    code, _, err = run(capsys, *f"bench model {tmp_path}/net.onnx --rounds 1".split())
    assert code == 2
    assert "--dim side=" in err
    code, out, _ = run(capsys, *f"bench model {tmp_path}/net.onnx --rounds 1 --dim side=20 --json".split())
    assert code == 0
    assert next(iter(json.loads(out)["shapes"].values())) == [1, 3, 20, 20]


def test_noise_for_calibration_differs_from_what_is_timed() -> None:
    inputs = {"x": TensorType("f32", (1, 4))}
    feeds = bench_network.random_feeds(inputs, {"x": (1, 4)})
    samples = bench_network.random_samples(inputs, {"x": (1, 4)})
    assert all((sample["x"] != feeds["x"]).any() for sample in samples)
