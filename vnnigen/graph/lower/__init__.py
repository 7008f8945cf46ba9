"""From nodes to the steps of a plan: one small rule per operator, in a table.

A rule is a function `(ctx: Lowering, node: Node) -> str | None`, registered with `@lowers("Op", ...)` in a module of
this package that `vnnigen.graph.lower` imports below.  It asks the context for its inputs' places, for the place of its
result, and emits steps:

    x = ctx.wanted(node, 0)                      # as storage.assign decided; converts where it lies otherwise
    x = ctx.take(name, Storage("f32"))           # or as the rule itself wants it
    y = ctx.result(node)                         # a new buffer, a slice of a concatenation, an output of the graph
    op = ctx.operator(node, key, make)           # an operator of vnnigen.ops, made once for all shapes
    ctx.native(node, op.native(...), [x, ...], y)

or, for an operator that only relabels, `ctx.set(name, place)` with another view of its input's place.  A rule that
cannot take a node returns the reason, before it emits anything: the node then runs in NumPy, and `explain` shows why.
To give an operator a kernel, write a rule in a new module here and import it below; `storage.assign` says in which
types and order a node finds its inputs (the sets of operators there).
"""

from vnnigen.graph.lower import (  # noqa: F401 (the table)
    broadcast,
    concat,
    conv,
    element,
    matmul,
    pool,
    quantize,
    reduce,
    rows,
    shape,
    space,
)
from vnnigen.graph.lower.context import Buffer, Lowered, Lowering, Step, lowers
from vnnigen.graph.lower.walk import lower

__all__ = ["Buffer", "Lowered", "Lowering", "Step", "lower", "lowers"]
