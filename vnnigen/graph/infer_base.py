"""The table of shape rules, and what a rule sees of its node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from vnnigen.errors import ModelError
from vnnigen.graph.attributes import node_error
from vnnigen.graph.evaluate_base import AnyArray
from vnnigen.graph.ir import Dim, ElemType, Node, TensorType

Shape = tuple[Dim, ...]
#: Operators whose inputs are all of one element type, by ONNX's schemas (`Linear` is MatMul or Gemm here).
_ONE_TYPE = """
    Add And BatchNormalization BitwiseAnd BitwiseOr BitwiseXor Concat Conv ConvTranspose Div Equal Gemm Greater
    GreaterOrEqual InstanceNormalization LayerNormalization Less LessOrEqual Linear MatMul Max Mean Min Mod Mul Or PRelu
    Sub Sum Xor
"""
ONE_TYPE = frozenset(_ONE_TYPE.split())
#: Those that only real numbers have.
_REAL = """
    AveragePool BatchNormalization Conv ConvTranspose Elu Exp Gelu GlobalAveragePool HardSigmoid HardSwish
    InstanceNormalization LayerNormalization LeakyRelu Linear Log LogSoftmax Mish Reciprocal Selu Sigmoid Silu Softmax
    Softplus Sqrt Tanh
"""
REAL = frozenset(_REAL.split())


@dataclass(frozen=True)
class Site:
    """A node as its rule sees it: the types of its inputs, and their values where they are known.

    Values of shapes may hold names (arrays of objects) where a length has no number yet.
    """

    node: Node
    types: tuple[TensorType | None, ...]
    values: tuple[AnyArray | None, ...]

    def error(self, reason: str) -> ModelError:
        """The error to raise: names the node."""
        return node_error(self.node, reason)

    def has(self, i: int) -> bool:
        """Whether input `i` is given."""
        return i < len(self.types) and self.types[i] is not None

    def type(self, i: int) -> TensorType:
        """The type of input `i`. ModelError if it is left out."""
        found = self.types[i] if i < len(self.types) else None
        if found is None:
            raise self.error(f"input {i} is missing")
        return found

    def dtype(self, i: int) -> ElemType:
        """The element type of input `i`."""
        return self.type(i).dtype

    def shape(self, i: int, rank: int | None = None) -> Shape | None:
        """The shape of input `i`, None while unknown. ModelError if it has not `rank` dimensions."""
        found = self.type(i).shape
        if found is not None and rank is not None and len(found) != rank:
            raise self.error(f"input {i} must have {rank} dimensions, its shape is {found}")
        return found

    def value(self, i: int) -> AnyArray | None:
        """The value of input `i`, if it is given and known."""
        return self.values[i] if i < len(self.values) else None

    def ints(self, i: int) -> tuple[int, ...] | None:
        """The value of an integer input, if known to the last number."""
        value = self.value(i)
        if value is None or value.dtype.kind not in "iu":
            return None
        return tuple(int(v) for v in value.reshape(-1))

    def dims(self, i: int) -> Shape | None:
        """The value of an integer input as lengths: numbers, and names for those unknown."""
        value = self.value(i)
        if value is None or value.dtype.kind not in "iuO":
            return None
        return tuple(v if isinstance(v, str) else int(v) for v in value.reshape(-1).tolist())

    def fresh(self, axis: int | str, output: int = 0) -> str:
        """A name for a length of an output that cannot be told; always the same one for the same axis."""
        return f"{self.node.outputs[output]}.{axis}"

    def unknown(self, rank: int, output: int = 0) -> Shape:
        """A shape of which only the rank is known."""
        return tuple(self.fresh(i, output) for i in range(rank))


Rule = Callable[[Site], "TensorType | Sequence[TensorType]"]
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Enter a rule into the table under the names of the operators it is for."""

    def enter(function: Rule) -> Rule:
        for op in ops:
            assert op not in RULES, op
            RULES[op] = function
        return function

    return enter


def check_types(site: Site) -> None:
    """ModelError where inputs have element types that the operator does not take."""
    kinds = [kind.dtype for kind in site.types if kind is not None]
    if site.node.op in ONE_TYPE and len(set(kinds)) > 1:
        raise site.error(f"its inputs are of types {', '.join(sorted(set(kinds)))}; they must be the same")
    if site.node.op in REAL and kinds and kinds[0] != "f32":
        raise site.error(f"its input is of type {kinds[0]}; it must be a real number")


def same_length(site: Site, a: Dim, b: Dim, what: str) -> Dim:
    """The length that two dimensions must share: the known one of them. ModelError if they differ."""
    if isinstance(a, int) and isinstance(b, int) and a != b:
        raise site.error(f"{what}: {a} is not {b}")
    return a if isinstance(a, int) else b


def broadcast(site: Site, *shapes: Shape | None, output: int = 0) -> Shape | None:
    """The shape that shapes broadcast to, None if one is unknown. ModelError if they do not.

    Against an unknown length, one above 1 wins; two different unknown ones make a third.
    """
    if any(s is None for s in shapes):
        return None
    known = [s for s in shapes if s is not None]
    rank = max(map(len, known))
    result: list[Dim] = []
    for i in range(rank):
        lengths = {s[i - rank] for s in known if len(s) >= rank - i}
        lengths = {d for d in lengths if d != 1}
        numbers = sorted(d for d in lengths if isinstance(d, int))
        if len(numbers) > 1:
            raise site.error(f"shapes {' and '.join(map(str, known))} do not broadcast")
        if numbers or len(lengths) < 2:
            result.append(numbers[0] if numbers else next(iter(lengths), 1))
        else:
            result.append(site.fresh(i, output))
    return tuple(result)


def elements(shape: Shape) -> int | None:
    """How many elements a shape holds, None while a length is unknown."""
    numbers = [d for d in shape if isinstance(d, int)]
    return prod(numbers) if len(numbers) == len(shape) else None
