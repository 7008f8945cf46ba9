"""What passes share: one sweep over a graph that looks at each node and what makes its inputs, and changes as it goes.

A pass asks `Edit` for nodes in order, replaces or removes some, and calls `finish`, which writes the result back. Every
fusion puts the joined node where the later one stood, so that whatever it reads has been made and no cycle can arise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vnnigen.graph.ir import Array, Dim, Fused, Graph, Node, QWeight, TensorType, candidates

F64 = npt.NDArray[np.float64]
#: Their kernels apply fused steps to accumulators: a step costs next to nothing.
MATRIX_HOSTS = frozenset({"Conv", "Linear", "MatMul"})
#: Their kernels apply fused steps to registers: a step saves a pass over memory.
ELEMENT_HOSTS = frozenset({"Add", "Mul"})
#: (A ConvTranspose is expanded to a convolution, steps included.)
HOSTS = MATRIX_HOSTS | ELEMENT_HOSTS | {"ConvTranspose"}
#: These have constant weights into which factors and offsets per channel can be folded.
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Linear"})


class Edit:
    """A sweep over the nodes of a graph, in order; see the module's text."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.count = 0
        self._slots = [[node] for node in graph.nodes]
        self._slot_of = {node.name: i for i, node in enumerate(graph.nodes)}
        self._producers = graph.producers()
        self._uses = graph.uses()
        self._renamed: dict[str, str] = {}
        made = (name for node in graph.nodes for name in (node.name, *node.outputs))
        self._names = {*graph.inputs, *graph.constants, *made}

    def __iter__(self) -> Iterator[Node]:
        """The standard's nodes as they are when their turn comes; those of other domains are not passes' business."""
        for slot in self._slots:
            for node in list(slot):
                if node.domain == "":
                    yield self._current(node)

    # Looking.

    def final(self, name: str) -> str:
        """What a value is called by now."""
        while name in self._renamed:
            name = self._renamed[name]
        return name

    def producer(self, name: str) -> Node | None:
        """The node of the standard that makes a value, None for a graph's input or a constant."""
        node = self._producers.get(name)
        if node is None or node.domain != "":
            return None
        return self._current(node)

    def _current(self, node: Node) -> Node:
        inputs = tuple(map(self.final, node.inputs))
        return node if inputs == node.inputs else replace(node, inputs=inputs)

    def maker(self, name: str) -> Node | None:
        """The node that makes a value which may vanish: its only result, read once, no output, not quantized."""
        node = self.producer(name)
        if node is None or len(node.outputs) != 1 or self._uses[name] != 1 or name in self.graph.quant:
            return None
        return node if name not in self.graph.outputs else None

    def uses(self, name: str) -> int:
        """How often a value is read."""
        return self._uses[name]

    # Changing.

    def new_name(self, wish: str) -> str:
        """A name for a value or node that is not in use."""
        name = next(name for name in candidates(wish) if name not in self._names)
        self._names.add(name)
        return name

    def constant(self, wish: str, values: npt.ArrayLike) -> str:
        """The name of a new f32 constant."""
        name = self.new_name(wish)
        array = np.ascontiguousarray(np.asarray(values).astype(np.float32)).reshape(np.shape(values))
        self.graph.constants[name] = array
        self.graph.types[name] = TensorType("f32", array.shape)
        return name

    def put(self, at: Node, *new: Node, without: Iterable[Node] = ()) -> None:
        """Replace a node by others in its place (none removes it), and remove the nodes `without`."""
        for node in (at, *without):
            slot = self._slots[self._slot_of[node.name]]
            old = next(n for n in slot if n.name == node.name)
            slot.remove(old)
            self._uses.subtract(self.final(name) for name in old.inputs if name)
            for name in node.outputs:
                self._producers.pop(name, None)
        where = self._slot_of[at.name]
        for node in new:
            self._slots[where].append(node)
            self._slot_of[node.name] = where
            self._uses.update(name for name in node.inputs if name)
            self._producers.update((name, node) for name in node.outputs if name)
        self.count += 1

    def bypass(self, node: Node, source: str) -> bool:
        """Remove a node whose only result is the same as the value `source`; False where names forbid it."""
        target, graph = node.output, self.graph
        if graph.quant.get(source) != graph.quant.get(target):
            return False
        if target not in graph.outputs:
            self.put(node)
            self._rename(target, source)
            return True
        # The result's name must stay, so the source takes it, unless that is known by its name outside as well.
        maker = self._producers.get(source)
        if maker is None or source in graph.outputs:
            return False
        self.put(node)
        outputs = tuple(target if name == source else name for name in maker.outputs)
        self.put(maker, replace(maker, outputs=outputs))
        self.count -= 1
        self._rename(source, target)
        return True

    def merge(self, node: Node, same: Node) -> None:
        """Remove a node; its readers read the results of another one that computes the `same`."""
        self.put(node)
        for old, new in zip(node.outputs, same.outputs, strict=True):
            if old:
                self._rename(old, new)

    def _rename(self, old: str, new: str) -> None:
        self._renamed[old] = new
        self._uses[new] += self._uses.pop(old, 0)

    def absorb(self, node: Node, host: Node, steps: Iterable[Fused] = (), operands: Iterable[str] = ()) -> None:
        """Let `host` do what `node` does to its result: `steps`, then those that are fused into the node already.

        Each operand is read by a step in turn: those have `operand` -1 here, and get its index among the inputs.
        `host` may differ, but for its name, from the node that stands in the graph.
        """
        inputs = list(host.inputs)
        if host.op in WEIGHTED:
            inputs += [""] * (3 - len(inputs))  # the bias' place
        left = iter((*operands, *(node.inputs[step.operand] for step in node.fused if step.operand is not None)))
        fused = list(host.fused)
        for step in (*steps, *node.fused):
            if step.operand is not None:
                step = replace(step, operand=len(inputs))  # noqa: PLW2901
                inputs.append(next(left))
            fused.append(step)
        self.put(node, replace(host, inputs=tuple(inputs), outputs=node.outputs, fused=tuple(fused)), without=[host])

    def finish(self) -> int:
        """Write the changes back and drop what became useless. The number of changes."""
        if self.count:
            self.graph.nodes = [node for slot in self._slots for node in slot]
            self.graph.rewrite(renamed=self._renamed)
            self.graph.prune()
        return self.count


def plain(graph: Graph, name: str) -> Array | None:
    """A constant that is an array, None for anything else, quantized weights among it."""
    value = graph.constants.get(name)
    return None if isinstance(value, QWeight) else value


def f32_constant(graph: Graph, name: str) -> F64 | None:
    """An f32 constant, in f64."""
    value = plain(graph, name)
    return value.astype(np.float64) if value is not None and value.dtype == np.float32 else None


def dims(graph: Graph, name: str) -> tuple[Dim, ...] | None:
    """The shape of a value or constant, names of unknown lengths in it; None if not even the rank is known."""
    if (shape := graph.shape(name)) is not None:
        return shape
    kind = graph.types.get(name) or graph.inputs.get(name)
    return None if kind is None else kind.shape


def rank(graph: Graph, name: str) -> int | None:
    """The number of dimensions of a value."""
    shape = dims(graph, name)
    return None if shape is None else len(shape)


def is_f32(graph: Graph, name: str) -> bool:
    """Whether a value is known to be f32."""
    kind = graph.types.get(name) or graph.inputs.get(name)
    return kind is not None and kind.dtype == "f32"


def scalar(graph: Graph, name: str, beside: str | None = None) -> float | None:
    """A constant of one element that broadcasts to a value `beside` it without adding dimensions."""
    value = plain(graph, name)
    if value is None or value.size != 1 or value.dtype.kind not in "fiu":
        return None
    if value.ndim and beside is not None:
        other = rank(graph, beside)
        if other is None or value.ndim > other:
            return None
    return float(value.reshape(()))


def same_shape(graph: Graph, a: str, b: str) -> bool:
    """Whether two values are known to have one shape; lengths of one name are equal."""
    shape = dims(graph, a)
    return shape is not None and shape == dims(graph, b)
