"""MobileNetV2 as a list of 52 convolutions and a classifier, from torchvision's state dict.

Activations are NHWC. Activation 0 is the image and activation `i + 1` is the output of convolution `i`, so a
record names its residual input by the index of an activation. What a convolution runs on is a parameter: a
record is only weights and geometry, and `forward` takes one callable per record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from vnnigen.errors import ModelError
from vnnigen.kernels.post_ops import Clip, PostOp, Sum

Array = NDArray[Any]
F32 = NDArray[np.float32]

BN_EPSILON = 1e-5  # torch's default, which torchvision's MobileNetV2 keeps
BN_SIGMAS = 6.0  # how many standard deviations above its mean a channel is expected to reach
CLASSES = 1000

# Sandler et al. 2018, table 2: expansion, output channels, repeats, stride of the first repeat.
BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class ConvLayer(Protocol):
    """A convolution that is ready to run; `tensors` fills its `Sum` post-ops in order."""

    @property
    def isa(self) -> str:
        """What it runs on."""

    def __call__(self, x: Array, out: Array | None = None, tensors: Sequence[Array] = ()) -> Array:
        """Convolve `x` [N, H, W, C] and return [N, OH, OW, OC]."""


@dataclass(frozen=True, eq=False)
class ConvRecord:
    """One convolution with its batch norm folded in."""

    name: str
    weight: F32  # OIHW
    bias: F32
    stride: int
    padding: int
    groups: int
    relu6: bool
    residual: int | None  # index of the activation that is added to the output
    ceiling: F32  # per output channel: what batch norm says the output hardly ever exceeds


@dataclass(frozen=True, eq=False)
class Network:
    """The convolutions in order, then global average pooling and a fully connected classifier."""

    convs: tuple[ConvRecord, ...]
    classifier: F32  # [classes, channels]
    classifier_bias: F32


def mobilenet_v2(state: Mapping[str, Array]) -> Network:
    """Build the network from torchvision's parameter names.

    Raises `ModelError` when a parameter is missing, has another shape or is not finite.
    """
    convs = tuple(_records(state))
    width = convs[-1].bias.size
    weight = _parameter(state, "classifier.1.weight", (CLASSES, width)).astype(np.float32)
    return Network(convs, weight, _parameter(state, "classifier.1.bias", (CLASSES,)).astype(np.float32))


def fold_batch_norm(weight: Array, gamma: Array, beta: Array, mean: Array, variance: Array) -> tuple[F32, F32]:
    """Fold an inference-mode batch norm into weights [O, I, H, W]: float64 inside, rounded to f32 once."""
    factor = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + BN_EPSILON)
    folded = weight.astype(np.float64) * factor[:, None, None, None]
    bias = beta.astype(np.float64) - mean.astype(np.float64) * factor
    return folded.astype(np.float32), bias.astype(np.float32)


def forward(layers: Sequence[ConvLayer], convs: Sequence[ConvRecord], x: Array) -> list[Array]:
    """Run all convolutions; return every activation, the input first."""
    activations = [x]
    for layer, conv in zip(layers, convs, strict=True):
        tensors = () if conv.residual is None else (activations[conv.residual],)
        activations.append(layer(activations[-1], tensors=tensors))
    return activations


def classify(network: Network, features: F32) -> F32:
    """Compute the logits [N, classes] from the last activation [N, H, W, C]."""
    pooled = features.mean(axis=(1, 2), dtype=np.float32)
    return np.asarray(pooled @ network.classifier.T + network.classifier_bias)


def post_ops(conv: ConvRecord, residual: Sum | None = None) -> tuple[PostOp, ...]:
    """List the post-ops of `conv` in order; `residual` describes the tensor to add where there is one."""
    ops: list[PostOp] = []
    if conv.residual is not None:
        ops.append(residual or Sum())
    if conv.relu6:
        ops.append(Clip(0.0, 6.0))
    return tuple(ops)


class NumpyConv2d:
    """An f32 convolution in NumPy: the independent yardstick for accuracy, on BLAS and so fast enough.

    Takes dense and depthwise convolutions, and the post-ops `Sum` (with the tensor given in the call) and
    `Clip`, which is all MobileNetV2 has.
    """

    isa = "numpy"

    def __init__(
        self, weight: F32, bias: F32, *, stride: int = 1, padding: int = 0, groups: int = 1,
        post_ops: Sequence[PostOp] = (),
    ) -> None:  # fmt: skip
        """Keep the weights [O, I/groups, H, W] in the order that the matrix product wants."""
        self.kernel = weight.shape[2:]
        self.depthwise = groups > 1
        self.taps = np.ascontiguousarray(weight.transpose(2, 3, 1, 0))  # [H, W, I/groups, O]
        self.bias, self.stride, self.padding, self.post_ops = bias, stride, padding, tuple(post_ops)

    def __call__(self, x: Array, out: Array | None = None, tensors: Sequence[Array] = ()) -> Array:
        """Convolve `x` [N, H, W, C], then apply the post-ops."""
        p = self.padding
        padded = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0))) if p else x
        y = self._depthwise(padded) if self.depthwise else self._dense(padded)
        y += self.bias
        rest = iter(tensors)
        for op in self.post_ops:
            if isinstance(op, Sum):
                y += next(rest) * np.float32(op.scale)
            elif isinstance(op, Clip):
                np.clip(y, op.lo, op.hi, out=y)
            else:
                raise ModelError(f"the NumPy convolution does not know the post-op {op}")
        if out is None:
            return y
        out[...] = y
        return out

    def _dense(self, x: Array) -> Array:
        kh, kw = self.kernel
        if (kh, kw) == (1, 1):
            return np.asarray(x[:, :: self.stride, :: self.stride] @ self.taps[0, 0])
        windows = sliding_window_view(x, (kh, kw), (1, 2))[:, :: self.stride, :: self.stride]  # [N,OH,OW,C,H,W]
        n, oh, ow = windows.shape[:3]
        rows = windows.transpose(0, 1, 2, 4, 5, 3).reshape(n * oh * ow, -1)
        y = rows @ self.taps.reshape(rows.shape[1], -1)
        return np.asarray(y.reshape(n, oh, ow, -1))

    def _depthwise(self, x: Array) -> Array:
        (kh, kw), s = self.kernel, self.stride
        oh, ow = (x.shape[1] - kh) // s + 1, (x.shape[2] - kw) // s + 1
        y = np.zeros((x.shape[0], oh, ow, x.shape[3]), x.dtype)
        for i, j in np.ndindex(kh, kw):
            y += x[:, i : i + (oh - 1) * s + 1 : s, j : j + (ow - 1) * s + 1 : s] * self.taps[i, j, 0]
        return y


def float_layers(network: Network, conv: Callable[..., ConvLayer] = NumpyConv2d) -> list[ConvLayer]:
    """Every convolution of the network, made by `conv`: NumPy's, or `vnnigen.Conv2dF32`."""
    return [
        conv(c.weight, c.bias, stride=c.stride, padding=c.padding, groups=c.groups, post_ops=post_ops(c))
        for c in network.convs
    ]


# ---------------------------------------------------------------------------------------------------------
# torchvision's names


def _records(state: Mapping[str, Array]) -> Iterator[ConvRecord]:
    """Walk the architecture and yield its convolutions in the order they run."""
    yield _record(state, "features.0", 3, 32, kernel=3, stride=2)
    channels, feature, done = 32, 1, 1
    for expansion, out, repeats, first_stride in BLOCKS:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            wide, prefix, entry, part = channels * expansion, f"features.{feature}.conv", done, 0
            if expansion > 1:
                yield _record(state, f"{prefix}.0", channels, wide)
                part = 1
            yield _record(state, f"{prefix}.{part}", wide, wide, kernel=3, stride=stride, groups=wide)
            residual = entry if stride == 1 and channels == out else None
            names = (f"{prefix}.{part + 1}", f"{prefix}.{part + 2}")
            yield _record(state, names, wide, out, relu6=False, residual=residual)
            channels, feature, done = out, feature + 1, done + part + 2
    yield _record(state, f"features.{feature}", channels, 1280)


def _record(
    state: Mapping[str, Array], names: str | tuple[str, str], inputs: int, outputs: int, *, kernel: int = 1,
    stride: int = 1, groups: int = 1, relu6: bool = True, residual: int | None = None,
) -> ConvRecord:  # fmt: skip
    """One convolution; `names` are those of the convolution and its batch norm, or their common prefix."""
    conv, norm = (f"{names}.0", f"{names}.1") if isinstance(names, str) else names
    weight = _parameter(state, f"{conv}.weight", (outputs, inputs // groups, kernel, kernel))
    parts = ("weight", "bias", "running_mean", "running_var")
    gamma, beta, mean, variance = (_parameter(state, f"{norm}.{part}", (outputs,)) for part in parts)
    folded, bias = fold_batch_norm(weight, gamma, beta, mean, variance)
    ceiling = (beta + BN_SIGMAS * np.abs(gamma)).astype(np.float32)
    return ConvRecord(conv, folded, bias, stride, kernel // 2, groups, relu6, residual, ceiling)


def _parameter(state: Mapping[str, Array], name: str, shape: tuple[int, ...]) -> Array:
    value = state.get(name)
    if value is None:
        raise ModelError(f"the state dict has no {name!r}; is it torchvision's MobileNetV2?")
    if value.shape != shape:
        raise ModelError(f"{name!r} has shape {value.shape}, MobileNetV2 has {shape}")
    if value.dtype.kind != "f" or not np.isfinite(value).all():
        raise ModelError(f"{name!r} must hold finite floating-point numbers")
    return value
