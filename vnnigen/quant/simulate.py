"""An annotated graph in NumPy, with the arithmetic of the kernels: the oracle of int8 networks.

Values are stored as `graph.storage.assign` says, so that rounding happens where the native plan rounds.  Int8 layers,
sums and average pools go through the operators' own references (exact integers, the kernels' epilogue); all other nodes
compute in f32 on what their inputs stand for, and their result is rounded to how it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vnnigen.errors import ModelError
from vnnigen.graph.attributes import float_attr, int_attr, ints_attr, str_attr
from vnnigen.graph.evaluate import evaluate
from vnnigen.graph.ir import Array, Fused, Graph, Node, QWeight, ValueQuant
from vnnigen.graph.specialize import specialize
from vnnigen.graph.storage import Assignment, Storage, assign
from vnnigen.graph.windows import windows
from vnnigen.kernels.bf16 import round_to_bf16
from vnnigen.kernels.post_ops import (
    GELU,
    Binary,
    Clip,
    HardSwish,
    LeakyReLU,
    PostOp,
    ReLU,
    Sigmoid,
    SiLU,
    Sum,
    Tanh,
)
from vnnigen.kernels.types import NUMPY
from vnnigen.ops.conv import Conv2dInt8
from vnnigen.ops.element import SumTensors, convert
from vnnigen.ops.gemm import GemmInt8
from vnnigen.ops.matmul import MatMulInt8
from vnnigen.ops.pool import AvgPool2d

_ISA = "reference"


@dataclass(frozen=True, eq=False)
class Stored:
    """An array as it lies in memory and, for bytes, what they mean."""

    array: Array
    quant: ValueQuant | None = None

    @property
    def real(self) -> Array:
        """The numbers that it stands for."""
        if self.quant is None:
            return self.array.astype(np.float32) if self.array.dtype == NUMPY["bf16"] else self.array
        return convert(
            self.array, np.float32, x_scale=self.quant.scale, x_zero_point=self.quant.zero_point, isa=_ISA
        )  # fmt: skip

    @property
    def step(self) -> tuple[float, int]:
        """Scale and zero point, 1 and 0 for real numbers."""
        return (1.0, 0) if self.quant is None else (self.quant.scale, self.quant.zero_point)

    def become(self, storage: Storage | None) -> Stored:
        """The same numbers, stored in another way."""
        if storage is None or (storage.dtype, storage.quant) == (self._dtype, self.quant):
            return self
        return store(self.real, storage)

    @property
    def _dtype(self) -> str:
        return next((name for name, dtype in NUMPY.items() if dtype == self.array.dtype), "")


def store(real: Array, storage: Storage) -> Stored:
    """Real numbers as bytes or bf16; other storage keeps them."""
    q = storage.quant
    if q is not None:
        whole = np.ascontiguousarray(real, np.float32)
        made = convert(whole, NUMPY[q.dtype], y_scale=q.scale, y_zero_point=q.zero_point, isa=_ISA)
        return Stored(made, q)
    return Stored(round_to_bf16(real.astype(np.float32)) if storage.dtype == "bf16" else real)


def simulate(
    graph: Graph,
    feeds: Mapping[str, Array],
    wanted: Iterable[str] | None = None,
    assignment: Assignment | None = None,
) -> dict[str, Array]:
    """Compute `wanted` values (default: the outputs) of an annotated graph, as the numbers that they stand for.

    `assignment` says how values are stored; without it, the graph is specialized to the shapes of `feeds` and
    `graph.storage` decides. Raises ModelError for inputs that are missing and nodes that cannot be computed.
    """
    if assignment is None:
        graph = specialize(graph, {name: np.shape(x) for name, x in feeds.items()})
        assignment = assign(graph)
    if missing := set(graph.inputs) - set(feeds):
        raise ModelError(f"simulate: input {sorted(missing)[0]!r} is not fed")
    values = {name: Stored(np.asarray(x)).become(assignment.values.get(name)) for name, x in feeds.items()}

    def read(name: str) -> Stored:
        if name not in values:
            constant = graph.array(name)
            if constant is None:
                raise ModelError(f"simulate: value {name!r} is not made")
            return Stored(constant)
        return values[name]

    for node in graph:
        inputs = [
            read(name).become(assignment.wants.get((node.name, i))) if name else None
            for i, name in enumerate(node.inputs)
        ]
        storages = [assignment.values[name] if name else Storage("f32") for name in node.outputs]
        made = _int8(graph, node, inputs, storages[0]) if assignment.precision[node.name] == "int8" else None
        if made is None:
            results = evaluate(node, [None if x is None else x.real for x in inputs])
            values.update(
                (name, Stored(y).become(s)) for name, y, s in zip(node.outputs, results, storages, strict=False) if name
            )  # fmt: skip
        else:
            values[node.output] = made.become(storages[0])
    return {name: read(name).real for name in (graph.outputs if wanted is None else wanted)}


Inputs = Sequence[Stored | None]
Rule = Callable[[Graph, Node, Inputs, dict[str, Any]], "Array | None"]


def _int8(graph: Graph, node: Node, inputs: Inputs, out: Storage) -> Stored | None:
    """A node in integers, None where integers mean no more than the numbers that they stand for."""
    rule = _RULES.get(node.op)
    if rule is None:
        return None
    q = out.quant
    target: dict[str, Any] = {"out_dtype": np.float32}
    if q is not None:
        target = {"out_dtype": NUMPY[q.dtype], "y_scale": q.scale, "y_zero_point": q.zero_point}
    made = rule(graph, node, inputs, target)
    return None if made is None else Stored(made, q)


def _conv(graph: Graph, node: Node, inputs: Inputs, target: dict[str, Any]) -> Array | None:
    x, weights = inputs[0], graph.constants[node.inputs[1]]
    assert x is not None
    assert isinstance(weights, QWeight)
    kernel = weights.values.shape[2:]
    w = windows(node, kernel, x.array.shape[2:])
    flat = len(kernel) == 1  # an image of one row

    def image(array: Array) -> Array:
        return array[:, :, None] if flat and array.ndim == 3 else array

    pads = tuple(zip(w.begin, w.end, strict=True))
    one = (1,) * flat
    ops, tensors = post_ops(graph, node, inputs, weights.values.shape[0])
    conv = Conv2dInt8(
        image(weights.values), _bias(graph, node), **_source("x", x), **_weight_step("w", weights),
        stride=one + w.strides, dilation=one + w.dilations, padding=((0, 0),) * flat + pads,
        groups=int_attr(node, "group", 1), post_ops=ops, layout="NCHW", isa=_ISA, **target,
    )  # fmt: skip
    y = conv(image(x.array), tensors=[image(t) for t in tensors])
    return y[:, :, 0] if flat else y


def _linear(graph: Graph, node: Node, inputs: Inputs, target: dict[str, Any]) -> Array | None:
    x, weights = inputs[0], graph.constants[node.inputs[1]]
    assert x is not None
    assert isinstance(weights, QWeight)
    k, n = weights.values.shape
    ops, tensors = post_ops(graph, node, inputs, n)
    gemm = GemmInt8(
        weights.values, _bias(graph, node), **_source("a", x), **_weight_step("b", weights), post_ops=ops, isa=_ISA,
        **target,
    )  # fmt: skip
    rows = np.ascontiguousarray(x.array).reshape(-1, k)
    outer = x.array.shape[:-1]
    y = gemm(rows, tensors=[np.broadcast_to(t, (*outer, n)).reshape(-1, n) for t in tensors])
    return y.reshape(*outer, n)


def _matmul(graph: Graph, node: Node, inputs: Inputs, target: dict[str, Any]) -> Array | None:
    a, b = inputs[:2]
    assert a is not None
    assert b is not None
    outer = np.broadcast_shapes(a.array.shape[:-2], b.array.shape[:-2])
    shape = (*outer, a.array.shape[-2], b.array.shape[-1])
    ops, tensors = post_ops(graph, node, inputs, shape[-1])
    op = MatMulInt8(**_source("a", a), **_source("b", b), post_ops=ops, isa=_ISA, **target)
    return op(a.array, b.array, tensors=[np.ascontiguousarray(np.broadcast_to(t, shape)) for t in tensors])


def _add(graph: Graph, node: Node, inputs: Inputs, target: dict[str, Any]) -> Array | None:
    fused = {step.operand for step in node.fused}
    own = [x for i, x in enumerate(inputs) if i not in fused]
    if any(x is None for x in own) or len({x.array.shape for x in own if x is not None}) != 1:
        return None
    sources = [x for x in own if x is not None]
    if len(sources) > 5 or fused - {None}:
        return None
    ops, _ = post_ops(graph, node, inputs, sources[0].array.shape[-1])
    y_shape = sources[0].array.shape
    total = SumTensors(
        len(sources), scales=[x.step[0] for x in sources], zero_points=[x.step[1] for x in sources], post_ops=ops,
        isa=_ISA, **target,
    )  # fmt: skip
    return np.asarray(total([np.ascontiguousarray(x.array) for x in sources])).reshape(y_shape)


def _average(graph: Graph, node: Node, inputs: Inputs, target: dict[str, Any]) -> Array | None:
    x = inputs[0]
    if x is None or x.array.ndim != 4 or node.fused or int_attr(node, "ceil_mode", 0):
        return None
    arguments: dict[str, Any] = {"kernel": None}
    if node.op == "AveragePool":
        kernel = ints_attr(node, "kernel_shape")
        assert kernel is not None
        w = windows(node, kernel, x.array.shape[2:])
        if set(w.dilations) != {1}:
            return None
        arguments = {
            "kernel": kernel, "stride": w.strides, "padding": tuple(zip(w.begin, w.end, strict=True)),
            "include_padding": bool(int_attr(node, "count_include_pad", 0)),
        }  # fmt: skip
    pool = AvgPool2d(**arguments, **_source("x", x), **target, isa=_ISA)
    y: Array = pool(np.ascontiguousarray(x.array.transpose(0, 2, 3, 1))).transpose(0, 3, 1, 2)
    return y


_RULES: dict[str, Rule] = {
    "Conv": _conv, "Linear": _linear, "MatMul": _matmul, "Add": _add, "Sum": _add, "AveragePool": _average,
    "GlobalAveragePool": _average,
}  # fmt: skip


def _source(name: str, x: Stored) -> dict[str, Any]:
    scale, zero_point = x.step
    return {f"{name}_scale": scale, f"{name}_zero_point": zero_point}


def _weight_step(name: str, w: QWeight) -> dict[str, Any]:
    scale, zero_point = (v if w.axis is not None else v.reshape(()) for v in (w.scale, w.zero_point))
    return {f"{name}_scale": scale, f"{name}_zero_point": zero_point if zero_point.any() else 0}


def _bias(graph: Graph, node: Node) -> Array | None:
    bias = graph.array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    return None if bias is None else bias.reshape(-1).astype(np.float32)


def post_ops(graph: Graph, node: Node, inputs: Inputs, channels: int) -> tuple[list[PostOp], list[Array]]:
    """The fused steps of a node as post-operations, and the tensors that they read at the call."""
    ops: list[PostOp] = []
    tensors: list[Array] = []
    for step in node.fused:
        if step.operand is None:
            ops.append(_activation(node, step))
            continue
        constant, operand = graph.array(node.inputs[step.operand]), inputs[step.operand]
        if constant is not None and constant.size in (1, channels):
            vector = np.array(np.broadcast_to(constant.reshape(-1), (channels,)), np.float32)
            ops.append(Binary("mul" if step.op == "Mul" else "add", vector))
            continue
        assert operand is not None
        scale, zero_point = operand.step
        tensors.append(np.ascontiguousarray(operand.array))
        if step.op == "Mul":
            ops.append(Binary("mul", None, scale, zero_point, operand.array.dtype))
        else:
            ops.append(Sum(scale, zero_point, dtype=operand.array.dtype))
    return ops, tensors


def _activation(node: Node, step: Fused) -> PostOp:
    as_node = replace(node, attrs=dict(step.attrs))
    if step.op == "Clip":
        return Clip(float_attr(as_node, "min", -np.inf), float_attr(as_node, "max", np.inf))
    if step.op == "LeakyRelu":
        return LeakyReLU(float_attr(as_node, "alpha", 0.01))
    if step.op == "Gelu":
        return GELU("tanh" if str_attr(as_node, "approximate", "none") == "tanh" else "none")
    if step.op == "Silu":
        return SiLU(float_attr(as_node, "alpha", 1.0))
    simple: dict[str, type[PostOp]] = {"Relu": ReLU, "HardSwish": HardSwish, "Sigmoid": Sigmoid, "Tanh": Tanh}
    if step.op not in simple:
        raise ModelError(f"node {node.name!r} ({node.op}): no such fused step: {step.op}")
    return simple[step.op]()
