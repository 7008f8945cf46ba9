"""Rules of elementwise operators, reductions, products of matrices and normalizations."""

from __future__ import annotations

from collections.abc import Sequence

from vnnigen.graph.attributes import axes_of, axis_of, int_attr
from vnnigen.graph.dtypes import onnx_type
from vnnigen.graph.infer_base import Shape, Site, broadcast, rule, same_length
from vnnigen.graph.ir import Dim, TensorType


@rule(
    "Identity", "Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Gelu", "Erf", "Softplus",
    "Softsign", "Silu", "Swish", "Mish", "Elu", "Selu", "Celu", "ThresholdedRelu", "Shrink", "Sqrt", "Exp", "Log",
    "Neg", "Abs", "Reciprocal", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh",
    "Cosh", "Asinh", "Acosh", "Atanh", "Not", "BitwiseNot", "CumSum", "Trilu", "LRN", "LpNormalization",
    "MeanVarianceNormalization", "ReverseSequence",
)  # fmt: skip
def same(site: Site) -> TensorType:
    return site.type(0)


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(site: Site) -> TensorType:
    x = site.shape(0)
    if x is not None:
        axis_of(site.node, int_attr(site.node, "axis", -1), len(x))
    return site.type(0)


def _together(site: Site) -> Shape | None:
    return broadcast(site, *(site.shape(i) for i in range(len(site.types))))


@rule("Add", "Sub", "Mul", "Div", "Sum", "Min", "Max", "Mean", "Mod", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
def elementwise(site: Site) -> TensorType:
    return TensorType(site.dtype(0), _together(site))


@rule("Pow")
def power(site: Site) -> TensorType:
    return TensorType(site.dtype(0), _together(site))


@rule("PRelu")
def prelu(site: Site) -> TensorType:
    if broadcast(site, site.shape(0), site.shape(1)) != site.shape(0) and None not in (site.shape(0), site.shape(1)):
        raise site.error(f"a slope of shape {site.shape(1)} for {site.shape(0)}")
    return site.type(0)


@rule("And", "Or", "Xor", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
def compare(site: Site) -> TensorType:
    return TensorType("bool", _together(site))


@rule("IsNaN", "IsInf")
def test(site: Site) -> TensorType:
    return TensorType("bool", site.shape(0))


@rule(
    "ReduceSum", "ReduceMean", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSum", "ReduceLogSumExp",
)  # fmt: skip
def reduction(site: Site) -> TensorType:
    x, axes, keep = site.shape(0), site.ints(1), int_attr(site.node, "keepdims", 1)
    if x is None:
        return site.type(0)
    if site.has(1) and axes is None:
        return TensorType(site.dtype(0), site.unknown(len(x)) if keep else None)
    if not axes and int_attr(site.node, "noop_with_empty_axes", 0):
        return site.type(0)
    return TensorType(site.dtype(0), _without(x, axes_of(site.node, axes or tuple(range(len(x))), len(x)), bool(keep)))


def _without(x: Shape, axes: tuple[int, ...], keep: bool) -> Shape:
    return tuple(1 if i in axes else d for i, d in enumerate(x) if keep or i not in axes)


@rule("ArgMax", "ArgMin")
def arg_extreme(site: Site) -> TensorType:
    x = site.shape(0)
    if x is None:
        return TensorType("s64", None)
    axis = axis_of(site.node, int_attr(site.node, "axis", 0), len(x))
    return TensorType("s64", _without(x, (axis,), bool(int_attr(site.node, "keepdims", 1))))


def _matmul(site: Site, a: Shape | None, b: Shape | None) -> Shape | None:
    if a is None or b is None:
        return None
    if not a or not b:
        raise site.error(f"cannot multiply {a} by {b}")
    left: Shape = a if len(a) > 1 else (1, *a)
    right: Shape = b if len(b) > 1 else (*b, 1)
    same_length(site, left[-1], right[-2], f"cannot multiply {a} by {b}")
    batch = broadcast(site, left[:-2], right[:-2])
    assert batch is not None
    rows: Shape = left[-2:-1] if len(a) > 1 else ()
    columns: Shape = right[-1:] if len(b) > 1 else ()
    return (*batch, *rows, *columns)


@rule("MatMul")
def matmul(site: Site) -> TensorType:
    return TensorType(site.dtype(0), _matmul(site, site.shape(0), site.shape(1)))


@rule("MatMulInteger")
def matmul_integer(site: Site) -> TensorType:
    return TensorType("s32", _matmul(site, site.shape(0), site.shape(1)))


@rule("Linear")
def linear(site: Site) -> TensorType:
    y = _matmul(site, site.shape(0), site.shape(1, rank=2))
    if y is not None and site.has(2) and broadcast(site, y, site.shape(2)) not in (y, None):
        raise site.error(f"a bias of shape {site.shape(2)} for {y}")
    return TensorType(site.dtype(0), y)


@rule("Gemm")
def gemm(site: Site) -> TensorType:
    a, b = site.shape(0, rank=2), site.shape(1, rank=2)
    if a is None or b is None:
        return TensorType(site.dtype(0), site.unknown(2))
    a = a[::-1] if int_attr(site.node, "transA", 0) else a
    b = b[::-1] if int_attr(site.node, "transB", 0) else b
    y = _matmul(site, a, b)
    if site.has(2) and broadcast(site, y, site.shape(2)) not in (y, None):
        raise site.error(f"a bias of shape {site.shape(2)} for {y}")
    return TensorType(site.dtype(0), y)


@rule("BatchNormalization", "InstanceNormalization", "GroupNormalization")
def per_channel(site: Site) -> TensorType:
    x = site.shape(0)
    if x is None:
        return site.type(0)
    if len(x) < 2:
        raise site.error(f"an input of shape {x} has no channels")
    for i in range(1, len(site.types)):
        vector = site.shape(i)
        if vector is not None and len(vector) != 1:
            raise site.error(f"input {i} of shape {vector} must have one value per channel")
        if vector is not None:
            same_length(site, vector[0], x[1], f"input {i} has not one value per channel of {x}")
    return site.type(0)


@rule("LayerNormalization", "RMSNormalization")
def layer_normalization(site: Site) -> Sequence[TensorType]:
    x = site.shape(0)
    if x is None:
        return [site.type(0), TensorType("f32", None), TensorType("f32", None)]
    axis = axis_of(site.node, int_attr(site.node, "axis", -1), len(x))
    for i in range(1, len(site.types)):
        if site.has(i) and broadcast(site, x, site.shape(i)) not in (x, None):
            raise site.error(f"input {i} of shape {site.shape(i)} for {x}")
    rest: tuple[Dim, ...] = (*x[:axis], *(1,) * (len(x) - axis))
    kind = onnx_type(int_attr(site.node, "stash_type", 1))
    return [site.type(0), TensorType(kind, rest), TensorType(kind, rest)]
