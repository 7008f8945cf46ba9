"""From a model to a network that runs: import, passes, calibration, quantization."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from vnnigen.errors import QuantizationError
from vnnigen.graph.format import load_graph
from vnnigen.graph.importer import import_model
from vnnigen.graph.infer import infer
from vnnigen.graph.ir import Array, Graph, Precision
from vnnigen.graph.network import Network
from vnnigen.graph.passes import run_passes
from vnnigen.quant import QuantConfig, SampleFiles, absorb_activations, absorb_weights, calibrate, quantize_with_report

if TYPE_CHECKING:
    from onnx import ModelProto

Sample = Array | Mapping[str, Array]


def compile(
    model: str | Path | bytes | ModelProto | Graph, precision: Precision = "f32", *,
    calibration: Iterable[Sample] | str | os.PathLike[str] | None = None, config: QuantConfig | None = None,
    isa: str | None = None, threads: int | None = None, progress: Callable[[int], None] | None = None,
) -> Network:  # fmt: skip
    """Compile a model to a network that is called with arrays of its inputs.

    Args:
        model: An ONNX file, its bytes, a ModelProto (these need the extra `onnx`), or a Graph.
        precision: In which numbers layers compute: "f32", "bf16", or "int8". A model that is quantized already (with
            QuantizeLinear and DequantizeLinear, or QLinear operators) stays so, whatever `precision` says.
        calibration: For "int8": samples of what the network will see, read once; each an array for the only input, or
            a dict of arrays by input. Some tens to hundreds are usual. Or the path of a .npy or .npz file, or of a
            folder of such: see `vnnigen.SampleFiles`.
        config: How to quantize; default `QuantConfig()`.
        isa: The highest tier to use; default: the machine's best.
        threads: Most threads of a call; default: as many as kernels may use.
        progress: Called with the number of samples seen, after each.

    Raises:
        ModelError: for a file that is damaged, hostile or not understood, naming node and reason.
        QuantizationError: for int8 without samples, samples that do not fit, or a precision that there is not.
        ISAError, MissingExtraError: for a tier that cannot be used; without the onnx package.

    """
    if precision not in get_args(Precision):
        raise QuantizationError(f"precision must be one of {', '.join(get_args(Precision))}, not {precision!r}")
    graph = model.copy() if isinstance(model, Graph) else import_model(model)
    infer(graph)
    quantized = absorb_weights(graph)
    log = run_passes(graph)
    if quantized:
        decisions = absorb_activations(graph)
        infer(graph)
    elif precision == "int8":
        if calibration is None:
            raise QuantizationError(
                "precision='int8' needs calibration=, an iterable of samples of the model's input or a path to some"
            )
        if isinstance(calibration, (str, os.PathLike)):
            calibration = SampleFiles(calibration, graph.inputs)
        chosen = QuantConfig() if config is None else config
        graph, decisions = quantize_with_report(graph, calibrate(graph, calibration, chosen, progress), chosen)
    else:
        graph.nodes, decisions = [replace(n, precision=precision) for n in graph.nodes], []
    log += [f"{d.node} ({d.op}): {d.precision}, {d.reason}" for d in decisions if d.precision != "int8" and d.reason]
    return Network(graph, isa=isa, threads=threads, log=log)


def load(path: str | os.PathLike[str], *, isa: str | None = None, threads: int | None = None) -> Network:
    """Load a network that `Network.save` wrote; weights are packed at the first call. `isa`, `threads`: as `compile`.

    Raises ModelError for a file that is truncated, damaged, of another version, or none of ours.
    """
    graph, log = load_graph(path)
    return Network(graph, isa=isa, threads=threads, log=log)


__all__ = ["compile", "load"]
