"""The int8 network: the corrections, and all convolutions through the public operator."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from vnnigen import Conv2dF32, Conv2dInt8, num_threads
from vnnigen.demo import report
from vnnigen.demo.mobilenet import ConvRecord, Network, NumpyConv2d, float_layers, forward
from vnnigen.demo.photos import Photo, split
from vnnigen.demo.quantized import QuantizedNetwork, Scale, _layer, equalize, quantize_network
from vnnigen.demo.report import Accuracy, DemoResult, accuracy, measure, run_demo, sqnr_db


def tiny_network(seed: int = 0) -> Network:
    """Three convolutions with a residual, wildly different channels before the depthwise one."""
    rng = np.random.default_rng(seed)

    def record(name: str, oc: int, ic: int, kernel: int, **more: Any) -> ConvRecord:
        weight = rng.normal(size=(oc, ic, kernel, kernel)).astype(np.float32) / kernel
        bias, ceiling = rng.normal(size=oc).astype(np.float32), np.full(oc, 100, np.float32)
        fields = {"stride": 1, "padding": kernel // 2, "groups": 1, "relu6": True, "residual": None, **more}
        return ConvRecord(name, weight, bias, ceiling=ceiling, **fields)

    convs = [
        record("expand", 16, 3, 1),
        record("depthwise", 16, 1, 3, groups=16),
        record("project", 3, 16, 1, relu6=False, residual=0),
    ]
    small = np.geomspace(0.02, 1, 16).astype(np.float32)
    convs[0] = replace(
        convs[0], weight=convs[0].weight * small[:, None, None, None], bias=convs[0].bias * small, ceiling=20 * small
    )
    convs[1] = replace(convs[1], weight=convs[1].weight / small[:, None, None, None])
    return Network(tuple(convs), rng.normal(size=(10, 3)).astype(np.float32), np.zeros(10, np.float32))


def tiny_images(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(5).normal(size=(count, 1, 9, 9, 3)).clip(-2, 2).astype(np.float32))


def test_equalization_keeps_the_function_and_raises_small_channels() -> None:
    network, image = tiny_network(), tiny_images(1)[0]
    even = equalize(network)
    before, after = (forward(float_layers(n), n.convs, image) for n in (network, even))
    np.testing.assert_allclose(after[-1], before[-1], rtol=1e-4, atol=1e-4)
    gain = np.maximum(6 / network.convs[0].ceiling, 1)
    assert gain.max() > 10
    np.testing.assert_allclose(after[1], before[1] * gain, rtol=1e-5, atol=1e-5)


def test_equalization_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = tiny_network(), tiny_images(12)
    layers = float_layers(network)
    want = [forward(layers, network.convs, image)[-1] for image in images]

    def sqnr() -> float:
        q = quantize_network(network, images[:4], Conv2dInt8)
        got = [(q.activations(image)[-1].astype(np.float32) - q.qparams[-1].zero_point) for image in images]
        return sqnr_db(np.stack(want[4:]), np.stack(got[4:]) * np.float32(q.qparams[-1].scale))

    with_it = sqnr()
    monkeypatch.setattr("vnnigen.demo.quantized.equalize", lambda n: n)
    assert with_it > sqnr() + 3


def test_bias_correction_removes_the_mean_error(network: Network, all_photos: list[Photo]) -> None:
    photo, conv = all_photos[0].pixels, network.convs[0]
    layer = _layer(0, conv, [photo], [Scale(1.0, 0), Scale(1.0, 0)], lambda w, b, **more: (w, b, more["w_scale"]))
    weight, bias, scale = layer  # type: ignore[misc]
    exact = NumpyConv2d(conv.weight, conv.bias, stride=2, padding=1)(photo).mean(axis=(0, 1, 2))
    rounded = (weight * scale[:, None, None, None]).astype(np.float32)
    for b, tolerance in ((bias, 1e-5), (conv.bias, None)):
        error = np.abs(NumpyConv2d(rounded, b, stride=2, padding=1)(photo).mean(axis=(0, 1, 2)) - exact).max()
        assert error < tolerance if tolerance else error > 1e-3


class Spy:
    """Conv2dInt8 that counts itself and insists on integers."""

    calls = 0

    def __init__(self, weight: np.ndarray, bias: np.ndarray, **arguments: Any) -> None:
        assert weight.dtype == np.int8
        self.layer = Conv2dInt8(weight, bias, **arguments)

    isa = "spy"

    def __call__(self, x: np.ndarray, out: np.ndarray | None = None, tensors: Any = ()) -> np.ndarray:
        Spy.calls += 1
        assert x.dtype == np.uint8
        assert all(t.dtype == np.uint8 for t in tensors)
        y = self.layer(x, out, tensors)
        assert y.dtype == np.uint8
        return y


@pytest.fixture(scope="module")
def quantized(network: Network, all_photos: list[Photo]) -> QuantizedNetwork:
    return quantize_network(network, [p.pixels for p in split(all_photos)[0]], Spy)


def test_all_52_convolutions_run_in_int8(quantized: QuantizedNetwork, all_photos: list[Photo]) -> None:
    Spy.calls = 0
    assert quantized.logits(all_photos[1].pixels).shape == (1, 1000)
    assert Spy.calls == len(quantized.layers) == 52


def test_int8_network_recognises_held_out_photos(
    network: Network, quantized: QuantizedNetwork, all_photos: list[Photo]
) -> None:
    _, held_out = split(all_photos)
    labels, images = np.array([p.label for p in held_out]), [p.pixels for p in held_out]
    want = report._logits(network, float_layers(network), images)
    got = np.concatenate([quantized.logits(image) for image in images])
    assert sqnr_db(want, got) > 20
    assert accuracy(got, labels).top1 >= accuracy(want, labels).top1 - 2
    assert accuracy(got, labels).top5 >= 14


def test_every_activation_is_that_of_the_reference_tier(network: Network, all_photos: list[Photo]) -> None:
    # A quarter of a photo: the reference's exact rounding takes its time.
    calibration, image = [p.pixels for p in split(all_photos)[0][:2]], all_photos[1].pixels[:, 40:152, 40:152]
    got = quantize_network(network, calibration, Conv2dInt8).activations(image)
    want = quantize_network(network, calibration, partial(Conv2dInt8, isa="reference")).activations(image)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"activation {i}")


# --- the report ------------------------------------------------------------------------------------------


def test_accuracy_counts() -> None:
    logits = np.array([[5, 4, 3, 2, 1, 0, 9.0], [1, 2, 3, 4, 5, 6, 7.0], [7, 6, 5, 4, 3, 2, 1.0]])
    assert accuracy(logits, np.array([6, 2, 6])) == Accuracy(1, 2)


def test_sqnr() -> None:
    signal = np.array([3.0, 4.0])
    assert sqnr_db(signal, signal + np.array([0, 0.5])) == pytest.approx(20)
    assert sqnr_db(signal, signal) == float("inf")


def tiny_result() -> DemoResult:
    pictures = [Photo(f"p{i}", i % 10, image) for i, image in enumerate(tiny_images(6))]
    return measure(tiny_network(), pictures[:2], pictures[2:], rounds=3)


def test_measure_a_small_network_end_to_end() -> None:
    result = tiny_result()
    assert (result.calibration_photos, result.held_out_photos) == (2, 4)
    assert result.kernels_sqnr_db > 100
    assert result.logit_sqnr_db > 25
    assert [layer.kind for layer in result.layers] == ["1x1", "3x3 dw", "1x1"]
    assert result.layers[0].shape == "9²x3 → 9²x16"
    assert all(layer.int8_us > 0 and layer.f32_us > 0 for layer in result.layers)
    assert result.f32_ms == pytest.approx(sum(layer.f32_us for layer in result.layers) / 1e3)
    assert result.speedup == pytest.approx(result.f32_ms / result.int8_ms)


def test_f32_kernels_are_the_timed_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    class Recording(Conv2dF32):
        def __call__(self, x: Any, out: Any = None, tensors: Any = ()) -> Any:
            timed.append("f32" if out is not None else "run")
            return super().__call__(x, out, tensors)

    pictures = [Photo("p", 0, image) for image in tiny_images(2)]
    measure(tiny_network(), pictures[:1], pictures[1:], conv_f32=Recording, rounds=4)
    assert timed.count("f32") == 3 * 5


def test_printed_report_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], network: Network, all_photos: list[Photo]
) -> None:
    result = tiny_result()
    monkeypatch.setattr(report, "measure", lambda network, calibration, held_out: result)
    before = num_threads()
    console = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    assert run_demo(console, threads=1) is result
    assert num_threads() == before
    text = console.export_text()
    for part in ("calibrated on 2 photos", "4 others", f"{result.int8.top5} / 4", "SQNR", "9²x16 → 9²x3", "all 3"):
        assert part in " ".join(text.split()), text
    assert max(map(len, text.splitlines())) <= 80
    capsys.readouterr()
    run_demo(as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data["speedup"] == pytest.approx(result.speedup)
    assert len(data["layers"]) == 3
    assert set(data["int8"]) == {"top1", "top5"}
