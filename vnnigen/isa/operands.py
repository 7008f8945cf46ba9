"""Operands of decoded instructions as closures over the machine: addresses, integers, widths.

Registers are bound when a closure is made; the memory is looked up when it runs, as each call brings its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import Instruction, MemorySizeExt, OpCodeInfo, OpKind, Register, RegisterExt

from vnnigen.errors import EmulatorError
from vnnigen.isa.machine import Machine

if TYPE_CHECKING:  # to a type checker it is an enum; at run time iced-x86 has a module of ints
    from iced_x86._iced_x86_py import Register as RegisterNumber

Getter = Callable[[], int]
Setter = Callable[[int], None]

M64 = 2**64 - 1
_HIGH_BYTES = frozenset((Register.AH, Register.CH, Register.DH, Register.BH))


def is_memory(ins: Instruction, op: int) -> bool:
    """Whether operand `op` is in memory."""
    return bool(ins.op_kind(op) == OpKind.MEMORY)


def is_register(ins: Instruction, op: int) -> bool:
    """Whether operand `op` is a register."""
    return bool(ins.op_kind(op) == OpKind.REGISTER)


def is_vector(register: RegisterNumber) -> bool:
    """Whether it is an xmm, ymm or zmm register."""
    return bool(RegisterExt.is_vector_register(register))


def is_mask(register: RegisterNumber) -> bool:
    """Whether it is a k register."""
    return bool(RegisterExt.is_k(register))


def number(register: RegisterNumber) -> int:
    """Hardware number of a register (of any width)."""
    if register in _HIGH_BYTES:
        raise EmulatorError("ah, bh, ch and dh are not supported")
    full = RegisterExt.full_register(register) if RegisterExt.is_gpr(register) else register
    return int(RegisterExt.number(full))


def width(ins: Instruction, op: int) -> int:
    """Bytes of a register or memory operand; for an embedded broadcast, of the whole vector."""
    if is_memory(ins, op):
        size = OpCodeInfo(ins.code).memory_size if ins.is_broadcast else ins.memory_size
        return int(MemorySizeExt.size(size))
    return int(RegisterExt.size(ins.op_register(op)))


def address(m: Machine, ins: Instruction) -> Getter:
    """Effective address of the memory operand."""
    g, displacement, scale = m.gpr, ins.memory_displacement, ins.memory_index_scale
    if ins.is_ip_rel_memory_operand:
        target = ins.ip_rel_memory_address
        return lambda: target
    if ins.memory_base != Register.NONE and not RegisterExt.is_gpr64(ins.memory_base):
        raise EmulatorError("only 64-bit addresses are supported")
    if displacement >> 63:
        displacement -= 1 << 64
    has_base, has_index = ins.memory_base != Register.NONE, ins.memory_index != Register.NONE
    base = number(ins.memory_base) if has_base else 0
    if not has_index:
        if not has_base:
            return lambda: displacement & M64
        return lambda: (g[base] + displacement) & M64
    if not RegisterExt.is_gpr64(ins.memory_index):
        raise EmulatorError("vector indices and 32-bit addresses are not supported")
    index = number(ins.memory_index)
    if has_base:
        return lambda: (g[base] + g[index] * scale + displacement) & M64
    return lambda: (g[index] * scale + displacement) & M64


def strided(m: Machine, ins: Instruction) -> tuple[Getter, Getter]:
    """Address of row 0 and distance of rows (signed) of a tile load's or store's memory operand.

    Without an index the distance is 0 (Intel SDM vol. 2, section 2.1.5 and TILELOADD: "if the SIB encoding omits an
    index register, the value zero is assumed").
    """
    g, displacement, scale = m.gpr, ins.memory_displacement, ins.memory_index_scale
    if not RegisterExt.is_gpr64(ins.memory_base):
        raise EmulatorError("a tile's memory operand needs a 64-bit base")
    base = number(ins.memory_base)
    if ins.memory_index == Register.NONE:
        return lambda: (g[base] + displacement) & M64, lambda: 0
    index = number(ins.memory_index)

    def stride() -> int:
        value = g[index] * scale & M64
        return value - (value >> 63 << 64)

    return (lambda: (g[base] + displacement) & M64), stride


def integer(m: Machine, ins: Instruction, op: int, bits: int, signed: bool) -> Getter:
    """Value of an operand, extended from its own size, or from `bits` if it is a k register or immediate."""
    raw, own = _unsigned(m, ins, op, bits)
    if not signed:
        return raw
    top, span = 1 << (own - 1), 1 << own

    def extended() -> int:
        value = raw()
        return value - span if value & top else value

    return extended


def _unsigned(m: Machine, ins: Instruction, op: int, bits: int) -> tuple[Getter, int]:
    """Return (unsigned value, its width in bits)."""
    g, k = m.gpr, m.k
    if is_memory(ins, op):
        where, size = address(m, ins), width(ins, op)
        return lambda: m.memory.read_int(where(), size), 8 * size
    if not is_register(ins, op):
        value = ins.immediate(op) & ((1 << bits) - 1)
        return lambda: value, bits
    register = ins.op_register(op)
    i = number(register)
    if is_mask(register):
        ones = (1 << bits) - 1
        return lambda: k[i] & ones, bits
    own = 8 * int(RegisterExt.size(register))
    if own == 64:
        return lambda: g[i], 64
    part = (1 << own) - 1
    return lambda: g[i] & part, own


def setter(m: Machine, ins: Instruction, bits: int) -> Setter:
    """Return the writer of operand 0. 32-bit GPRs clear their upper half, 8 and 16 bits keep the rest."""
    g, k = m.gpr, m.k
    if is_memory(ins, 0):
        where, size = address(m, ins), width(ins, 0)
        cut = (1 << 8 * size) - 1
        return lambda value: m.memory.write_int(where(), size, value & cut)
    register = ins.op0_register
    i = number(register)
    if is_mask(register):
        ones = (1 << bits) - 1

        def set_mask(value: int) -> None:
            k[i] = value & ones

        return set_mask
    own = 8 * int(RegisterExt.size(register))
    part = (1 << own) - 1
    kept = M64 ^ part if own < 32 else 0

    def set_gpr(value: int) -> None:
        g[i] = g[i] & kept | value & part

    return set_gpr
