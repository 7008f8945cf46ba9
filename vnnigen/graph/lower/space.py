"""Pixels to channels and back: a copy between views of six dimensions."""

from __future__ import annotations

from vnnigen.graph.attributes import int_attr, str_attr
from vnnigen.graph.ir import Node
from vnnigen.graph.lower.context import Lowering, lowers
from vnnigen.graph.storage import Place, Storage


@lowers("DepthToSpace", "SpaceToDepth")
def blocks(ctx: Lowering, node: Node) -> str | None:
    """Move the pixels of blocks to channels, or channels to pixels."""
    if node.fused:
        return "more than a change of order"
    x, b, shape = ctx.value(node.inputs[0]), int_attr(node, "blocksize", 1), ctx.shape(node.output)
    assigned = ctx.assignment.values[node.output]
    if (x.dtype, x.quant) != (assigned.dtype, assigned.quant):
        x = ctx.take(node.inputs[0], Storage(assigned.dtype, assigned.quant, x.layout or "plain"))
    y, crd = ctx.result(node), str_attr(node, "mode", "DCR") == "CRD"
    if node.op == "DepthToSpace":
        x, y = _deep(x, b, crd), _flat(y, shape[2] // b, shape[3] // b, b)
    else:
        x, y = _flat(x, shape[2], shape[3], b), _deep(y, b, crd)
    ctx.copy_into(node.inputs[0], x, y)
    return None


def _deep(p: Place, b: int, crd: bool) -> Place:
    """[n, channels of all pixels of a block, h, w] as [n, c, h, b, w, b]."""
    n, c, h, w = p.shape
    split = p.reshape((n, c // (b * b), b, b, h, w) if crd else (n, b, b, c // (b * b), h, w))
    assert split is not None  # dimensions that are split need no copy
    return split.transpose((0, 1, 4, 2, 5, 3) if crd else (0, 3, 4, 1, 5, 2))


def _flat(p: Place, h: int, w: int, b: int) -> Place:
    """[n, c, h * b, w * b] as [n, c, h, b, w, b]."""
    split = p.reshape((*p.shape[:2], h, b, w, b))
    assert split is not None
    return split
