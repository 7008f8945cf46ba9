"""Whole networks on this library, on ONNX Runtime and on OpenVINO, each in processes of its own.

The peers are large and stay optional: the interpreter named by VNNIGEN_PEERS_PYTHON must have onnx, onnxruntime,
openvino and nncf (1.23, 1.32, 2026.4 and 3.4 are what was tried), or else the one that runs the benchmark. Quantized
networks of peers are kept in the cache directory between runs, ours only during one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx

from benchmarks.models import MODELS, build
from benchmarks.models.net import Array
from benchmarks.models.operations import operations
from benchmarks.peers.onednn import CAPS, cache_directory
from benchmarks.peers.process import PeerError, PeerJob, PeerProcess

WORKER = Path(__file__).with_name("network_worker.py")
OURS = "vnnigen"
#: Engines and what each computes in. ONNX Runtime's CPU provider has no bf16.
PRECISIONS = {OURS: ("int8", "bf16", "f32"), "openvino": ("int8", "bf16", "f32"), "onnxruntime": ("int8", "f32")}
_QUANTIZED = {OURS: ".vnni", "openvino": ".xml", "onnxruntime": ".onnx"}
#: Samples to calibrate on.
_CALIBRATION = 32
_MODEL_SOURCES = Path(__file__).parents[1] / "models"


def interpreter(engine: str) -> str:
    """Return the interpreter that has an engine; PeerError if it has not."""
    if engine == OURS:
        return sys.executable
    python = os.environ.get("VNNIGEN_PEERS_PYTHON", sys.executable)
    if not _has(python, engine):
        raise PeerError(f"{python} has no {engine}: install it there, or set VNNIGEN_PEERS_PYTHON to one that has")
    return python


@cache
def _has(python: str, module: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec(module) is not None
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def capped(tier: str | None) -> dict[str, str]:
    """Return the environment that keeps this library and OpenVINO's oneDNN on a tier."""
    if tier is None:
        return {}
    return {"VNNIGEN_MAX_ISA": tier, "ONEDNN_MAX_CPU_ISA": CAPS[tier]}


@dataclass(frozen=True)
class Place:
    """Where a process runs: how many threads, the CPUs it is bound to, and the cap on its instructions."""

    threads: int = 1
    cpus: tuple[int, ...] = ()
    tier: str | None = None

    def command(self, engine: str) -> list[str]:
        """Return the start of a worker's command line."""
        cpus = ",".join(map(str, self.cpus)) or "-"
        return [interpreter(engine), str(WORKER), engine, str(self.threads), cpus]

    def environment(self) -> dict[str, str]:
        """Return a worker's environment; libraries that read OMP_NUM_THREADS start no more threads than asked for."""
        return os.environ | {"OMP_NUM_THREADS": str(self.threads)} | capped(self.tier)


class NetworkProcess(PeerProcess):
    """An engine that runs networks."""

    def __init__(self, engine: str, place: Place) -> None:
        """Start it. PeerError where it cannot be had or cannot be kept on the tier."""
        self.name = self.engine = engine
        if engine == "onnxruntime" and place.tier not in (None, "avx512_vnni"):
            raise PeerError(f"ONNX Runtime chooses its own instructions; it is not compared under {place.tier}")
        super().__init__(place.command(engine), place.environment())
        self.version = self.ready[1]

    def load(self, model: Path, precision: str, inputs: Path) -> PeerJob:
        """Load a model for inputs of one shape; PeerError with the engine's words."""
        try:
            return self.job(f"load {model} {precision} {inputs}")
        except PeerError as error:
            raise PeerError(f"{self.engine} cannot load it: {str(error).partition('`: ')[2] or error}") from error

    def answers(self, job: PeerJob, inputs: Path, to: Path) -> dict[str, Array]:
        """Compute each sample of `inputs` alone and return all outputs; goes through the file `to`."""
        self.ask(f"answers {job.number} {inputs} {to}")
        with np.load(to) as file:
            return {name: file[name] for name in file.files}


@cache
def _fingerprint() -> str:
    """Identify what builds models and inputs."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_MODEL_SOURCES.glob("*.py"))))
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Store:
    """The files of a run: models and inputs in the cache directory, our quantized networks in `own`."""

    own: Path

    @property
    def folder(self) -> Path:
        """Where files are kept between runs, for as long as the builders stay as they are."""
        folder = cache_directory() / "networks" / _fingerprint()
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def model(self, name: str) -> Path:
        """Return a network's file, its batch left open."""
        path = self.folder / f"{name}.onnx"
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}")
            onnx.save_model(build(name), part)
            part.replace(path)
        return path

    def operations(self, name: str) -> int:
        """Return the operations of one sample."""
        path = self.folder / f"{name}.operations"
        if not path.exists():
            path.write_text(str(operations(build(name, 1))))
        return int(path.read_text())

    def inputs(self, name: str, count: int, seed: int) -> Path:
        """Return a file of samples; seed 0 is for calibration."""
        path = self.folder / f"{name}-{count}-{seed}.npz"
        if not path.exists():
            np.savez(path, **MODELS[name].sampler(count, seed))  # type: ignore[arg-type]
        return path

    def prepared(self, name: str, engine: str, precision: str, place: Place, version: str) -> Path:
        """Return the file that an engine loads; the first time, quantize. PeerError with the engine's words."""
        if precision != "int8":
            return self.model(name)
        folder = self.own if engine == OURS else self.folder
        path = folder / f"{name}-{version}{_QUANTIZED[engine]}"
        if not path.exists():
            words = [str(self.model(name)), str(self.inputs(name, _CALIBRATION, 0)), str(path)]
            words += ["transformer"] if MODELS[name].transformer else []
            run_worker(engine, Place(place.threads), "quantize", *words)
        return path


def run_worker(engine: str, place: Place, *words: str, environment: dict[str, str] | None = None) -> str:
    """Run a worker to its end and return what it printed; PeerError with the last line of its complaint."""
    command = [*place.command(engine), *words]
    env = place.environment() | (environment or {})
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise PeerError(f"{engine} cannot {words[0]} {Path(words[1]).name}: {last[0]}")
    return done.stdout
