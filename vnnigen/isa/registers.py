"""Operands: registers and their views, memory references, labels.

All are small immutable values. Each carries `kind`, the short string by which instruction forms are
looked up, and `raw`, what iced-x86's constructors take (a register number or a `MemoryOperand`).

Kinds: r8 cl r16 r32 r64, x y z (vectors 0-15), xh yh zh (vectors 16-31, EVEX only), k k0, t (tiles),
m (memory), mi (with an index), mb (memory, broadcast), mx my mz mxh myh mzh (memory with a vector index), each
with ":size" if the access width is stated; L (label); immediates: see `forms`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from iced_x86 import MemoryOperand, Register

from vnnigen.errors import AssemblerError

GPR_NAMES = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
# System V AMD64 ABI 1.0, section 3.2.1 and 3.2.3.
ARGUMENT_REGISTERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
CALLEE_SAVED = ("rbx", "rbp", "r12", "r13", "r14", "r15")

# Encoders see constants at POOL_BASE + offset, the code after them; branch targets are small numbers, so
# that no branch target can be taken for an address.
POOL_BASE = 0x1000_0000

# AL CL DL BL, then SPL BPL SIL DIL R8L.. : AH..BH, which lie between, are never used.
_R8 = tuple(range(Register.AL, Register.AL + 4)) + tuple(range(Register.SPL, Register.SPL + 12))
_GPR_BASE = {16: int(Register.AX), 32: int(Register.EAX), 64: int(Register.RAX)}
_VEC_BASE = {128: int(Register.XMM0), 256: int(Register.YMM0), 512: int(Register.ZMM0)}
_VEC_LETTER = {128: "x", 256: "y", 512: "z"}


@dataclass(frozen=True, slots=True)
class Reg:
    """A register: `index` in its file, width in `bits`, the `name` that the author gave it."""

    index: int
    bits: int
    name: str = field(default="", compare=False)
    kind: str = field(init=False, repr=False, compare=False)
    raw: int = field(init=False, repr=False, compare=False)

    def _set(self, kind: str, raw: int) -> None:
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "raw", raw)

    @property
    def asm(self) -> str:
        """The hardware name, as in assembly text."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class GPR(Reg):
    """A general-purpose register of 64, 32, 16 or 8 bits."""

    def __post_init__(self) -> None:
        if self.bits == 8:
            self._set("cl" if self.index == 1 else "r8", _R8[self.index])
        else:
            self._set(f"r{self.bits}", _GPR_BASE[self.bits] + self.index)

    @property
    def r64(self) -> GPR:
        """The whole register."""
        return GPR(self.index, 64, self.name)

    @property
    def r32(self) -> GPR:
        """The low 32 bits (a write clears the high half)."""
        return GPR(self.index, 32, self.name)

    @property
    def r16(self) -> GPR:
        """The low 16 bits."""
        return GPR(self.index, 16, self.name)

    @property
    def r8(self) -> GPR:
        """The low 8 bits."""
        return GPR(self.index, 8, self.name)

    @property
    def asm(self) -> str:
        """The hardware name: rax, eax, ax, al, r8, r8d, r8w, r8b."""
        name = GPR_NAMES[self.index]
        if self.index >= 8:
            return name + {64: "", 32: "d", 16: "w", 8: "b"}[self.bits]
        if self.bits == 8:
            return name[1] + "l" if self.index < 4 else name[1:] + "l"
        return {64: name, 32: "e" + name[1:], 16: name[1:]}[self.bits]


@dataclass(frozen=True, slots=True)
class Vec(Reg):
    """A vector register, seen as zmm, ymm or xmm."""

    def __post_init__(self) -> None:
        high = "h" if self.index >= 16 else ""
        self._set(_VEC_LETTER[self.bits] + high, _VEC_BASE[self.bits] + self.index)

    @property
    def zmm(self) -> Vec:
        """All 512 bits."""
        return Vec(self.index, 512, self.name)

    @property
    def ymm(self) -> Vec:
        """The low 256 bits."""
        return Vec(self.index, 256, self.name)

    @property
    def xmm(self) -> Vec:
        """The low 128 bits."""
        return Vec(self.index, 128, self.name)

    @property
    def asm(self) -> str:
        """The hardware name: zmm0, ymm0, xmm0."""
        return f"{_VEC_LETTER[self.bits]}mm{self.index}"


@dataclass(frozen=True, slots=True)
class Mask(Reg):
    """An AVX-512 mask register k0-k7."""

    def __post_init__(self) -> None:
        self._set("k" if self.index else "k0", int(Register.K0) + self.index)

    @property
    def asm(self) -> str:
        """The hardware name: k1."""
        return f"k{self.index}"


@dataclass(frozen=True, slots=True)
class Tile(Reg):
    """An AMX tile register tmm0-tmm7."""

    def __post_init__(self) -> None:
        self._set("t", int(Register.TMM0) + self.index)

    @property
    def asm(self) -> str:
        """The hardware name: tmm0."""
        return f"tmm{self.index}"


@dataclass(frozen=True, slots=True)
class InstructionPointer(Reg):
    """RIP: the base of a reference to the constant pool."""

    def __post_init__(self) -> None:
        self._set("rip", int(Register.RIP))

    @property
    def asm(self) -> str:
        """The hardware name."""
        return "rip"


RIP = InstructionPointer(0, 64)
RSP = GPR(GPR_NAMES.index("rsp"), 64)


@dataclass(frozen=True, slots=True)
class Mem:
    """A memory operand [base + index*scale + disp].

    `size` (in bits) is needed only where the other operands leave the access width open, as in
    `cmp(Mem(r, 8, size=32), 0)` or `movzx(r.r32, Mem(p, size=8))`. `bcast` asks for EVEX embedded broadcast.
    Raises AssemblerError for a base that is not a 64-bit register, a scale other than 1, 2, 4, 8, an index
    rsp or a displacement outside 32 bits.
    """

    base: Reg
    disp: int = 0
    index: Reg | None = None
    scale: int = 1
    bcast: bool = False
    size: int = 0
    kind: str = field(init=False, repr=False, compare=False)
    raw: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        base, index, disp = self.base, self.index, int(self.disp)
        kind = "mb" if self.bcast else "m"
        if base.kind not in ("r64", "rip"):
            raise AssemblerError(f"a memory operand's base must be a 64-bit register, not {base.asm}")
        if not -(2**31) <= disp < 2**31:
            raise AssemblerError(f"displacement {disp} does not fit in 32 bits; add it to the base register")
        if index is not None:
            kind = self._index_kind(index)
        if base.kind == "rip":
            raw = MemoryOperand(base.raw, 0, 1, POOL_BASE + disp, 8, self.bcast, 0)  # type: ignore[arg-type]
        else:
            number = 0 if index is None else index.raw
            raw = MemoryOperand(base.raw, number, self.scale, disp, 1 if disp else 0, self.bcast, 0)  # type: ignore[arg-type]
        object.__setattr__(self, "kind", f"{kind}:{self.size}" if self.size else kind)
        object.__setattr__(self, "raw", raw)

    def _index_kind(self, index: Reg) -> str:
        if self.scale not in (1, 2, 4, 8):
            raise AssemblerError(f"an index can be scaled by 1, 2, 4 or 8, not {self.scale}")
        if self.base.kind == "rip":
            raise AssemblerError("a constant-pool reference cannot have an index; lea its address first")
        if isinstance(index, Vec) and not self.bcast:
            return "m" + index.kind
        if index.kind != "r64" or index == RSP:
            raise AssemblerError(f"an index must be a 64-bit register other than rsp, not {index.asm}")
        return "mb" if self.bcast else "mi"

    def __add__(self, offset: int) -> Mem:
        """Return the operand `offset` bytes further on."""
        return Mem(self.base, self.disp + offset, self.index, self.scale, self.bcast, self.size)

    def __sub__(self, offset: int) -> Mem:
        """Return the operand `offset` bytes before."""
        return self + -offset

    def broadcast(self) -> Mem:
        """Return the operand with embedded broadcast of one element."""
        return replace(self, bcast=True)

    def sized(self, bits: int) -> Mem:
        """Return the operand with its access width stated."""
        return replace(self, size=bits)


@dataclass(eq=False, slots=True)
class Label:
    """A branch target; made by `Assembler.label`, placed by `Assembler.bind`."""

    name: str
    bound: bool = False
    kind: str = field(default="L", init=False)


Operand = Reg | Mem | Label | int
