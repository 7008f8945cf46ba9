"""A Pad in front of a convolution or pooling becomes its padding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vnnigen.graph.attributes import int_attr, ints_attr, str_attr
from vnnigen.graph.ir import Graph, Node
from vnnigen.graph.passes.edit import Edit, plain, rank, scalar

#: No result of these is below zero, so beside them a zero in a maximum is as good as nothing.
_NOT_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid")
_LOWEST = float(np.finfo(np.float32).min)


def fuse_pad(graph: Graph) -> int:
    """Fuse constant padding of the image's dimensions into Conv, AveragePool and MaxPool."""
    edit = Edit(graph)
    for node in edit:
        if node.op not in ("Conv", "AveragePool", "MaxPool") or len(node.outputs) != 1:
            continue
        pad = edit.producer(node.inputs[0])
        if pad is not None and pad.op == "Pad" and node.inputs[0] not in graph.quant:
            _fuse(edit, node, pad)
    return edit.finish()


def _fuse(edit: Edit, node: Node, pad: Node) -> None:
    graph, source = edit.graph, pad.inputs[0]
    added, kernel = _spatial_pads(graph, pad), _kernel(graph, node)
    if added is None or kernel is None or len(added) != 2 * len(kernel):
        return
    if str_attr(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID", "") or int_attr(node, "ceil_mode", 0):
        return
    old = ints_attr(node, "pads", (0,) * len(added))
    if str_attr(node, "auto_pad", "NOTSET") == "VALID":
        old = (0,) * len(added)
    pads = tuple(a + b for a, b in zip(old, added, strict=True))
    # Windows that see nothing but padding are legal in a Pad, but not as padding of a pooling.
    if any(p >= k for p, k in zip(pads, kernel * 2, strict=True)) or not _value_fits(edit, node, pad, any(old)):
        return
    attrs = {name: value for name, value in node.attrs.items() if name != "auto_pad"} | {"pads": pads}
    if node.op == "AveragePool":
        attrs["count_include_pad"] = 1
    edit.put(node, replace(node, inputs=(source, *node.inputs[1:]), attrs=attrs))


def _kernel(graph: Graph, node: Node) -> tuple[int, ...] | None:
    """How many pixels a window spans in each dimension."""
    shape = graph.shape(node.inputs[1]) if node.op == "Conv" else None
    kernel = ints_attr(node, "kernel_shape") if node.op != "Conv" else None if shape is None else shape[2:]
    if kernel is None:
        return None
    dilations = ints_attr(node, "dilations", (1,) * len(kernel))
    return tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))


def _spatial_pads(graph: Graph, pad: Node) -> tuple[int, ...] | None:
    """Begins, then ends, of all dimensions but the first two; None if it does anything but add there."""
    dims, pads = rank(graph, pad.inputs[0]), plain(graph, pad.inputs[1])
    if str_attr(pad, "mode", "constant") != "constant" or dims is None or dims < 3 or pads is None:
        return None
    axes = np.arange(dims)
    if len(pad.inputs) > 3 and pad.inputs[3]:
        given = plain(graph, pad.inputs[3])
        if given is None:
            return None
        axes = given.astype(np.int64) % dims
    full = np.zeros((2, dims), np.int64)
    full[:, axes] = pads.reshape(2, -1)
    if full.min() < 0 or full[:, :2].any():
        return None
    return tuple(int(p) for p in full[:, 2:].reshape(-1))


def _value_fits(edit: Edit, node: Node, pad: Node, padded: bool) -> bool:
    """Whether the node's own padding means what was filled in."""
    graph = edit.graph
    value = scalar(graph, pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] else 0.0
    if value is None:
        return False
    if node.op == "MaxPool":
        source = edit.producer(pad.inputs[0])
        return value <= _LOWEST or (value == 0 and source is not None and _not_negative(graph, source))
    if node.op == "AveragePool" and padded and not int_attr(node, "count_include_pad", 0):
        return False
    return value == 0


def _not_negative(graph: Graph, node: Node) -> bool:
    if node.fused:
        last = node.fused[-1]
        return last.op in _NOT_NEGATIVE or (last.op == "Clip" and float(last.attrs.get("min", -1)) >= 0)
    low = scalar(graph, node.inputs[1]) if node.op == "Clip" and len(node.inputs) > 1 and node.inputs[1] else None
    return node.op in _NOT_NEGATIVE or (low is not None and low >= 0)
