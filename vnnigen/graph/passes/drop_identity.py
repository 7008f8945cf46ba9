"""Drop nodes that change nothing: Identity, Dropout, a Reshape to the same shape, x * 1, a Concat of one tensor, ..."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vnnigen.graph.attributes import str_attr
from vnnigen.graph.ir import Graph, Node
from vnnigen.graph.passes.edit import Edit, plain, same_shape, scalar

#: Where the result has the input's shape, it is the input.
_SHAPE_SAYS_ALL = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum",
    "ReduceProd", "GlobalAveragePool", "GlobalMaxPool",
)  # fmt: skip
#: The constant beside which the other operand stays as it is, and whether it may stand on the left.
_NEUTRAL = {"Add": (0.0, True), "Sub": (0.0, False), "Mul": (1.0, True), "Div": (1.0, False), "Pow": (1.0, False)}


def drop_identity(graph: Graph) -> int:
    """Drop nodes that change nothing."""
    edit = Edit(graph)
    for node in edit:
        test = _TESTS.get(node.op)
        outputs = [name for name in node.outputs if name and edit.uses(name)]
        if test is None or not node.inputs or node.fused or len(outputs) > 1:
            continue
        if len(node.outputs) > 1 and (node.op not in ("Dropout",) or outputs != [node.outputs[0]]):
            continue
        source = test(graph, node)
        if source is not None:
            edit.bypass(Node(node.name, node.op, node.inputs, node.outputs[:1]), source)
    return edit.finish()


def _always(graph: Graph, node: Node) -> str | None:
    return node.inputs[0]


def _alone(graph: Graph, node: Node) -> str | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _by_shape(graph: Graph, node: Node) -> str | None:
    return node.inputs[0] if same_shape(graph, node.inputs[0], node.output) else None


def _split(graph: Graph, node: Node) -> str | None:
    return node.inputs[0] if len(node.outputs) == 1 else None


def _cast(graph: Graph, node: Node) -> str | None:
    types = [graph.types.get(name) or graph.inputs.get(name) for name in (node.inputs[0], node.output)]
    before, after = types
    return node.inputs[0] if before is not None and after is not None and before.dtype == after.dtype else None


def _clip(graph: Graph, node: Node) -> str | None:
    return node.inputs[0] if not any(node.inputs[1:]) else None


def _pad(graph: Graph, node: Node) -> str | None:
    pads = plain(graph, node.inputs[1])
    return node.inputs[0] if pads is not None and not pads.any() else None


def _slice(graph: Graph, node: Node) -> str | None:
    steps = plain(graph, node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] else np.ones(1)
    static = graph.shape(node.inputs[0])
    if steps is None or (steps != 1).any() or static is None or static != graph.shape(node.output):
        return None
    return node.inputs[0]


def _resize(graph: Graph, node: Node) -> str | None:
    static = graph.shape(node.inputs[0])
    if static is None or static != graph.shape(node.output):
        return None
    scales = plain(graph, node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else np.ones(1)
    whole = str_attr(node, "coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
    return node.inputs[0] if whole and scales is not None and (scales == 1).all() else None


def _neutral(graph: Graph, node: Node) -> str | None:
    value, either = _NEUTRAL[node.op]
    left, right = node.inputs
    for constant, other in ((right, left), (left, right))[: 1 + either]:
        if scalar(graph, constant, other) == value:
            return other
    return None


_TESTS: dict[str, Callable[[Graph, Node], str | None]] = {
    "Identity": _always, "Dropout": _always, "Cast": _cast, "Clip": _clip, "Pad": _pad, "Slice": _slice,
    "Resize": _resize, "Split": _split, **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _alone),
    **dict.fromkeys(_SHAPE_SAYS_ALL, _by_shape), **dict.fromkeys(_NEUTRAL, _neutral),
}  # fmt: skip
