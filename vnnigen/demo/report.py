"""`vnnigen demo`: a trained MobileNetV2 on real photos, f32 against int8, accuracy and time per layer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vnnigen.demo.mobilenet import (
    F32,
    Array,
    ConvLayer,
    Network,
    classify,
    float_layers,
    forward,
    mobilenet_v2,
)
from vnnigen.demo.photos import PHOTO_WHEEL, WEIGHT_WHEEL, Photo, photos, split, weights_path
from vnnigen.demo.quantized import QuantizedNetwork, quantize_network
from vnnigen.demo.torch_pickle import load_state_dict
from vnnigen.ops.conv import Conv2dF32, Conv2dInt8
from vnnigen.runtime.threads import num_threads, set_num_threads

ROUNDS = 31  # paired timings of a layer


@dataclass(frozen=True)
class LayerTime:
    """Median times of one convolution, int8 and f32 timed alternately."""

    name: str
    kind: str
    shape: str
    int8_us: float
    f32_us: float

    @property
    def speedup(self) -> float:
        """How many times faster int8 is."""
        return self.f32_us / self.int8_us


@dataclass(frozen=True)
class Accuracy:
    """Counts over the held-out photos."""

    top1: int
    top5: int


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured."""

    calibration_photos: int
    held_out_photos: int
    f32: Accuracy
    int8: Accuracy
    same_top1: int  # photos on which int8 and f32 agree about the class
    logit_sqnr_db: float
    kernels_sqnr_db: float  # f32 kernels against NumPy
    layers: tuple[LayerTime, ...]
    isa: str
    threads: int

    @property
    def int8_ms(self) -> float:
        """All convolutions in int8."""
        return sum(layer.int8_us for layer in self.layers) / 1e3

    @property
    def f32_ms(self) -> float:
        """All convolutions in f32."""
        return sum(layer.f32_us for layer in self.layers) / 1e3

    @property
    def speedup(self) -> float:
        """How many times faster all convolutions are in int8."""
        return self.f32_ms / self.int8_ms

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the derived ones included."""
        derived = {"int8_ms": self.int8_ms, "f32_ms": self.f32_ms, "speedup": self.speedup}
        layers = [{**asdict(layer), "speedup": layer.speedup} for layer in self.layers]
        return {**asdict(self), "layers": layers, **derived}


def run_demo(console: Console | None = None, *, threads: int = 1, as_json: bool = False) -> DemoResult:
    """Run the demo and print its report on `console` (or JSON on standard output).

    Raises `MissingExtraError` when the photos, the weights or Pillow are not installed, `ModelError` when a
    file is damaged.
    """
    network = mobilenet_v2(load_state_dict(weights_path()))
    calibration, held_out = split(photos())
    with _threads(threads):
        result = measure(network, calibration, held_out)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        show(result, console or Console())
    return result


def measure(
    network: Network,
    calibration: Sequence[Photo],
    held_out: Sequence[Photo],
    *,
    conv_f32: Callable[..., ConvLayer] = Conv2dF32,
    conv_int8: Callable[..., ConvLayer] = Conv2dInt8,
    rounds: int = ROUNDS,
) -> DemoResult:
    """Quantize on the photos of `calibration`, compare on those `held_out`, time each layer."""
    f32_layers = float_layers(network, conv_f32)
    int8_network = quantize_network(network, [photo.pixels for photo in calibration], conv_int8)
    labels = np.array([photo.label for photo in held_out])
    images = [photo.pixels for photo in held_out]
    expected = _logits(network, float_layers(network), images)
    f32 = _logits(network, f32_layers, images)
    int8 = np.concatenate([int8_network.logits(image) for image in images])
    layers = tuple(time_layers(network, f32_layers, int8_network, images[0], rounds))
    return DemoResult(
        calibration_photos=len(calibration),
        held_out_photos=len(held_out),
        f32=accuracy(f32, labels),
        int8=accuracy(int8, labels),
        same_top1=int((int8.argmax(axis=1) == f32.argmax(axis=1)).sum()),
        logit_sqnr_db=sqnr_db(f32, int8),
        kernels_sqnr_db=sqnr_db(expected, f32),
        layers=layers,
        isa=", ".join(sorted({layer.isa for layer in int8_network.layers})),
        threads=num_threads(),
    )


def _logits(network: Network, layers: Sequence[ConvLayer], images: Sequence[F32]) -> F32:
    return np.concatenate([classify(network, forward(layers, network.convs, x)[-1]) for x in images])


def accuracy(logits: F32, labels: Array) -> Accuracy:
    """Count rows of `logits` [N, classes] whose label is first, and among the first five."""
    order = np.argsort(-logits, axis=1)
    return Accuracy(int((order[:, 0] == labels).sum()), int((order[:, :5] == labels[:, None]).sum()))


def sqnr_db(signal: F32, other: F32) -> float:
    """Signal to noise ratio in dB, the noise being the difference of `other`; inf for no difference."""
    noise = np.square(signal - other, dtype=np.float64).sum()
    power = np.square(signal, dtype=np.float64).sum()
    return float(10 * np.log10(power / noise)) if noise else float("inf")


def time_layers(
    network: Network, f32_layers: Sequence[ConvLayer], int8: QuantizedNetwork, image: F32, rounds: int
) -> Iterator[LayerTime]:
    """Time every convolution on the activations that `image` gives it, int8 and f32 in turn."""
    f32_activations = forward(f32_layers, network.convs, image)
    int8_activations = int8.activations(image)
    for i, conv in enumerate(network.convs):
        calls = [
            _call(layers[i], i, conv.residual, activations)
            for layers, activations in ((int8.layers, int8_activations), (f32_layers, f32_activations))
        ]
        times: list[list[int]] = [[], []]
        for round_ in range(rounds + 1):
            for call, taken in zip(calls, times, strict=True):
                start = time.perf_counter_ns()
                call()
                if round_:  # the first warms the caches
                    taken.append(time.perf_counter_ns() - start)
        x, y = f32_activations[i].shape, f32_activations[i + 1].shape
        kind = f"{conv.weight.shape[2]}x{conv.weight.shape[3]}{' dw' if conv.groups > 1 else ''}"
        shape = f"{x[1]}²x{x[3]} → {y[1]}²x{y[3]}"
        int8_us, f32_us = (median(taken) / 1e3 for taken in times)
        yield LayerTime(conv.name, kind, shape, int8_us, f32_us)


def _call(layer: ConvLayer, index: int, residual: int | None, activations: Sequence[Array]) -> Callable[[], object]:
    x, out = activations[index], np.empty_like(activations[index + 1])
    tensors = () if residual is None else (activations[residual],)
    return lambda: layer(x, out=out, tensors=tensors)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute on `count` threads for a while."""
    before = num_threads()
    set_num_threads(count)
    try:
        yield
    finally:
        set_num_threads(before)


def show(result: DemoResult, console: Console) -> None:
    """Print the report."""
    n = result.held_out_photos
    console.print(
        f"MobileNetV2 (weights: {WEIGHT_WHEEL}), ImageNet photos (of {PHOTO_WHEEL}): calibrated on "
        f"{result.calibration_photos} photos, judged on {n} others. So few photos show that the network "
        "works, not its accuracy to the percent.\n"
        f"All {len(result.layers)} convolutions in int8 on {result.isa}; pooling and classifier in f32. "
        f"Threads: {result.threads}.\n",
        highlight=False,
    )
    table = Table("held-out photos", "top-1", "top-5", title="Accuracy")
    table.add_row("f32", f"{result.f32.top1} / {n}", f"{result.f32.top5} / {n}")
    table.add_row("int8", f"{result.int8.top1} / {n}", f"{result.int8.top5} / {n}")
    console.print(table)
    console.print(
        f"int8 and f32 name the same class on {result.same_top1} of {n} photos; SQNR of the logits "
        f"{result.logit_sqnr_db:.1f} dB (f32 kernels against NumPy: {result.kernels_sqnr_db:.0f} dB).\n",
        highlight=False,
    )
    console.print(_time_table(result))


def _time_table(result: DemoResult) -> Table:
    table = Table(title="Time per convolution, batch 1 (median, int8 and f32 timed in turn)", show_footer=True)
    totals = (f"{result.int8_ms:.2f} ms", f"{result.f32_ms:.2f} ms", f"{result.speedup:.2f}x")
    for title, footer in (("layer", f"all {len(result.layers)}"), ("kind", ""), ("shape", "")):
        table.add_column(title, footer=footer, no_wrap=True)
    for title, footer in zip(("int8 µs", "f32 µs", "f32 / int8"), totals, strict=True):
        table.add_column(title, footer=footer, justify="right", no_wrap=True)
    for layer in result.layers:
        times = f"{layer.int8_us:.1f}", f"{layer.f32_us:.1f}", f"{layer.speedup:.2f}x"
        table.add_row(layer.name.removeprefix("features."), layer.kind, layer.shape, *times)
    return table
