"""The larger operators that stay NumPy steps of plans: Resize, TopK, NonMaxSuppression, LSTM and scatters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vnnigen.graph.attributes import axes_of, axis_of, int_attr, ints_attr, node_error, str_attr
from vnnigen.graph.dtypes import numpy_dtype, onnx_type
from vnnigen.graph.evaluate_base import AnyArray, evaluates, wide
from vnnigen.graph.evaluate_math import sigmoid
from vnnigen.graph.evaluate_shape import ints
from vnnigen.graph.ir import Node


@evaluates("TopK")
def top_k(node: Node, x: AnyArray, k: AnyArray) -> tuple[AnyArray, AnyArray]:
    axis, count = axis_of(node, int_attr(node, "axis", -1), x.ndim), int(k.reshape(()))
    if not 0 <= count <= x.shape[axis]:
        raise node_error(node, f"the top {count} of {x.shape[axis]}")
    if int_attr(node, "largest", 1):
        # Of equals the first wins: a stable sort of the reversed axis, read backwards.
        backwards = np.flip(np.argsort(np.flip(x, axis), axis, kind="stable"), axis)
        order = x.shape[axis] - 1 - backwards
    else:
        order = np.argsort(x, axis, kind="stable")
    best = np.take(order, np.arange(count), axis)
    return np.take_along_axis(x, best, axis), best.astype(np.int64)


def _overlap(box: AnyArray, others: AnyArray) -> AnyArray:
    """Intersection over union of a box (y1, x1, y2, x2) with others [n, 4]."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
    union = np.prod(box[2:] - box[:2]) + areas - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def corners(boxes: AnyArray, center: int) -> AnyArray:
    """Boxes [..., 4] as (y1, x1, y2, x2), from (x, y, width, height) of a `center` or from any two corners."""
    if center:
        x, y, w, h = np.moveaxis(boxes, -1, 0)
        return np.stack([y - h / 2, x - w / 2, y + h / 2, x + w / 2], -1)
    a, b = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([np.minimum(a, b), np.maximum(a, b)], -1)


@evaluates("NonMaxSuppression")
def non_max_suppression(
    node: Node, boxes: AnyArray, scores: AnyArray, limit: AnyArray | None = None, iou: AnyArray | None = None,
    least: AnyArray | None = None,
) -> AnyArray:  # fmt: skip
    most = 0 if limit is None else int(limit.reshape(()))
    overlap = 0.0 if iou is None else float(iou.reshape(()))
    found: list[tuple[int, int, int]] = []
    every = corners(boxes, int_attr(node, "center_point_box", 0))
    for b, c in np.ndindex(*scores.shape[:2]):
        candidates = np.argsort(-scores[b, c], kind="stable")
        if least is not None:
            candidates = candidates[scores[b, c][candidates] > least.reshape(())]
        taken = 0
        while candidates.size and taken < most:
            best, candidates = candidates[0], candidates[1:]
            found.append((b, c, int(best)))
            taken += 1
            candidates = candidates[_overlap(every[b, best], every[b, candidates]) <= overlap]
    return np.array(found, np.int64).reshape(-1, 3)


# Resize.


def resized_length(length: int, scale: float) -> int:
    """The length a Resize by `scale` makes. Rounded first: 3 * (5 / 3) is to be 5, whatever f32 makes of it."""
    return int(np.floor(round(length * scale, 4)))


def _original(node: Node, out: int, size: int, scale: float, region: tuple[float, float]) -> AnyArray:
    """Where each of `out` pixels lies in the image of `size`."""
    mode = str_attr(node, "coordinate_transformation_mode", "half_pixel")
    x = np.arange(out, dtype=np.float64)
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        return x * (size - 1) / (size * scale - 1) if size * scale > 1 else np.zeros(out)
    if mode == "pytorch_half_pixel" and size * scale <= 1:
        return np.zeros(out)
    if mode == "half_pixel_symmetric":
        adjusted = out / (size * scale)
        return size / 2 * (1 - adjusted) + (x + 0.5) / scale - 0.5
    if mode == "tf_crop_and_resize":
        start, end = region
        step = (end - start) * (size - 1) / (out - 1) if out > 1 else 0.0
        return start * (size - 1) + x * step if out > 1 else np.full(out, 0.5 * (start + end) * (size - 1))
    if mode not in ("half_pixel", "pytorch_half_pixel"):
        raise node_error(node, f"coordinate_transformation_mode {mode!r}")
    return (x + 0.5) / scale - 0.5


_NEAREST: dict[str, Callable[[AnyArray], AnyArray]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def resize_matrix(node: Node, out: int, size: int, scale: float, region: tuple[float, float] = (0, 1)) -> AnyArray:
    """The weights [out, size] that make a line of `out` pixels from one of `size`, of a Resize (nearest, linear)."""
    at = _original(node, out, size, scale, region)
    mode = str_attr(node, "mode", "nearest")
    rows = np.arange(out)
    weights = np.zeros((out, size))
    if mode == "nearest":
        rounding = str_attr(node, "nearest_mode", "round_prefer_floor")
        if rounding not in _NEAREST:
            raise node_error(node, f"nearest_mode {rounding!r}")
        weights[rows, np.clip(_NEAREST[rounding](at), 0, size - 1).astype(np.int64)] = 1
        return weights
    low = np.floor(at)
    for pixel, share in ((low, 1 - (at - low)), (low + 1, at - low)):
        np.add.at(weights, (rows, np.clip(pixel, 0, size - 1).astype(np.int64)), share)
    return weights


def resize_scales(node: Node, shape: tuple[int, ...], scales: AnyArray | None, sizes: AnyArray | None
                  ) -> tuple[tuple[int, ...], tuple[float, ...]]:  # fmt: skip
    """The resulting shape of a Resize, and the scale per dimension."""
    rank = len(shape)
    axes = axes_of(node, ints_attr(node, "axes", tuple(range(rank))), rank)
    out, factors = list(shape), [1.0] * rank
    given = sizes if sizes is not None and sizes.size else scales
    if given is None or given.size != len(axes):
        raise node_error(node, f"neither scales nor sizes for the dimensions {axes}")
    if given is scales:
        for axis, scale in zip(axes, given.reshape(-1), strict=True):
            out[axis], factors[axis] = resized_length(shape[axis], float(scale)), float(scale)
        return tuple(out), tuple(factors)
    policy = str_attr(node, "keep_aspect_ratio_policy", "stretch")
    wish = ints(given)
    ratios = [w / shape[a] for w, a in zip(wish, axes, strict=True)]
    if policy != "stretch":
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        ratios = [ratio] * len(axes)
        wish = tuple(int(np.floor(ratio * shape[a] + 0.5)) for a in axes)
    for axis, length, ratio in zip(axes, wish, ratios, strict=True):
        out[axis], factors[axis] = length, ratio
    return tuple(out), tuple(factors)


@evaluates("Resize")
def resize(
    node: Node, x: AnyArray, roi: AnyArray | None = None, scales: AnyArray | None = None, sizes: AnyArray | None = None
) -> AnyArray:
    crop = str_attr(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    linear = str_attr(node, "mode", "nearest") in ("nearest", "linear")
    if not linear or crop or int_attr(node, "antialias", 0) or int_attr(node, "exclude_outside", 0):
        raise NotImplementedError
    shape, factors = resize_scales(node, x.shape, scales, sizes)
    y = wide(x)
    for axis, (out, factor) in enumerate(zip(shape, factors, strict=True)):
        if out != x.shape[axis] or factor != 1:
            weights = resize_matrix(node, out, x.shape[axis], factor).astype(y.dtype if y.dtype.kind == "f" else "f8")
            y = np.moveaxis(np.tensordot(weights, y, (1, axis)), 0, axis)
    return y.astype(x.dtype)


# Recurrence.


def _activations(node: Node) -> list[Callable[[AnyArray], AnyArray]]:
    known: dict[str, Callable[[AnyArray], AnyArray]] = {
        "Sigmoid": sigmoid, "Tanh": np.tanh, "Relu": lambda x: np.maximum(x, 0),
    }  # fmt: skip
    directions = 2 if str_attr(node, "direction", "forward") == "bidirectional" else 1
    names = node.attrs.get("activations", ("Sigmoid", "Tanh", "Tanh") * directions)
    assert isinstance(names, tuple)
    if not all(name in known for name in names) or node.attrs.get("clip") is not None:
        raise NotImplementedError
    return [known[str(name)] for name in names]


@evaluates("LSTM")
def lstm(
    node: Node, x: AnyArray, w: AnyArray, r: AnyArray, bias: AnyArray | None = None, lengths: AnyArray | None = None,
    h0: AnyArray | None = None, c0: AnyArray | None = None, peephole: AnyArray | None = None,
) -> tuple[AnyArray, ...]:  # fmt: skip
    if lengths is not None and np.any(lengths != x.shape[0 if int_attr(node, "layout", 0) == 0 else 1]):
        raise NotImplementedError
    batch_first, functions = int_attr(node, "layout", 0), _activations(node)
    steps = x.swapaxes(0, 1) if batch_first else x
    directions, four, hidden = r.shape
    batch = steps.shape[1]
    kind = str_attr(node, "direction", "forward")
    every: AnyArray = np.zeros((steps.shape[0], directions, batch, hidden), x.dtype)
    last_h, last_c = np.zeros((directions, batch, hidden), x.dtype), np.zeros((directions, batch, hidden), x.dtype)
    for d in range(directions):
        f, g, out = functions[3 * d : 3 * d + 3]
        h, c = (0 * last_h[d] if s is None else (s[:, d] if batch_first else s[d]) for s in (h0, c0))
        b = np.zeros(four, x.dtype) if bias is None else bias[d, :four] + bias[d, four:]
        p = np.zeros(3 * hidden, x.dtype) if peephole is None else peephole[d]
        pi, po, pf = np.split(p, 3)
        fed = steps @ w[d].T + b  # every step at once; only the recurrent product has to wait
        order = range(steps.shape[0])
        for t in reversed(order) if kind == "reverse" or d == 1 else order:
            i, o, forget, cell = np.split(fed[t] + h @ r[d].T, 4, axis=-1)
            forget_gate = 1 - f(i + pi * c) if int_attr(node, "input_forget", 0) else f(forget + pf * c)
            c = forget_gate * c + f(i + pi * c) * g(cell)
            h = f(o + po * c) * out(c)
            every[t, d] = h
        last_h[d], last_c[d] = h, c
    if batch_first:
        return every.transpose(2, 0, 1, 3), last_h.swapaxes(0, 1), last_c.swapaxes(0, 1)
    return every, last_h, last_c


# Scatters.


@evaluates("ScatterElements")
def scatter_elements(node: Node, x: AnyArray, indices: AnyArray, updates: AnyArray) -> AnyArray:
    axis = axis_of(node, int_attr(node, "axis", 0), x.ndim)
    where: list[AnyArray] = [*np.indices(indices.shape)]
    where[axis] = indices
    return _scatter(node, x, tuple(where), updates)


@evaluates("ScatterND")
def scatter_nd(node: Node, x: AnyArray, indices: AnyArray, updates: AnyArray) -> AnyArray:
    return _scatter(node, x, tuple(np.moveaxis(indices, -1, 0)), updates)


def _scatter(node: Node, x: AnyArray, where: tuple[AnyArray, ...], updates: AnyArray) -> AnyArray:
    combine = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
    how = str_attr(node, "reduction", "none")
    y = x.copy()
    if how == "none":
        y[where] = updates
    else:
        combine[how].at(y, where, updates)
    return y


@evaluates("OneHot")
def one_hot(node: Node, indices: AnyArray, depth: AnyArray, values: AnyArray) -> AnyArray:
    axis, count = int_attr(node, "axis", -1), int(depth.reshape(()))
    at = axis_of(node, axis, indices.ndim + 1)
    chosen = np.mod(indices.astype(np.int64), count)
    chosen = np.where((indices >= -count) & (indices < count), chosen, -1)
    hot = np.expand_dims(chosen, at) == np.arange(count).reshape([-1 if i == at else 1 for i in range(chosen.ndim + 1)])
    return np.where(hot, values[1], values[0]).astype(values.dtype)


@evaluates("Trilu")
def trilu(node: Node, x: AnyArray, k: AnyArray | None = None) -> AnyArray:
    cut = np.triu if int_attr(node, "upper", 1) else np.tril
    return cut(x, 0 if k is None else int(k.reshape(()))) if x.size else x


@evaluates("NonZero")
def non_zero(_: Node, x: AnyArray) -> AnyArray:
    return np.array(np.nonzero(np.atleast_1d(x)), np.int64)


@evaluates("EyeLike")
def eye_like(node: Node, x: AnyArray) -> AnyArray:
    wanted = int_attr(node, "dtype", 0)
    dtype = numpy_dtype(onnx_type(wanted)) if wanted else x.dtype
    return np.eye(x.shape[0], x.shape[1], k=int_attr(node, "k", 0)).astype(dtype)
