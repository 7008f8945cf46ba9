"""Add, Sub, Mul and Div with constants: into the weights before them, or else steps of the node before them."""

from __future__ import annotations

import numpy as np

from vnnigen.graph.ir import Fused, Graph, Node
from vnnigen.graph.passes.channels import affine_of, channel_values, fold_after
from vnnigen.graph.passes.edit import (
    ELEMENT_HOSTS,
    F64,
    HOSTS,
    WEIGHTED,
    Edit,
    dims,
    f32_constant,
    is_f32,
    plain,
    same_shape,
)


def fuse_binary(graph: Graph) -> int:
    """Fuse arithmetic with constants, one per channel or one for all."""
    edit = Edit(graph)
    for node in edit:
        if node.op not in ("Add", "Sub", "Mul", "Div") or not is_f32(graph, node.output):
            continue
        for first, (constant, value) in ((True, node.inputs[:2]), (False, node.inputs[1::-1])):
            host = edit.maker(value)
            if host is not None and plain(graph, constant) is not None and _fuse(edit, node, host, constant, first):
                break
    return edit.finish()


def _fuse(edit: Edit, node: Node, host: Node, constant: str, first: bool) -> bool:
    values = _values(edit.graph, node, host, constant)
    affine = None if values is None else affine_of(node.op, values, first=first)
    if affine is None:
        return False
    if host.op in WEIGHTED and (new := fold_after(edit, host, affine)) is not None:
        edit.absorb(node, new)
        return True
    if host.op not in HOSTS or not all(np.isfinite(part.astype(np.float32)).all() for part in affine):
        return False
    steps, operands = [], []
    for op, part, neutral in (("Mul", affine.factor, 1), ("Add", affine.offset, 0)):
        if (part != neutral).any():
            steps.append(Fused(op, operand=-1))
            operands.append(edit.constant(f"{node.name}_{op.lower()}", part))
    edit.absorb(node, host, steps, operands)
    return True


def _values(graph: Graph, node: Node, host: Node, constant: str) -> F64 | None:
    """The constant as the vector that a step of `host` reads; None if it is not one per channel or for all."""
    if host.op in WEIGHTED:
        return channel_values(graph, host, constant)
    values = f32_constant(graph, constant)
    if values is None or host.op not in HOSTS or not same_shape(graph, host.output, node.output):
        return None
    if values.size == 1:
        return values.reshape(1)
    shape = dims(graph, node.output)
    if host.op not in ELEMENT_HOSTS or shape is None or len(shape) < 2:
        return None
    padded = (1,) * (len(shape) - values.ndim) + values.shape
    channels_at = {1, len(shape) - 1}
    along = [axis for axis, length in enumerate(padded) if length != 1]
    return values.reshape(padded) if len(along) == 1 and along[0] in channels_at else None
