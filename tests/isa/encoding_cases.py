"""Instances of every instruction form that the assembler can emit, each with its text in Intel syntax.

The text is made here from the operands, not by the library that encodes them, so that another assembler can
read it and its bytes can be compared with ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from iced_x86 import EncodingKind, OpCodeInfo

from vnnigen.errors import AssemblerError
from vnnigen.isa.assembler import GPR, Assembler, Mask, Mem, Tile, Vec
from vnnigen.isa.forms import Candidate, candidates
from vnnigen.isa.registers import Operand, Reg
from vnnigen.isa.registry import MNEMONICS

PTR = {8: "BYTE", 16: "WORD", 32: "DWORD", 64: "QWORD", 128: "XMMWORD", 256: "YMMWORD", 512: "ZMMWORD"}
BITS = {"XMM": 128, "YMM": 256, "ZMM": 512}

# rsp and r12 need a SIB byte, rbp and r13 a displacement; then disp8, disp8*N and disp32 at their limits.
BASES = ("rax", "rsp", "rbp", "rsi", "r8", "r12", "r13", "r15")
DISPLACEMENTS = (0, 8, 64, -64, 127, -128, 128, 8128, -8192, 8192, 0x12345678, -0x12345678)
INDEXES = ((None, 1), ("rcx", 1), ("rbp", 2), ("r12", 4), ("r13", 8), (None, 1), ("rax", 8))
STRIDES = (("rcx", 1), ("rbp", 1), ("r13", 2), ("rax", 4), ("r12", 8))  # of tile rows: an index is mandatory
NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
IMMEDIATES = {
    "IMM8": (5, 127, -2, 200),
    "IMM8SEX16": (5, -128, 127),
    "IMM8SEX32": (5, -128, 127),
    "IMM8SEX64": (5, -128, 127),
    "IMM16": (0x1234, -300, 0xFEDC),
    "IMM32": (0x12345678, -0x1234567, 300),
    "IMM32SEX64": (0x12345678, -0x1234567, 300),
    "IMM64": (0x123456789ABCDEF0, 2**63 + 5, 0xDEADBEEF, -(2**40)),
}


@dataclass(frozen=True)
class Case:
    """One instruction: how to ask our assembler for it, and its text (without an encoding prefix).

    A memory operand is `bits` wide (a broadcast fills as many); a broadcast repeats an `element`.
    """

    mnemonic: str
    operands: tuple[Operand, ...]
    mask: Mask | None
    zero: bool
    features: frozenset[str]
    bits: int
    element: int

    @property
    def text(self) -> str:
        """The instruction in GNU as's Intel syntax."""
        parts = [self.operand_text(o) for o in self.operands]
        if self.mask is not None:
            parts[0] += f"{{{self.mask.asm}}}" + ("{z}" if self.zero else "")
        return f"{self.mnemonic} {', '.join(parts)}".strip()

    def operand_text(self, o: Operand) -> str:
        if isinstance(o, int):
            return str(o)
        if not isinstance(o, Mem):
            return o.asm
        index = "" if o.index is None else f"+{o.index.asm}*{o.scale}"
        address = f"[{o.base.asm}{index}{o.disp:+d}]"
        if self.mnemonic in ("ldtilecfg", "sttilecfg"):
            return address  # as has no name for the width of 64 bytes
        if o.bcast:
            return f"{PTR[self.element]} BCST {address}{{1to{self.bits // self.element}}}"
        return (f"{PTR[self.bits]} PTR " if self.bits else "") + address


def gpr(name: str, bits: int = 64) -> GPR:
    return GPR(NAMES.index(name), bits)


class Operands:
    """Hands out operands, rotating through registers, addresses and immediates."""

    def __init__(self) -> None:
        self.counter = count()

    def pick(self, choices: tuple) -> object:
        return choices[next(self.counter) % len(choices)]

    def make(self, slot: str, kind: str, candidate: Candidate) -> Operand:
        """Return an operand of `kind` (reg, high, mem, bcast) for a slot of the opcode table."""
        if slot.startswith("IMM"):
            return self.pick(IMMEDIATES[slot])
        if kind in ("mem", "bcast") and ("MEM" in slot):
            return self.memory(slot, kind == "bcast")
        if slot == "CL":
            return GPR(1, 8)
        if slot.startswith("R"):
            return GPR(self.pick((0, 1, 3, 4, 5, 6, 7, 8, 11, 12, 13, 15)), int(re.match(r"R(\d+)", slot)[1]))
        if slot.startswith("K"):
            return Mask(self.pick(tuple(range(1, 8))), 64)
        if slot.startswith("TMM"):
            return Tile(self.pick(tuple(range(8))), 8192)
        low = kind != "high" or slot.endswith("IS4")
        return Vec(self.pick((0, 5, 7, 8, 12, 15)) + (0 if low else 16), BITS[slot[:3]])

    def memory(self, slot: str, bcast: bool) -> Mem:
        index, scale = self.pick(STRIDES if slot == "SIBMEM" else INDEXES)
        if "VSIB" in slot:
            register: Reg | None = Vec(self.pick((0, 7, 9, 15)), BITS[slot[-1] + "MM"])
            scale = self.pick((1, 2, 4, 8))
        else:
            register = None if index is None else gpr(index)
        return Mem(gpr(self.pick(BASES)), self.pick(DISPLACEMENTS), register, scale, bcast)


def kinds_of(candidate: Candidate) -> list[str]:
    """Return the ways to fill the slots that this encoding offers."""
    kinds = []
    if not any(s.startswith("MEM") or s == "SIBMEM" for s in candidate.slots):
        kinds.append("reg")
        if candidate.evex and any(s[:3] in BITS for s in candidate.slots):
            kinds.append("high")
    if any("MEM" in s and not s.endswith("REG_MEM") for s in candidate.slots):
        kinds.append("mem")
        if candidate.bcast:
            kinds.append("bcast")
    return kinds


def cases(memory_variants: int = 6, register_variants: int = 3) -> Iterator[Case]:
    """Yield instances of every form of every registered instruction but branches and `ret`."""
    operands = Operands()
    for name in MNEMONICS:
        for candidate in candidates(name):
            if name == "ret" or "BR64_4" in candidate.slots:
                continue
            for kind in kinds_of(candidate):
                repeat = register_variants if kind in ("reg", "high") else memory_variants
                for _ in range(repeat if candidate.slots else 1):
                    yield from instances(name, candidate, kind, operands)


def instances(name: str, candidate: Candidate, kind: str, operands: Operands) -> Iterator[Case]:
    """Yield one instance unmasked, masked and zeroing, as far as the encoding allows."""
    for masked, zero in ((False, False), (True, False), (True, True)):
        if (masked and not candidate.mask) or (not masked and candidate.needs_mask):
            continue
        ops = tuple(operands.make(slot, kind, candidate) for slot in candidate.slots)
        if zero and (not candidate.zero or isinstance(ops[0], Mem)):
            continue
        mask = Mask(1 + next(operands.counter) % 7, 64) if masked else None
        element = re.search(r"m(\d+)bcst", candidate.text)
        bits = int(element[1]) if element else 0
        yield Case(name, ops, mask, zero, candidate.features, candidate.bits, bits)


def assemble(case: Case, assemblers: dict[frozenset[str], Assembler]) -> None:
    """Emit `case` with the assembler of its features; where the access width is open, state it."""
    a = assemblers.setdefault(case.features, Assembler("cases", features=case.features))
    emit = getattr(a, case.mnemonic)
    try:
        emit(*case.operands, mask=case.mask, zero=case.zero)
    except AssemblerError as error:
        if "width could be" not in str(error):
            raise
        operands = [o.sized(case.bits) if isinstance(o, Mem) else o for o in case.operands]
        emit(*operands, mask=case.mask, zero=case.zero)


def assemble_all(wanted: list[Case]) -> tuple[list[Case], list[str], bytes]:
    """Assemble with our assembler: the cases in the order of the bytes, their encodings' names, the bytes."""
    assemblers: dict[frozenset[str], Assembler] = {}
    groups: dict[frozenset[str], list[Case]] = {}
    for case in wanted:
        assemble(case, assemblers)
        groups.setdefault(case.features, []).append(case)
    data = b""
    encodings: list[str] = []
    for a in assemblers.values():
        forms = [item.form for item in a._items]
        end = a.label("end")
        a.bind(end)
        a.jmp(end)
        code = a.finalize().encode()
        assert code.data.endswith(b"\xeb\xfe")
        data += code.data[:-2]
        names = {EncodingKind.VEX: "vex", EncodingKind.EVEX: "evex"}
        encodings += [names.get(OpCodeInfo(f.code).encoding, "") for f in forms]
    return [case for group in groups.values() for case in group], encodings, data
