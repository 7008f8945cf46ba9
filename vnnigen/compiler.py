"""From a model to a network that runs: import, passes, calibration, quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vnnigen.errors import QuantizationError
from vnnigen.graph.importer import import_model
from vnnigen.graph.infer import infer
from vnnigen.graph.ir import Array, Graph, Precision
from vnnigen.graph.network import Network
from vnnigen.graph.passes import run_passes
from vnnigen.quant import QuantConfig, absorb_activations, absorb_weights, calibrate, quantize_with_report

if TYPE_CHECKING:
    from onnx import ModelProto

Sample = Array | Mapping[str, Array]


def compile(
    model: str | Path | bytes | ModelProto | Graph, precision: Precision = "f32", *,
    calibration: Iterable[Sample] | None = None, config: QuantConfig | None = None, isa: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Network:  # fmt: skip
    """Compile a model."""
    graph = model.copy() if isinstance(model, Graph) else import_model(model)
    infer(graph)
    quantized = absorb_weights(graph)
    run_passes(graph)
    if quantized:
        absorb_activations(graph)
    elif precision == "int8":
        if calibration is None:
            raise QuantizationError("precision='int8' needs calibration=: samples of the model's inputs")
        chosen = QuantConfig() if config is None else config
        graph, _ = quantize_with_report(graph, calibrate(graph, calibration, chosen, progress), chosen)
    elif precision == "bf16":
        graph.nodes = [replace(n, precision="bf16") for n in graph.nodes]
    return Network(graph, isa=isa)


__all__: list[Any] = ["compile"]
