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

Kind = Literal["vector", "integer", "machine", "tile", "control"]
Meaning = Callable[..., Any]
_M = TypeVar("_M", bound=Meaning)


@dataclass(frozen=True)
class Insn:
    """An instruction of the registry.

    What the meaning takes and returns depends on the kind:

    - vector: one array of lanes per source operand (of one element for a GPR, of bools for a `k` register),
      then the immediate as an int. Returns the destination's lanes: integers wrap to the lane, a `k`
      destination and a comparison want bools, a GPR destination one lane or an int. Fewer lanes than the
      destination holds are followed by zeros if `cut`.
    - integer: `(flags, bits, *ints)`, unsigned ints (or `signed` ones); returns an int, which may wrap.
    - machine: `(machine, bits, *ints)`, for implicit operands and the stack.
    - tile: `(machine, *operands)`, see `table.amx`.
    - control: jumps and `ret`: the emulator's loop executes them; for Jcc the meaning is the condition.

    The fields:

    - mnemonic: iced's lower-case name.
    - kind: see above.
    - meaning: the executable meaning.
    - lanes: NumPy lane type of each operand, the last one repeated; lanes[0] is the destination's and
      the granularity of the write mask.
    - reads_dest: the destination's old value is passed first.
    - dest: False when op0 is a source and only flags are written (vector meanings then get Flags first).
    - rows: if not 0, arrays come as rows of that many bytes: the instruction works per 128 (256) bits.
    - cut: sources and destination pair lanes of different sizes; spare source lanes are cut off.
    - scalar: only lane 0 is masked; the other lanes come from the meaning.
    - compare: bools become all-ones lanes when the destination is a vector register.
    - reads_all: a masked-off lane of the memory operand is still read (exception classes E4NF, E6NF).
    - whole: number of an operand that is one value for all lanes (a shift count): read whole under any mask.
    - aligned: a memory operand must be aligned to its size.
    - lane_mask: number of the operand whose lanes' sign bits select the lanes (VMASKMOV), else None.
    - merge: number of the operand that gives the masked-off lanes under merge masking (1 for VBLENDM).
    - signed: integer sources are sign-extended.
    - address: a memory operand stands for its address (LEA, PREFETCH).
    - bits: operand size of an integer instruction where the mnemonic, not the operands, decides (KMOVB).
    """

    mnemonic: str
    kind: Kind
    meaning: Meaning
    lanes: tuple[str, ...] = ()
    reads_dest: bool = False
    dest: bool = True
    rows: int = 0
    cut: bool = False
    scalar: bool = False
    compare: bool = False
    reads_all: bool = False
    whole: int | None = None
    aligned: bool = False
    lane_mask: int | None = None
    merge: int = 0
    signed: bool = False
    address: bool = False
    bits: int = 0

    def lane(self, operand: int) -> str:
        """NumPy type of the lanes of `operand`."""
        return self.lanes[min(operand, len(self.lanes) - 1)]


TABLE: dict[str, Insn] = {}
"""Everything declared so far, by name (aliases included)."""


def insn(
    *names: str, lanes: str = "", kind: Kind | None = None, aliases: tuple[str, ...] = (), **how: Any
) -> Callable[[_M], _M]:
    """Declare the instructions `names` with the decorated function as their meaning; KeyError if a name is taken.

    `lanes` makes it a vector instruction: one NumPy type for all operands, or one each, separated by spaces.
    `aliases` are further names of a single instruction (`jz` of `je`). Other arguments: fields of `Insn`.
    """

    def declare(meaning: _M) -> _M:
        for name in names:
            default: Kind = "vector" if lanes else "integer"
            record = Insn(name, kind or default, meaning, tuple(lanes.split()), **how)
            for key in (name, *aliases):
                if key in TABLE:
                    raise KeyError(f"instruction {key!r} is declared twice")
                TABLE[key] = record
        return meaning

    return declare
