"""A `Graph` back as a model of the newest opset, to let the onnx package say what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from vnnigen.graph.dtypes import NUMPY_DTYPES
from vnnigen.graph.ir import Graph


def to_onnx(graph: Graph) -> Any:
    """A graph without fused steps as a ModelProto."""
    nodes = []
    for node in graph:
        attrs = {
            k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else list(v) if isinstance(v, tuple) else v
            for k, v in node.attrs.items()
        }
        nodes.append(helper.make_node(node.op, list(node.inputs), list(node.outputs), name=node.name, **attrs))
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(NUMPY_DTYPES[kind.dtype]), kind.shape)
        for name, kind in graph.inputs.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in graph.outputs]
    constants = [numpy_helper.from_array(graph.array(name), name) for name in graph.constants]  # type: ignore[arg-type]
    made = helper.make_graph(nodes, graph.name or "graph", inputs, outputs, constants)
    newest = onnx.defs.onnx_opset_version()
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", newest)])


def run(graph: Graph, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """The outputs of a graph by onnx.reference."""
    return list(ReferenceEvaluator(to_onnx(graph)).run(None, dict(feeds)))
