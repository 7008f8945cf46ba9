"""The network: its shape, batch-norm folding, and what it sees on the photos."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from vnnigen import Clip, LeakyReLU, ModelError, Sum
from vnnigen.demo.mobilenet import (
    BN_EPSILON,
    Network,
    NumpyConv2d,
    classify,
    float_layers,
    fold_batch_norm,
    forward,
    mobilenet_v2,
)
from vnnigen.demo.photos import Photo, weights_path
from vnnigen.demo.report import accuracy
from vnnigen.demo.torch_pickle import load_state_dict


def slow_conv(x: np.ndarray, w: np.ndarray, stride: int, padding: int, groups: int) -> np.ndarray:
    """A convolution as its definition reads, in float64."""
    x = np.pad(x.astype(np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    (n, h, wd, _), (oc, icg, kh, kw) = x.shape, w.shape
    oh, ow, ocg = (h - kh) // stride + 1, (wd - kw) // stride + 1, oc // groups
    y = np.zeros((n, oh, ow, oc))
    for o in range(oc):
        first = o // ocg * icg
        for i, j in np.ndindex(oh, ow):
            window = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw, first : first + icg]
            y[:, i, j, o] = (window * w[o].transpose(1, 2, 0)).sum(axis=(1, 2, 3))
    return y


CONVS = [  # ic, oc, kernel, stride, padding, groups
    (3, 8, 3, 2, 1, 1),
    (6, 5, 1, 1, 0, 1),
    (6, 5, 1, 2, 0, 1),
    (7, 7, 3, 1, 1, 7),
    (7, 7, 3, 2, 1, 7),
]


@pytest.mark.parametrize(("ic", "oc", "kernel", "stride", "padding", "groups"), CONVS)
def test_numpy_convolution_is_the_definition(
    ic: int, oc: int, kernel: int, stride: int, padding: int, groups: int
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 8, ic)).astype(np.float32)
    w = rng.normal(size=(oc, ic // groups, kernel, kernel)).astype(np.float32)
    b = rng.normal(size=oc).astype(np.float32)
    want = slow_conv(x, w, stride, padding, groups) + b
    residual = rng.normal(size=want.shape).astype(np.float32)
    conv = NumpyConv2d(w, b, stride=stride, padding=padding, groups=groups, post_ops=(Sum(2.0), Clip(-1, 1.5)))
    out = np.empty(want.shape, np.float32)
    assert conv(x, out=out, tensors=(residual,)) is out
    np.testing.assert_allclose(out, np.clip(want + 2 * residual, -1, 1.5), rtol=1e-5, atol=1e-5)


def test_numpy_convolution_names_a_post_op_it_does_not_know() -> None:
    conv = NumpyConv2d(np.ones((1, 1, 1, 1), np.float32), np.zeros(1, np.float32), post_ops=(LeakyReLU(0.1),))
    with pytest.raises(ModelError, match="LeakyReLU"):
        conv(np.ones((1, 1, 1, 1), np.float32))


@pytest.mark.parametrize(("ic", "oc", "kernel", "stride", "padding", "groups"), CONVS)
def test_folded_batch_norm_equals_unfolded(
    ic: int, oc: int, kernel: int, stride: int, padding: int, groups: int
) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, 6, 6, ic))
    w = rng.normal(size=(oc, ic // groups, kernel, kernel)).astype(np.float32)
    gamma, beta, mean = rng.normal(size=(3, oc)).astype(np.float32)
    variance = rng.uniform(1e-6, 4, oc).astype(np.float32)  # small enough for epsilon to matter
    y = slow_conv(x, w, stride, padding, groups)
    want = gamma * (y - mean) / np.sqrt(variance.astype(np.float64) + BN_EPSILON) + beta
    folded, bias = fold_batch_norm(w, gamma, beta, mean, variance)
    assert folded.dtype == bias.dtype == np.float32
    got = slow_conv(x, folded, stride, padding, groups) + bias
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_architecture(network: Network) -> None:
    convs = network.convs
    assert len(convs) == 52
    assert sum(c.groups > 1 for c in convs) == 17
    assert sum(c.residual is not None for c in convs) == 10
    assert sum(not c.relu6 for c in convs) == 17
    assert all(c.groups in (1, c.weight.shape[0]) for c in convs)
    for a, b in pairwise(convs):
        assert b.weight.shape[1] * b.groups == a.weight.shape[0]
    assert network.classifier.shape == (1000, 1280)


def test_work_is_the_published_300_million_multiply_adds(network: Network) -> None:
    side, macs = 224, network.classifier.size
    for c in network.convs:
        side = -(-side // c.stride)
        macs += side * side * c.weight.size
    assert side == 7
    assert round(macs / 1e6) == 301  # Sandler et al. 2018, table 4: 300M


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("features.0.0.weight", None, "has no 'features.0.0.weight'"),
        ("features.17.conv.3.running_var", None, "has no 'features.17.conv.3.running_var'"),
        ("features.2.conv.0.0.weight", np.zeros((96, 16, 3, 3), np.float32), r"\(96, 16, 3, 3\), MobileNetV2 has"),
        ("classifier.1.bias", np.full(1000, np.nan, np.float32), "finite"),
        ("features.0.1.bias", np.zeros(32, np.int64), "floating-point"),
    ],
)
def test_state_dicts_that_do_not_fit(network: Network, name: str, change: np.ndarray | None, message: str) -> None:
    state = load_state_dict(weights_path())
    if change is None:
        del state[name]
    else:
        state[name] = change
    with pytest.raises(ModelError, match=message):
        mobilenet_v2(state)


def test_f32_network_recognises_the_photos(network: Network, all_photos: list[Photo]) -> None:
    layers = float_layers(network)
    logits = [classify(network, forward(layers, network.convs, p.pixels)[-1]) for p in all_photos]
    got = accuracy(np.concatenate(logits), np.array([p.label for p in all_photos]))
    assert len(all_photos) == 20
    assert got.top1 >= 17
    assert got.top5 == 20
