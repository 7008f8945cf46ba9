"""The geometry of convolutions and pooling: kernel, strides, dilations, padding, and how many windows fit."""

from __future__ import annotations

from dataclasses import dataclass

from vnnigen.graph.attributes import int_attr, ints_attr, node_error, str_attr
from vnnigen.graph.ir import Dim, Node


@dataclass(frozen=True)
class Windows:
    """Where windows lie, per spatial dimension. `begin`/`end` are the zeros (pooling: nothing) around the image."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, ...]:
        """How many pixels a window spans, holes of its dilation included."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))


def _per_axis(node: Node, name: str, rank: int, default: int, least: int) -> tuple[int, ...]:
    values = ints_attr(node, name, (default,) * rank)
    if len(values) != rank:
        raise node_error(node, f"{name} {values} for {rank} spatial dimensions")
    if min(values, default=least) < least:
        raise node_error(node, f"{name} {values} below {least}")
    return values


def windows(node: Node, kernel: tuple[int, ...], spatial: tuple[Dim, ...] | None) -> Windows:
    """The geometry of a convolution or pooling node whose image is `spatial` (H, W; None or names while unknown).

    `auto_pad` SAME needs a dimension's length unless the stride is 1. Raises ModelError naming the node.
    """
    rank = len(kernel)
    if min(kernel, default=1) < 1:
        raise node_error(node, f"kernel {kernel} below 1")
    declared = ints_attr(node, "kernel_shape", kernel)
    if declared != kernel:
        raise node_error(node, f"kernel_shape {declared}, but the weights are {kernel}")
    strides = _per_axis(node, "strides", rank, 1, 1)
    dilations = _per_axis(node, "dilations", rank, 1, 1)
    auto = str_attr(node, "auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = _per_axis(node, "pads", 2 * rank, 0, 0)
        return Windows(kernel, strides, dilations, pads[:rank], pads[rank:])
    if auto == "VALID":
        return Windows(kernel, strides, dilations, (0,) * rank, (0,) * rank)
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise node_error(node, f"auto_pad {auto!r}")
    totals = []
    for i, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True)):
        extent = (k - 1) * d + 1
        size = spatial[i] if spatial is not None else "?"
        if s == 1:
            totals.append(extent - 1)
        elif isinstance(size, int):
            totals.append(max((-(-size // s) - 1) * s + extent - size, 0))
        else:
            raise node_error(node, f"auto_pad {auto} with stride {s} needs the image's size, which is {size!r}")
    small, large = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    begin, end = (small, large) if auto == "SAME_UPPER" else (large, small)
    return Windows(kernel, strides, dilations, begin, end)


def window_counts(node: Node, w: Windows, spatial: tuple[Dim, ...], fresh: tuple[str, ...]) -> tuple[Dim, ...]:
    """How many windows fit along each dimension; the `fresh` name where the image's length is not known.

    `ceil_mode` counts a last partial window, if it starts within the image or the padding before it (ONNX, from
    opset 19 on). Raises ModelError if none fits.
    """
    ceil = int_attr(node, "ceil_mode", 0)
    counts: list[Dim] = []
    for i, size in enumerate(spatial):
        extent, stride, pads = w.extent[i], w.strides[i], w.begin[i] + w.end[i]
        if not isinstance(size, int):
            counts.append(size if stride == 1 and pads == extent - 1 else fresh[i])
            continue
        room = size + pads - extent
        count = (-(-room // stride) if ceil else room // stride) + 1
        if ceil and (count - 1) * stride >= size + w.begin[i]:
            count -= 1
        if room < 0 or count < 1:
            raise node_error(node, f"a window of {extent} does not fit into {size} pixels with padding {pads}")
        counts.append(count)
    return tuple(counts)


@dataclass(frozen=True)
class Transposed:
    """The geometry of a ConvTranspose: what is cut from the full result (before, after), and the size of the rest."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    size: tuple[Dim, ...]


def transposed(node: Node, kernel: tuple[int, ...], spatial: tuple[Dim, ...], fresh: tuple[str, ...]) -> Transposed:
    """The geometry of a ConvTranspose of an image `spatial`. Raises ModelError naming the node."""
    rank = len(kernel)
    declared = ints_attr(node, "kernel_shape", kernel)
    if declared != kernel:
        raise node_error(node, f"kernel_shape {declared}, but the weights are {kernel}")
    strides = _per_axis(node, "strides", rank, 1, 1)
    dilations = _per_axis(node, "dilations", rank, 1, 1)
    extra = _per_axis(node, "output_padding", rank, 0, 0)
    auto = str_attr(node, "auto_pad", "NOTSET")
    wish = ints_attr(node, "output_shape")
    if wish is not None and len(wish) == rank + 2:  # some exporters name batch and channels too
        wish = wish[2:]
    if wish is not None and (len(wish) != rank or min(wish) < 1):
        raise node_error(node, f"output_shape {wish} for {rank} spatial dimensions")
    pads = _per_axis(node, "pads", 2 * rank, 0, 0)
    begin, sizes = [], list[Dim]()
    for i, size in enumerate(spatial):
        extent = (kernel[i] - 1) * dilations[i] + 1 + extra[i]
        if wish is None and auto in ("NOTSET", "", "VALID"):
            cut = pads[i] + pads[i + rank] if auto != "VALID" else 0
            begin.append(pads[i] if auto != "VALID" else 0)
            sizes.append((size - 1) * strides[i] + extent - cut if isinstance(size, int) else fresh[i])
        elif isinstance(size, int):
            out = wish[i] if wish is not None else size * strides[i]
            cut = (size - 1) * strides[i] + extent - out
            begin.append(cut // 2 if auto == "SAME_UPPER" else cut - cut // 2)
            sizes.append(out)
        else:
            begin.append(0)
            sizes.append(wish[i] if wish is not None else fresh[i])
    if any(isinstance(s, int) and s < 1 for s in sizes):
        raise node_error(node, f"its result would have the size {tuple(sizes)}")
    return Transposed(strides, dilations, tuple(begin), tuple(sizes))
