"""Rules of operators that networks seldom have and that plans leave to the onnx package's reference."""

from __future__ import annotations

from collections.abc import Sequence

from vnnigen.graph.attributes import axes_of, axis_of, int_attr, ints_attr, str_attr
from vnnigen.graph.infer_base import Shape, Site, broadcast, elements, rule, same_length
from vnnigen.graph.ir import Dim, TensorType
from vnnigen.graph.windows import window_counts, windows


@rule("BitShift")
def bit_shift(site: Site) -> TensorType:
    return TensorType(site.dtype(0), broadcast(site, site.shape(0), site.shape(1)))


@rule("RotaryEmbedding", "TensorScatter")
def same(site: Site) -> TensorType:
    return site.type(0)


@rule("SwiGLU")
def swiglu(site: Site) -> TensorType:
    return TensorType(site.dtype(0), broadcast(site, site.shape(0), site.shape(1)))


@rule("Det")
def det(site: Site) -> TensorType:
    x = site.shape(0)
    if x is not None and len(x) < 2:
        raise site.error(f"the determinant of a tensor of shape {x}")
    return TensorType(site.dtype(0), None if x is None else x[:-2])


@rule("Compress")
def compress(site: Site) -> TensorType:
    x, axis = site.shape(0), site.node.attrs.get("axis")
    if axis is None or x is None:
        return TensorType(site.dtype(0), (site.fresh(0),) if axis is None else None)
    at = axis_of(site.node, int_attr(site.node, "axis", 0), len(x))
    return TensorType(site.dtype(0), (*x[:at], site.fresh(at), *x[at + 1 :]))


@rule("Unique")
def unique(site: Site) -> Sequence[TensorType]:
    x, axis = site.shape(0), site.node.attrs.get("axis")
    count = site.fresh("count")
    values: Shape | None = (count,)
    inverse: Dim = site.fresh("inverse", 0)
    if x is not None and axis is not None:
        at = axis_of(site.node, int_attr(site.node, "axis", 0), len(x))
        values, inverse = (*x[:at], count, *x[at + 1 :]), x[at]
    elif x is not None:
        total = elements(x)
        inverse = inverse if total is None else total
    else:
        values = None if axis is not None else values
    vector = TensorType("s64", (count,))
    return [TensorType(site.dtype(0), values), vector, TensorType("s64", (inverse,)), vector]


@rule("Einsum")
def einsum(site: Site) -> TensorType:
    kind = site.dtype(0)
    terms, arrow, result = str_attr(site.node, "equation", "").replace(" ", "").partition("->")
    parts = terms.split(",")
    shapes = [site.shape(i) for i in range(len(site.types))]
    if len(parts) != len(shapes):
        raise site.error(f"equation {terms!r} for {len(shapes)} inputs")
    if any(s is None for s in shapes):
        return TensorType(kind, None)
    lengths: dict[str, Dim] = {}
    dots: list[Shape] = []
    for part, dims in zip(parts, (s for s in shapes if s is not None), strict=True):
        before, ellipsis, after = part.partition("...")
        free = len(dims) - len(before) - len(after)
        if free < 0 or (free and not ellipsis):
            raise site.error(f"equation term {part!r} for an input of shape {dims}")
        dots.append(dims[len(before) : len(before) + free])
        for label, length in zip(before + after, dims[: len(before)] + dims[len(dims) - len(after) :], strict=True):
            known = lengths.setdefault(label, length)
            lengths[label] = length if known == 1 else known if length == 1 else same_length(
                site, known, length, f"index {label!r}"
            )  # fmt: skip
    if not arrow:
        once = sorted(label for label in lengths if terms.count(label) == 1)
        result = ("..." if any(dots) else "") + "".join(once)
    if unknown := set(result.replace("...", "")) - set(lengths):
        raise site.error(f"its result has the indices {sorted(unknown)}, which no input has")
    before, ellipsis, after = result.partition("...")
    middle = broadcast(site, *dots) if ellipsis else ()
    return TensorType(kind, (*(lengths[c] for c in before), *(middle or ()), *(lengths[c] for c in after)))


@rule("GridSample")
def grid_sample(site: Site) -> TensorType:
    x, grid = site.shape(0), site.shape(1)
    if x is None or grid is None:
        return TensorType(site.dtype(0), None)
    if len(grid) != len(x):
        raise site.error(f"a grid of shape {grid} for {x}")
    same_length(site, grid[-1], len(x) - 2, f"the coordinates of a grid of shape {grid} for {x}")
    return TensorType(site.dtype(0), (*x[:2], *grid[1:-1]))


@rule("RoiAlign")
def roi_align(site: Site) -> TensorType:
    x, rois = site.shape(0, rank=4), site.shape(1, rank=2)
    size = int_attr(site.node, "output_height", 1), int_attr(site.node, "output_width", 1)
    count, channels = site.fresh(0) if rois is None else rois[0], site.fresh(1) if x is None else x[1]
    return TensorType(site.dtype(0), (count, channels, *size))


@rule("MaxRoiPool")
def max_roi_pool(site: Site) -> TensorType:
    x, rois = site.shape(0, rank=4), site.shape(1, rank=2)
    size = ints_attr(site.node, "pooled_shape", ())
    count, channels = site.fresh(0) if rois is None else rois[0], site.fresh(1) if x is None else x[1]
    return TensorType(site.dtype(0), (count, channels, *size))


@rule("CenterCropPad")
def center_crop_pad(site: Site) -> TensorType:
    x, wish = site.shape(0), site.dims(1)
    if x is None:
        return site.type(0)
    axes = axes_of(site.node, ints_attr(site.node, "axes", tuple(range(len(x)))), len(x))
    if wish is not None and len(wish) != len(axes):
        raise site.error(f"a shape of {wish} for the dimensions {axes}")
    out = list(x)
    for i, axis in enumerate(axes):
        out[axis] = site.fresh(axis) if wish is None else wish[i]
    return TensorType(site.dtype(0), tuple(out))


@rule("Col2Im")
def col2im(site: Site) -> TensorType:
    x, image, block = site.shape(0, rank=3), site.dims(1), site.ints(2)
    if x is None or image is None or block is None:
        return TensorType(site.dtype(0), None)
    pixels = elements(block)
    channels = x[1] // pixels if isinstance(x[1], int) and pixels else site.fresh(1)
    return TensorType(site.dtype(0), (x[0], channels, *image))


@rule("DeformConv")
def deform_conv(site: Site) -> TensorType:
    x, weights = site.shape(0, rank=4), site.type(1).static
    if x is None or weights is None:
        return TensorType(site.dtype(0), site.unknown(4))
    groups = int_attr(site.node, "group", 1)
    same_length(site, x[1], weights[1] * groups, f"weights {weights} of {groups} groups for the channels of {x}")
    w = windows(site.node, weights[2:], x[2:])
    counts = window_counts(site.node, w, x[2:], (site.fresh(2), site.fresh(3)))
    return TensorType(site.dtype(0), (x[0], weights[0], *counts))


@rule("MaxUnpool")
def max_unpool(site: Site) -> TensorType:
    x, wish = site.shape(0), site.dims(2)
    if x is None or site.has(2):
        return TensorType(site.dtype(0), wish if wish is not None or x is None else site.unknown(len(x)))
    rank = len(x) - 2
    kernel = ints_attr(site.node, "kernel_shape", (1,) * rank)
    strides, pads = ints_attr(site.node, "strides", (1,) * rank), ints_attr(site.node, "pads", (0,) * 2 * rank)
    if not len(kernel) == len(strides) == len(pads) // 2 == rank:
        raise site.error(f"kernel {kernel}, strides {strides} and pads {pads} for an input of shape {x}")
    spatial = (
        (d - 1) * strides[i] + kernel[i] - pads[i] - pads[i + rank] if isinstance(d, int) else site.fresh(i + 2)
        for i, d in enumerate(x[2:])
    )
    return TensorType(site.dtype(0), (*x[:2], *spatial))


@rule("STFT")
def stft(site: Site) -> TensorType:
    x, step, length = site.shape(0), site.ints(1), site.ints(3)
    window = site.shape(2, rank=1) if site.has(2) else None
    frame = length[0] if length else window[0] if window else None
    if x is None or len(x) < 2 or not isinstance(x[1], int) or not isinstance(frame, int) or not step or step[0] < 1:
        return TensorType(site.dtype(0), (site.fresh(0), site.fresh(1), site.fresh(2), 2))
    bins = frame // 2 + 1 if int_attr(site.node, "onesided", 1) else frame
    return TensorType(site.dtype(0), (x[0], (x[1] - frame) // step[0] + 1, bins, 2))


def _heads(site: Site, i: int, attribute: str) -> tuple[Dim, Dim, Dim, Dim] | None:
    """Input `i` of Attention as (batch, heads, length, width), also where heads and width are one dimension."""
    x = site.shape(i)
    if x is None:
        return None
    if len(x) == 4:
        return x[0], x[1], x[2], x[3]
    heads = int_attr(site.node, attribute, 0)
    if len(x) != 3 or heads < 1:
        raise site.error(f"input {i} of shape {x} with {attribute} = {heads}")
    if isinstance(x[2], int) and x[2] % heads:
        raise site.error(f"input {i} of shape {x} is of no multiple of {heads} heads")
    return x[0], heads, x[1], x[2] // heads if isinstance(x[2], int) else site.fresh(f"width{i}")


@rule("Attention")
def attention(site: Site) -> Sequence[TensorType]:
    q = _heads(site, 0, "q_num_heads")
    k, v = _heads(site, 1, "kv_num_heads"), _heads(site, 2, "kv_num_heads")
    kind = site.dtype(0)
    if q is None or k is None or v is None:
        return [TensorType(kind, None)] * 4
    past = site.shape(4, rank=4) if site.has(4) else (0, 0, 0, 0)
    total: Dim = site.fresh("total")
    if past is not None and isinstance(past[2], int) and isinstance(k[2], int):
        total = past[2] + k[2]
    y: Shape = (*q[:3], v[3])
    if len(site.shape(0) or ()) == 3:
        whole = q[1] * v[3] if isinstance(q[1], int) and isinstance(v[3], int) else site.fresh(2)
        y = (q[0], q[2], whole)
    present = [(*k[:2], total, k[3]), (*v[:2], total, v[3]), (*q[:3], total)]
    return [TensorType(kind, y), *(TensorType(kind, p) for p in present)]
