"""What nodes and graphs compute, in NumPy: the oracle of tests, and the steps of plans that have no kernel.

f32 tensors are computed in f32 or f64 and rounded to f32 once per node; half-precision ones in f32.  Operators without
an implementation here are left to the `onnx` package's reference (the extra `onnx`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vnnigen.errors import MissingExtraError, ModelError
from vnnigen.graph import evaluate_math, evaluate_nn, evaluate_rest, evaluate_shape  # noqa: F401 (they fill the table)
from vnnigen.graph.attributes import node_error
from vnnigen.graph.evaluate_base import EVALUATORS, AnyArray, per_channel, wide
from vnnigen.graph.ir import Array, Fused, Graph, Node

if TYPE_CHECKING:
    from onnx import NodeProto

#: Their result's last dimension is the channel; of all others it is the one after the batch.
CHANNELS_LAST = frozenset({"Linear", "MatMul", "Gemm", "MatMulInteger", "LayerNormalization", "RMSNormalization"})
#: These compute an image per channel, so a vector as a fused operand lies along dimension 1 and not the last one.
CHANNELS_SECOND = frozenset({
    "Conv", "ConvTranspose", "ConvInteger", "BatchNormalization", "MaxPool", "AveragePool", "GlobalAveragePool",
    "GlobalMaxPool", "InstanceNormalization", "GroupNormalization",
})  # fmt: skip


def evaluate(node: Node, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    """Compute one node, fused steps included: its outputs, in order.

    `inputs` are those of `node.inputs`, operands of fused steps among them, None where one is left out. Raises
    ModelError naming the node if they do not fit it; MissingExtraError if only the onnx package knows the operator.
    """
    operands = {step.operand for step in node.fused} - {None}
    own = [x for i, x in enumerate(inputs) if i not in operands]
    with np.errstate(all="ignore"):
        results = _compute(node, own)
        first: AnyArray = results[0]
        for step in node.fused:
            first = apply_fused(node, step, first, None if step.operand is None else inputs[step.operand])
    return (np.ascontiguousarray(first).reshape(first.shape), *results[1:])


def _compute(node: Node, inputs: Sequence[Array | None]) -> tuple[AnyArray, ...]:
    function = EVALUATORS.get(node.op) if node.domain in ("", "ai.onnx") else None
    if function is None or (node.op == "MaxPool" and len(node.outputs) == 2):
        return _by_reference(node, inputs)
    try:
        results = function(node, *inputs)
    except NotImplementedError:  # a rare form (Resize with cubic filters, ...)
        return _by_reference(node, inputs)
    except ModelError:
        raise
    except (ValueError, ArithmeticError, IndexError, TypeError, AttributeError) as error:
        shapes = [None if x is None else x.shape for x in inputs]
        raise node_error(node, f"cannot be computed on {shapes}: {error}") from error
    return results if isinstance(results, tuple) else (np.asarray(results),)


# Fused steps.


def apply_fused(node: Node, step: Fused, y: AnyArray, operand: AnyArray | None) -> AnyArray:
    """Apply one fused step to the result `y` of a node; `operand` is the tensor that it reads, if any."""
    if step.op == "Clip":
        low, high = (step.attrs.get(name) for name in ("min", "max"))
        bounds = [None if b is None else np.array(b, wide(y).dtype) for b in (low, high)]
        return np.asarray(EVALUATORS["Clip"](node, wide(y), *bounds)).astype(y.dtype)
    function = EVALUATORS.get(step.op)
    if function is None:
        raise node_error(node, f"no such fused step: {step.op}")
    inputs = [y]
    if operand is not None:
        vector = operand.ndim == 1 and node.op in CHANNELS_SECOND
        inputs.append(per_channel(operand, y.ndim, 1) if vector else operand)
    result = np.asarray(function(Node(node.name, step.op, (), ("",), step.attrs), *inputs))
    if result.shape != y.shape:
        raise node_error(node, f"the fused {step.op} changes the shape from {y.shape} to {result.shape}")
    return result.astype(y.dtype)


# The onnx package's reference.


def _import_onnx() -> Any:
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
        import onnx.reference
    except ImportError:
        raise MissingExtraError("onnx", "onnx") from None
    return onnx


def node_proto(node: Node) -> NodeProto:
    """The node (without its fused steps) as the onnx package's, values named x0, x1, ... and y0, y1, ..."""
    onnx = _import_onnx()
    operands = {step.operand for step in node.fused} - {None}
    own = [name for i, name in enumerate(node.inputs) if i not in operands]
    made: NodeProto = onnx.helper.make_node(
        node.op,
        [f"x{i}" if name else "" for i, name in enumerate(own)],
        [f"y{i}" if name else "" for i, name in enumerate(node.outputs)],
        domain=node.domain,
    )
    for name, value in sorted(node.attrs.items()):
        proto = onnx.numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        made.attribute.append(onnx.helper.make_attribute(name, proto))
    return made


@lru_cache(maxsize=256)
def _session(node: bytes) -> Any:
    """The reference of a serialized NodeProto."""
    onnx = _import_onnx()
    proto = onnx.NodeProto.FromString(node)

    def values(names: Iterable[str]) -> list[Any]:
        return [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in names if name]

    graph = onnx.helper.make_graph([proto], "node", values(proto.input), values(proto.output))
    opset = onnx.helper.make_opsetid(proto.domain, onnx.defs.onnx_opset_version())
    return onnx.reference.ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset]))


def _by_reference(node: Node, inputs: Sequence[Array | None]) -> tuple[AnyArray, ...]:
    session = _session(node_proto(node).SerializeToString(deterministic=True))
    feeds = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
    try:
        results = iter(session.run(None, feeds))
    except Exception as error:  # anything at all: it is another project's code on a model's numbers
        shapes = [None if x is None else x.shape for x in inputs]
        raise node_error(node, f"cannot be computed on {shapes}: {error}") from error
    empty: AnyArray = np.zeros(0, np.float32)
    return tuple(np.asarray(next(results)) if name else empty for name in node.outputs)


# Whole graphs.


def run_reference(
    graph: Graph, feeds: Mapping[str, npt.ArrayLike], wanted: Iterable[str] | None = None
) -> dict[str, Array]:
    """Compute `wanted` values (default: the outputs) of a graph from arrays of its inputs, node by node.

    Any value may be fed in place of what is before it.

    Quantized weights count as the f32 ones they stand for, annotations of values and precisions are ignored. Raises
    ModelError naming an input that is missing, a value that does not exist, or a node that cannot be computed.
    """
    names = list(graph.outputs if wanted is None else wanted)
    values: dict[str, Array] = {name: np.asarray(x) for name, x in feeds.items()}
    left: dict[str, int] = {}
    needed, todo = set(names) - set(values), []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            todo.append(node)
            needed.update(name for name in node.inputs if name and name not in values)
    for node in todo:
        for name in node.inputs:
            left[name] = left.get(name, 0) + 1
    keep = {*names, *graph.constants}

    def value(node: str, name: str) -> Array:
        if name not in values:
            constant = graph.array(name)
            if constant is None:
                raise ModelError(f"{node}: value {name!r} is neither fed nor made by a node")
            return constant
        return values[name]

    for node in reversed(todo):
        where = f"node {node.name!r} ({node.op})"
        results = evaluate(node, [value(where, name) if name else None for name in node.inputs])
        for name in set(node.inputs):  # frees what nobody reads any more
            left[name] -= node.inputs.count(name)
            if left[name] == 0 and name not in keep:
                values.pop(name, None)
        values.update((name, y) for name, y in zip(node.outputs, results, strict=False) if name)
    return {name: value("run_reference", name) for name in names}
