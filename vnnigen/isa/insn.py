"""One record per instruction: its mnemonic and its meaning on NumPy lanes or Python integers.

The tables in `vnnigen.isa.table` are made of `insn`-decorated functions:

    @insn("vpaddd", lanes="i4")
    def _(a, b): return a + b

The function knows nothing of registers, memory, masks or broadcast; the emulator fetches the operands,
applies the write mask and clears the upper bits, the same way for every instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Kind = Literal["vector", "integer", "control"]
Meaning = Callable[..., Any]
_M = TypeVar("_M", bound=Meaning)


@dataclass(frozen=True)
class Insn:
    """An instruction of the registry.

    Vector meanings take one array per source operand (a memory or GPR operand is an array too), then the
    immediate as an int, and return the destination's lanes (wider integers wrap, a `k` destination wants
    bools, a GPR destination an int). Integer meanings take `(flags, bits, *ints)` and return an int.
    Control instructions (jumps, stack, hints) have no meaning here: the emulator's loop executes them.

    Attributes:
        mnemonic: iced's lower-case name.
        kind: "vector", "integer" or "control".
        meaning: the executable meaning.
        lanes: NumPy lane type of each operand, the last one repeated; lanes[0] is the destination's and
            is the granularity of the write mask.
        reads_dest: the destination's old value is passed first.
        dest: False when op0 is a source and only flags are written (the Flags object is then passed first).
        rows: arrays have shape (width / 128 bits, lanes per 128 bits): the instruction works per 128-bit lane.
        cut: sources and destination have lanes of different sizes, one to one; the wider side sets the count.
        scalar: only lane 0 is computed and masked; the other lanes of the 128 come from the meaning.
        reads_all: a masked-off lane of the memory operand is still read (exception classes E4NF, E6NF).
        aligned: a memory operand must be aligned to its size.
        lane_mask: number of the operand whose lanes' sign bits select the lanes (VMASKMOV), else None.
        merge: number of the operand that gives the masked-off lanes under merge masking (1 for VBLENDM).
    """

    mnemonic: str
    kind: Kind
    meaning: Meaning
    lanes: tuple[str, ...] = ()
    reads_dest: bool = False
    dest: bool = True
    rows: bool = False
    cut: bool = False
    scalar: bool = False
    reads_all: bool = False
    aligned: bool = False
    lane_mask: int | None = None
    merge: int = 0

    def lane(self, operand: int) -> str:
        """NumPy type of the lanes of `operand`."""
        return self.lanes[min(operand, len(self.lanes) - 1)]


TABLE: dict[str, Insn] = {}
"""Everything declared so far, by name (aliases included)."""


def insn(
    *names: str, lanes: str = "", kind: Kind | None = None, aliases: tuple[str, ...] = (), **how: Any
) -> Callable[[_M], _M]:
    """Declare the instructions `names` with the decorated function as their meaning.

    `lanes` makes it a vector instruction: one NumPy type for all operands, or one each, separated by spaces.
    `aliases` are further names of a single instruction (`jz` of `je`). Other arguments: fields of `Insn`.
    """

    def declare(meaning: _M) -> _M:
        for name in names:
            record = Insn(name, kind or ("vector" if lanes else "integer"), meaning, tuple(lanes.split()), **how)
            for key in (name, *aliases):
                if key in TABLE:
                    raise KeyError(f"instruction {key!r} is declared twice")
                TABLE[key] = record
        return meaning

    return declare
