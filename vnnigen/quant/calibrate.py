"""Calibration: run a network on samples and remember the ranges of its values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from vnnigen.errors import QuantizationError
from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.ir import Array, Graph, TensorType
from vnnigen.graph.network import Network
from vnnigen.kernels.types import F64
from vnnigen.quant.observers import Histogram, Mean, MinMax, Range
from vnnigen.quant.policy import WEIGHTED, decide, pairs_to_equalize
from vnnigen.quant.ranges import kl_range, percentile_range
from vnnigen.quant.scheme import QuantConfig

Feeds = Mapping[str, Array]
#: Computes the values that calibration wants from arrays of the graph's inputs.
Runner = Callable[[Feeds], Mapping[str, Array]]
Sample = Array | Feeds


@dataclass(frozen=True, eq=False)
class Calibration:
    """What calibration found: the range to cover of each value, by name, and how many samples were seen.

    `means` holds the mean per channel of the values that convolutions and Linear read (for bias correction), `channels`
    the smallest and largest elements per channel of those that depthwise convolutions read (for equalization).
    """

    ranges: Mapping[str, Range]
    samples: int
    means: Mapping[str, F64] = field(default_factory=dict)
    channels: Mapping[str, tuple[F64, F64]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Range:
        """The range of a value. QuantizationError if it was not observed."""
        if name not in self.ranges:
            raise QuantizationError(
                f"value {name!r} was not calibrated; calibrate the same graph with the same config that quantizes it"
            )
        return self.ranges[name]


def calibrate(
    graph: Graph,
    samples: Iterable[Sample],
    config: QuantConfig,
    progress: Callable[[int], None] | None = None,
    runner: Callable[[Graph, tuple[str, ...]], Runner] | None = None,
) -> Calibration:
    """Run `graph` on samples and choose the ranges of all values that `config` wants as bytes.

    A sample is an array for the only input, or a dict of arrays, each of the shape of its input (any length along
    symbolic dimensions; a multiple of the batch, where that is fixed). Samples are read once, one at a time, and
    memory does not grow with their number. `progress` is called after each with their number so far. `runner` makes,
    from the graph and the names wanted, what runs the samples: by default the native f32 network.

    Raises QuantizationError for samples that do not fit the inputs, for none at all, and for NaN or infinity in a
    sample or a value, naming it.
    """
    policy = decide(graph, config)
    wanted = policy.values
    layers = [node for node in graph if node.op in WEIGHTED and policy.precision(node) == "int8"]
    means = {n.inputs[0]: Mean(1 if n.op == "Conv" else -1) for n in layers if config.bias_correction}
    observers: dict[str, MinMax | Histogram] = {
        name: MinMax(name) if config.method == "minmax" else Histogram(name) for name in wanted
    }
    equalized = pairs_to_equalize(graph) if config.equalization and config.weights == "channel" else []
    channels = {n.inputs[0]: MinMax(n.inputs[0], axis=1) for _, n in equalized if n.inputs[0] in observers}
    run = (runner or native_runner)(graph, tuple(wanted))
    count = 0
    for sample in samples:
        for feeds in check_sample(graph, sample, count):
            values = run(feeds)
            for name, observer in observers.items():
                observer.update(np.asarray(values[name], np.float32))
            for name, mean in means.items():
                mean.update(np.asarray(values[name], np.float32))
            for name, extent in channels.items():
                extent.update(np.asarray(values[name], np.float32))
        count += 1
        if progress is not None:
            progress(count)
    if count == 0:
        raise QuantizationError("calibration got no samples")
    ranges = {name: _range(observer, config) for name, observer in observers.items()}
    return Calibration(
        ranges, count, {name: mean.value() for name, mean in means.items()},
        {name: (extent.lows, extent.highs) for name, extent in channels.items()},
    )  # fmt: skip


def _range(observer: MinMax | Histogram, config: QuantConfig) -> Range:
    symmetric = config.activations == "symmetric"
    if isinstance(observer, MinMax):
        return observer.range()
    if config.method == "kl":
        return kl_range(observer, symmetric)
    return percentile_range(observer, config.percentile, symmetric)


def native_runner(graph: Graph, wanted: tuple[str, ...]) -> Runner:
    """Run a graph natively, in f32, with more outputs: all that is wanted. Its types must be inferred."""
    made = tuple(name for name in wanted if name not in graph.inputs)
    watched = graph.copy()
    watched.outputs = made or graph.outputs
    watched.prune()
    network = Network(watched)

    def run(feeds: Feeds) -> Mapping[str, Array]:
        results = network(feeds)
        values = results if isinstance(results, tuple) else (results,)
        return {**feeds, **dict(zip(watched.outputs, values, strict=True))}

    return run


def reference_runner(graph: Graph, wanted: tuple[str, ...]) -> Runner:
    """Run a graph node by node in NumPy."""
    return lambda feeds: run_reference(graph, feeds, wanted)


def check_sample(graph: Graph, sample: Sample, index: int) -> Iterator[dict[str, Array]]:
    """Yield a sample as feeds of the graph: once, or in parts where the graph's batch is fixed and the sample's larger.

    Raises QuantizationError, naming the sample and the input, for names, types or shapes that do not fit.
    """
    where = f"calibration sample {index}"
    if isinstance(sample, Mapping):
        feeds = dict(sample)
    elif len(graph.inputs) == 1:
        feeds = {next(iter(graph.inputs)): sample}
    else:
        raise QuantizationError(f"{where}: the graph has the inputs {sorted(graph.inputs)}; give a dict of arrays")
    if set(feeds) != set(graph.inputs):
        raise QuantizationError(f"{where} has the inputs {sorted(feeds)}; the graph has {sorted(graph.inputs)}")
    bound: dict[str, int] = {}
    parts = {_parts(f"{where}, input {n!r}", x, graph.inputs[n], bound) for n, x in feeds.items()}
    if len(parts) > 1:
        raise QuantizationError(f"{where}: its inputs have different batches")
    for part in range(number := parts.pop()):
        yield {name: np.split(x, number)[part] if number > 1 else x for name, x in feeds.items()}


def _parts(where: str, x: Array, kind: TensorType, bound: dict[str, int]) -> int:
    """Check one array; into how many it must be split. `bound` collects lengths of symbolic dimensions."""
    if not isinstance(x, np.ndarray):
        raise QuantizationError(f"{where} must be a NumPy array, not {type(x).__name__}")
    if x.dtype != numpy_dtype(kind.dtype):
        raise QuantizationError(f"{where} must be {numpy_dtype(kind.dtype)}, not {x.dtype}")
    if x.size == 0:
        raise QuantizationError(f"{where} is empty, of shape {x.shape}")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise QuantizationError(f"{where} contains NaN or infinity")
    if kind.shape is None:
        return 1
    number, fits = 1, x.ndim == len(kind.shape)
    for axis, (have, want) in enumerate(zip(x.shape, kind.shape, strict=False)):
        if isinstance(want, str):
            fits &= bound.setdefault(want, have) == have
        elif axis == 0 and want and have > want and have % want == 0:
            number = have // want
        else:
            fits &= have == want
    if not fits:
        raise QuantizationError(f"{where} has shape {x.shape}, which does not fit {kind.shape}")
    return number
