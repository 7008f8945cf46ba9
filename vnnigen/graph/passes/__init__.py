"""Passes over a graph, each a function in a file of its own that can be run, and tested, alone.

All expect types from `infer`, keep the names and values of the graph's outputs, and run again change nothing. They
leave alone what they do not understand: quantized weights, quantized values, nodes of other domains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from vnnigen.graph.ir import Graph
from vnnigen.graph.passes.drop_identity import drop_identity
from vnnigen.graph.passes.eliminate_common import eliminate_common
from vnnigen.graph.passes.expand_conv_transpose import expand_conv_transpose
from vnnigen.graph.passes.fold_batch_norm import fold_batch_norm
from vnnigen.graph.passes.fold_constants import fold_constants
from vnnigen.graph.passes.fuse_activation import fuse_activation
from vnnigen.graph.passes.fuse_binary import fuse_binary
from vnnigen.graph.passes.fuse_layer_norm import fuse_layer_norm
from vnnigen.graph.passes.fuse_pad import fuse_pad
from vnnigen.graph.passes.fuse_patterns import fuse_patterns
from vnnigen.graph.passes.fuse_sum import fuse_sum
from vnnigen.graph.passes.matmul_to_linear import matmul_to_linear
from vnnigen.graph.passes.merge_transposes import merge_transposes

#: Changes a graph in place; the number of changes.
Pass = Callable[[Graph], int]

#: In this order: what makes patterns visible, what recognises them, what changes weights, what becomes fused steps.
PASSES: tuple[Pass, ...] = (
    fold_constants,
    drop_identity,
    eliminate_common,
    merge_transposes,
    fuse_patterns,
    fuse_layer_norm,
    matmul_to_linear,
    fuse_pad,
    fold_batch_norm,
    fuse_binary,
    fuse_activation,
    expand_conv_transpose,
    fuse_sum,
)


def run_passes(graph: Graph, passes: Sequence[Pass] = PASSES) -> list[str]:
    """Run the passes, in order, again and again until none changes anything (a sum opens the way for an activation).

    The log has a line for each that did something. Raises ModelError if a pass left an impossible graph.
    """
    graph.prune()
    done: Counter[str] = Counter()
    while True:
        counts = {run.__name__: run(graph) for run in passes}
        done.update(counts)
        if not any(counts.values()):
            break
    graph.check()
    return [f"{name}: {_times(count)}" for name, count in done.items() if count]


def _times(count: int) -> str:
    return "1 change" if count == 1 else f"{count} changes"
