"""Operators that move or make elements: shapes, slices, gathers, casts.

Those that only move take arrays of objects too: `infer` runs them on shapes in which names stand for unknown lengths.
"""

from __future__ import annotations

from math import prod

import numpy as np

from vnnigen.graph.attributes import array_attr, axes_of, axis_of, int_attr, ints_attr, node_error, str_attr
from vnnigen.graph.dtypes import numpy_dtype, onnx_type
from vnnigen.graph.evaluate_base import AnyArray, evaluates, wide
from vnnigen.graph.ir import Node


def ints(values: AnyArray) -> tuple[int, ...]:
    """The elements of a small integer tensor."""
    return tuple(int(v) for v in values.reshape(-1))


@evaluates("Identity", "Dropout")
def identity(node: Node, x: AnyArray, *_: AnyArray | None) -> AnyArray | tuple[AnyArray, ...]:
    return (x, np.ones(x.shape, np.bool_)) if len(node.outputs) == 2 else x


@evaluates("Constant")
def constant(node: Node) -> AnyArray:
    value = array_attr(node, "value")
    if value is None:
        raise node_error(node, "a Constant without a tensor")
    return value


@evaluates("Shape")
def shape(node: Node, x: AnyArray) -> AnyArray:
    start, end = int_attr(node, "start", 0), int_attr(node, "end", x.ndim)
    return np.array(x.shape[start:end], np.int64)


@evaluates("Size")
def size(_: Node, x: AnyArray) -> AnyArray:
    return np.array(x.size, np.int64)


@evaluates("Reshape")
def reshape(node: Node, x: AnyArray, target: AnyArray) -> AnyArray:
    keep = int_attr(node, "allowzero", 0) == 0
    wish = [x.shape[i] if d == 0 and keep and i < x.ndim else d for i, d in enumerate(ints(target))]
    try:
        return x.reshape(wish)
    except ValueError:
        raise node_error(node, f"{x.shape} cannot become {tuple(wish)}") from None


@evaluates("Flatten")
def flatten(node: Node, x: AnyArray) -> AnyArray:
    axis = int_attr(node, "axis", 1)
    cut = axis if axis == x.ndim else axis_of(node, axis, max(x.ndim, 1))
    return x.reshape(prod(x.shape[:cut]), prod(x.shape[cut:]))


@evaluates("Squeeze")
def squeeze(node: Node, x: AnyArray, axes: AnyArray | None = None) -> AnyArray:
    if axes is None:
        return x.reshape([d for d in x.shape if d != 1])
    cut = axes_of(node, ints(axes), x.ndim)
    if any(x.shape[a] != 1 for a in cut):
        raise node_error(node, f"dimensions {cut} of {x.shape} are not all 1")
    return x.reshape([d for i, d in enumerate(x.shape) if i not in cut])


@evaluates("Unsqueeze")
def unsqueeze(node: Node, x: AnyArray, axes: AnyArray) -> AnyArray:
    return np.expand_dims(x, axes_of(node, ints(axes), x.ndim + axes.size))


@evaluates("Transpose")
def transpose(node: Node, x: AnyArray) -> AnyArray:
    perm = ints_attr(node, "perm", tuple(range(x.ndim))[::-1])
    if sorted(perm) != list(range(x.ndim)):
        raise node_error(node, f"perm {perm} of a tensor of {x.ndim} dimensions")
    return x.transpose(perm)


@evaluates("Concat")
def concat(node: Node, *parts: AnyArray) -> AnyArray:
    return np.concatenate(parts, axis_of(node, int_attr(node, "axis", 0), parts[0].ndim))


@evaluates("Split")
def split(node: Node, x: AnyArray, lengths: AnyArray | None = None) -> tuple[AnyArray, ...]:
    axis = axis_of(node, int_attr(node, "axis", 0), x.ndim)
    sizes = split_lengths(node, x.shape[axis]) if lengths is None else ints(lengths)
    if sum(sizes) != x.shape[axis] or len(sizes) != len(node.outputs):
        raise node_error(node, f"cannot split {x.shape[axis]} into {sizes}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))


def split_lengths(node: Node, length: int) -> tuple[int, ...]:
    """The lengths of a Split without given ones: equal, the last one shorter."""
    count = int_attr(node, "num_outputs", len(node.outputs))
    chunk = -(-length // max(count, 1))
    return tuple(min(chunk, length - i * chunk) for i in range(count))


def slice_of(start: int, end: int, step: int) -> slice:
    """ONNX's slice as Python's: backwards, an end far below zero means "through the first element"."""
    return slice(start, None if step < 0 and end < -(2**31) + 2 else end, step)


@evaluates("Slice")
def slice_(
    node: Node, x: AnyArray, starts: AnyArray, ends: AnyArray, axes: AnyArray | None = None,
    steps: AnyArray | None = None,
) -> AnyArray:  # fmt: skip
    where = [slice(None)] * x.ndim
    along = range(starts.size) if axes is None else axes_of(node, ints(axes), x.ndim)
    strides = (1,) * starts.size if steps is None else ints(steps)
    for axis, start, end, step in zip(along, ints(starts), ints(ends), strides, strict=True):
        where[axis] = slice_of(start, end, step)
    return x[tuple(where)]


@evaluates("Gather")
def gather(node: Node, x: AnyArray, indices: AnyArray) -> AnyArray:
    axis = axis_of(node, int_attr(node, "axis", 0), x.ndim)
    try:
        return np.take(x, indices.astype(np.int64), axis)
    except IndexError as error:
        raise node_error(node, str(error)) from None


@evaluates("GatherElements")
def gather_elements(node: Node, x: AnyArray, indices: AnyArray) -> AnyArray:
    axis = axis_of(node, int_attr(node, "axis", 0), x.ndim)
    where: list[AnyArray] = [*np.indices(indices.shape, sparse=True)]
    where[axis] = indices
    return x[tuple(where)]


@evaluates("GatherND")
def gather_nd(node: Node, x: AnyArray, indices: AnyArray) -> AnyArray:
    batch = int_attr(node, "batch_dims", 0)
    leading: list[AnyArray] = [*np.indices(indices.shape[:batch], sparse=True)]
    padded = [i.reshape(i.shape + (1,) * (indices.ndim - 1 - batch)) for i in leading]
    where = (*padded, *np.moveaxis(indices, -1, 0))
    return x[where]


@evaluates("Expand")
def expand(node: Node, x: AnyArray, target: AnyArray) -> AnyArray:
    try:
        return np.broadcast_to(x, np.broadcast_shapes(x.shape, ints(target))).copy()
    except ValueError:
        raise node_error(node, f"{x.shape} cannot be expanded to {ints(target)}") from None


@evaluates("Tile")
def tile(_: Node, x: AnyArray, repeats: AnyArray) -> AnyArray:
    return np.tile(x, ints(repeats))


@evaluates("ConstantOfShape")
def constant_of_shape(node: Node, target: AnyArray) -> AnyArray:
    value = array_attr(node, "value")
    fill = np.zeros(1, np.float32) if value is None else value
    return np.full(ints(target), fill.reshape(()), fill.dtype)


@evaluates("Range")
def range_(_: Node, start: AnyArray, limit: AnyArray, delta: AnyArray) -> AnyArray:
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@evaluates("Cast")
def cast(node: Node, x: AnyArray) -> AnyArray:
    return _cast(x, numpy_dtype(onnx_type(int_attr(node, "to", 0))))


@evaluates("CastLike")
def cast_like(_: Node, x: AnyArray, like: AnyArray) -> AnyArray:
    return _cast(x, like.dtype)


def _cast(x: AnyArray, dtype: np.dtype[np.generic]) -> AnyArray:
    if x.dtype.kind == "O":
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        return wide(x).astype(dtype) if dtype.kind in "iub" else x.astype(dtype)


@evaluates("Where")
def where(_: Node, condition: AnyArray, x: AnyArray, y: AnyArray) -> AnyArray:
    return np.where(condition, x, y)


@evaluates("Pad")
def pad(
    node: Node, x: AnyArray, pads: AnyArray, value: AnyArray | None = None, axes: AnyArray | None = None
) -> AnyArray:
    mode = str_attr(node, "mode", "constant")
    along = tuple(range(x.ndim)) if axes is None else axes_of(node, ints(axes), x.ndim)
    amounts, widths = ints(pads), [(0, 0)] * x.ndim
    for i, axis in enumerate(along):
        widths[axis] = (amounts[i], amounts[i + len(along)])
    # Negative padding crops, before anything is added.
    x = x[tuple(slice(max(-b, 0), d - max(-e, 0)) for (b, e), d in zip(widths, x.shape, strict=True))]
    widths = [(max(b, 0), max(e, 0)) for b, e in widths]
    if mode == "constant":
        fill = x.dtype.type(0) if value is None else value.reshape(())
        return np.pad(x, widths, constant_values=fill)
    modes = {"edge": "edge", "reflect": "reflect", "wrap": "wrap"}
    if mode not in modes:
        raise node_error(node, f"mode {mode!r} of Pad")
    return np.asarray(np.pad(x, widths, mode=modes[mode]))  # type: ignore[call-overload]


@evaluates("DepthToSpace")
def depth_to_space(node: Node, x: AnyArray) -> AnyArray:
    n, c, h, w = x.shape
    b = int_attr(node, "blocksize", 1)
    if str_attr(node, "mode", "DCR") == "CRD":
        y = x.reshape(n, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        y = x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // (b * b), h * b, w * b)


@evaluates("SpaceToDepth")
def space_to_depth(node: Node, x: AnyArray) -> AnyArray:
    n, c, h, w = x.shape
    b = int_attr(node, "blocksize", 1)
    order = (0, 1, 3, 5, 2, 4) if str_attr(node, "mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    y = x.reshape(n, c, h // b, b, w // b, b).transpose(order)
    return y.reshape(n, c * b * b, h // b, w // b)
