"""QuantizeLinear and DequantizeLinear nodes as annotations of values, weights and nodes.

In two steps: `absorb_weights` right after import, so that passes see weights where they look for them, and
`absorb_activations` after the passes, when nodes are as they will be computed. Between, the nodes keep passes from
fusing over a value whose bytes may do a Relu's work (its zero point being the smallest byte). For the same reason a
node that stays f32 goes on reading through its QuantizeLinear and DequantizeLinear. What else stays of them makes byte
outputs of the graph, reads byte inputs, or has scales that are computed at run time, per channel, or of other types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vnnigen.errors import QuantizationError
from vnnigen.graph.attributes import int_attr
from vnnigen.graph.ir import Array, Graph, Node, Precision, QWeight, TensorType, ValueQuant
from vnnigen.graph.storage import assign
from vnnigen.kernels import qparams
from vnnigen.kernels.types import F32
from vnnigen.quant.policy import ANCHORS, FLEXIBLE, SHARING, WEIGHTED, Decision, data_inputs, obstacle
from vnnigen.quant.quantize import overflows

#: Operators that read their inputs as they are stored, not as their precision says.
AS_STORED = frozenset(("Add", "Sum", "Concat"))
_BYTES = (np.dtype(np.uint8), np.dtype(np.int8))


class _Step(NamedTuple):
    """What a QuantizeLinear or DequantizeLinear has besides the tensor; axis None: one scale for all."""

    scale: F32
    zero_point: Array
    axis: int | None


def absorb_qdq(graph: Graph) -> list[Decision]:
    """Both steps at once, for a graph that no passes run on; see `absorb_activations`."""
    absorb_weights(graph)
    return absorb_activations(graph)


def absorb_weights(graph: Graph) -> bool:
    """Turn constants behind DequantizeLinear nodes into plain ones, in place; False if there are no Q/DQ nodes.

    Weights of Conv, MatMul and Gemm become QWeight (u8 as s8, with both shifted by 128), the latter two Linear; other
    constants, biases among them, become f32. Raises QuantizationError for scales that mean nothing.
    """
    if not any(node.op in ("QuantizeLinear", "DequantizeLinear") for node in graph):
        return False
    _absorb_constants(graph)
    _make_linear(graph)
    graph.prune()
    return True


def absorb_activations(graph: Graph) -> list[Decision]:
    """Annotate values that are quantized and dequantized, in place, as `quantize` would; what became of each node.

    Nodes that read and make values quantized per tensor as u8 or s8 compute in int8, without the Q/DQ nodes between
    them. Raises QuantizationError for scales that mean nothing.
    """
    _move_bytes_later(graph)
    reals = _annotate(graph)
    decisions = _set_precisions(graph)
    producers = graph.producers()

    def source(node: Node, i: int) -> str:
        """What an int8 node reads instead of a dequantized value: the one whose bytes those are."""
        name = node.inputs[i]
        real = reals.get(name, name)
        if any(step.operand == i for step in node.fused):  # is read as it is stored
            maker = producers.get(real)
            return real if maker is not None and maker.precision == "int8" else name
        return real

    rounded: set[tuple[str, str]] = set()
    while True:
        trial = graph.copy()
        trial.nodes = [
            replace(n, inputs=tuple(n.inputs[i] if (n.name, n.inputs[i]) in rounded else source(n, i)
                                    for i in range(len(n.inputs)))) if n.precision == "int8" else n
            for n in graph
        ]  # fmt: skip
        trial.prune()
        lost = _not_rounded(trial, reals)
        if lost <= rounded:
            break
        rounded |= lost
    graph.nodes = trial.nodes
    graph.prune()
    left = {node.name for node in graph}
    return [d for d in decisions if d.node in left]


def _not_rounded(graph: Graph, reals: Mapping[str, str]) -> set[tuple[str, str]]:
    """Nodes and dequantized values that they would no longer see: they read the real numbers instead, as f32.

    Sums and concatenations take their inputs as they are stored, as operands of fused steps are taken; and only what an
    int8 node makes is stored as bytes.
    """
    stored = assign(graph).values
    behind = {real: name for name, real in reals.items()}
    return {
        (node.name, behind[name])
        for node in graph
        if node.precision == "int8"
        for i, name in enumerate(node.inputs)
        if node.op in AS_STORED or any(step.operand == i for step in node.fused)
        if name in behind and stored[name].quant is None
    }


def _step(graph: Graph, node: Node, rank: int | None) -> _Step | None:
    """Scale and zero point of a Q or DQ node, None if they are not constant or in blocks."""
    scales = graph.array(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else ""
    if scales is None or int_attr(node, "block_size", 0) or (given and given not in graph.constants):
        return None
    scale: F32 = scales.astype(np.float32)
    zero_point = graph.array(given) if given else None
    if zero_point is None:
        source = graph.constants.get(node.inputs[0])
        kind = {2: np.uint8, 3: np.int8}.get(int_attr(node, "output_dtype", 2), np.uint8)
        dtype = kind if node.op == "QuantizeLinear" or not isinstance(source, np.ndarray) else source.dtype
        zero_point = np.zeros(scale.shape, dtype)
        if node.op == "DequantizeLinear" and source is None:
            known = graph.types.get(node.inputs[0]) or graph.inputs.get(node.inputs[0])
            zero_point = zero_point.astype(np.int8 if known is not None and known.dtype == "s8" else np.uint8)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise QuantizationError(f"node {node.name!r} ({node.op}): scales must be finite and above zero")
    if scale.size == 1:
        return _Step(scale.reshape(()), zero_point.reshape(()), None)
    axis = int_attr(node, "axis", 1)
    if scale.ndim != 1 or zero_point.shape != scale.shape or rank is None or not -rank <= axis < rank:
        return None
    return _Step(scale, zero_point, axis % rank)


# Constants.


def _absorb_constants(graph: Graph) -> None:
    """Weights become QWeight, other constants behind Q and DQ nodes f32."""
    readers = graph.consumers()
    removed: dict[str, Node | None] = {}
    for node in graph.nodes:
        if node.op not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        source = graph.constants.get(node.inputs[0])
        step = None if not isinstance(source, np.ndarray) else _step(graph, node, source.ndim)
        if not isinstance(source, np.ndarray) or step is None or node.output in graph.outputs:
            continue
        if node.op == "QuantizeLinear":
            if step.zero_point.dtype not in _BYTES:
                continue
            made: Array | QWeight = qparams.quantize(
                source, step.scale, step.zero_point, dtype=step.zero_point.dtype, axis=step.axis
            )  # fmt: skip
        else:
            found = _weights(source, step)
            if found is None:
                continue
            made = found
            layers = {(n.op, n.inputs.index(node.output)) for n in readers.get(node.output, ())}
            if not layers <= {("Conv", 1), ("MatMul", 1), ("Gemm", 1)} or not _fits(made, layers):
                made = _real(source, step)
        graph.constants[node.output] = made
        removed[node.name] = None
    graph.rewrite(removed)


def _weights(source: Array, step: _Step) -> QWeight | Array | None:
    """Quantized constants of bytes as s8, s32 ones as f32, None for other types."""
    if source.dtype == np.int32:
        return _real(source, step)
    if source.dtype not in _BYTES:
        return None
    shift = 128 if source.dtype == np.uint8 else 0
    values = (source.astype(np.int16) - shift).astype(np.int8)
    zero_point = step.zero_point.astype(np.int32) - shift
    return QWeight(values, step.scale, np.broadcast_to(zero_point, step.scale.shape).copy(), step.axis)


def _real(source: Array, step: _Step) -> Array:
    """The f32 numbers that a quantized constant stands for."""
    shape = [1] * source.ndim
    if step.axis is not None:
        shape[step.axis] = -1
    centered = source.astype(np.int64) - step.zero_point.astype(np.int64).reshape(shape if source.ndim else ())
    real: Array = (centered * step.scale.astype(np.float64).reshape(shape if source.ndim else ())).astype(np.float32)
    return real


def _fits(weights: QWeight | Array, layers: set[tuple[str, int]]) -> bool:
    """Whether scales lie along the output channels of all layers that read the weights."""
    if not isinstance(weights, QWeight):
        return True
    if weights.axis is None:
        return True
    rank = weights.values.ndim
    # Gemm's may be transposed: either axis is right for one form, `_make_linear` looks which.
    right = {"Conv": {0}, "MatMul": {rank - 1}, "Gemm": {0, 1}}
    return all(weights.axis in right[op] for op, _ in layers)


def _make_linear(graph: Graph) -> None:
    """MatMul and Gemm with quantized matrices become Linear; what cannot gets f32 weights."""
    nodes = []
    for node in graph:
        weights = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        if node.op not in ("MatMul", "Gemm") or not isinstance(weights, QWeight):
            nodes.append(node)
            continue
        transposed = node.op == "Gemm" and int_attr(node, "transB", 0) != 0
        if weights.values.ndim != 2 or weights.axis == (1 if transposed else 0) or not _plain_gemm(node):
            name = graph.new_name(f"{node.inputs[1]}_real")
            graph.constants[name] = weights.real
            nodes.append(replace(node, inputs=(node.inputs[0], name, *node.inputs[2:])))
            continue
        name = node.inputs[1]
        if transposed:
            name = graph.new_name(f"{name}_transposed")
            values = np.ascontiguousarray(weights.values.T)
            graph.constants[name] = replace(weights, values=values, axis=None if weights.axis is None else 1)
        inputs = [node.inputs[0], name]
        if len(node.inputs) > 2 and node.inputs[2]:
            inputs.append(_bias(graph, node.inputs[2], graph.array(name)))
        nodes.append(replace(node, op="Linear", inputs=tuple(inputs), attrs={}))
    graph.nodes = nodes


def _plain_gemm(node: Node) -> bool:
    """Whether a MatMul or Gemm is x @ w + bias."""
    if node.op == "MatMul":
        return True
    factors = (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0))
    biased = len(node.inputs) > 2 and node.inputs[2]
    return not int_attr(node, "transA", 0) and factors[0] == 1.0 and (factors[1] == 1.0 or not biased)


def _bias(graph: Graph, name: str, weights: Array | None) -> str:
    """A Gemm's bias as one value per column: a constant of one element, or of one row, is repeated."""
    bias = graph.array(name)
    assert weights is not None
    if bias is None or bias.shape == weights.shape[1:] or bias.size not in (1, weights.shape[1]):
        return name
    vector = np.array(np.broadcast_to(bias.reshape(-1), weights.shape[1:]), np.float32)
    new = graph.new_name(f"{name}_vector")
    graph.constants[new] = vector
    graph.types[new] = TensorType("f32", vector.shape)
    return new


# Activations.


def _move_bytes_later(graph: Graph) -> None:
    """Quantize after operators that only move what they read, not before: x -> Q -> op becomes x -> op -> Q."""
    producers, readers = graph.producers(), graph.consumers()
    nodes: list[Node] = []
    for node in graph:
        makers = [producers.get(name) for name in (node.inputs if node.op == "Concat" else node.inputs[:1])]
        quantizers = [m for m in makers if m is not None and m.op == "QuantizeLinear"]
        quants = [_value_quant(graph, m) for m in quantizers]
        same = bool(quants) and None not in quants and len(set(quants)) == 1 and len(quants) == len(makers)
        if node.op not in SHARING or not same or len(node.outputs) != 1:
            nodes.append(node)
            continue
        sources = [m.inputs[0] for m in quantizers]
        for name in sources:
            if _only_quantized(graph, name, quants[0], readers, producers):
                graph.quant.setdefault(name, quants[0])  # type: ignore[arg-type]  # not None, see above
        moved = graph.new_name(f"{node.output}_real")
        kind = graph.types.get(node.output)
        graph.types[moved] = TensorType("f32", None if kind is None else kind.shape)
        after = replace(
            quantizers[0],
            name=graph.new_name(f"{node.name}_quantize"),
            inputs=(moved, *quantizers[0].inputs[1:]),
            outputs=node.outputs,
        )
        rest = node.inputs[len(sources) :]
        made = replace(node, inputs=(*sources, *rest), outputs=(moved,))
        nodes += [made, after]
        producers[moved], producers[node.output] = made, after
        readers[moved] = [after]
    graph.nodes = nodes


def _annotate(graph: Graph) -> dict[str, str]:
    """Annotate what Q nodes read and DQ nodes make: by dequantized value, the value of the same bytes before Q."""
    producers, readers = graph.producers(), graph.consumers()
    quants = {n.output: _value_quant(graph, n) for n in graph if n.op in ("QuantizeLinear", "DequantizeLinear")}
    for node in graph:
        quant = quants.get(node.output) if node.op == "QuantizeLinear" else None
        if quant is not None and _only_quantized(graph, node.inputs[0], quant, readers, producers):
            graph.quant.setdefault(node.inputs[0], quant)
    reals: dict[str, str] = {}
    for node in graph:
        quant = quants.get(node.output) if node.op == "DequantizeLinear" else None
        if quant is None:
            continue
        graph.quant[node.output] = quant
        source = producers.get(node.inputs[0])
        paired = source is not None and source.op == "QuantizeLinear" and quants[source.output] == quant
        if source is not None and paired and graph.quant.get(source.inputs[0]) == quant:
            reals[node.output] = source.inputs[0]
    return reals


def _value_quant(graph: Graph, node: Node) -> ValueQuant | None:
    """The bytes that a Q or DQ node writes or reads, None unless they are u8 or s8 per tensor."""
    step = _step(graph, node, None)
    if step is None or step.axis is not None or step.zero_point.dtype not in _BYTES:
        return None
    kind = graph.types.get(node.output if node.op == "QuantizeLinear" else node.inputs[0])
    if kind is not None and kind.dtype not in ("u8", "s8"):
        return None
    return ValueQuant("u8" if step.zero_point.dtype == np.uint8 else "s8", float(step.scale), int(step.zero_point))


def _only_quantized(
    graph: Graph, name: str, quant: ValueQuant | None, readers: dict[str, list[Node]], producers: dict[str, Node]
) -> bool:
    """Whether annotating a value changes no reader: all quantize it alike, or f32 is what its producer writes."""
    if name in graph.constants:
        return False
    maker = producers.get(name)
    if maker is None or (maker.op not in ANCHORS and maker.op not in FLEXIBLE):
        return True
    alike = all(n.op == "QuantizeLinear" and _value_quant(graph, n) == quant for n in readers[name])
    return alike and name not in graph.outputs


# Precisions.


def _set_precisions(graph: Graph) -> list[Decision]:
    """Nodes all of whose data is annotated compute in int8."""
    int8 = {}
    for node in graph:
        int8[node.name] = _why_not(graph, node)
    able = [n for n in graph if int8[n.name] is None and n.op in WEIGHTED]
    weights = {n.name: w for n in able if isinstance(w := graph.constants[n.inputs[1]], QWeight)}
    int8.update(overflows(graph, graph.quant, weights))
    decisions = []
    for node in graph:
        why = int8[node.name]
        precision: Precision = "int8" if why is None else "f32"
        decisions.append(Decision(node.name, node.op, precision, why or "quantized in the model"))
    graph.nodes = [replace(n, precision=d.precision) for n, d in zip(graph.nodes, decisions, strict=True)]
    return decisions


def _why_not(graph: Graph, node: Node) -> str | None:
    """Why a node does not compute in int8, None if it does."""
    if why := obstacle(graph, node):
        return why
    if node.op in WEIGHTED and not isinstance(graph.constants[node.inputs[1]], QWeight):
        return "its weights are not quantized"
    inputs = data_inputs(graph, node)
    if missing := [n for n in inputs if n not in graph.quant]:
        return f"its input {missing[0]!r} is not quantized"
    if node.op in ANCHORS:
        return None
    outputs = [n for n in node.outputs if n]
    if missing := [n for n in outputs if n not in graph.quant]:
        return f"its output {missing[0]!r} is not quantized"
    if node.op in SHARING - {"Concat"} and len({graph.quant[n] for n in [*inputs, *outputs]}) > 1:
        return "its input and output have different scales"
    return None
