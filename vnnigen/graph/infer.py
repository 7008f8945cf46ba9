"""Types of all values of a graph: element type and shape, by one small rule per operator.

Lengths may be names; where a rule cannot tell a length it makes up a name.  Small integer tensors are followed as
values, names included, so that a Reshape to what Shape, Gather and Concat put together is understood.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from vnnigen.errors import ModelError
from vnnigen.graph import infer_math, infer_nn, infer_rare, infer_shape  # noqa: F401 (they fill the table)
from vnnigen.graph.attributes import int_attr, node_error
from vnnigen.graph.dtypes import elem_type, numpy_dtype
from vnnigen.graph.evaluate import evaluate
from vnnigen.graph.evaluate_base import EVALUATORS, AnyArray
from vnnigen.graph.infer_base import RULES, Rule, Site, check_types
from vnnigen.graph.ir import Graph, Node, TensorType

#: No tensor of a network may take more; a file that asks for it is damaged or hostile.
MAX_TENSOR_BYTES = 2**34
#: Values of at most so many elements are followed: shapes, axes, scales.
SMALL = 4096
#: These also move the names of unknown lengths.
MOVES = frozenset({
    "Identity", "Cast", "Concat", "Gather", "Slice", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose", "Split",
})  # fmt: skip
#: Constants under these are weights that quantization is to see, or are different each time.
NOT_FOLDED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


@dataclass(frozen=True)
class Inferred:
    """The types of all values, and the small values that are known (names of lengths as objects)."""

    types: dict[str, TensorType]
    values: dict[str, AnyArray]


def shape_rule(op: str) -> Rule | None:
    """The rule of an operator, None if there is none."""
    return RULES.get(op)


def infer(graph: Graph) -> None:
    """Fill `graph.types` for every value, constants included.

    Raises ModelError naming the node where shapes or types contradict each other, an operator has no rule, or a tensor
    would take more than `MAX_TENSOR_BYTES`.
    """
    graph.types = propagate(graph).types


def propagate(graph: Graph) -> Inferred:
    """The types and small values of a graph, which is left as it is. Raises as `infer` does."""
    types = dict(graph.inputs)
    values: dict[str, AnyArray] = {}
    for name in graph.constants:
        array = graph.array(name)
        assert array is not None
        types[name] = TensorType(elem_type(array.dtype), array.shape)
        values[name] = array
    for node in graph.nodes:
        site = _site(node, types, values)
        made = apply_rule(site)
        for name, kind in zip(node.outputs, made, strict=False):
            if name:
                types[name] = kind
        for name, value in zip(node.outputs, _known(site, made), strict=False):
            if name:
                values[name] = value
    return Inferred(types, values)


def _site(node: Node, types: dict[str, TensorType], values: dict[str, AnyArray]) -> Site:
    operands = {step.operand for step in node.fused} - {None}
    own = [name for i, name in enumerate(node.inputs) if i not in operands]
    if missing := [name for name in own if name and name not in types]:
        raise node_error(node, f"reads {missing[0]!r}, which nothing before it makes")
    return Site(node, tuple(types[n] if n else None for n in own), tuple(values.get(n) if n else None for n in own))


def apply_rule(site: Site) -> tuple[TensorType, ...]:
    """The types of a node's outputs, checked for their size."""
    rule = shape_rule(site.node.op)
    if rule is None:
        raise site.error("this operator is not known")
    check_types(site)
    try:
        made = rule(site)
    except ModelError:
        raise
    except (
        ValueError,
        ArithmeticError,
        IndexError,
        TypeError,
    ) as error:  # numbers that no rule expects: NaN scales, ...
        raise site.error(f"its type cannot be told: {error}") from error
    outputs = (made,) if isinstance(made, TensorType) else tuple(made)
    if len(site.node.outputs) > len(outputs):
        raise site.error(f"has {len(site.node.outputs)} outputs, at most {len(outputs)} are known")
    for kind in outputs:
        if any(isinstance(d, int) and d < 0 for d in kind.shape or ()):
            raise site.error(f"its result would be of shape {kind.shape}")
        size = prod((d for d in kind.shape or () if isinstance(d, int)), start=numpy_dtype(kind.dtype).itemsize)
        if size > MAX_TENSOR_BYTES and 0 not in (kind.shape or ()):
            raise site.error(f"its result of shape {kind.shape} would take {size} bytes")
    return outputs


# Values.


def _known(site: Site, made: tuple[TensorType, ...]) -> tuple[AnyArray, ...]:
    """The values of a node's outputs if they are small and follow from what is known; else nothing."""
    node = site.node
    if node.op in ("Shape", "Size"):
        return _shape_value(site)
    shapes = [kind.static for kind in made[: len(node.outputs)]]
    given = [site.values[i] for i, kind in enumerate(site.types) if kind is not None]
    inputs = [v for v in given if v is not None]
    if len(inputs) < len(given) or any(s is None or prod(s) > SMALL for s in shapes):
        return ()
    if node.op not in EVALUATORS or node.op in NOT_FOLDED or node.fused or any(v.size > SMALL for v in inputs):
        return ()
    named = [v.dtype.kind == "O" for v in inputs]
    if any(named) and (node.op not in MOVES or (any(named[1:]) and node.op != "Concat")):
        return ()
    return tuple(_numbers(np.asarray(y)) for y in evaluate(node, site.values))


def _shape_value(site: Site) -> tuple[AnyArray, ...]:
    x = site.shape(0)
    if x is None:
        return ()
    if site.node.op == "Size":
        numbers = [d for d in x if isinstance(d, int)]
        return (np.array(prod(numbers), np.int64),) if len(numbers) == len(x) else ()
    cut = x[int_attr(site.node, "start", 0) : int_attr(site.node, "end", 2**31)]
    return (_numbers(np.array(cut, object)),)


def _numbers(value: AnyArray) -> AnyArray:
    """Lengths as s64 as soon as no name is among them."""
    if value.dtype.kind == "U":  # a single name
        return value.astype(object)
    if value.dtype.kind != "O" or any(isinstance(v, str) for v in value.reshape(-1)):
        return value
    return value.astype(np.int64)


def check_input(name: str, declared: TensorType, shape: tuple[int, ...], names: dict[str, int]) -> None:
    """Raise ModelError unless `shape` is one that the graph's input `name` may have; enter its lengths into `names`."""
    if any(d < 0 for d in shape):
        raise ModelError(f"input {name!r} cannot have the shape {shape}")
    if declared.shape is None:
        return
    if len(declared.shape) != len(shape):
        raise ModelError(f"input {name!r} has {len(declared.shape)} dimensions {declared.shape}, not {shape}")
    for want, have in zip(declared.shape, shape, strict=True):
        known = want if isinstance(want, int) else names.setdefault(want, have)
        if known != have:
            raise ModelError(f"input {name!r} of shape {declared.shape} cannot be {shape}: {want} is {known}")
