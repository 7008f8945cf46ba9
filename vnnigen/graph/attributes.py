"""Attributes of nodes by type: ModelError naming the node where a file gives another kind of value."""

from __future__ import annotations

from typing import overload

import numpy as np

from vnnigen.errors import ModelError
from vnnigen.graph.ir import Array, Node


def node_error(node: Node, reason: str) -> ModelError:
    """The error of a node: its name, operator, and what is wrong with it."""
    return ModelError(f"node {node.name!r} ({node.op}): {reason}")


def int_attr(node: Node, name: str, default: int) -> int:
    """An integer (also a flag) of the node."""
    value = node.attrs.get(name, default)
    if not isinstance(value, (int, np.integer)):
        raise node_error(node, f"attribute {name!r} must be an integer, not {value!r}")
    return int(value)


def float_attr(node: Node, name: str, default: float) -> float:
    """A number of the node."""
    value = node.attrs.get(name, default)
    if not isinstance(value, (int, float, np.number)):
        raise node_error(node, f"attribute {name!r} must be a number, not {value!r}")
    return float(value)


def str_attr(node: Node, name: str, default: str) -> str:
    """A string of the node."""
    value = node.attrs.get(name, default)
    if not isinstance(value, str):
        raise node_error(node, f"attribute {name!r} must be a string, not {value!r}")
    return value


@overload
def ints_attr(node: Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]: ...


@overload
def ints_attr(node: Node, name: str, default: None = None) -> tuple[int, ...] | None: ...


def ints_attr(node: Node, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
    """A list of integers of the node."""
    value = node.attrs.get(name, default)
    if value is None:
        return None
    if not isinstance(value, tuple) or not all(isinstance(v, (int, np.integer)) for v in value):
        raise node_error(node, f"attribute {name!r} must be a list of integers, not {value!r}")
    return tuple(int(v) for v in value)


def array_attr(node: Node, name: str) -> Array | None:
    """A tensor of the node, None if it has none of that name."""
    value = node.attrs.get(name)
    if value is not None and not isinstance(value, np.ndarray):
        raise node_error(node, f"attribute {name!r} must be a tensor, not {value!r}")
    return value


def axis_of(node: Node, axis: int, rank: int) -> int:
    """An axis counted from the front, of a tensor of `rank` dimensions."""
    if not -rank <= axis < rank:
        raise node_error(node, f"axis {axis} of a tensor of {rank} dimensions")
    return axis % rank


def axes_of(node: Node, axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Axes counted from the front; each at most once."""
    found = tuple(axis_of(node, axis, rank) for axis in axes)
    if len(set(found)) < len(found):
        raise node_error(node, f"axes {axes} name one dimension twice")
    return found
