"""Where and how values lie while a network runs: types, quantization, order of dimensions.

`assign` decides for every value how its producer stores it, and for every input of a node how it wants to read it;
where the two differ, lowering converts (once for all readers that want the same).  The rules, per value:

* 8-bit integers if quantization annotated the value, its producer can write them and a node that computes in int8
  reads it; bf16 if a bf16 node reads it and the producer can write that; else what the model says (f32).
* Images of convolutions and pooling lie channels last ("nhwc"); element-wise operators and concatenations follow what
  they read; everything else lies as ONNX says ("plain").

A `Place` is where one value lies, as shape and strides over a buffer, like an array without memory: transposing,
slicing and reshaping one costs nothing, and only a reader that cannot take the strides pays for a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Array, ElemType, Graph, Node, Precision, QWeight, ValueQuant

Layout = Literal["plain", "nhwc"]
#: Types that conversion kernels read and write.
KERNEL_TYPES: tuple[ElemType, ...] = ("u8", "s8", "s32", "f32", "bf16")


# --- places -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """How a value is stored: element type, what its integers mean, and the order of its dimensions."""

    dtype: ElemType
    quant: ValueQuant | None = None
    layout: Layout = "plain"

    def __str__(self) -> str:
        scale = "" if self.quant is None else f"*{self.quant.scale:.4g}"
        return f"{self.dtype}{scale}" + (" nhwc" if self.layout == "nhwc" else "")


def strides_of(shape: Sequence[int], layout: Layout, itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a tensor without gaps whose dimensions lie in the layout's order."""
    order = list(range(len(shape)))
    if layout == "nhwc":
        order = [0, *range(2, len(shape)), 1]
    strides, step = [0] * len(shape), itemsize
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


@dataclass(frozen=True)
class Place:
    """A value in buffer number `buffer`: its logical shape and, in bytes, strides and offset."""

    buffer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: ElemType
    quant: ValueQuant | None = None
    offset: int = 0

    @classmethod
    def new(cls, buffer: int, shape: Sequence[int], storage: Storage) -> Place:
        """The place of a whole buffer."""
        strides = strides_of(shape, storage.layout, numpy_dtype(storage.dtype).itemsize)
        return cls(buffer, tuple(shape), strides, storage.dtype, storage.quant)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.itemsize

    def lies(self, layout: Layout) -> bool:
        """Whether the elements lie without gaps in the layout's order (lengths of 1 do not matter)."""
        if 0 in self.shape:
            return True
        wanted = strides_of(self.shape, layout, self.itemsize)
        return all(n == 1 or a == b for n, a, b in zip(self.shape, self.strides, wanted, strict=True))

    @property
    def layout(self) -> Layout | None:
        """The order in which it lies without gaps, None with gaps or in another order."""
        return "plain" if self.lies("plain") else "nhwc" if len(self.shape) > 2 and self.lies("nhwc") else None

    def array(self, base: Array | None = None) -> Array:
        """The place as an array over `base` (bytes); without it one whose elements must not be touched."""
        if base is None:
            one = np.empty(1, numpy_dtype(self.dtype))
            hollow: Array = np.lib.stride_tricks.as_strided(one, self.shape, self.strides)
            return hollow
        real: Array = np.ndarray(self.shape, numpy_dtype(self.dtype), base.data, self.offset, self.strides)
        return real

    def transpose(self, perm: Sequence[int]) -> Place:
        """Dimensions in another order."""
        return replace(self, shape=tuple(self.shape[p] for p in perm), strides=tuple(self.strides[p] for p in perm))

    def reshape(self, shape: Sequence[int]) -> Place | None:
        """The same elements in another shape, None where that takes a copy."""
        view = self.array().view()
        try:
            view.shape = tuple(shape)
        except (AttributeError, ValueError):
            return None
        return replace(self, shape=view.shape, strides=view.strides)

    def slice(self, axis: int, start: int, length: int, step: int = 1) -> Place:
        """`length` indices along an axis, from `start` on, `step` apart."""
        shape, strides = list(self.shape), list(self.strides)
        offset = self.offset + start * strides[axis]
        shape[axis], strides[axis] = length, strides[axis] * step
        return replace(self, shape=tuple(shape), strides=tuple(strides), offset=offset)

    def channels_last(self) -> Place:
        """An image [n, c, ...] as [n, ..., c]."""
        return self.transpose([0, *range(2, len(self.shape)), 1])

    @property
    def pitch(self) -> int | None:
        """Elements between neighbours along all dimensions but the last, which has no gaps; None if it is not so."""
        *outer, last = self.shape
        if last != 1 and self.strides[-1] != self.itemsize:
            return None
        pitch = common_pitch(outer, self.strides[:-1])
        return None if pitch is None else pitch // self.itemsize or last


def common_pitch(lengths: Sequence[int], strides: Sequence[int]) -> int | None:
    """The distance in bytes of neighbours along all dimensions (0: there are none), None if there is no single one."""
    pitch = step = 0
    for n, stride in reversed(list(zip(lengths, strides, strict=True))):
        if n == 1:
            continue
        if step and stride != step:
            return None
        pitch = pitch or stride
        step = stride * n
    return pitch


# --- what nodes read and write ----------------------------------------------------------------------------------

#: Operators that only relabel: their result is another view of what they read.
VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Dropout"})
#: Views that may leave gaps.
PARTS = frozenset({"Slice", "Split"})
#: Operators that move pixels of blocks to channels or back.
BLOCKS = frozenset({"DepthToSpace", "SpaceToDepth"})
#: Element-wise operators with one tensor input, which conversion kernels apply.
UNARY = frozenset({
    "Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Gelu", "Silu", "Identity",
})  # fmt: skip
BINARY = frozenset({"Add", "Sub", "Mul", "Sum", "Min", "Max"})
CONVS, POOLS = frozenset({"Conv"}), frozenset({"MaxPool", "AveragePool", "GlobalAveragePool"})
IMAGES = CONVS | POOLS
#: Operators that keep images channels last where they find them so.
FOLLOWS = UNARY | BINARY | BLOCKS | {
    "Concat", "PRelu", "Div", "Resize", "Pad", "Exp", "Sqrt", "Erf", "Softplus", "Mish", "QuantizeLinear",
    "DequantizeLinear",
}  # fmt: skip
#: What can be computed in integers, and in bf16.
INT8_OPS = frozenset({"Conv", "Linear", "MatMul", "Concat", "Add", "Sum"}) | POOLS | UNARY
BF16_OPS = frozenset({"Conv", "Linear", "MatMul", "Concat"}) | POOLS | UNARY | BINARY
#: Results are as their source is: nothing is computed (but between neighbours, in some ways to resize).
SAME_NUMBERS = VIEWS | PARTS | BLOCKS | {"MaxPool", "Resize"}


@dataclass(frozen=True)
class Assignment:
    """Storage per value, what each input of a node is wanted as (None: as it is), and each node's precision.

    `fallbacks` says, per node, why it does not compute in the precision it is annotated with.
    """

    values: dict[str, Storage]
    wants: dict[tuple[str, int], Storage | None]
    precision: dict[str, Precision]
    fallbacks: dict[str, str]


def fallback(graph: Graph, node: Node) -> str | None:
    """Why a node cannot compute in the precision that it is annotated with, None if it can."""
    kinds = [graph.types.get(name) for name in node.outputs if name]
    if any(k is None or k.dtype not in ("f32", "bf16") for k in kinds):
        return "its result is not a real number"
    if node.precision == "bf16":
        return None if node.op in BF16_OPS else f"{node.op} has no bf16 kernel"
    if node.op not in INT8_OPS:
        return f"{node.op} has no int8 kernel"
    sources = node.inputs[:1] if node.op in ("Conv", "Linear") else [n for n in node.inputs if n]
    if missing := [n for n in sources if n not in graph.quant and n not in graph.constants]:
        return f"its input {missing[0]!r} has no quantization"
    if node.op in ("Conv", "Linear") and not isinstance(graph.constants.get(node.inputs[1]), QWeight):
        return "its weights are not quantized"
    return None


def assign(graph: Graph, *, inputs: dict[str, Layout] | None = None) -> Assignment:
    """Decide the storage of every value. `inputs` says in which order graph inputs come, by default as ONNX says."""
    precision: dict[str, Precision] = {}
    fallbacks: dict[str, str] = {}
    for node in graph:
        why = None if node.precision == "f32" else fallback(graph, node)
        precision[node.name] = node.precision if why is None else "f32"
        if why is not None and node.op not in SAME_NUMBERS:
            fallbacks[node.name] = why
    result = Assignment({}, {}, precision, fallbacks)
    for name, kind in graph.inputs.items():
        result.values[name] = Storage(kind.dtype, None, (inputs or {}).get(name, "plain"))
    readers = graph.consumers()
    for node in graph:
        layout = _layout(graph, node, result)
        for i, name in enumerate(node.inputs):
            result.wants[node.name, i] = _want(graph, node, i, layout, result) if name else None
        for name in node.outputs:
            if name:
                result.values[name] = _output(graph, node, name, layout, readers, result)
    return result


def _layout(graph: Graph, node: Node, done: Assignment) -> Layout:
    """The order of a node's result."""
    rank = len(graph.shape(node.outputs[0]) or ())
    if node.op in IMAGES:
        return "nhwc"
    if rank < 3:
        return "plain"
    tensors = [n for n in node.inputs if n in done.values]
    if node.op in FOLLOWS:
        ranks = {len(graph.shape(n) or ()) for n in tensors[: None if node.op not in ("Resize", "Pad") else 1]}
        images = any(done.values[n].layout == "nhwc" for n in tensors)
        return "nhwc" if images and ranks <= {rank} else "plain"
    if node.op == "Softmax":
        axis = node.attrs.get("axis", -1)
        return "nhwc" if tensors and done.values[tensors[0]].layout == "nhwc" and axis in (1, 1 - rank) else "plain"
    perm = node.attrs.get("perm")
    if node.op == "Transpose" and perm == (0, rank - 1, *range(1, rank - 1)):
        return "nhwc"
    if tensors and node.op in PARTS | {"Identity", "Dropout"}:
        return done.values[tensors[0]].layout
    return "plain"


def _want(graph: Graph, node: Node, i: int, layout: Layout, done: Assignment) -> Storage | None:
    """How a node wants its input number i."""
    name = node.inputs[i]
    stored, kind = done.values.get(name), graph.types.get(name)
    if node.op in SAME_NUMBERS and node.op not in POOLS:
        return None
    real = "f32" if stored is None or stored.dtype in KERNEL_TYPES else stored.dtype
    if kind is not None and kind.dtype != "f32":
        return None
    if any(f.operand == i for f in node.fused):
        return stored and replace(stored, layout=layout)
    p = done.precision[node.name]
    if node.op == "MaxPool" and stored is not None and stored.dtype in KERNEL_TYPES:
        return replace(stored, layout=layout)
    if p == "int8" and name in graph.quant:
        if stored is not None and stored.quant is not None:
            return replace(stored, layout=layout)
        q = graph.quant[name]
        return Storage(q.dtype, q, layout)
    return Storage("bf16" if p == "bf16" else real, None, layout)


def _output(
    graph: Graph, node: Node, name: str, layout: Layout, readers: dict[str, list[Node]], done: Assignment
) -> Storage:
    """How a node's result is stored."""
    kind = graph.types.get(name)
    source = done.values.get(node.inputs[0]) if node.inputs else None
    if node.op in SAME_NUMBERS and source is not None:
        return replace(source, layout=layout)
    if kind is None or kind.dtype != "f32":
        return Storage("f32" if kind is None else kind.dtype, None, layout)
    wanted = _wanted(name, readers, done.precision)
    p, q = done.precision[node.name], graph.quant.get(name)
    kernels = node.op in CONVS or node.op in ("Linear", "MatMul")
    integers = (p == "int8" or not kernels) and node.op in INT8_OPS | BINARY
    if q is not None and "int8" in wanted and integers:
        return Storage(q.dtype, q, layout)
    if "bf16" in wanted and "int8" not in wanted and (p != "f32" or not kernels) and node.op in BF16_OPS:
        return Storage("bf16", None, layout)
    return Storage("f32", None, layout)


def _wanted(name: str, readers: dict[str, list[Node]], precision: dict[str, Precision]) -> set[Precision]:
    """In which precisions a value is read, looking through views."""
    found: set[Precision] = set()
    for node in readers.get(name, ()):
        if node.op in SAME_NUMBERS:
            for out in node.outputs:
                found |= _wanted(out, readers, precision)
        else:
            found.add(precision[node.name])
    return found
