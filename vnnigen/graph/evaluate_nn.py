"""Convolutions, pooling and the quantization operators."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np

from vnnigen.graph.attributes import axis_of, int_attr, ints_attr, node_error
from vnnigen.graph.dtypes import numpy_dtype, onnx_type
from vnnigen.graph.evaluate_base import AnyArray, evaluates, exact, per_channel, wide
from vnnigen.graph.ir import Node
from vnnigen.graph.windows import Windows, transposed, window_counts, windows


def _tap(padded: AnyArray, w: Windows, tap: tuple[int, ...], counts: tuple[int, ...]) -> AnyArray:
    """What one position of the kernel reads: a pixel per window, as a view."""
    where = [
        slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, s, n in zip(tap, w.dilations, w.strides, counts, strict=True)
    ]
    index = (slice(None), slice(None), *where)
    return padded[index]


def _of_tap(weights: AnyArray, tap: tuple[int, ...]) -> AnyArray:
    """The weights of one position of the kernel, its last dimensions."""
    index = (slice(None),) * (weights.ndim - len(tap)) + tap
    return weights[index]


def _taps(kernel: tuple[int, ...]) -> product[tuple[int, ...]]:
    return product(*map(range, kernel))


def _counts(node: Node, w: Windows, spatial: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(n) for n in window_counts(node, w, spatial, ("",) * len(spatial)))


def _convolve(node: Node, x: AnyArray, weights: AnyArray) -> AnyArray:
    """Sum over the kernel's positions of a product of matrices each: no copy of every window is made."""
    groups = int_attr(node, "group", 1)
    batch, channels, *_ = x.shape
    outputs, per_group = weights.shape[:2]
    if channels != per_group * groups or outputs % groups:
        raise node_error(node, f"weights {weights.shape} of {groups} groups for {channels} channels")
    w = windows(node, weights.shape[2:], x.shape[2:])
    counts = _counts(node, w, x.shape[2:])
    padded = np.pad(x, [(0, 0), (0, 0), *zip(w.begin, w.end, strict=True)])
    total: AnyArray = np.zeros((batch, groups, outputs // groups, prod(counts)), x.dtype)
    for tap in _taps(w.kernel):
        pixels = _tap(padded, w, tap, counts).reshape(batch, groups, per_group, prod(counts))
        total += np.matmul(_of_tap(weights, tap).reshape(groups, outputs // groups, per_group), pixels)
    return total.reshape(batch, outputs, *counts)


@evaluates("Conv")
def conv(node: Node, x: AnyArray, weights: AnyArray, bias: AnyArray | None = None) -> AnyArray:
    y = _convolve(node, wide(x), wide(weights))
    return (y if bias is None else y + per_channel(wide(bias), x.ndim, 1)).astype(x.dtype)


@evaluates("ConvInteger")
def conv_integer(
    node: Node, x: AnyArray, weights: AnyArray, x_zero: AnyArray | None = None, w_zero: AnyArray | None = None
) -> AnyArray:
    left = exact(x) - (0 if x_zero is None else exact(x_zero).reshape(()))
    right = exact(weights) - (0 if w_zero is None else per_channel(exact(w_zero), weights.ndim, 0))
    return _convolve(node, left, right).astype(np.int32)


@evaluates("ConvTranspose")
def conv_transpose(node: Node, x: AnyArray, weights: AnyArray, bias: AnyArray | None = None) -> AnyArray:
    groups = int_attr(node, "group", 1)
    batch, channels, *spatial = x.shape
    if weights.shape[0] != channels or channels % groups:
        raise node_error(node, f"weights {weights.shape} of {groups} groups for {channels} channels")
    kernel, per_group = weights.shape[2:], weights.shape[1]
    t = transposed(node, kernel, tuple(spatial), ("",) * len(spatial))
    sizes = tuple(int(s) for s in t.size)
    # Wide enough for every contribution and for what is asked for; then cut.
    room = [max((n - 1) * s + (k - 1) * d + 1, max(b, 0) + o) + max(-b, 0) for n, s, k, d, b, o in
            zip(spatial, t.strides, kernel, t.dilations, t.begin, sizes, strict=True)]  # fmt: skip
    shift = [max(-b, 0) for b in t.begin]  # a negative cut adds zeros in front
    y: AnyArray = np.zeros((batch, groups * per_group, *room), wide(x).dtype)
    pixels = wide(x).reshape(batch, groups, channels // groups, prod(spatial))
    for tap in _taps(kernel):
        w = _of_tap(wide(weights), tap).reshape(groups, channels // groups, per_group).swapaxes(1, 2)
        part = np.matmul(w, pixels).reshape(batch, groups * per_group, *spatial)
        where = [slice(f + i * d, f + i * d + (n - 1) * s + 1, s) for f, i, d, s, n in
                 zip(shift, tap, t.dilations, t.strides, spatial, strict=True)]  # fmt: skip
        at = (slice(None), slice(None), *where)
        y[at] += part
    cut = [slice(f + b, f + b + o) for f, b, o in zip(shift, t.begin, sizes, strict=True)]
    rest = (slice(None), slice(None), *cut)
    y = y[rest]
    return (y if bias is None else y + per_channel(wide(bias), x.ndim, 1)).astype(x.dtype)


def _pooled(node: Node, x: AnyArray, fill: float) -> tuple[Windows, tuple[int, ...], AnyArray]:
    """The windows of a pooling node, how many, and the image with `fill` around it as far as windows reach."""
    w = windows(node, ints_attr(node, "kernel_shape", ()), x.shape[2:])
    counts = _counts(node, w, x.shape[2:])
    reach = [max((n - 1) * s + e - d - b, 0) for n, s, e, d, b in
             zip(counts, w.strides, w.extent, x.shape[2:], w.begin, strict=True)]  # fmt: skip
    value = np.array(fill).astype(x.dtype)
    return w, counts, np.pad(x, [(0, 0), (0, 0), *zip(w.begin, reach, strict=True)], constant_values=value)


@evaluates("MaxPool")
def max_pool(node: Node, x: AnyArray) -> AnyArray:
    lowest = np.iinfo(x.dtype).min if x.dtype.kind in "iu" else -np.inf
    w, counts, padded = _pooled(node, x, lowest)
    y = np.full((*x.shape[:2], *counts), lowest).astype(x.dtype)
    for tap in _taps(w.kernel):
        np.maximum(y, _tap(padded, w, tap, counts), out=y)
    return y


@evaluates("AveragePool", "LpPool")
def average_pool(node: Node, x: AnyArray) -> AnyArray:
    p = int_attr(node, "p", 2)
    image = np.abs(wide(x)) ** p if node.op == "LpPool" else wide(x)
    w, counts, padded = _pooled(node, image, 0)
    total: AnyArray = np.zeros((*x.shape[:2], *counts), image.dtype)
    for tap in _taps(w.kernel):
        total += _tap(padded, w, tap, counts)
    if node.op == "LpPool":
        return np.asarray(total ** (1 / p)).astype(x.dtype)
    return (total / window_pixels(node, w, x.shape[2:], counts)).astype(x.dtype)


def window_pixels(node: Node, w: Windows, spatial: tuple[int, ...], counts: tuple[int, ...]) -> AnyArray:
    """How many pixels each window of an AveragePool averages (shape `counts`): those that are within the image.

    With count_include_pad also those of the padding, but never those beyond it, which ceil_mode makes windows reach.
    """
    include = int_attr(node, "count_include_pad", 0)
    pixels: AnyArray = np.ones((), np.int64)
    for i, size in enumerate(spatial):
        taps = np.arange(counts[i])[:, None] * w.strides[i] + np.arange(w.kernel[i]) * w.dilations[i] - w.begin[i]
        low, high = (-w.begin[i], size + w.end[i]) if include else (0, size)
        pixels = pixels[..., None] * ((taps >= low) & (taps < high)).sum(axis=1)
    return pixels


@evaluates("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(node: Node, x: AnyArray) -> AnyArray:
    axes = tuple(range(2, x.ndim))
    if node.op == "GlobalMaxPool":
        return np.asarray(np.max(x, axes, keepdims=True))
    if node.op == "GlobalLpPool":
        p = int_attr(node, "p", 2)
        return np.asarray(np.sum(np.abs(x) ** p, axes, keepdims=True) ** (1 / p)).astype(x.dtype)
    return np.asarray(np.mean(wide(x), axes, keepdims=True)).astype(x.dtype)


# Quantization.


def _along(node: Node, x: AnyArray, values: AnyArray) -> AnyArray:
    """A scale or zero point laid over `x`: of all, per index of an axis, or per block of one."""
    if values.size == 1 and values.ndim < 2:
        return values.reshape(())
    axis = axis_of(node, int_attr(node, "axis", 1), x.ndim)
    if values.ndim == 1:
        return per_channel(values, x.ndim, axis)
    block = int_attr(node, "block_size", 0) or -(-x.shape[axis] // values.shape[axis])
    return np.repeat(values, block, axis)[tuple(map(slice, x.shape))]


@evaluates("QuantizeLinear")
def quantize_linear(node: Node, x: AnyArray, scale: AnyArray, zero_point: AnyArray | None = None) -> AnyArray:
    wanted = int_attr(node, "output_dtype", 0)
    dtype = zero_point.dtype if zero_point is not None else numpy_dtype(onnx_type(wanted)) if wanted else np.uint8
    if np.dtype(dtype).kind not in "iu":
        raise node_error(node, f"quantization to {np.dtype(dtype)}")
    # Division and rounding (half to even) in f32, as ONNX says; x may be s32.
    scaled = np.rint(wide(x).astype(np.float32) / _along(node, x, scale).astype(np.float32))
    shifted = scaled.astype(np.float64) + (0 if zero_point is None else _along(node, x, zero_point).astype(np.float64))
    bounds = np.iinfo(np.dtype(dtype))
    return np.clip(shifted, bounds.min, bounds.max).astype(dtype)


@evaluates("DequantizeLinear")
def dequantize_linear(node: Node, x: AnyArray, scale: AnyArray, zero_point: AnyArray | None = None) -> AnyArray:
    wanted = int_attr(node, "output_dtype", 0)
    shifted = x.astype(np.int64) - (0 if zero_point is None else _along(node, x, zero_point).astype(np.int64))
    real = shifted.astype(np.float32) * _along(node, x, scale).astype(np.float32)
    return real.astype(numpy_dtype(onnx_type(wanted)) if wanted else scale.dtype)


@evaluates("DynamicQuantizeLinear")
def dynamic_quantize_linear(_: Node, x: AnyArray) -> tuple[AnyArray, AnyArray, AnyArray]:
    low = np.minimum(np.min(x, initial=0.0), 0).astype(np.float32)
    high = np.maximum(np.max(x, initial=0.0), 0).astype(np.float32)
    scale = np.float32((high - low) / np.float32(255))
    if scale == 0:  # all zeros: any scale will do
        scale = np.float32(1)
    zero_point = np.uint8(np.clip(np.rint((0 - low) / scale), 0, 255))
    q = np.clip(np.rint(x / scale) + np.float32(zero_point), 0, 255).astype(np.uint8)
    return q, np.array(scale), np.array(zero_point)


@evaluates("ReverseSequence")
def reverse_sequence(node: Node, x: AnyArray, lengths: AnyArray) -> AnyArray:
    batch, time = int_attr(node, "batch_axis", 1), int_attr(node, "time_axis", 0)
    moved = np.moveaxis(x, (batch, time), (0, 1)).copy()
    for row, length in zip(moved, lengths, strict=True):
        row[:length] = row[:length][::-1].copy()
    return np.moveaxis(moved, (0, 1), (batch, time))
