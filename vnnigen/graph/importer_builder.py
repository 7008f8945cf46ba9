"""What the normalisers of operators write into, and how they read a node's attributes and constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vnnigen.errors import ModelError
from vnnigen.graph.attributes import node_error
from vnnigen.graph.ir import Array, Attr, Node


class Names:
    """Gives out names that are not taken, in constant time however often the same is wished for."""

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken
        self._last: dict[str, int] = {}

    def new(self, wish: str) -> str:
        """A name like `wish`, which is taken from now on."""
        number = self._last.get(wish, 0)
        name = f"{wish}_{number}" if number else wish
        while name in self.taken:
            number += 1
            name = f"{wish}_{number}"
        self._last[wish] = number
        self.taken.add(name)
        return name


class Builder:
    """The nodes and constants of a graph in the making.

    `version` is the opset of ONNX's operators that the nodes were written for, `read` the names that any node or
    output of the graph reads.
    """

    def __init__(self, version: int, taken: set[str], read: set[str]) -> None:
        self.version = version
        self.read = read
        self.nodes: list[Node] = []
        self.constants: dict[str, Array] = {}
        self.notes: list[str] = []
        self._values = Names(taken)
        self._node_names = Names(set())

    def value(self, wish: str) -> str:
        """A new name for a value."""
        return self._values.new(wish)

    def constant(self, array: npt.ArrayLike, wish: str) -> str:
        """A new constant's name."""
        name = self.value(wish)
        made = np.array(array)
        made.flags.writeable = False
        self.constants[name] = made
        return name

    def define(self, name: str, array: Array) -> None:
        """A constant with a name of the model's. ModelError if it has one already."""
        if not name or name in self.constants:
            raise ModelError(f"two initializers are named {name!r}" if name else "an initializer has no name")
        self.constants[name] = array

    def node_name(self, wish: str) -> str:
        """A new name for a node."""
        return self._node_names.new(wish)

    def add(self, node: Node) -> None:
        """Add a node, under a name of its own."""
        self.nodes.append(replace(node, name=self.node_name(node.name)))

    def emit(
        self,
        node: Node,
        op: str,
        inputs: Sequence[str],
        attrs: Mapping[str, Attr | None] = {},
        output: str | None = None,
    ) -> str:
        """Add a node of ONNX's that does part of what `node` does, and name its only output.

        Attributes that are None are left out. Without `output` the value is a new one.
        """
        output = self.value(f"{node.name}_{op}") if output is None else output
        given = {key: value for key, value in attrs.items() if value is not None}
        self.add(Node(f"{node.name}_{op}", op, without_last_empty(inputs), (output,), given))
        return output

    def small(self, node: Node, index: int, what: str) -> Array:
        """Input `index` of a node, which must be constant. ModelError otherwise."""
        array = self.constants.get(optional(node, index))
        if array is None:
            raise node_error(node, f"its {what} must be constant")
        return array


#: Writes a node in the newest form.
Normaliser = Callable[[Builder, Node], None]


def without_last_empty(names: Sequence[str]) -> tuple[str, ...]:
    """`names` up to the last one that is given."""
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return tuple(kept)


def required(node: Node, least: int, most: int | None = None) -> None:
    """ModelError unless the node has the first `least` inputs, and no more than `most` in all."""
    if len(node.inputs) < least or not all(node.inputs[:least]):
        raise node_error(node, f"has {len(without_last_empty(node.inputs))} inputs, needs {least}")
    if most is not None and len(without_last_empty(node.inputs)) > most:
        raise node_error(node, f"has {len(node.inputs)} inputs, takes {most}")
    if not node.outputs or not node.outputs[0]:
        raise node_error(node, "has no output")


def optional(node: Node, index: int) -> str:
    """The name of an input, "" if it is left out."""
    return node.inputs[index] if index < len(node.inputs) else ""


def without(node: Node, *keys: str) -> dict[str, Attr]:
    """The attributes except some."""
    return {key: value for key, value in node.attrs.items() if key not in keys}
