"""The int8 policy: which nodes compute in int8, which values become bytes, and which of those share a scale.

* Convolutions, Linear and products of two activations compute in int8 wherever their kernels can ("anchors").
* Pooling, concatenation, sums, element-wise operators and what only moves elements compute in int8 between anchors:
  where they read what an anchor made (perhaps through others of their kind) and an anchor reads what they make. So
  bytes stay bytes between layers, and the last layers read bytes and write f32. Averages behind the last layer read
  bytes, too: a quarter of the memory, and they average rounding errors out.
* A value that is moved, max-pooled or concatenated keeps its scale: all that are connected so share one, the smallest
  that covers them all. So nothing is requantized, and a concatenation's inputs can be written in place.
* All else is f32, and so is a node whose sums could leave s32; the reason is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from vnnigen.graph.ir import Fused, Graph, Node, Precision, QWeight
from vnnigen.graph.storage import INT8_OPS, SAME_NUMBERS
from vnnigen.quant.scheme import QuantConfig

#: Operators for the sake of which others compute in int8.
ANCHORS = frozenset({"Conv", "Linear", "MatMul"})
WEIGHTED = frozenset({"Conv", "Linear"})
#: Operators whose inputs and outputs share one scale.
SHARING = SAME_NUMBERS | {"Concat"}
#: Computes in int8 next to anchors.
FLEXIBLE = (INT8_OPS | SHARING) - ANCHORS
#: Of those, the ones that read bytes even if all that they lead to is f32.
AVERAGES = frozenset({"AveragePool", "GlobalAveragePool"})
#: The most products of two bytes whose sum fits s32 whatever their zero points.
MAX_K = (2**31 - 1) // 255**2


@dataclass(frozen=True)
class Decision:
    """In which numbers a node computes, and why."""

    node: str
    op: str
    precision: Precision
    reason: str


@dataclass(frozen=True)
class Policy:
    """What was decided: one Decision per node, and the values stored or read as bytes, in groups of one scale each.

    `first` are the values that the first layers read.
    """

    decisions: dict[str, Decision]
    groups: tuple[tuple[str, ...], ...]
    first: frozenset[str]

    @property
    def values(self) -> list[str]:
        """All values that are stored or read as bytes."""
        return [name for group in self.groups for name in group]

    def precision(self, node: Node) -> Precision:
        """In which numbers a node computes."""
        return self.decisions[node.name].precision


def is_real(graph: Graph, name: str) -> bool:
    """Whether a value is an activation in f32 (or of a type that is not known)."""
    kind = graph.types.get(name) or graph.inputs.get(name)
    return bool(name) and name not in graph.constants and (kind is None or kind.dtype == "f32")


def data_inputs(graph: Graph, node: Node) -> list[str]:
    """The activations that a node computes on, without operands of fused steps."""
    if node.op in WEIGHTED or node.op in SAME_NUMBERS:
        return [n for n in node.inputs[:1] if is_real(graph, n)]
    operands = {step.operand for step in node.fused}
    return [n for i, n in enumerate(node.inputs) if i not in operands and is_real(graph, n)]


def operands(graph: Graph, node: Node) -> list[str]:
    """The activations that fused steps read (residuals)."""
    names = (node.inputs[step.operand] for step in node.fused if step.operand is not None)
    return [name for name in names if is_real(graph, name)]


def obstacle(graph: Graph, node: Node) -> str | None:
    """Why a node cannot compute in int8, whatever its neighbours do; None if it can."""
    if node.op in WEIGHTED:
        return _weights_obstacle(graph, node)
    if node.op == "MatMul":
        return _matmul_obstacle(graph, node)
    if node.op not in FLEXIBLE or node.domain:
        return f"{node.op} has no int8 kernel"
    if not data_inputs(graph, node):
        return "it reads no real numbers"
    if node.op == "Concat" and any(n in graph.constants for n in node.inputs):
        return "it joins constants"
    if node.op == "MaxPool" and any(node.outputs[1:]):
        return "it gives the places of the maxima, too"
    return None


def _weights_obstacle(graph: Graph, node: Node) -> str | None:
    if len(node.inputs) < 2 or node.inputs[1] not in graph.constants:
        return "its weights are computed at run time"
    weights = graph.constants[node.inputs[1]]
    if not isinstance(weights, QWeight) and weights.dtype != "float32":
        return f"its weights are {weights.dtype}"
    rank = len((weights.values if isinstance(weights, QWeight) else weights).shape)
    if rank not in ((3, 4) if node.op == "Conv" else (2,)):
        return f"its weights have {rank} dimensions"
    if len(node.inputs) > 2 and node.inputs[2] and node.inputs[2] not in graph.constants:
        return "its bias is computed at run time"
    return None if is_real(graph, node.inputs[0]) else "its input is not f32"


def _matmul_obstacle(graph: Graph, node: Node) -> str | None:
    if any(n in graph.constants for n in node.inputs[:2]):
        return "a product with a constant that is no Linear"
    kinds = [graph.types.get(n) for n in node.inputs[:2]]
    for kind in kinds:
        if kind is not None and (kind.dtype != "f32" or (kind.shape is not None and len(kind.shape) < 2)):
            return "its operands are no f32 matrices"
    shape = None if kinds[0] is None else kinds[0].shape
    if shape is not None and isinstance(shape[-1], int) and shape[-1] > MAX_K:
        return f"K = {shape[-1]}: a sum of more than {MAX_K} products of bytes could leave s32"
    return None


def pairs_to_equalize(graph: Graph) -> list[tuple[Node, Node]]:
    """Convolutions and the depthwise ones that alone read their results, where channels can be scaled between them."""
    producers, uses = graph.producers(), graph.uses()
    pairs = []
    for node in graph:
        first = producers.get(node.inputs[0]) if node.inputs else None
        shape = graph.shape(node.inputs[1]) if node.op == "Conv" else None
        if first is None or first.op != "Conv" or shape is None or obstacle(graph, first) or obstacle(graph, node):
            continue
        channels = graph.shape(first.inputs[1])
        depthwise = channels is not None and shape[1] == 1 and node.attrs.get("group") == channels[0]
        plain = not any(isinstance(graph.constants[n.inputs[1]], QWeight) for n in (first, node))
        if depthwise and plain and uses[node.inputs[0]] == 1 and all(map(_scalable, first.fused)):
            pairs.append((first, node))
    return pairs


def _scalable(step: Fused) -> bool:
    """Whether scaling a channel before a fused step is as good as scaling it behind."""
    if step.op == "Clip":
        return step.attrs.get("min") == 0
    return step.op in ("Relu", "LeakyRelu")


def decide(graph: Graph, config: QuantConfig, barred: Mapping[str, str] = {}) -> Policy:
    """Apply the policy to an f32 graph. `barred` nodes stay f32 for the reason given.

    Raises QuantizationError for a pattern of the config that matches nothing.
    """
    config.check_patterns(graph)
    first, last = _edges(graph)
    decisions: dict[str, Decision] = {}
    for node in graph:
        precision, reason = _wish(graph, node, config, node.name in first, node.name in last, barred)
        decisions[node.name] = Decision(node.name, node.op, precision, reason)
    anchors = {n.name for n in graph if n.op in ANCHORS and decisions[n.name].precision == "int8"}
    able = {n.name for n in graph if n.op in FLEXIBLE and decisions[n.name].precision == "int8"}
    between = _between(graph, anchors, able)
    for node in graph:
        if node.name in able and node.name not in between:
            why = "not between int8 layers"
            decisions[node.name] = Decision(node.name, node.op, "f32", why)
    groups = _groups(graph, anchors | between)
    read_first = {v for n in graph if n.name in first and n.name in anchors for v in data_inputs(graph, n)}
    return Policy(decisions, groups, frozenset(read_first))


def _wish(
    graph: Graph, node: Node, config: QuantConfig, first: bool, last: bool, barred: Mapping[str, str]
) -> tuple[Precision, str]:
    """What a node would compute in if its neighbours were int8, and why."""
    wished = config.override(node)
    because = "" if wished is None else f"override {wished[1]!r}"
    if wished is not None and wished[0] != "int8":
        return wished[0], because
    why = barred.get(node.name) or obstacle(graph, node)
    if why is not None:
        return "f32", f"{because}, but {why}" if because else why
    if wished is None and first and config.first in ("f32", "bf16"):
        return ("f32" if config.first == "f32" else "bf16"), f"first layer: {config.first}"
    if wished is None and last and config.last != "int8":
        return config.last, f"last layer: {config.last}"
    return "int8", because or ("layer" if node.op in ANCHORS else "between int8 layers")


def _edges(graph: Graph) -> tuple[set[str], set[str]]:
    """The names of layers that no other layer comes before, and of those that none comes after."""
    after: set[str] = set()  # values that depend on a layer
    first = set()
    for node in graph:
        depends = any(name in after for name in node.inputs)
        if node.op in ANCHORS and not depends:
            first.add(node.name)
        if depends or node.op in ANCHORS:
            after.update(node.outputs)
    before: set[str] = set()  # values that a layer depends on
    last = set()
    for node in reversed(graph.nodes):
        leads = any(name in before for name in node.outputs)
        if node.op in ANCHORS and not leads:
            last.add(node.name)
        if leads or node.op in ANCHORS:
            before.update(node.inputs)
    return first, last


def _between(graph: Graph, anchors: set[str], able: set[str]) -> set[str]:
    """The able nodes that read what an anchor made, perhaps through others of them, and average or lead to one."""
    made: set[str] = set()
    for node in graph:
        if node.name in anchors or (node.name in able and made.intersection(data_inputs(graph, node))):
            made.update(n for n in node.outputs if n)
    wanted: set[str] = set()
    between = set()
    for node in reversed(graph.nodes):
        leads = node.name in able and (node.op in AVERAGES or bool(wanted.intersection(node.outputs)))
        if leads or node.name in anchors:
            wanted.update(data_inputs(graph, node))
            wanted.update(operands(graph, node))
        if leads and made.intersection(data_inputs(graph, node)):
            between.add(node.name)
    return between


def _groups(graph: Graph, int8: set[str]) -> tuple[tuple[str, ...], ...]:
    """The values that int8 nodes read as bytes or pass on, by common scale, in order of appearance.

    An operand of a fused step is among them if an int8 node makes it; others are read as they are.
    """
    read: dict[str, None] = {}
    made: set[str] = set()
    links: list[list[str]] = []
    for node in graph:
        if node.name not in int8:
            continue
        inputs, outputs = data_inputs(graph, node), [n for n in node.outputs if n]
        read.update(dict.fromkeys(inputs))
        read.update(dict.fromkeys(n for n in operands(graph, node) if n in made))
        if node.op in SHARING:
            read.update(dict.fromkeys(outputs))
        if node.op in SHARING and not node.fused:
            links.append([*inputs, *outputs])
        made.update(outputs)
    return tuple(_connected(read, links))


def _connected(names: Iterable[str], links: Iterable[list[str]]) -> Iterator[tuple[str, ...]]:
    """Partition names so that linked ones are together."""
    parent: dict[str, str] = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for link in links:
        for name in link[1:]:
            parent[root(name)] = root(link[0])
    members: dict[str, list[str]] = {}
    for name in parent:
        members.setdefault(root(name), []).append(name)
    return (tuple(group) for group in members.values())
