"""Small graphs made by hand, and the check that every test of a pass makes: same results, and idempotent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.infer import infer
from vnnigen.graph.ir import Attr, Dim, ElemType, Graph, Node, TensorType
from vnnigen.graph.passes import Pass


class Build:
    """Write nodes one after another; `op` returns the name of the node's (first) value."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.made = Graph("test", {}, (), [], {})

    def input(self, *shape: Dim, name: str = "x", dtype: ElemType = "f32") -> str:
        self.made.inputs[name] = TensorType(dtype, shape)
        return name

    def const(self, values: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        name = f"c{len(self.made.constants)}"
        self.made.constants[name] = np.asarray(values, dtype)
        return name

    def ints(self, *values: int) -> str:
        return self.const(values, np.int64)

    def random(self, *shape: int, low: float = -1.0, high: float = 1.0) -> str:
        return self.const(self.rng.uniform(low, high, shape))

    def op(self, op: str, *inputs: str, outputs: Sequence[str] = (), **attrs: Attr) -> str:
        name = f"{op.lower()}{len(self.made.nodes)}"
        self.made.nodes.append(Node(f"n_{name}", op, inputs, tuple(outputs) or (name,), attrs))
        return (*outputs, name)[0]

    def conv(self, x: str, cin: int, cout: int, k: int = 1, pad: int = 0, group: int = 1, bias: bool = True) -> str:
        extra = [self.random(cout)] if bias else []
        w = self.random(cout, cin // group, k, k)
        return self.op("Conv", x, w, *extra, pads=(pad,) * 4, group=group, kernel_shape=(k, k))

    def norm(self, x: str, channels: int) -> str:
        parameters = [self.random(channels, low=lo, high=hi) for lo, hi in ((0.5, 2), (-1, 1), (-1, 1), (0.5, 2))]
        return self.op("BatchNormalization", x, *parameters, epsilon=1e-3)

    def graph(self, *outputs: str) -> Graph:
        self.made.outputs = outputs
        infer(self.made)
        self.made.check()
        return self.made


def feeds(graph: Graph, seed: int = 1, length: int = 3) -> dict[str, npt.NDArray[Any]]:
    """Random inputs; unknown lengths are `length`."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, kind in graph.inputs.items():
        assert kind.shape is not None
        shape = [d if isinstance(d, int) else length for d in kind.shape]
        floats = kind.dtype == "f32"
        made[name] = rng.uniform(-4, 4, shape).astype(np.float32) if floats else rng.integers(0, 4, shape)
    return made


def check(graph: Graph, *passes: Pass, changes: int | None = None, tolerance: float = 1e-5) -> list[str]:
    """Run passes: outputs, and values that are kept, stay the same, and another run changes nothing. The operators."""
    inputs, outputs = feeds(graph), graph.outputs
    before = run_reference(graph, inputs, [o for n in graph for o in n.outputs if o])
    count = sum(run(graph) for run in passes)
    graph.check()
    assert graph.outputs == outputs
    kept = [o for n in graph for o in n.outputs if o in before]
    assert not set(outputs) - {*kept, *graph.constants, *graph.inputs}
    for name, y in run_reference(graph, inputs, kept).items():
        scale = float(np.abs(before[name]).max(initial=1e-3, where=np.isfinite(before[name])))
        np.testing.assert_allclose(y, before[name], rtol=tolerance, atol=tolerance * scale, err_msg=name)
    for node in graph:
        assert all(o in graph.types for o in node.outputs if o), node
    assert sum(run(graph) for run in passes) == 0, "not idempotent"
    if changes is not None:
        assert count == changes
    return [node.op for node in graph]


def steps(graph: Graph, name: str | None = None) -> list[str]:
    """The fused steps of the node that makes a value (default: the first output)."""
    return [step.op for step in graph.producers()[name or graph.outputs[0]].fused]
