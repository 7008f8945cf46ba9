"""What lowering rules work with: buffers, places of values, conversions on demand, and the steps so far."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np

from vnnigen.errors import ModelError
from vnnigen.graph.dtypes import elem_type, numpy_dtype
from vnnigen.graph.evaluate import evaluate
from vnnigen.graph.ir import Array, ElemType, Graph, Node, Precision, ValueQuant
from vnnigen.graph.storage import KERNEL_TYPES, Assignment, Place, Storage
from vnnigen.graph.tiers import Tiers
from vnnigen.kernels.types import DType
from vnnigen.ops.element import Convert
from vnnigen.ops.step import NativeStep
from vnnigen.ops.strided_copy import copy_step

T = TypeVar("T")
Rule = Callable[["Lowering", Node], "str | None"]
RULES: dict[str, Rule] = {}


def lowers(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, rule))
        return rule

    return register


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory of a plan. `index` numbers inputs and outputs; `initial` is a constant's or kept memory's contents.

    "object" is no memory: an array whose shape is only known once it is there.
    """

    nbytes: int
    kind: Literal["arena", "input", "output", "const", "object"] = "arena"
    index: int = 0
    initial: Array | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """One step: kernels (`native` with launches), or a Python function of arrays; `reason` says why no kernels."""

    node: str
    op: str
    inputs: tuple[Place | None, ...]
    outputs: tuple[Place, ...]
    function: Callable[[Sequence[Any]], Sequence[Array]]
    native: NativeStep | None = None
    temps: tuple[int, ...] = ()
    reason: str = ""

    @property
    def kernel(self) -> str:
        """Names of what runs."""
        return "numpy" if self.native is None else "+".join(dict.fromkeys(self.native.kernels))


@dataclass(frozen=True, eq=False)
class Lowered:
    """A lowered graph: steps in order, buffers that their places refer to, what was decided on the way."""

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    fallbacks: dict[str, str]


@dataclass(eq=False)
class Lowering:
    """The state of lowering one graph; see the package for what rules do with it."""

    graph: Graph
    assignment: Assignment
    tiers: Tiers
    #: Operators by node and everything they depend on, shared by all plans of a network.
    operators: dict[Hashable, Any] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    buffers: list[Buffer] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    _converted: dict[tuple[str, Storage], Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Count readers, once."""
        self.readers = self.graph.consumers()
        self.uses = self.graph.uses()

    # Values.

    def buffer(self, nbytes: int, kind: Any = "arena", index: int = 0, initial: Array | None = None) -> int:
        """A new buffer's number."""
        self.buffers.append(Buffer(nbytes, kind, index, initial))
        return len(self.buffers) - 1

    def set(self, name: str, place: Place) -> None:
        """Say where a value is."""
        self.places[name] = place

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a value; rules ask only for nodes all of whose shapes are known."""
        shape = self.graph.shape(name)
        if shape is None:
            raise ModelError(f"the shape of {name!r} is not known")
        return shape

    def constant(self, name: str) -> Array | None:
        """A constant as an array (quantized weights as real numbers), None for other values."""
        return self.graph.array(name) if name else None

    def value(self, name: str) -> Place:
        """Where a value is; constants get a place when first asked for."""
        if name not in self.places:
            array = self.constant(name)
            if array is None:
                raise ModelError(f"{name!r} is read before it is made")
            self.places[name] = self._constant_place(array, Storage(elem_type(array.dtype)))
        return self.places[name]

    def _constant_place(self, array: Array, storage: Storage) -> Place:
        place = Place.new(-1, array.shape, storage)
        flat = np.zeros(max(place.nbytes, 64), np.uint8)
        place.array(flat)[...] = array
        return replace(place, buffer=self.buffer(len(flat), "const", initial=flat))

    def wanted(self, node: Node, i: int) -> Place:
        """Input number i of a node, stored as it wants it."""
        return self.take(node.inputs[i], self.assignment.wants[node.name, i])

    def take(self, name: str, storage: Storage | None) -> Place:
        """A value stored in a certain way; None: as it is. Converted once for all who want the same."""
        place = self.value(name)
        if storage is None or (
            place.dtype == storage.dtype and place.quant == storage.quant and place.lies(storage.layout)
        ):
            return place
        if (name, storage) not in self._converted:
            self._converted[name, storage] = self.convert(name, place, storage)
        return self._converted[name, storage]

    def precision(self, node: Node) -> Precision:
        """In which numbers a node computes."""
        return self.assignment.precision[node.name]

    # Results.

    def result(self, node: Node, *, pitched: bool = False, storage: Storage | None = None, output: int = 0) -> Place:
        """The place of a node's result, which it becomes the value's.

        With `pitched`, the rule's kernel can leave gaps between pixels (or rows), and the place may be a slice of a
        concatenation. `storage` where the rule cannot store as was assigned.
        """
        name = node.outputs[output]
        storage = storage or self.assignment.values[name]
        place = self._destination(name, storage) if pitched else None
        if place is None:
            place = self._output_place(name, storage) or self.fresh(self.shape(name), storage)
        self.places[name] = place
        return place

    def fresh(self, shape: Sequence[int], storage: Storage) -> Place:
        """A new buffer of a shape."""
        place = Place.new(-1, shape, storage)
        return replace(place, buffer=self.buffer(place.nbytes))

    def _output_place(self, name: str, storage: Storage) -> Place | None:
        """Where the caller wants a value that is an output of the graph, if it is stored as callers want it."""
        kind = self.graph.types.get(name)
        if self.graph.outputs.count(name) != 1 or kind is None or storage.quant is not None:
            return None
        place = Place.new(-1, self.shape(name), storage)
        if storage.dtype != kind.dtype or not place.lies("plain"):
            return None
        index = self.graph.outputs.index(name)
        return replace(place, buffer=self.buffer(place.nbytes, "output", index))

    def _destination(self, name: str, storage: Storage) -> Place | None:
        """The slice of a concatenation that is all that reads a value, if both are stored alike."""
        readers = self.readers.get(name, [])
        if self.uses[name] != 1 or not readers or readers[0].op != "Concat":
            return None
        node = readers[0]
        whole = self.assignment.values[node.output]
        if whole != storage or self.graph.shape(node.output) is None:
            return None
        if node.output not in self.places:
            self.result(node, pitched=True)
        place = self.places[node.output]
        axis = concat_axis(node, len(place.shape))
        before = 0
        for other in node.inputs:
            if other == name:
                break
            before += self.shape(other)[axis]
        return place.slice(axis, before, self.shape(name)[axis])

    # Steps.

    def operator(self, node: Node, key: Hashable, make: Callable[[], T]) -> T:
        """The operator of a node: made once for all plans where `key` is the same."""
        found = self.operators.get((node.name, key))
        if found is None:
            found = self.operators[node.name, key] = make()
        return cast("T", found)

    def native(self, node: Node, steps: Sequence[NativeStep], inputs: Sequence[Place], out: Place) -> None:
        """Emit an operator's steps. Places have the shapes that the operator works on."""
        for step in steps:
            self._emit(node.name, node.op, step, inputs, out)

    def _emit(self, name: str, op: str, step: NativeStep, inputs: Sequence[Place], out: Place) -> None:
        temps = tuple(self.buffer(max(t.bytes, 64), initial=t.initial) for t in step.temps)
        reason = "" if step.launches is not None else "the reference tier has no kernels"

        def function(arrays: Sequence[Any]) -> Sequence[Array]:
            return (step.function(arrays),)

        self.steps.append(Step(name, op, tuple(inputs), (out,), function, step, temps, reason))

    def numpy(self, node: Node, reason: str) -> None:
        """Run a node in NumPy: real numbers in, in any order, and real numbers out."""
        inputs: list[Place | None] = []
        fixed: dict[int, Array] = {}
        for i, name in enumerate(node.inputs):
            array = self.constant(name)
            if array is not None:
                fixed[i] = array
            inputs.append(None if array is not None or not name else self.real(name))

        def function(arrays: Sequence[Any]) -> Sequence[Array]:
            given = [fixed.get(i, a) for i, a in enumerate(arrays)]
            return [y for y, name in zip(evaluate(node, given), node.outputs, strict=False) if name]

        outputs = [self._numpy_result(node, i) for i, name in enumerate(node.outputs) if name]
        self.steps.append(Step(node.name, node.op, tuple(inputs), tuple(outputs), function, reason=reason))

    def real(self, name: str) -> Place:
        """A value as the model means it: integers that stand for real numbers become f32."""
        place = self.value(name)
        kind = self.graph.types.get(name)
        stored_otherwise = place.quant is not None or (place.dtype == "bf16" and (kind is None or kind.dtype == "f32"))
        if not stored_otherwise:
            return place
        return self.take(name, Storage("f32", None, place.layout or "plain"))

    def _numpy_result(self, node: Node, output: int) -> Place:
        name = node.outputs[output]
        kind = self.graph.types.get(name)
        if kind is None or kind.static is None:
            self.places[name] = Place(self.buffer(0, "object"), (), (), "f32")
            return self.places[name]
        layout = self.assignment.values[name].layout
        return self.result(node, storage=Storage(kind.dtype, None, layout), output=output)

    def is_object(self, name: str) -> bool:
        """Whether a value's shape is known only at run time."""
        return name in self.places and self.buffers[self.places[name].buffer].kind == "object"

    # Conversions.

    def convert(self, name: str, place: Place, storage: Storage, out: Place | None = None) -> Place:
        """Emit what stores a value in another way, into a new buffer or `out` (of that storage)."""
        if self.buffers[place.buffer].kind == "object":
            raise ModelError(f"{name!r} has a shape that is known only at run time; no kernel can read it")
        out = self.fresh(place.shape, storage) if out is None else out
        no_kernel = place.dtype not in KERNEL_TYPES or storage.dtype not in KERNEL_TYPES or 0 in place.shape
        same = (place.dtype, place.quant) == (storage.dtype, storage.quant)
        if no_kernel or (same and (place.layout is None or place.lies(storage.layout))):
            self._copy_step(name, place, out)
            return out
        if place.layout is None:
            place = self.copy(name, place, Storage(place.dtype, place.quant, storage.layout))
        layouts = None
        if place.lies(storage.layout):  # the order does not matter
            count = int(np.prod(place.shape))
            source, target = (replace(p, shape=(count,), strides=(p.itemsize,)) for p in (place, out))
        else:
            layouts = ("NHWC", "NCHW") if storage.layout == "plain" else ("NCHW", "NHWC")
            source, target = (_as_image(p, p.layout) for p in (place, out))
        op = converter(place.dtype, place.quant, storage, layouts, self.tiers.element)
        for step in op.native([source.shape], [cast("DType", place.dtype)]):
            self._emit(f"{name} -> {storage}", "Convert", step, [source], target)
        return out

    def copy(self, name: str, place: Place, storage: Storage) -> Place:
        """Emit a copy of a place with gaps, or in an order of its own, without."""
        out = self.fresh(place.shape, storage)
        self._copy_step(name, place, out)
        return out

    def copy_into(self, name: str, place: Place, out: Place) -> None:
        """Copy between places of any strides, real numbers where the types differ."""
        if (place.dtype, place.quant) != (out.dtype, out.quant):
            place = self.take(name, Storage(out.dtype, out.quant, place.layout or "plain"))
        self._copy_step(name, place, out)

    def _copy_step(self, name: str, place: Place, out: Place) -> None:
        """Emit a copy of elements between places of one type and any strides."""
        if 0 in place.shape or place.dtype != out.dtype:
            reason = f"no kernel copies {place.dtype} to {out.dtype}"
            self.steps.append(Step(f"copy of {name}", "Copy", (place,), (out,), tuple, reason=reason))
            return
        shape = place.shape or (1,)
        strides = [tuple(s // p.itemsize for s in p.strides) or (1,) for p in (place, out)]
        step = copy_step(shape, strides[0], strides[1], numpy_dtype(place.dtype), self.tiers.element)
        self._emit(f"copy of {name}", "Copy", step, [place], out)


def _as_image(place: Place, layout: Any) -> Place:
    """A tensor [n, c, ...] as the 4 dimensions that it has in memory, in the order of `layout`."""
    n, c, *rest = place.shape
    pixels = (1, int(np.prod(rest)))
    shape = (n, *pixels, c) if layout == "nhwc" else (n, c, *pixels)
    seen = (place.channels_last() if layout == "nhwc" else place).reshape(shape)
    assert seen is not None
    return seen


def converter(
    src: ElemType, quant: ValueQuant | None, to: Storage, layouts: tuple[str, str] | None, isa: str | None
) -> Convert:
    """The conversion between two storages."""
    q: dict[str, Any] = {}
    if quant is not None:
        q |= {"x_scale": quant.scale, "x_zero_point": quant.zero_point}
    if to.quant is not None:
        q |= {"y_scale": to.quant.scale, "y_zero_point": to.quant.zero_point}
    return Convert(numpy_dtype(to.dtype), layout=layouts, isa=isa, **q)


def concat_axis(node: Node, rank: int) -> int:
    """The axis of a concatenation, counted from the front."""
    axis = node.attrs["axis"]
    assert isinstance(axis, int)
    return axis % rank
