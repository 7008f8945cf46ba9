"""Runs whole networks on one engine; speaks the protocol of `benchmarks.peers.process`.

    python network_worker.py ENGINE THREADS CPUS                    then, a line each:
        load MODEL PRECISION INPUTS      a job that computes INPUTS, an .npz of the model's inputs
        answers JOB INPUTS OUTPUTS       compute each sample of INPUTS alone and write all outputs to an .npz
    python network_worker.py ENGINE THREADS CPUS quantize MODEL CALIBRATION OUT [transformer]
    python network_worker.py ENGINE THREADS CPUS first MODEL PRECISION INPUTS [CACHE]

`first` prints seconds for importing the engine, seconds from the file to the first result, and the process's peak
memory in bytes. CPUS, comma-separated, are what the process is bound to; `-` leaves that to the system.

Runs under any interpreter that has the engine, and imports nothing of this project unless that is the engine.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
#: Computes the outputs by name.
Run = Callable[[Feeds], dict[str, Array]]


def read(path: str) -> dict[str, Array]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def one_by_one(feeds: Feeds) -> Iterator[dict[str, Array]]:
    """Split a batch into samples of batch 1."""
    for i in range(len(next(iter(feeds.values())))):
        yield {name: np.ascontiguousarray(values[i : i + 1]) for name, values in feeds.items()}


class OnnxRuntime:
    """ONNX Runtime's CPU provider: f32, and int8 as QDQ with u8 activations and s8 weights per channel.

    Of its quantizer's forms that is the fastest with VNNI: s8 activations have no instruction of their own, and QDQ
    is rewritten to the same operators that the form QOperator has.
    """

    module = "onnxruntime"

    def __init__(self, threads: int) -> None:
        self.api = importlib.import_module(self.module)
        self.threads = threads
        self.version = f"ONNX-Runtime-{self.api.__version__}"

    def load(self, model: str, _precision: str, feeds: Feeds, _cache: str | None = None) -> Run:
        """Make a model ready for inputs of the shapes of `feeds`."""
        options = self.api.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("N", len(next(iter(feeds.values()))))
        session = self.api.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda x: dict(zip(names, session.run(names, x), strict=True))

    def quantize(self, model: str, samples: list[dict[str, Array]], out: str, _transformer: bool) -> None:
        """Write the model in int8, calibrated on `samples`."""
        quantization = importlib.import_module("onnxruntime.quantization")
        shape_inference = importlib.import_module("onnxruntime.quantization.shape_inference")

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
            rest = iter(samples)

            def get_next(self) -> dict[str, Array] | None:
                return next(self.rest, None)

        with tempfile.TemporaryDirectory() as folder:
            prepared = f"{folder}/prepared.onnx"
            shape_inference.quant_pre_process(model, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared, out, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip


class OpenVINO:
    """OpenVINO's CPU plugin for least latency: f32, bf16, and int8 as NNCF quantizes it, with islands of f32."""

    module = "openvino"

    def __init__(self, threads: int) -> None:
        self.api = importlib.import_module(self.module)
        self.threads = threads
        self.version = f"OpenVINO-{self.api.__version__.split('-')[0]}"

    def load(self, model: str, precision: str, feeds: Feeds, cache: str | None = None) -> Run:
        """Make a model ready for inputs of the shapes of `feeds`."""
        core = self.api.Core()
        if cache:
            core.set_property({"CACHE_DIR": cache})
        network = core.read_model(model)
        network.reshape({name: list(x.shape) for name, x in feeds.items()})
        config = {
            "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "ENABLE_CPU_PINNING": False,
        }  # fmt: skip
        compiled = core.compile_model(network, "CPU", config)
        request = compiled.create_infer_request()
        names = [output.get_any_name() for output in compiled.outputs]

        def run(x: Feeds) -> dict[str, Array]:
            values = request.infer(x, share_inputs=True, share_outputs=True)
            return {name: values[i] for i, name in enumerate(names)}

        return run

    def quantize(self, model: str, samples: list[dict[str, Array]], out: str, transformer: bool) -> None:
        """Write the model in int8, calibrated on `samples`."""
        nncf = importlib.import_module("nncf")

        network = self.api.Core().read_model(model)
        kind = nncf.ModelType.TRANSFORMER if transformer else None
        quantized = nncf.quantize(network, nncf.Dataset(samples), model_type=kind, subset_size=len(samples))
        self.api.save_model(quantized, out, compress_to_fp16=False)


class Vnnigen:
    """The library of this project; a cap on instructions comes from the environment."""

    module = "vnnigen"

    def __init__(self, threads: int) -> None:
        self.api = importlib.import_module(self.module)
        self.api.set_num_threads(threads)
        self.version = f"vnnigen-{self.api.__version__}"

    def load(self, model: str, precision: str, _feeds: Feeds, cache: str | None = None) -> Run:
        """Make a model ready for inputs of the shapes of `feeds`."""
        if cache:
            os.environ["VNNIGEN_CACHE_DIR"] = cache
        network = self.api.load(model) if model.endswith(".vnni") else self.api.compile(model, precision=precision)
        names = list(network.outputs)

        def run(x: Feeds) -> dict[str, Array]:
            values = network(dict(x))
            return dict(zip(names, values if isinstance(values, tuple) else (values,), strict=True))

        return run

    def quantize(self, model: str, samples: list[dict[str, Array]], out: str, _transformer: bool) -> None:
        """Write the model in int8, calibrated on `samples`."""
        self.api.compile(model, precision="int8", calibration=samples).save(out)


ENGINES: dict[str, Callable[[int], Any]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVINO, "vnnigen": Vnnigen}
Job = tuple[Run, Feeds]


def peak_memory() -> int:
    """Peak resident bytes of this program; getrusage would count what the parent had before exec (proc(5), VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def answer(engine: Any, line: str, jobs: dict[int, Job]) -> str:
    verb, *words = line.split()
    if verb == "run":
        run, feeds = jobs[int(words[0])]
        start, cpu = time.perf_counter_ns(), time.process_time_ns()
        for _ in range(int(words[1])):
            run(feeds)
        return f"ok {time.perf_counter_ns() - start} {time.process_time_ns() - cpu}"
    if verb == "drop":
        del jobs[int(words[0])]
        return "ok"
    if verb == "answers":
        run, _ = jobs[int(words[0])]
        found = [{k: np.array(v) for k, v in run(x).items()} for x in one_by_one(read(words[1]))]
        together: dict[str, Any] = {name: np.concatenate([y[name] for y in found]) for name in found[0]}
        np.savez(words[2], **together)
        return "ok"
    model, precision, inputs = words
    feeds = read(inputs)
    number = max(jobs, default=0) + 1
    jobs[number] = engine.load(model, precision, feeds), feeds
    jobs[number][0](feeds)
    return f"ok {number} {engine.version}"


def first(engine: Any, imported: float, model: str, precision: str, inputs: str, cache: str | None = None) -> None:
    """Time from the file to the first result."""
    feeds = read(inputs)
    start = time.perf_counter()
    engine.load(model, precision, feeds, cache)(feeds)
    print("ok", imported, time.perf_counter() - start, peak_memory(), flush=True)


def main() -> None:
    name, threads, cpus, *rest = sys.argv[1:]
    if cpus != "-":
        os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    start = time.perf_counter()
    engine = ENGINES[name](int(threads))
    imported = time.perf_counter() - start
    try:
        match rest:
            case ["quantize", model, calibration, out, *kind]:
                engine.quantize(model, list(one_by_one(read(calibration))), out, bool(kind))
            case ["first", *words]:
                first(engine, imported, *words)
            case _:
                serve(engine)
    except Exception as error:
        sys.exit(in_one_line(error))


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def serve(engine: Any) -> None:
    print("ready", engine.version, flush=True)
    jobs: dict[int, Job] = {}
    for line in sys.stdin:
        try:
            print(answer(engine, line, jobs), flush=True)
        except Exception as error:
            print("error", in_one_line(error), flush=True)


if __name__ == "__main__":
    main()
