"""The graph of a network: nodes in order, values by name, and what quantization decided about them.

Operators keep ONNX's names, attributes and meaning in the newest form (attributes that became inputs are inputs), and
tensors keep ONNX's logical shapes: NCHW for images.  Where a tensor lies as NHWC is decided when a plan is made and
never changes what a node means.  Fusion adds `Fused` steps to a node; quantization annotates values (`Graph.quant`) and
nodes (`Node.precision`) and replaces weights by `QWeight`, but changes no topology.  So every pass can be read, and
tested, alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from vnnigen.errors import ModelError

Array = npt.NDArray[np.generic]
#: Element types of values; the first five are what kernels take.
ElemType = Literal["f32", "bf16", "u8", "s8", "s32", "s64", "f16", "f64", "bool", "u16", "s16", "u32", "u64"]
#: A length that is known, or the name of one that is not.
Dim = int | str
Attr = int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | Array
#: In which numbers a node computes.
Precision = Literal["f32", "bf16", "int8"]


@dataclass(frozen=True)
class TensorType:
    """Element type and logical shape of a value; `shape` None while unknown."""

    dtype: ElemType
    shape: tuple[Dim, ...] | None

    @property
    def static(self) -> tuple[int, ...] | None:
        """The shape if every length is known."""
        if self.shape is None or not all(isinstance(d, int) for d in self.shape):
            return None
        return tuple(d for d in self.shape if isinstance(d, int))


@dataclass(frozen=True, eq=False)
class QWeight:
    """Quantized weights: s8 values in the logical layout of the f32 ones, scale and zero point per index of `axis`."""

    values: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int32]
    axis: int | None

    @property
    def real(self) -> npt.NDArray[np.float32]:
        """The f32 weights they stand for."""
        shape = [1] * self.values.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        scale, zero_point = self.scale.reshape(shape), self.zero_point.reshape(shape)
        real: npt.NDArray[np.float32] = ((self.values.astype(np.int32) - zero_point) * scale).astype(np.float32)
        return real


Constant = Array | QWeight


@dataclass(frozen=True)
class ValueQuant:
    """How a value is stored as 8-bit integers: `real = (q - zero_point) * scale`."""

    dtype: Literal["u8", "s8"]
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Fused:
    """A step that a node applies to its result, in order, before it is stored.

    `op` is an ONNX operator (Relu, Clip, LeakyRelu, HardSwish, Sigmoid, Tanh, Gelu, Silu, Add, Mul); `attrs` its
    numbers; `operand` the index in `Node.inputs` of the tensor that Add and Mul read (of the node's output shape, or
    one value per channel).
    """

    op: str
    attrs: Mapping[str, float | str] = field(default_factory=dict)
    operand: int | None = None


@dataclass(frozen=True)
class Node:
    """One operator. Inputs and outputs are names of values; "" is an optional input that is left out."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Attr] = field(default_factory=dict)
    fused: tuple[Fused, ...] = ()
    precision: Precision = "f32"
    domain: str = ""

    @property
    def output(self) -> str:
        """The only output. ModelError where there are several."""
        if len(self.outputs) != 1:
            raise ModelError(f"node {self.name!r} ({self.op}) has {len(self.outputs)} outputs, expected one")
        return self.outputs[0]


@dataclass
class Graph:
    """A network. `nodes` are in an order of execution; `types` holds every value whose type is known.

    `notes` are remarks of the importer for the user, shown by explain().
    """

    name: str
    inputs: dict[str, TensorType]
    outputs: tuple[str, ...]
    nodes: list[Node]
    constants: dict[str, Constant]
    types: dict[str, TensorType] = field(default_factory=dict)
    quant: dict[str, ValueQuant] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    # Looking.

    def producers(self) -> dict[str, Node]:
        """The node that makes each value (graph inputs and constants have none)."""
        return {out: node for node in self.nodes for out in node.outputs if out}

    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that read each value, in order; a node that reads it twice is listed twice."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                if name:
                    found.setdefault(name, []).append(node)
        return found

    def uses(self) -> Counter[str]:
        """How often each value is read, outputs of the graph included."""
        count = Counter(name for node in self.nodes for name in node.inputs if name)
        count.update(self.outputs)
        return count

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The known shape of a value or constant, else None."""
        if name in self.constants:
            constant = self.constants[name]
            return (constant.values if isinstance(constant, QWeight) else constant).shape
        kind = self.types.get(name) or self.inputs.get(name)
        return None if kind is None else kind.static

    def array(self, name: str) -> Array | None:
        """A constant as an array (quantized weights as the f32 ones they stand for), None if `name` is not constant."""
        constant = self.constants.get(name)
        return constant.real if isinstance(constant, QWeight) else constant

    def __iter__(self) -> Iterator[Node]:
        """Iterate over the nodes, in order."""
        return iter(self.nodes)

    # Changing.

    def rewrite(self, replacements: Mapping[str, Node | None] = {}, renamed: Mapping[str, str] = {}) -> None:
        """Replace nodes by name (None removes one) and make readers of `renamed` values read others instead.

        Chains of renames are followed. Outputs of the graph keep their names: a renamed output is an error.
        """
        if hidden := set(renamed) & set(self.outputs):
            raise ModelError(f"outputs of the graph cannot be renamed: {sorted(hidden)}")

        def final(name: str) -> str:
            while name in renamed:
                name = renamed[name]
            return name

        nodes = (replacements.get(node.name, node) for node in self.nodes)
        self.nodes = [replace(n, inputs=tuple(map(final, n.inputs))) for n in nodes if n is not None]

    def prune(self) -> None:
        """Drop nodes, constants, types and annotations that no output needs."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(n for n in node.inputs if n)
        self.nodes = kept[::-1]
        self.constants = {n: c for n, c in self.constants.items() if n in needed}
        known = needed | set(self.inputs) | {out for n in self.nodes for out in n.outputs}
        self.types = {n: t for n, t in self.types.items() if n in known}
        self.quant = {n: q for n, q in self.quant.items() if n in known}

    def new_name(self, wish: str) -> str:
        """A name of a value or node that is not in use."""
        made = (name for node in self.nodes for name in (node.name, *node.outputs))
        used = {*self.inputs, *self.constants, *made}
        return next(name for name in candidates(wish) if name not in used)

    def copy(self) -> Graph:
        """A copy whose containers may be changed; nodes and arrays are shared, nobody changes those."""
        return Graph(
            self.name, dict(self.inputs), self.outputs, list(self.nodes), dict(self.constants), dict(self.types),
            dict(self.quant), list(self.notes),
        )  # fmt: skip

    def check(self) -> None:
        """Raise ModelError unless every value is made once, before it is read, and every output exists."""
        made = {*self.inputs, *self.constants, ""}
        names: set[str] = set()
        for node in self.nodes:
            if node.name in names:
                raise ModelError(f"two nodes are named {node.name!r}")
            names.add(node.name)
            for name in node.inputs:
                if name not in made:
                    raise ModelError(f"node {node.name!r} ({node.op}) reads {name!r}, which nothing before it makes")
            for name in node.outputs:
                if name and name in made:
                    raise ModelError(f"node {node.name!r} ({node.op}) makes {name!r}, which is made already")
                made.add(name)
        for name in self.outputs:
            if name not in made:
                raise ModelError(f"the graph's output {name!r} is made by no node")


def candidates(wish: str) -> Iterator[str]:
    """Names like `wish`, the plain one first."""
    yield wish
    number = 1
    while True:
        yield f"{wish}_{number}"
        number += 1


def sort_nodes(nodes: Iterable[Node], available: Iterable[str]) -> list[Node]:
    """Order nodes so that each comes after what it reads. ModelError naming nodes of a cycle or missing values."""
    have = {*available, ""}
    pending = list(nodes)
    done: list[Node] = []
    readers: dict[str, list[int]] = {}
    missing = []
    for i, node in enumerate(pending):
        absent = {n for n in node.inputs if n not in have}
        missing.append(len(absent))
        for name in absent:
            readers.setdefault(name, []).append(i)
    ready = [i for i, count in enumerate(missing) if count == 0][::-1]
    while ready:
        node = pending[ready.pop()]
        done.append(node)
        freed = []
        for name in node.outputs:
            for i in readers.pop(name, ()):
                missing[i] -= 1
                if missing[i] == 0:
                    freed.append(i)
        ready.extend(sorted(freed, reverse=True))
    if len(done) < len(pending):
        made = {o for n in pending for o in n.outputs}
        first = next(pending[i] for i, count in enumerate(missing) if count > 0)
        unmade = sorted(n for n in first.inputs if n not in have and n not in made)
        why = f"reads {unmade}, which nothing makes" if unmade else "is part of a cycle, or waits for one"
        raise ModelError(f"node {first.name!r} ({first.op}) {why}")
    return done
