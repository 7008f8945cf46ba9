"""From a model of ONNX to a `Graph`: every operator in its newest form, every tensor checked, nodes in order.

Operators are looked up in `ONNX_OPERATORS` and `CONTRIB_OPERATORS`; ONNX's checker holds each node against its
schema before it is normalised, so that normalisers need not. The whole network is computed in f32: weights of
other floating-point types are converted, and inputs and outputs are f32 (`Graph.notes` says so).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vnnigen.errors import ModelError
from vnnigen.graph.attributes import node_error
from vnnigen.graph.dtypes import ONNX_TYPES
from vnnigen.graph.importer_builder import Builder, without_last_empty
from vnnigen.graph.importer_contrib import CONTRIB_OPERATORS
from vnnigen.graph.importer_ops import NOT_SUPPORTED, ONNX_OPERATORS, SIDE_OUTPUTS
from vnnigen.graph.importer_values import FLOATS, read_attribute, read_tensor, read_type
from vnnigen.graph.ir import Array, Graph, Node, TensorType, sort_nodes
from vnnigen.graph.loader import DEFAULT_LIMITS, Limits, load_onnx, opsets, require_onnx

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

#: Operators that may read infinite constants: bounds and masks.
_TAKE_INFINITY = """
    Add And Cast CastLike Clip Concat Equal Expand Gather Greater GreaterOrEqual Identity IsInf Less LessOrEqual Max Min
    Pad Reshape ScatterElements ScatterND Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where
"""
TAKE_INFINITY = frozenset(_TAKE_INFINITY.split())
#: Schemas to hold older models against, too: runtimes took Resize without a region before it was optional, in 13, and
#: ONNX Runtime's optimizer writes LayerNormalization into models of before 17.
CHECKED_AS = {"Resize": 13, "LayerNormalization": 17}
#: Operators whose second input are weights, of which there must be some.
WEIGHTED = frozenset(("Conv", "ConvTranspose", "ConvInteger", "Gemm", "MatMul", "MatMulInteger"))


def import_model(
    source: str | os.PathLike[str] | bytes | ModelProto, *, folder: Path | None = None, limits: Limits = DEFAULT_LIMITS
) -> Graph:
    """Read a model (see `load_onnx` for the arguments) into a graph whose `check()` passes.

    Lengths that the model leaves open are names in `Graph.inputs`. Raises ModelError, naming the node or tensor and the
    reason, for whatever is damaged, hostile or not supported, and MissingExtraError without the onnx package.
    """
    onnx = require_onnx()
    model = load_onnx(source, folder=folder, limits=limits)
    return _Importer(onnx, model).graph()


class _Importer:
    """One import. The graph's constants are read first, since normalisers look at them."""

    def __init__(self, onnx: Any, model: ModelProto) -> None:
        self.onnx = onnx
        self.proto = model.graph
        versions = opsets(onnx, model)
        if model.ir_version < 1:
            raise ModelError(f"the model's ir_version is {model.ir_version}; ONNX counts from 1")
        self.ir_version = min(model.ir_version, onnx.IR_VERSION)
        read = {name for node in model.graph.node for name in node.input}
        read.update(info.name for info in model.graph.output)
        taken = {name for node in model.graph.node for name in node.output} | read
        taken.update(tensor.name for tensor in model.graph.initializer)
        self.build = Builder(versions[""], taken, read)

    def graph(self) -> Graph:
        """The graph."""
        build, proto = self.build, self.proto
        if not proto.node:
            raise ModelError(f"graph {proto.name!r} has no nodes")
        for tensor in proto.initializer:
            build.define(tensor.name, read_tensor(tensor, f"initializer {tensor.name!r}"))
        inputs = self._inputs()
        outputs = self._outputs()
        nodes = [self._node(node, index) for index, node in enumerate(proto.node)]
        for node, raw in zip(nodes, proto.node, strict=True):
            if node.op == "Constant" and not node.domain:
                build.define(_only_output(node), _constant(node, raw))
        for node, raw in zip(nodes, proto.node, strict=True):
            if node.op != "Constant" or node.domain:
                self._normalise(node, raw)
        made = Graph(
            proto.name, inputs, outputs, sort_nodes(build.nodes, [*inputs, *build.constants]), dict(build.constants),
            notes=build.notes,
        )  # fmt: skip
        made.check()
        _check_constants(made.nodes, build.constants)
        made.prune()
        return made

    def _inputs(self) -> dict[str, TensorType]:
        """Inputs that are fed; older models list their initializers, too."""
        inputs: dict[str, TensorType] = {}
        for info in self.proto.input:
            if info.name in self.build.constants:
                continue
            if not info.name or info.name in inputs:
                raise ModelError(f"two inputs are named {info.name!r}" if info.name else "an input has no name")
            inputs[info.name] = read_type(info, f"input {info.name!r}")
            self._note(info, "input")
        return inputs

    def _outputs(self) -> tuple[str, ...]:
        outputs = tuple(info.name for info in self.proto.output)
        if not outputs:
            raise ModelError(f"graph {self.proto.name!r} has no outputs")
        if len(set(outputs)) != len(outputs) or "" in outputs:
            raise ModelError(f"graph {self.proto.name!r} has outputs without names, or of one name: {outputs}")
        for info in self.proto.output:
            self._note(info, "output")
        return outputs

    def _note(self, info: ValueInfoProto, what: str) -> None:
        kind = ONNX_TYPES.get(info.type.tensor_type.elem_type, "f32")
        if kind in FLOATS and kind != "f32":
            self.build.notes.append(f"{what} {info.name!r} is {kind} in the model, f32 here")

    def _node(self, raw: NodeProto, index: int) -> Node:
        """The node as it stands, attributes read."""
        domain = "" if raw.domain == "ai.onnx" else raw.domain
        node = Node(
            raw.name or f"{raw.op_type}_{index}", raw.op_type, tuple(raw.input), tuple(raw.output), domain=domain
        )
        if not any(node.outputs):
            raise node_error(node, "has no outputs")
        _table(node)
        attrs = {}
        for attribute in raw.attribute:
            if attribute.name in attrs:
                raise node_error(node, f"has two attributes named {attribute.name!r}")
            attrs[attribute.name] = read_attribute(attribute, f"attribute {attribute.name!r} of node {node.name!r}")
        return replace(node, attrs=attrs)

    def _normalise(self, node: Node, raw: NodeProto) -> None:
        build = self.build
        if not node.domain:
            self._check_schema(node, raw)
        if node.op in SIDE_OUTPUTS and not any(name in build.read for name in node.outputs[1:]):
            node = replace(node, outputs=node.outputs[:1])
        node = replace(node, inputs=without_last_empty(node.inputs), outputs=without_last_empty(node.outputs))
        normaliser = _table(node)[node.op]
        if normaliser is None:
            build.add(node)
        else:
            normaliser(build, node)

    def _check_schema(self, node: Node, raw: NodeProto) -> None:
        context = self.onnx.checker.C.CheckerContext()
        context.ir_version = self.ir_version
        context.opset_imports = {"": max(self.build.version, CHECKED_AS.get(node.op, 0))}
        try:
            self.onnx.checker.check_node(raw, context)
        except self.onnx.checker.ValidationError as error:
            raise node_error(node, str(error).strip().split("\n")[0]) from None


def _table(node: Node) -> Mapping[str, Any]:
    """The table that has the node's operator. ModelError if none has."""
    table: Mapping[str, Any] = {"": ONNX_OPERATORS, "com.microsoft": CONTRIB_OPERATORS}.get(node.domain, {})
    if node.op in table or (node.op == "Constant" and not node.domain):
        return table
    if not table:
        raise node_error(node, f"the domain {node.domain!r} is not known")
    why = NOT_SUPPORTED.get(node.op, "this operator is not supported") if not node.domain else "is not supported"
    raise node_error(node, why)


def _only_output(node: Node) -> str:
    if len(node.outputs) != 1 or node.inputs:
        raise node_error(node, "must have one output and no inputs")
    return node.outputs[0]


def _constant(node: Node, raw: NodeProto) -> Array:
    """The value of a Constant node, in whichever of its attributes it stands."""
    if len(node.attrs) != 1:
        raise node_error(node, f"needs one value, has {len(node.attrs)}")
    ((key, value),) = node.attrs.items()
    types = {
        "value": None,
        "value_int": np.int64,
        "value_ints": np.int64,
        "value_float": np.float32,
        "value_floats": np.float32,
    }
    if key not in types or isinstance(value, str) or (key == "value") != isinstance(value, np.ndarray):
        raise node_error(node, f"a constant given as {key!r} is not supported")
    try:
        array = np.asarray(value, types[key])
    except (TypeError, ValueError):
        raise node_error(node, f"attribute {key!r} is of another type than its name says") from None
    if array.dtype == np.float32 and np.isnan(array).any():
        raise node_error(node, "contains NaN")
    array.flags.writeable = False
    return array


def _check_constants(nodes: list[Node], constants: Mapping[str, Array]) -> None:
    """ModelError for infinite numbers where they are no bounds or masks, and for empty weights."""
    infinite = {n for n, a in constants.items() if a.dtype == np.float32 and not np.isfinite(a).all()}
    for node in nodes:
        for name in node.inputs:
            if name in infinite and node.op not in TAKE_INFINITY:
                raise node_error(node, f"constant {name!r} contains infinity")
        if node.op in WEIGHTED:
            for name in node.inputs[:2]:
                if name in constants and constants[name].size == 0:
                    raise node_error(node, f"constant {name!r} is empty")
