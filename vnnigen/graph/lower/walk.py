"""The walk over a graph: every node by its rule, or in NumPy."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Graph, Node
from vnnigen.graph.lower.context import RULES, Lowered, Lowering
from vnnigen.graph.storage import Layout, Place, Storage, assign
from vnnigen.graph.tiers import Tiers

#: Operators whose kernels compute real numbers; ONNX has some for whole numbers, too.
PRODUCTS = frozenset(("Conv", "Linear", "Gemm", "MatMul"))


def lower(
    graph: Graph, tiers: Tiers | None = None, operators: dict[Hashable, Any] | None = None,
    inputs: dict[str, Layout] | None = None,
) -> Lowered:  # fmt: skip
    """Lower a graph of concrete shapes to steps.

    `operators` is kept by the caller, so that plans of other shapes share packed weights; `inputs` gives the order in
    which graph inputs lie, by default as ONNX says. Raises ModelError naming the node where one cannot be run.
    """
    ctx = Lowering(graph, assign(graph, inputs=inputs), tiers or Tiers(), {} if operators is None else operators)
    places = []
    for i, name in enumerate(graph.inputs):
        place = Place.new(-1, ctx.shape(name), ctx.assignment.values[name])
        place = Place.new(ctx.buffer(place.nbytes, "input", i), place.shape, ctx.assignment.values[name])
        ctx.set(name, place)
        places.append(place)
    for node in graph:
        reason = why_numpy(ctx, node) or RULES[node.op](ctx, node)
        if reason is not None:
            ctx.numpy(node, reason)
    outputs = tuple(_output(ctx, i, name) for i, name in enumerate(graph.outputs))
    return Lowered(tuple(ctx.steps), tuple(ctx.buffers), tuple(places), outputs, ctx.assignment.fallbacks)


def why_numpy(ctx: Lowering, node: Node) -> str | None:
    """Why no rule can take a node, None if one may."""
    if node.op not in RULES or node.domain not in ("", "ai.onnx"):
        return f"no kernel for {node.op}"
    if node.op in PRODUCTS and ctx.graph.types[node.outputs[0]].dtype != "f32":
        return "no kernel for products of integers alone"
    if any(ctx.is_object(name) for name in node.inputs):
        return "its input's shape is known only at run time"
    if any(name and ctx.graph.shape(name) is None for name in node.outputs):
        return "its result's shape is known only at run time"
    if any(0 in (ctx.graph.shape(name) or ()) for name in (*node.inputs, *node.outputs) if name):
        return "tensors without elements"
    return None


def _output(ctx: Lowering, index: int, name: str) -> Place:
    """Bring an output of the graph to where the caller wants it, unless it is there already."""
    place = ctx.value(name)
    buffer = ctx.buffers[place.buffer]
    if buffer.kind == "object" or (buffer.kind == "output" and buffer.index == index and place.lies("plain")):
        return place
    kind = ctx.graph.types.get(name)
    storage = Storage(place.dtype if kind is None else kind.dtype)
    out = Place.new(-1, place.shape, storage)
    nbytes = out.nbytes if out.shape else numpy_dtype(storage.dtype).itemsize
    return ctx.convert(name, place, storage, Place.new(ctx.buffer(nbytes, "output", index), place.shape, storage))
