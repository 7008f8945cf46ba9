"""A graph for given shapes of its inputs: every length a number, everything that follows from shapes folded."""

from __future__ import annotations

from collections.abc import Mapping

from vnnigen.errors import ModelError
from vnnigen.graph.infer import check_input, propagate
from vnnigen.graph.ir import Dim, Graph, TensorType
from vnnigen.graph.passes.fold_constants import fold


def specialize(graph: Graph, shapes: Mapping[str, tuple[int, ...]], *, dynamic: bool = False) -> Graph:
    """A copy of `graph` with inputs of `shapes` (inputs whose shape is static need none), constants folded, typed.

    Raises ModelError if a shape does not fit its input, a node contradicts it, or, unless `dynamic`, a value's shape
    depends on more than shapes (NonMaxSuppression, NonZero, a Reshape to computed numbers); it says which and why.
    """
    if unknown := set(shapes) - set(graph.inputs):
        raise ModelError(f"the graph has no input {sorted(unknown)[0]!r}, only {sorted(graph.inputs)}")
    made = graph.copy()
    names: dict[str, int] = {}
    for name, declared in graph.inputs.items():
        if name in shapes:
            check_input(name, declared, tuple(shapes[name]), names)
            made.inputs[name] = TensorType(declared.dtype, tuple(int(d) for d in shapes[name]))
    for name, declared in made.inputs.items():
        if declared.static is None:
            filled: tuple[Dim, ...] | None = declared.shape and tuple(names.get(str(d), d) for d in declared.shape)
            made.inputs[name] = TensorType(declared.dtype, filled)
            if made.inputs[name].static is None:
                raise ModelError(f"input {name!r} needs a shape, its declared one is {declared.shape}")
    inferred = propagate(made)
    made.types = inferred.types
    fold(made, inferred)
    made.prune()
    if not dynamic:
        _check_static(made)
    return made


def _check_static(graph: Graph) -> None:
    """Raise ModelError at the first value whose shape is not known: the one that all later ones follow from."""
    for node in graph.nodes:
        for name in node.outputs:
            if name and graph.types[name].static is None:
                inputs = ", ".join(f"{n!r} {graph.types[n].shape}" for n in node.inputs if n)
                raise ModelError(
                    f"the shape of {name!r} stays unknown ({graph.types[name].shape}): node {node.name!r} ({node.op}) "
                    f"makes it depend on the values of its inputs ({inputs}), not only on their shapes"
                )
