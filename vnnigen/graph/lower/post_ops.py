"""Fused steps of a node, and element-wise nodes, as post-ops of kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Array, Node
from vnnigen.graph.lower.context import Lowering
from vnnigen.graph.storage import KERNEL_TYPES, Layout, Place, Storage
from vnnigen.kernels.layout import MAX_TENSORS
from vnnigen.kernels.post_ops import (
    GELU,
    Binary,
    BinaryOp,
    Clip,
    HardSwish,
    LeakyReLU,
    Linear,
    PostOp,
    ReLU,
    Sigmoid,
    SiLU,
    Sum,
    Tanh,
)  # fmt: skip
from vnnigen.kernels.types import F32

Numbers = Mapping[str, Any]
#: The arithmetic of ONNX operators.
OPERATIONS: dict[str, BinaryOp] = {
    "Add": "add", "Sum": "add", "Sub": "sub", "Mul": "mul", "Min": "min", "Max": "max",
}  # fmt: skip


def _clip(a: Numbers) -> tuple[PostOp, ...]:
    return (Clip(float(a.get("min", -math.inf)), float(a.get("max", math.inf))),)


def _hard_sigmoid(a: Numbers) -> tuple[PostOp, ...]:
    return Linear(float(a.get("alpha", 0.2)), float(a.get("beta", 0.5))), Clip(0.0, 1.0)


def _gelu(a: Numbers) -> tuple[PostOp, ...]:
    return (GELU("tanh" if a.get("approximate") == "tanh" else "none"),)


ACTIVATIONS: dict[str, Callable[[Numbers], tuple[PostOp, ...]]] = {
    "Relu": lambda a: (ReLU(),),
    "Clip": _clip,
    "LeakyRelu": lambda a: (LeakyReLU(float(a.get("alpha", 0.01))),),
    "HardSwish": lambda a: (HardSwish(),),
    "HardSigmoid": _hard_sigmoid,
    "Sigmoid": lambda a: (Sigmoid(),),
    "Tanh": lambda a: (Tanh(),),
    "Gelu": _gelu,
    "Silu": lambda a: (SiLU(float(a.get("alpha", 1.0))),),
    "Identity": lambda a: (),
}


def channel_vector(array: Array, shape: tuple[int, ...], layout: Layout, axis: int) -> F32 | float | None:
    """A constant as one number, or as one per channel of a result of this shape; None if it is neither.

    `layout` says which dimension the kernel's channels are (the second of images), `axis` which one a vector lies
    along (the model's rule of broadcasting is the last one).
    """
    if array.size == 1 and array.ndim <= len(shape):
        return float(array.reshape(()).astype(np.float32))
    channel = 1 if layout == "nhwc" else len(shape) - 1
    lengths = [1] * (len(shape) - array.ndim) + list(array.shape)
    if array.ndim == 1:
        lengths = [1] * len(shape)
        lengths[axis] = len(array)
    if len(lengths) != len(shape) or any(n != 1 for i, n in enumerate(lengths) if i != channel):
        return None
    if lengths[channel] != shape[channel]:
        return None
    vector: F32 = array.reshape(-1).astype(np.float32)
    return vector


def constant_op(op: str, value: F32 | float) -> tuple[PostOp, ...]:
    """`v op value` as post-ops."""
    if not isinstance(value, float):
        return (Binary(OPERATIONS[op], value),)
    match OPERATIONS[op]:
        case "add":
            return (Linear(1.0, value),)
        case "sub":
            return (Linear(1.0, -value),)
        case "mul":
            return (Linear(value, 0.0),)
        case "max":
            return (Clip(value, math.inf),)
        case _:
            return (Clip(-math.inf, value),)


def tensor_op(op: str, place: Place) -> PostOp:
    """`v op tensor` as a post-op: the tensor is given at the call."""
    scale, zero = (1.0, 0) if place.quant is None else (place.quant.scale, place.quant.zero_point)
    dtype = numpy_dtype(place.dtype)
    if OPERATIONS[op] == "add":
        return Sum(scale, zero, dtype=dtype)
    return Binary(OPERATIONS[op], scale=scale, zero_point=zero, dtype=dtype)


def fused_ops(ctx: Lowering, node: Node, layout: Layout) -> tuple[tuple[PostOp, ...], tuple[str, ...]] | str:
    """The post-ops of a node's fused steps and the values that they read, or why kernels cannot do them."""
    shape = ctx.shape(node.outputs[0])
    ops: list[PostOp] = []
    tensors: list[str] = []
    for step in node.fused:
        if step.op in ACTIVATIONS:
            ops += ACTIVATIONS[step.op](step.attrs)
            continue
        if step.op not in OPERATIONS or step.operand is None:
            return f"a fused {step.op} has no post-op"
        name = node.inputs[step.operand]
        array = ctx.constant(name)
        value = None if array is None else channel_vector(array, shape, layout, 1 if layout == "nhwc" else -1)
        if value is not None:
            ops += constant_op(step.op, value)
        elif ctx.shape(name) != shape or ctx.value(name).dtype not in KERNEL_TYPES:
            return f"the fused {step.op} broadcasts {name!r}"
        else:
            ops.append(tensor_op(step.op, fused_tensor(ctx, name, layout)))
            tensors.append(name)
    if len(tensors) > MAX_TENSORS:
        return f"more than {MAX_TENSORS} fused tensors"
    return tuple(ops), tuple(tensors)


def fused_tensor(ctx: Lowering, name: str, layout: Layout) -> Place:
    """A tensor that a post-op reads, lying as the result does."""
    place = ctx.value(name)
    return ctx.take(name, Storage(place.dtype, place.quant, layout))


def output_arguments(storage: Storage) -> dict[str, Any]:
    """The arguments of operators that say how the result is stored."""
    q = storage.quant
    return {} if q is None else {"y_scale": q.scale, "y_zero_point": q.zero_point}
