"""Other inference engines, to be measured beside vnnigen: ONNX Runtime and OpenVINO, each as fast as it can be set up.

This file imports nothing of the package, so that benchmarks can load it under an interpreter that has the engines and
not vnnigen. An engine that is not installed raises ModuleNotFoundError.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
#: Computes the outputs by name.
Run = Callable[[Feeds], dict[str, Array]]


class Engine(Protocol):
    """An engine that runs on so many threads."""

    version: str

    def load(self, model: str, precision: str, feeds: Feeds, cache: str | None = None) -> Run:
        """Make a model ready for inputs of the shapes of `feeds`; `cache` is a folder to keep what speeds starts up."""

    def quantize(self, model: str, samples: Sequence[Feeds], out: str, transformer: bool = False) -> None:
        """Write the model in int8, calibrated on `samples`."""


class OnnxRuntime:
    """ONNX Runtime's CPU provider: f32, and int8 as QDQ with u8 activations and s8 weights per channel.

    Of its quantizer's forms that is the fastest with VNNI: s8 activations have no instruction of their own, and QDQ
    is rewritten to the same operators that the form QOperator has.
    """

    module, quantizer, suffix = "onnxruntime", "onnxruntime", ".onnx"
    precisions = ("int8", "f32")

    def __init__(self, threads: int) -> None:
        """Import it."""
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

    def quantize(self, model: str, samples: Sequence[Feeds], out: str, transformer: bool = False) -> None:
        """Write the model in int8, calibrated on `samples`."""
        quantization = importlib.import_module("onnxruntime.quantization")
        shape_inference = importlib.import_module("onnxruntime.quantization.shape_inference")

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
            rest = iter(samples)

            def get_next(self) -> Feeds | None:
                return next(self.rest, None)

        with tempfile.TemporaryDirectory() as folder:
            prepared = f"{folder}/prepared.onnx"
            shape_inference.quant_pre_process(_at_least_13(model, folder), prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared, out, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip


def _at_least_13(model: str, folder: str) -> str:
    """The model in opset 13, the first whose DequantizeLinear has an axis, if it is older."""
    onnx = importlib.import_module("onnx")
    loaded = onnx.load(model)
    if all(entry.domain or entry.version >= 13 for entry in loaded.opset_import):
        return model
    converter = importlib.import_module("onnx.version_converter")
    onnx.save(converter.convert_version(loaded, 13), f"{folder}/converted.onnx")
    return f"{folder}/converted.onnx"


class OpenVINO:
    """OpenVINO's CPU plugin for least latency: f32, bf16, and int8 as NNCF quantizes it, with islands of f32."""

    module, quantizer, suffix = "openvino", "nncf", ".xml"
    precisions = ("int8", "bf16", "f32")

    def __init__(self, threads: int) -> None:
        """Import it."""
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

    def quantize(self, model: str, samples: Sequence[Feeds], out: str, transformer: bool = False) -> None:
        """Write the model in int8, calibrated on `samples`."""
        nncf = importlib.import_module("nncf")

        network = self.api.Core().read_model(model)
        kind = nncf.ModelType.TRANSFORMER if transformer else None
        quantized = nncf.quantize(network, nncf.Dataset(samples), model_type=kind, subset_size=len(samples))
        self.api.save_model(quantized, out, compress_to_fp16=False)


ENGINES: dict[str, type[OnnxRuntime] | type[OpenVINO]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVINO}
