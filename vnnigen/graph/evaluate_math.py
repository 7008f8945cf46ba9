"""Elementwise operators, reductions, products of matrices, softmax and normalizations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, reduce

import numpy as np

from vnnigen.graph.attributes import axes_of, axis_of, float_attr, int_attr, ints_attr, node_error, str_attr
from vnnigen.graph.evaluate_base import AnyArray, evaluates, exact, per_channel, wide
from vnnigen.graph.evaluate_shape import ints
from vnnigen.graph.ir import Node

# Elementwise, of one tensor.


@cache
def _erf_table() -> tuple[AnyArray, AnyArray]:
    """Points of [-6, 6] every 1/64, and the error function there."""
    from math import erf as scalar

    points = np.arange(-6 * 64, 6 * 64 + 1) / 64
    return points, np.array([scalar(p) for p in points])


def erf(x: AnyArray) -> AnyArray:
    """The error function in f64: five terms of Taylor's series about the nearest of 769 points (within 1e-12)."""
    points, values = _erf_table()
    clipped = np.clip(np.nan_to_num(x.astype(np.float64)), -6, 6)
    at = np.rint(clipped * 64).astype(np.int64) + 6 * 64
    p = points[at]
    h = clipped - p
    q = p * p
    terms = 1 - p * h + (4 * q - 2) * h**2 / 6 + (12 - 8 * q) * p * h**3 / 24 + (16 * q * q - 48 * q + 12) * h**4 / 120
    y: AnyArray = values[at] + 2 / np.sqrt(np.pi) * np.exp(-p * p) * h * terms
    return np.where(np.isnan(x), np.nan, y)


def sigmoid(x: AnyArray) -> AnyArray:
    """1 / (1 + e^-x), without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def softplus(x: AnyArray) -> AnyArray:
    """log(1 + e^x), without overflow."""
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def _gelu(node: Node, x: AnyArray) -> AnyArray:
    if str_attr(node, "approximate", "none") == "tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def _selu(node: Node, x: AnyArray) -> AnyArray:
    alpha, gamma = float_attr(node, "alpha", 1.67326319217681884765625), float_attr(node, "gamma", 1.05070102214813232)
    return gamma * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _hard_sigmoid(node: Node, x: AnyArray) -> AnyArray:
    return np.clip(float_attr(node, "alpha", 0.2) * x + float_attr(node, "beta", 0.5), 0, 1)


def _shrink(node: Node, x: AnyArray) -> AnyArray:
    bias, lambd = float_attr(node, "bias", 0.0), float_attr(node, "lambd", 0.5)
    return np.where(x < -lambd, x + bias, np.where(x > lambd, x - bias, 0))


def _celu(node: Node, x: AnyArray) -> AnyArray:
    alpha = float_attr(node, "alpha", 1.0)
    return np.maximum(x, 0) + alpha * np.expm1(np.minimum(x, 0) / alpha)


# Of (node, x): these have attributes, or are names of several steps.
_ACTIVATIONS: dict[str, Callable[[Node, AnyArray], AnyArray]] = {
    "LeakyRelu": lambda n, x: np.where(x < 0, float_attr(n, "alpha", 0.01) * x, x),
    "Elu": lambda n, x: np.where(x < 0, float_attr(n, "alpha", 1.0) * np.expm1(np.minimum(x, 0)), x),
    "Selu": _selu,
    "Celu": _celu,
    "ThresholdedRelu": lambda n, x: np.where(x > float_attr(n, "alpha", 1.0), x, 0),
    "Shrink": _shrink,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda n, x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Gelu": _gelu,
    "Silu": lambda n, x: x * sigmoid(x),
    "Swish": lambda n, x: x * sigmoid(float_attr(n, "alpha", 1.0) * x),
    "Mish": lambda n, x: x * np.tanh(softplus(x)),
}
_UNARY: dict[str, Callable[[AnyArray], AnyArray]] = {
    "Relu": lambda x: np.maximum(x, 0), "Sigmoid": sigmoid, "Tanh": np.tanh, "Erf": erf, "Softplus": softplus,
    "Softsign": lambda x: x / (1 + np.abs(x)), "Sqrt": np.sqrt, "Exp": np.exp, "Log": np.log, "Neg": np.negative,
    "Abs": np.abs, "Reciprocal": lambda x: 1 / x, "Floor": np.floor, "Ceil": np.ceil, "Round": np.rint,
    "Sign": np.sign, "Sin": np.sin, "Cos": np.cos, "Tan": np.tan, "Asin": np.arcsin, "Acos": np.arccos,
    "Atan": np.arctan, "Sinh": np.sinh, "Cosh": np.cosh, "Asinh": np.arcsinh, "Acosh": np.arccosh,
    "Atanh": np.arctanh,
}  # fmt: skip


def _activation(function: Callable[[Node, AnyArray], AnyArray], node: Node, x: AnyArray) -> AnyArray:
    return function(node, wide(x)).astype(x.dtype)


def _unary(function: Callable[[AnyArray], AnyArray], _: Node, x: AnyArray) -> AnyArray:
    return function(wide(x)).astype(x.dtype)


for _name, _function in _ACTIVATIONS.items():
    evaluates(_name)(partial(_activation, _function))
for _name, _plain in _UNARY.items():
    evaluates(_name)(partial(_unary, _plain))

evaluates("Not")(lambda node, x: np.logical_not(x))
evaluates("BitwiseNot")(lambda node, x: np.bitwise_not(x))
evaluates("IsNaN")(lambda node, x: np.isnan(x))


@evaluates("IsInf")
def is_inf(node: Node, x: AnyArray) -> AnyArray:
    signs = int_attr(node, "detect_positive", 1), int_attr(node, "detect_negative", 1)
    found: AnyArray = np.isinf(x) & np.where(x > 0, *(np.bool_(s) for s in signs))
    return found


@evaluates("Clip")
def clip(_: Node, x: AnyArray, low: AnyArray | None = None, high: AnyArray | None = None) -> AnyArray:
    # min(max(x, low), high), as ONNX says it: `high` wins where the bounds cross.
    y = x if low is None else np.maximum(x, low.reshape(()))
    return y if high is None else np.minimum(y, high.reshape(()))


# Elementwise, of several.


def _divide(a: AnyArray, b: AnyArray) -> AnyArray:
    if a.dtype.kind not in "iu":
        return np.divide(a, b)
    quotient = np.floor_divide(a, b)  # ONNX cuts towards zero
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)


def _power(a: AnyArray, b: AnyArray) -> AnyArray:
    if a.dtype.kind in "iu" and b.dtype.kind == "f":
        return np.power(a.astype(np.float64), b)
    return np.power(a, b.astype(np.int64) if a.dtype.kind in "iu" else b.astype(a.dtype))


_BINARY: dict[str, Callable[[AnyArray, AnyArray], AnyArray]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divide, "Pow": _power, "Sum": np.add,
    "Max": np.maximum, "Min": np.minimum, "PRelu": lambda a, b: np.where(a < 0, a * b, a), "And": np.logical_and,
    "Or": np.logical_or, "Xor": np.logical_xor, "BitwiseAnd": np.bitwise_and, "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
}  # fmt: skip
_COMPARE: dict[str, Callable[[AnyArray, AnyArray], AnyArray]] = {
    "Equal": np.equal, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
}  # fmt: skip


def _fold(
    function: Callable[[AnyArray, AnyArray], AnyArray], node: Node, first: AnyArray, *others: AnyArray
) -> AnyArray:
    try:
        return reduce(function, map(wide, others), wide(first)).astype(first.dtype)
    except ValueError:
        raise node_error(node, f"shapes {[first.shape, *(o.shape for o in others)]} do not broadcast") from None


for _name, _both in _BINARY.items():
    evaluates(_name)(partial(_fold, _both))
for _name, _both in _COMPARE.items():
    evaluates(_name)(lambda node, a, b, f=_both: f(a, b))


@evaluates("Mean")
def mean(node: Node, *inputs: AnyArray) -> AnyArray:
    return (wide(_fold(np.add, node, *inputs)) / len(inputs)).astype(inputs[0].dtype)


@evaluates("Mod")
def mod(node: Node, a: AnyArray, b: AnyArray) -> AnyArray:
    return np.fmod(a, b) if int_attr(node, "fmod", 0) else np.mod(a, b)


# Reductions.


def _log_sum_exp(x: AnyArray, axis: tuple[int, ...], keepdims: bool) -> AnyArray:
    if x.size == 0:
        return np.log(np.sum(x, axis=axis, keepdims=keepdims))
    top = np.max(x, axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    total = np.log(np.sum(np.exp(x - top), axis=axis, keepdims=keepdims))
    return total + (top if keepdims else np.squeeze(top, axis))


def _extreme(function: Callable[..., AnyArray], highest: bool, x: AnyArray, **how: object) -> AnyArray:
    """The maximum or minimum, also of nothing: the type's lowest or highest number."""
    if x.dtype == np.bool_:
        return (np.any if highest else np.all)(x, **how)  # type: ignore[call-overload]
    limit = -np.inf if highest else np.inf
    if x.dtype.kind in "iu":
        limit = np.iinfo(x.dtype).min if highest else np.iinfo(x.dtype).max
    return function(x, initial=limit, **how)


_REDUCTIONS: dict[str, Callable[..., AnyArray]] = {
    "ReduceSum": np.sum, "ReduceMean": np.mean, "ReduceProd": np.prod,
    "ReduceMax": partial(_extreme, np.max, True), "ReduceMin": partial(_extreme, np.min, False),
    "ReduceL1": lambda x, **how: np.sum(np.abs(x), **how),
    "ReduceL2": lambda x, **how: np.sqrt(np.sum(np.square(x), **how)),
    "ReduceSumSquare": lambda x, **how: np.sum(np.square(x), **how),
    "ReduceLogSum": lambda x, **how: np.log(np.sum(x, **how)), "ReduceLogSumExp": _log_sum_exp,
}  # fmt: skip


def _reduce(function: Callable[..., AnyArray], node: Node, x: AnyArray, axes: AnyArray | None = None) -> AnyArray:
    chosen = () if axes is None else axes_of(node, ints(axes), x.ndim)
    if not chosen:
        if int_attr(node, "noop_with_empty_axes", 0):
            # Nothing is summed, but what ReduceL1, ReduceSumSquare, ... do to each element is done.
            return np.asarray(function(wide(x)[None], axis=(0,), keepdims=False)).astype(x.dtype)
        chosen = tuple(range(x.ndim))
    how = {"axis": chosen, "keepdims": bool(int_attr(node, "keepdims", 1))}
    return np.asarray(function(wide(x), **how)).astype(x.dtype)


for _name, _total in _REDUCTIONS.items():
    evaluates(_name)(partial(_reduce, _total))


@evaluates("ArgMax", "ArgMin")
def arg_extreme(node: Node, x: AnyArray) -> AnyArray:
    axis = axis_of(node, int_attr(node, "axis", 0), x.ndim)
    find = np.argmax if node.op == "ArgMax" else np.argmin
    if int_attr(node, "select_last_index", 0):
        found = x.shape[axis] - 1 - find(np.flip(x, axis), axis)
    else:
        found = find(x, axis)
    return np.expand_dims(found, axis) if int_attr(node, "keepdims", 1) else np.asarray(found)


@evaluates("CumSum")
def cum_sum(node: Node, x: AnyArray, axis: AnyArray) -> AnyArray:
    along = axis_of(node, int(axis.reshape(())), x.ndim)
    y = np.flip(x, along) if int_attr(node, "reverse", 0) else x
    total = np.cumsum(y, along, dtype=x.dtype)
    if int_attr(node, "exclusive", 0):
        total = total - y
    return np.flip(total, along) if int_attr(node, "reverse", 0) else total


# Products of matrices.


@evaluates("MatMul")
def matmul(node: Node, a: AnyArray, b: AnyArray) -> AnyArray:
    try:
        return np.asarray(np.matmul(wide(a), wide(b))).astype(a.dtype)
    except ValueError:
        raise node_error(node, f"cannot multiply {a.shape} by {b.shape}") from None


@evaluates("Linear")
def linear(node: Node, x: AnyArray, w: AnyArray, bias: AnyArray | None = None) -> AnyArray:
    y = matmul(node, x, w)
    return y if bias is None else (y + bias).astype(x.dtype)


@evaluates("Gemm")
def gemm(node: Node, a: AnyArray, b: AnyArray, c: AnyArray | None = None) -> AnyArray:
    left = a.T if int_attr(node, "transA", 0) else a
    right = b.T if int_attr(node, "transB", 0) else b
    y = wide(matmul(node, left, right)) * wide(np.array(float_attr(node, "alpha", 1.0), a.dtype))
    if c is not None:
        y = y + wide(c) * wide(np.array(float_attr(node, "beta", 1.0), a.dtype))
    return y.astype(a.dtype)


@evaluates("MatMulInteger")
def matmul_integer(
    _: Node, a: AnyArray, b: AnyArray, a_zero: AnyArray | None = None, b_zero: AnyArray | None = None
) -> AnyArray:
    left, right = exact(a), exact(b)
    if a_zero is not None:  # one per row
        left = left - (exact(a_zero)[..., None] if a_zero.size > 1 else exact(a_zero).reshape(()))
    if b_zero is not None:  # one per column
        right = right - (exact(b_zero) if b_zero.size > 1 else exact(b_zero).reshape(()))
    return np.asarray(np.matmul(left, right)).astype(np.int32)


# Softmax and normalizations.


@evaluates("Softmax", "LogSoftmax")
def softmax(node: Node, x: AnyArray) -> AnyArray:
    axis = axis_of(node, int_attr(node, "axis", -1), x.ndim)
    shifted = wide(x) - np.max(wide(x), axis, keepdims=True)
    e = np.exp(shifted)
    total = np.sum(e, axis, keepdims=True)
    return (e / total if node.op == "Softmax" else shifted - np.log(total)).astype(x.dtype)


@evaluates("Hardmax")
def hardmax(node: Node, x: AnyArray) -> AnyArray:
    axis = axis_of(node, int_attr(node, "axis", -1), x.ndim)
    y = np.zeros_like(x)
    np.put_along_axis(y, np.expand_dims(np.argmax(x, axis), axis), x.dtype.type(1), axis)
    return y


@evaluates("BatchNormalization")
def batch_normalization(
    node: Node, x: AnyArray, scale: AnyArray, bias: AnyArray, mean: AnyArray, variance: AnyArray
) -> AnyArray:
    factor = wide(scale) / np.sqrt(wide(variance) + float_attr(node, "epsilon", 1e-5))
    offset = wide(bias) - wide(mean) * factor
    return (wide(x) * per_channel(factor, x.ndim, 1) + per_channel(offset, x.ndim, 1)).astype(x.dtype)


def _normalized(x: AnyArray, axes: tuple[int, ...], epsilon: float) -> tuple[AnyArray, AnyArray, AnyArray]:
    mean = np.mean(x, axes, keepdims=True)
    scale = 1 / np.sqrt(np.mean(np.square(x - mean), axes, keepdims=True) + epsilon)
    return (x - mean) * scale, mean, scale


@evaluates("LayerNormalization")
def layer_normalization(
    node: Node, x: AnyArray, scale: AnyArray, bias: AnyArray | None = None
) -> AnyArray | tuple[AnyArray, ...]:
    axes = tuple(range(axis_of(node, int_attr(node, "axis", -1), x.ndim), x.ndim))
    y, mean, inverse = _normalized(wide(x), axes, float_attr(node, "epsilon", 1e-5))
    y = y * wide(scale) + (0 if bias is None else wide(bias))
    return (y.astype(x.dtype), mean, inverse)[: len(node.outputs)]


@evaluates("RMSNormalization")
def rms_normalization(node: Node, x: AnyArray, scale: AnyArray) -> AnyArray:
    axes = tuple(range(axis_of(node, int_attr(node, "axis", -1), x.ndim), x.ndim))
    square = np.mean(np.square(wide(x)), axes, keepdims=True)
    return (wide(x) / np.sqrt(square + float_attr(node, "epsilon", 1e-5)) * wide(scale)).astype(x.dtype)


@evaluates("InstanceNormalization", "GroupNormalization")
def group_normalization(node: Node, x: AnyArray, scale: AnyArray, bias: AnyArray) -> AnyArray:
    groups = x.shape[1] if node.op == "InstanceNormalization" else int_attr(node, "num_groups", 1)
    grouped = wide(x).reshape(x.shape[0], groups, -1)
    y = _normalized(grouped, (2,), float_attr(node, "epsilon", 1e-5))[0].reshape(x.shape)
    return (y * per_channel(wide(scale), x.ndim, 1) + per_channel(wide(bias), x.ndim, 1)).astype(x.dtype)


@evaluates("MeanVarianceNormalization")
def mean_variance_normalization(node: Node, x: AnyArray) -> AnyArray:
    axes = axes_of(node, ints_attr(node, "axes", (0, 2, 3)), x.ndim)
    spread = np.std(x, axes, keepdims=True) + 1e-9
    return ((x - np.mean(x, axes, keepdims=True)) / spread).astype(x.dtype)


@evaluates("LpNormalization")
def lp_normalization(node: Node, x: AnyArray) -> AnyArray:
    axis, p = axis_of(node, int_attr(node, "axis", -1), x.ndim), int_attr(node, "p", 2)
    norm = np.sum(np.abs(x) ** p, axis, keepdims=True) ** (1 / p)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm != 0)


@evaluates("LRN")
def lrn(node: Node, x: AnyArray) -> AnyArray:
    size = int_attr(node, "size", 1)
    squares = np.square(wide(x))
    before = (size - 1) // 2
    total = np.zeros_like(squares)
    for c in range(x.shape[1]):
        total[:, c] = squares[:, max(0, c - before) : c + size - before].sum(axis=1)
    base = float_attr(node, "bias", 1.0) + float_attr(node, "alpha", 1e-4) / size * total
    return (wide(x) / base ** float_attr(node, "beta", 0.75)).astype(x.dtype)
