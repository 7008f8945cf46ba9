"""Rules of convolutions, pooling, Resize, recurrence, selection and quantization."""

from __future__ import annotations

from collections.abc import Sequence

from vnnigen.graph.attributes import axes_of, axis_of, int_attr, ints_attr, str_attr
from vnnigen.graph.dtypes import onnx_type
from vnnigen.graph.evaluate_rest import resize_scales, resized_length
from vnnigen.graph.infer_base import Shape, Site, rule, same_length
from vnnigen.graph.ir import Dim, ElemType, TensorType
from vnnigen.graph.windows import transposed, window_counts, windows


def _image(site: Site) -> Shape | None:
    x = site.shape(0)
    if x is not None and len(x) < 3:
        raise site.error(f"needs an image, its input's shape is {x}")
    return x


def _static(site: Site, i: int) -> tuple[int, ...] | None:
    """The shape of weights, if it is known to the last number."""
    return site.type(i).static


def _spatial_names(site: Site, rank: int) -> tuple[str, ...]:
    return tuple(site.fresh(i + 2) for i in range(rank))


def _check_bias(site: Site, i: int, channels: int) -> None:
    if site.has(i):
        bias = site.shape(i, rank=1)
        if bias is not None:
            same_length(site, bias[0], channels, "the bias has not one value per output channel")


def _conv_shape(site: Site) -> Shape | None:
    x, weights = _image(site), _static(site, 1)
    if x is None or weights is None:
        return None if x is None else site.unknown(len(x))
    groups = int_attr(site.node, "group", 1)
    if len(weights) != len(x):
        raise site.error(f"weights {weights} for an input of shape {x}")
    if groups < 1 or weights[0] % groups:
        raise site.error(f"{weights[0]} output channels are no multiple of {groups} groups")
    same_length(site, x[1], weights[1] * groups, f"weights {weights} of {groups} groups for the channels of {x}")
    w = windows(site.node, weights[2:], x[2:])
    return (x[0], weights[0], *window_counts(site.node, w, x[2:], _spatial_names(site, len(x) - 2)))


@rule("Conv")
def conv(site: Site) -> TensorType:
    y = _conv_shape(site)
    if y is not None and isinstance(y[1], int):
        _check_bias(site, 2, y[1])
    return TensorType(site.dtype(0), y)


@rule("ConvInteger")
def conv_integer(site: Site) -> TensorType:
    return TensorType("s32", _conv_shape(site))


@rule("ConvTranspose")
def conv_transpose(site: Site) -> TensorType:
    x, weights = _image(site), _static(site, 1)
    if x is None or weights is None:
        return TensorType(site.dtype(0), None if x is None else site.unknown(len(x)))
    groups = int_attr(site.node, "group", 1)
    if len(weights) != len(x) or groups < 1 or weights[0] % groups:
        raise site.error(f"weights {weights} of {groups} groups for an input of shape {x}")
    same_length(site, x[1], weights[0], f"weights {weights} for the channels of {x}")
    _check_bias(site, 2, weights[1] * groups)
    t = transposed(site.node, weights[2:], x[2:], _spatial_names(site, len(x) - 2))
    return TensorType(site.dtype(0), (x[0], weights[1] * groups, *t.size))


@rule("MaxPool", "AveragePool", "LpPool")
def pool(site: Site) -> Sequence[TensorType]:
    x, kind = _image(site), site.dtype(0)
    if x is None:
        return [TensorType(kind, None), TensorType("s64", None)]
    kernel = ints_attr(site.node, "kernel_shape", ())
    if len(kernel) != len(x) - 2:
        raise site.error(f"kernel_shape {kernel} for an input of shape {x}")
    w = windows(site.node, kernel, x[2:])
    y = (*x[:2], *window_counts(site.node, w, x[2:], _spatial_names(site, len(kernel))))
    return [TensorType(kind, y), TensorType("s64", y)]


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(site: Site) -> TensorType:
    x = _image(site)
    return TensorType(site.dtype(0), None if x is None else (*x[:2], *(1,) * (len(x) - 2)))


@rule("Resize")
def resize(site: Site) -> TensorType:
    x, kind = site.shape(0), site.dtype(0)
    if x is None:
        return site.type(0)
    rank = len(x)
    axes = axes_of(site.node, ints_attr(site.node, "axes", tuple(range(rank))), rank)
    scales, sizes = site.value(2), site.value(3)
    static = site.type(0).static
    if any(v is not None and v.dtype.kind == "O" for v in (scales, sizes)):
        scales = sizes = None
    empty = scales is not None and scales.size == 0
    if (scales is None or empty) and sizes is None:
        if not site.has(2) and not site.has(3):
            raise site.error("neither scales nor sizes")
        return TensorType(kind, tuple(site.fresh(i) if i in axes else d for i, d in enumerate(x)))
    if static is not None:
        y, _ = resize_scales(site.node, static, None if empty else scales, sizes)
        if min(y) < 0:
            raise site.error(f"its result would be of shape {y}")
        return TensorType(kind, y)
    # Not all lengths are known: those that a scale of 1 keeps, and the sizes asked for.
    out: list[Dim] = list(x)
    given = sizes if sizes is not None else scales
    stretched = str_attr(site.node, "keep_aspect_ratio_policy", "stretch") == "stretch"
    for i, axis in enumerate(axes):
        wish = None if given is None or i >= given.size else given.reshape(-1)[i].item()
        if sizes is not None and wish is not None and stretched:
            out[axis] = int(wish)
        elif sizes is None and wish is not None and isinstance(x[axis], int):
            out[axis] = resized_length(int(x[axis]), float(wish))
        elif sizes is not None or wish != 1:
            out[axis] = site.fresh(axis)
    return TensorType(kind, tuple(out))


# Recurrence.


@rule("LSTM", "GRU", "RNN")
def recurrent(site: Site) -> Sequence[TensorType]:
    x, w, r, kind = site.shape(0, rank=3), site.shape(1, rank=3), site.shape(2, rank=3), site.dtype(0)
    outputs = 3 if site.node.op == "LSTM" else 2
    if x is None or r is None:
        return [TensorType(kind, None)] * outputs
    directions = 2 if str_attr(site.node, "direction", "forward") == "bidirectional" else 1
    same_length(site, r[0], directions, "the weights' directions")
    if w is not None:
        same_length(site, w[2], x[2], f"weights {w} for inputs {x}")
    hidden = r[2]
    if int_attr(site.node, "layout", 0):
        state: Shape = (x[0], directions, hidden)
        every: Shape = (x[0], x[1], directions, hidden)
    else:
        state, every = (directions, x[1], hidden), (x[0], directions, x[1], hidden)
    return [TensorType(kind, s) for s in (every, state, state)[:outputs]]


# Selection.


@rule("TopK")
def top_k(site: Site) -> Sequence[TensorType]:
    x, k = site.shape(0), site.ints(1)
    if x is None:
        return [site.type(0), TensorType("s64", None)]
    axis = axis_of(site.node, int_attr(site.node, "axis", -1), len(x))
    count: Dim = site.fresh(axis) if k is None else k[0]
    length = x[axis]
    if isinstance(count, int) and (count < 0 or (isinstance(length, int) and count > length)):
        raise site.error(f"the top {count} of {length}")
    y = (*x[:axis], count, *x[axis + 1 :])
    return [TensorType(site.dtype(0), y), TensorType("s64", y)]


@rule("NonMaxSuppression")
def non_max_suppression(site: Site) -> TensorType:
    boxes, scores = site.shape(0, rank=3), site.shape(1, rank=3)
    if boxes is not None and scores is not None:
        same_length(site, boxes[0], scores[0], "the batches of boxes and scores")
        same_length(site, boxes[1], scores[2], "the numbers of boxes and scores")
        same_length(site, boxes[2], 4, "the numbers of a box")
    return TensorType("s64", (site.fresh(0), 3))


@rule("NonZero")
def non_zero(site: Site) -> TensorType:
    x = site.shape(0)
    return TensorType("s64", (site.fresh(0) if x is None else max(len(x), 1), site.fresh(1)))


@rule("OneHot")
def one_hot(site: Site) -> TensorType:
    x, depth, kind = site.shape(0), site.value(1), site.dtype(2)
    if x is None:
        return TensorType(kind, None)
    axis = axis_of(site.node, int_attr(site.node, "axis", -1), len(x) + 1)
    unknown = depth is None or depth.dtype.kind == "O"
    count: Dim = site.fresh(axis) if unknown or depth is None else int(depth.reshape(-1)[0])
    return TensorType(kind, (*x[:axis], count, *x[axis:]))


@rule("EyeLike")
def eye_like(site: Site) -> TensorType:
    wanted = int_attr(site.node, "dtype", 0)
    return TensorType(onnx_type(wanted) if wanted else site.dtype(0), site.shape(0, rank=2))


# Quantization.


def _check_scale(site: Site) -> None:
    """A scale per tensor, per index of an axis, or per block of one."""
    x, scale = site.shape(0), site.shape(1)
    if scale is None or x is None or scale in ((), (1,)) or any(isinstance(d, str) for d in scale):
        return
    axis = axis_of(site.node, int_attr(site.node, "axis", 1), len(x))
    if len(scale) == 1:
        same_length(site, scale[0], x[axis], f"scales do not fit dimension {axis} of {x}")
    if site.has(2) and site.shape(2) not in (scale, None):
        raise site.error(f"zero points of shape {site.shape(2)} for scales of shape {scale}")


@rule("QuantizeLinear")
def quantize_linear(site: Site) -> TensorType:
    _check_scale(site)
    wanted = int_attr(site.node, "output_dtype", 0)
    kind: ElemType = site.dtype(2) if site.has(2) else onnx_type(wanted) if wanted else "u8"
    return TensorType(kind, site.shape(0))


@rule("DequantizeLinear")
def dequantize_linear(site: Site) -> TensorType:
    _check_scale(site)
    wanted = int_attr(site.node, "output_dtype", 0)
    return TensorType(onnx_type(wanted) if wanted else site.dtype(1), site.shape(0))


@rule("DynamicQuantizeLinear")
def dynamic_quantize_linear(site: Site) -> Sequence[TensorType]:
    return [TensorType("u8", site.shape(0)), TensorType("f32", ()), TensorType("u8", ())]
