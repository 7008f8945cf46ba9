"""Fold BatchNormalization into the weights before it, or behind it; alone it becomes Mul and Add.

Chains of Mul, Add and normalizations fold as well: what is left here as Mul and Add, fuse_binary folds one by one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vnnigen.graph.attributes import float_attr, int_attr, ints_attr, str_attr
from vnnigen.graph.ir import Graph, Node
from vnnigen.graph.passes.channels import Affine, fold_after, fold_before, output_channels
from vnnigen.graph.passes.edit import WEIGHTED, Edit, f32_constant, rank


def fold_batch_norm(graph: Graph) -> int:
    """Make every BatchNormalization of constants vanish."""
    edit = Edit(graph)
    waiting: dict[str, Affine] = {}
    for node in edit:
        if node.op in ("Conv", "Linear") and node.inputs[0] in waiting:
            _into_reader(edit, node, waiting[node.inputs[0]])
        elif node.op == "BatchNormalization" and (affine := batch_norm_affine(graph, node)) is not None:
            waiting[node.output] = affine
            if _into_host(edit, node, affine):
                del waiting[node.output]
    for node in edit:  # those that no weights took
        if node.op == "BatchNormalization" and node.output in waiting:
            _alone(edit, node, waiting[node.output])
    return edit.finish()


def batch_norm_affine(graph: Graph, node: Node) -> Affine | None:
    """Factor and offset per channel; None unless all parameters are constant and it normalizes by them."""
    parameters = [f32_constant(graph, name) for name in node.inputs[1:5]]
    if len(node.outputs) != 1 or node.fused or int_attr(node, "training_mode", 0):
        return None
    known = [p for p in parameters if p is not None and p.ndim == 1]
    if len(known) != 4:
        return None
    scale, shift, mean, variance = known
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + float_attr(node, "epsilon", 1e-5))
    return Affine(factor, shift - mean * factor) if np.isfinite(factor).all() else None


def _into_host(edit: Edit, node: Node, affine: Affine) -> bool:
    host = edit.maker(node.inputs[0])
    if host is None or host.op not in WEIGHTED or output_channels(edit.graph, host) != affine.factor.size:
        return False
    if host.op == "Linear" and rank(edit.graph, host.output) != 2:  # channels are dimension 1, features the last
        return False
    new = fold_after(edit, host, affine)
    if new is None:
        return False
    edit.absorb(node, new)
    return True


def _into_reader(edit: Edit, node: Node, affine: Affine) -> None:
    """Fold into a Conv or Linear that is the only reader, if no padding would get the offset."""
    norm = edit.maker(node.inputs[0])
    if norm is None or norm.op != "BatchNormalization":
        return
    if node.op == "Linear":
        legal = rank(edit.graph, node.inputs[0]) == 2
    else:
        unpadded = str_attr(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID", "") and not any(
            ints_attr(node, "pads", ())
        )
        legal = unpadded or not affine.offset.any()
    new = fold_before(edit, node, affine) if legal else None
    if new is not None:
        edit.put(node, replace(new, inputs=(norm.inputs[0], *new.inputs[1:])), without=[norm])


def _alone(edit: Edit, node: Node, affine: Affine) -> None:
    """Mul and Add of constants that broadcast along the channels, dimension 1."""
    dims = rank(edit.graph, node.inputs[0])
    if dims is None or dims < 2:
        return
    factor, offset = (a.reshape(-1, *[1] * (dims - 2)) for a in affine)
    scaled = edit.new_name(f"{node.output}_scaled")
    if node.output in edit.graph.types:
        edit.graph.types[scaled] = edit.graph.types[node.output]
    mul = Node(edit.new_name(f"{node.name}_mul"), "Mul", (node.inputs[0], edit.constant(f"{node.name}_factor", factor)),
               (scaled,))  # fmt: skip
    add = Node(node.name, "Add", (scaled, edit.constant(f"{node.name}_offset", offset)), node.outputs)
    edit.put(node, mul, add)
