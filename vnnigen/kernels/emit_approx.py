"""Code for `approx.Program`s: instruction forms and registers, chosen once per program and kind of tier.

A program is lowered to three-operand instructions over numbered registers: 0 is the argument's and the result's, the
others are temporaries, as few as the program's live values need. Constants are memory operands where an instruction
takes one: broadcast from four bytes under EVEX, whole vectors otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vnnigen.isa.assembler import Assembler
from vnnigen.kernels.approx import PROGRAMS, Bits, Operation, Program, Scalar, Table, Var

#: A register number, or a constant or a scalar in memory.
Place = int | Bits | Scalar | Table
_FMA = {"fma": "vfmadd", "fms": "vfmsub", "fnma": "vfnmadd"}
_PLAIN = {n: f"v{n}ps" for n in ("add", "sub", "mul", "div", "max", "min", "and", "or", "sqrt")}
_PLAIN |= {"plus": "vpaddd", "pick": "vpermd"}
#: Shifts to the left, by how much.
_SHIFTS = {"exponent": 23, "eighths": 20}
_COMMUTES = ("add", "mul", "and", "or")


@dataclass(frozen=True)
class Instruction:
    """A mnemonic and its operands, the destination first."""

    mnemonic: str
    operands: tuple[Place, ...]
    immediate: int | None = None


@dataclass(frozen=True)
class Lowered:
    """Instructions over `registers` temporaries (numbers 1 to `registers`) and register 0."""

    instructions: tuple[Instruction, ...]
    registers: int


@lru_cache(maxsize=64)
def lowered(kind: str, evex: bool) -> Lowered:
    """The code of a step kind."""
    return lower(PROGRAMS[kind], evex)


def lower(program: Program, evex: bool, resident: frozenset[Place] = frozenset()) -> Lowered:
    """Choose the instructions and registers of a program, with or without EVEX's embedded broadcast.

    Constants of `resident` are in registers of their own, see `emit_together`.
    """
    return _Lowering(program.operations, evex, resident).run()


class _Lowering:
    """Register allocation in one pass: a value's register is free again after the operation that uses it last."""

    def __init__(self, operations: Sequence[Operation], evex: bool, resident: frozenset[Place]) -> None:
        self.operations, self.evex, self.resident = operations, evex, resident
        self.last = {s.index: k for k, op in enumerate(operations) for s in op.sources if isinstance(s, Var)}
        self.where: dict[int, int] = {0: 0}
        self.free: list[int] = []
        self.count = 1
        self.out: list[Instruction] = []

    def run(self) -> Lowered:
        """Lower all operations."""
        for k, op in enumerate(self.operations):
            if op.name in _FMA:
                register = self._fused(k, op)
            elif op.name in _SHIFTS:
                (source,) = self._places(op, ())
                self._release(k, op)
                register = self._take()
                assert isinstance(source, int)
                self.out.append(Instruction("vpslld", (register, source), _SHIFTS[op.name]))
            else:
                register = self._plain(k, op)
            self.where[k + 1] = register
        if register != 0:
            self.out.append(Instruction("vmovaps", (0, register)))
        return Lowered(tuple(self.out), self.count - 1)

    def _take(self) -> int:
        if self.free:
            self.free.sort()
            return self.free.pop(0)
        self.count += 1
        return self.count - 1

    def _release(self, k: int, op: Operation, keep: int | None = None) -> None:
        """Free the registers of values that operation k uses last, but for `keep`."""
        for index in {s.index for s in op.sources if isinstance(s, Var)}:
            if self.last[index] == k and self.where[index] != keep:
                self.free.append(self.where[index])

    def _load(self, operand: Bits | Scalar) -> int:
        register = self._take()
        self.out.append(Instruction("vbroadcastss", (register, operand)))
        return register

    def _places(self, op: Operation, memory: tuple[int, ...]) -> list[Place]:
        """Where the sources are; those at positions `memory` may stay in memory, but only one of them."""
        places: list[Place] = []
        used = False
        for i, s in enumerate(op.sources):
            if isinstance(s, Var):
                places.append(self.where[s.index])
            elif isinstance(s, Table) or (s in self.resident and op.name not in _FMA):
                places.append(s)
            elif i in memory and not used and (self.evex or isinstance(s, Bits)):
                used = True
                places.append(s)
            else:
                places.append(self._load(s))
        return places

    def _loaded(self, op: Operation, places: list[Place]) -> list[int]:
        """Registers that hold constants: this operation's alone."""
        return [p for s, p in zip(op.sources, places, strict=True) if not isinstance(s, Var) and isinstance(p, int)]

    def _plain(self, k: int, op: Operation) -> int:
        if op.name in _COMMUTES and not isinstance(op.sources[0], Var):
            op = Operation(op.name, op.sources[::-1])
        places = self._places(op, (1,))
        self.free += self._loaded(op, places)
        self._release(k, op)
        register = self._take()
        self.out.append(Instruction(_PLAIN[op.name], (register, *places)))
        return register

    def _fused(self, k: int, op: Operation) -> int:
        """An FMA overwrites one of its sources: one that ends here, else a copy."""
        places = self._places(op, (0, 1, 2))
        ends = [self.where[s.index] for s in op.sources if isinstance(s, Var) and self.last[s.index] == k]
        ends += self._loaded(op, places)
        at = next((i for i in (2, 0, 1) if places[i] in ends), None)
        if at is None:
            at = next(i for i in (2, 0, 1) if isinstance(places[i], int))
            copy = self._take()
            self.out.append(Instruction("vmovaps", (copy, places[at])))
            places[at] = copy
        a, b, c = places
        if at == 1:
            a, b = b, a
        if at == 2:
            form = "231"
            operands: tuple[Place, ...] = (c, b, a) if isinstance(a, (Bits, Scalar)) else (c, a, b)
        elif isinstance(b, int):
            form, operands = "213", (a, b, c)
        else:
            form, operands = "132", (a, c, b)
        self.out.append(Instruction(f"{_FMA[op.name]}{form}ps", operands))
        register = operands[0]
        assert isinstance(register, int)
        self.free += [r for r in self._loaded(op, places) if r != register]
        self._release(k, op, keep=register)
        return register


def emit(
    a: Assembler, code: Lowered, v: Any, temps: Sequence[Any], memory: Callable[[Bits | Scalar, bool], Any]
) -> None:
    """Replace v by the function's value.

    `memory` gives the operand of a constant or scalar: of four bytes for VBROADCASTSS, else of a whole vector.
    """
    emit_together(a, code, [[v, *temps]], memory, {})


def emit_together(
    a: Assembler, code: Lowered, vectors: Sequence[Sequence[Any]], memory: Callable[[Bits | Scalar, bool], Any],
    resident: Mapping[Place, Any], masks: Sequence[Any] = (),
) -> None:  # fmt: skip
    """Do what `emit` does for several vectors in step, each with its temporaries behind it.

    In step because a scheduler that is full of one vector's waiting instructions sees nothing of the next one.
    `resident` are constants in registers; tables must be there. Where there are `masks`, one for each vector, results
    are zero in the lanes that they leave out.
    """

    def operand(place: Place, registers: Sequence[Any], one: bool) -> Any:
        if isinstance(place, int):
            return registers[place]
        if place in resident or isinstance(place, Table):
            return resident[place]
        return memory(place, one)

    for ins in code.instructions:
        broadcast = ins.mnemonic == "vbroadcastss"
        copies = broadcast and ins.operands[1] in resident
        immediate = () if ins.immediate is None else (ins.immediate,)
        for i, registers in enumerate(vectors):
            operands = [operand(p, registers, broadcast) for p in ins.operands]
            masked = {"mask": masks[i], "zero": True} if masks and ins is code.instructions[-1] else {}
            getattr(a, "vmovaps" if copies else ins.mnemonic)(*operands, *immediate, **masked)
