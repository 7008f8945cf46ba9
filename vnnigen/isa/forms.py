"""Instruction forms: which encoding of a mnemonic fits given operands and allowed CPU features.

Derived from iced-x86's own opcode tables, so that no encoding is written down here. A `Form` is chosen once
for each (mnemonic, operand kinds, masking, features) and then reused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any

from iced_x86 import (
    Code,
    CpuidFeature,
    EncodingKind,
    Instruction,
    MemorySizeInfo,
    Mnemonic,
    OpCodeInfo,
    OpCodeOperandKind,
)

from vnnigen.errors import AssemblerError

# Intel's manuals give several names to some conditions; iced-x86 knows one of each.
_CONDITIONS = {
    "z": "e", "nz": "ne", "c": "b", "nc": "ae", "nae": "b", "nb": "ae", "na": "be", "nbe": "a",
    "nge": "l", "nl": "ge", "ng": "le", "nle": "g", "pe": "p", "po": "np",
}  # fmt: skip
ALIASES: Mapping[str, str] = MappingProxyType(
    {p + k: p + v for p in ("j", "cmov", "set") for k, v in _CONDITIONS.items()} | {"sal": "shl"}
)

# What every x86-64 machine has. PREFETCHW has a CPUID bit, but 64-bit processors without it run it as a NOP.
_BASELINE = frozenset(
    {"intel8086", "intel186", "intel286", "intel386", "intel486", "x64"}
    | {"cmov", "mmx", "sse", "sse2", "cx8", "multibytenop", "prefetchw"}
)


def _constants(module: ModuleType) -> dict[str, Any]:
    """Return the values of one of iced-x86's enums, which are modules of integers."""
    return {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, int)}


_FEATURE_NAMES = {int(value): name.lower() for name, value in _constants(CpuidFeature).items()}

# The kinds of our operands that an operand slot of the opcode tables takes.
_VECTORS = {f"{c.upper()}MM": c for c in "xyz"}
_MEM = frozenset({"m", "mi"})
_SLOTS: dict[str, frozenset[str]] = {
    "MEM": _MEM,
    "SIBMEM": _MEM,
    "CL": frozenset({"cl"}),
    "IMM8": frozenset({"i8", "u8"}),
    "IMM8SEX16": frozenset({"i8"}),
    "IMM8SEX32": frozenset({"i8"}),
    "IMM8SEX64": frozenset({"i8"}),
    "IMM16": frozenset({"i8", "u8", "i16"}),
    "IMM32": frozenset({"i8", "u8", "i16", "i32", "u32"}),
    "IMM32SEX64": frozenset({"i8", "u8", "i16", "i32"}),
    "IMM64": frozenset({"i8", "u8", "i16", "i32", "u32", "i64"}),
    "BR64_4": frozenset({"L"}),
    "K_OR_MEM": _MEM | {"k", "k0"},
}
_SLOTS |= {f"K_{s}": frozenset({"k", "k0"}) for s in ("REG", "RM", "VVVV")}
_SLOTS |= {f"TMM_{s}": frozenset({"t"}) for s in ("REG", "RM", "VVVV")}
for _n in (8, 16, 32, 64):
    _own = frozenset({"r8", "cl"}) if _n == 8 else frozenset({f"r{_n}"})
    _SLOTS |= {f"R{_n}_{s}": _own for s in ("REG", "RM", "OPCODE", "VVVV")}
    _SLOTS[f"R{_n}_OR_MEM"] = _own | _MEM
    _SLOTS[f"R{_n}_REG_MEM"] = _own
for _mm, _c in _VECTORS.items():
    _SLOTS |= {f"{_mm}_{s}": frozenset({_c, _c + "h"}) for s in ("REG", "RM", "VVVV")}
    _SLOTS[f"{_mm}_OR_MEM"] = _MEM | {_c, _c + "h", "mb"}
    _SLOTS[f"{_mm}_IS4"] = frozenset({_c})
    _SLOTS |= {f"MEM_VSIB{n}{_c.upper()}": frozenset({f"m{_c}", f"m{_c}h"}) for n in (32, 64)}

_SLOT_NAMES = {int(value): name for name, value in _constants(OpCodeOperandKind).items()}
_IMMEDIATE_WIDTH = {"IMM8": 1, "IMM16": 2, "IMM32": 4, "IMM32SEX64": 4, "IMM64": 8}

_KIND_TEXT = {
    "cl": "cl", "r8": "8-bit register", "r16": "16-bit register", "r32": "32-bit register",
    "r64": "64-bit register",
    "i8": "immediate", "u8": "immediate of 8 bits, unsigned", "i16": "immediate of 16 bits",
    "i32": "immediate of 32 bits", "u32": "immediate of 32 bits, unsigned", "i64": "immediate of 64 bits",
    "k": "mask register", "k0": "mask register", "t": "tile", "L": "label",
    "m": "memory", "mi": "memory with an index", "mb": "broadcast memory",
}  # fmt: skip
for _c in _VECTORS.values():
    _KIND_TEXT |= {_c: f"{_c}mm", f"{_c}h": f"{_c}mm16-31"}
    _KIND_TEXT |= {f"m{_c}{high}": f"memory indexed by {_c}mm" for high in ("", "h")}


def immediate_kind(value: int) -> str:
    """Return the narrowest immediate kind: i8 u8 i16 i32 u32 i64 (i16 and i64 of either signedness)."""
    if -128 <= value < 128:
        return "i8"
    if 0 <= value < 256:
        return "u8"
    if -(2**15) <= value < 2**16:
        return "i16"
    if -(2**31) <= value < 2**31:
        return "i32"
    if 0 <= value < 2**32:
        return "u32"
    if -(2**63) <= value < 2**64:
        return "i64"
    raise AssemblerError(f"immediate {value} does not fit in 64 bits")


@dataclass(frozen=True, slots=True)
class Form:
    """One encoding of one mnemonic, ready to build iced-x86 instructions: `build(code, *raw operands)`."""

    mnemonic: str
    code: Any
    build: Callable[..., Instruction]
    features: frozenset[str]
    wide: bool  # touches ymm or zmm, so the function needs VZEROUPPER
    ends: bool  # control never falls through
    distinct: bool  # its registers must all be different (AMX products, gathers)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of the opcode table: one encoding and the operands that it takes."""

    code: Any
    slots: tuple[str, ...]
    evex: bool
    mask: bool
    needs_mask: bool
    zero: bool
    bcast: bool
    bits: int  # memory access width; 0 if there is none
    features: frozenset[str]
    text: str
    rank: tuple[int, ...]

    def takes(self, kinds: tuple[str, ...], mask: bool, zero: bool, size: int) -> bool:
        """Tell whether operands of these kinds, masked so, have this encoding."""
        return (
            len(kinds) == len(self.slots)
            and all(k in _SLOTS[s] for k, s in zip(kinds, self.slots, strict=True))
            and (self.mask if mask else not self.needs_mask)
            and (not zero or (self.zero and not kinds[0].startswith("m")))
            and (self.bcast or "mb" not in kinds)
            and (self.evex or not any(k.endswith("h") for k in kinds))
            and (not size or not self.bits or size == self.bits)
        )


def _rank(slots: tuple[str, ...], info: OpCodeInfo) -> tuple[int, ...]:
    """Order equivalent encodings: VEX, short immediates, opcode-embedded registers, no REX.W, then loads."""
    immediate = sum(_IMMEDIATE_WIDTH.get(s, 1) for s in slots if s.startswith("IMM"))
    embedded = any(s.endswith("OPCODE") for s in slots)
    store = bool(slots) and slots[0].endswith("_OR_MEM")
    evex = info.encoding == EncodingKind.EVEX
    return (int(evex), immediate, int(not embedded), info.w, int(store), int(info.code))


def _candidate(code: Any) -> Candidate | None:
    info = OpCodeInfo(code)
    if not info.mode64 or info.encoding not in (EncodingKind.LEGACY, EncodingKind.VEX, EncodingKind.EVEX):
        return None
    slots = tuple(_SLOT_NAMES[int(k)] for k in info.op_kinds())
    if any(s not in _SLOTS for s in slots):
        return None  # segment and control registers, short accumulator forms, 16-bit branches, ...
    if info.operand_size == 16 and not any(s.startswith("R16") for s in slots):
        return None  # RET and PUSH imm with an operand-size prefix
    if ":" in info.instruction_string:
        return None  # far jumps
    names = {_FEATURE_NAMES[int(f)] for f in Instruction.create(code).cpuid_features()}
    return Candidate(
        code,
        slots,
        evex=info.encoding == EncodingKind.EVEX,
        mask=info.can_use_op_mask_register,
        needs_mask=info.require_op_mask_register,
        zero=info.can_use_zeroing_masking,
        bcast=info.can_broadcast,
        bits=8 * MemorySizeInfo(info.memory_size).size,
        features=frozenset(names) - _BASELINE,
        text=info.instruction_string,
        rank=_rank(slots, info),
    )


@cache
def _codes() -> dict[int, list[Any]]:
    table: dict[int, list[Any]] = {}
    for code in _constants(Code).values():
        table.setdefault(int(OpCodeInfo(code).mnemonic), []).append(code)
    return table


@cache
def candidates(mnemonic: str) -> tuple[Candidate, ...]:
    """Return every 64-bit encoding of `mnemonic`, best first; AssemblerError if there is none such."""
    number = getattr(Mnemonic, ALIASES.get(mnemonic, mnemonic).upper(), None)
    if number is None:
        raise AssemblerError(f"{mnemonic}: no such instruction in iced-x86's tables")
    found = [c for c in map(_candidate, _codes()[int(number)]) if c is not None]
    return tuple(sorted(found, key=lambda c: c.rank))


def _build_function(kinds: tuple[str, ...]) -> Callable[..., Instruction]:
    """Return the `Instruction.create_*` for operands of these kinds."""
    if kinds == ("L",):
        return Instruction.create_branch
    parts = []
    for kind in kinds:
        if kind == "u32":
            parts.append("u32")
        elif kind in ("i8", "u8", "i16", "i32"):
            parts.append("i32")
        else:
            parts.append("mem" if kind.startswith("m") else "reg")
    create: Callable[..., Instruction] = getattr(Instruction, "_".join(["create", *parts]))
    return create


def _mov_imm64(code: Any, register: Any, value: int) -> Instruction:
    """Build MOV r64, imm64; the value's bits may be meant as signed or unsigned."""
    return Instruction.create_reg_u64(code, register, value & (2**64 - 1))


def select(mnemonic: str, kinds: tuple[str, ...], mask: bool, zero: bool, allowed: frozenset[str] | None) -> Form:
    """Choose the encoding of `mnemonic` for operands of `kinds`, using only the CPU features `allowed`.

    Raises AssemblerError, naming the legal forms or the missing CPU features, if there is none or if the
    memory operand's width is open.
    """
    size = next((int(k.split(":")[1]) for k in kinds if ":" in k), 0)
    kinds = tuple(k.split(":")[0] for k in kinds)
    fitting = [c for c in candidates(mnemonic) if c.takes(kinds, mask, zero, size)]
    usable = [c for c in fitting if allowed is None or c.features <= allowed]
    if not usable:
        raise AssemblerError(_no_form(mnemonic, kinds, mask, zero, size, fitting))
    best = usable[0]
    widths = {c.bits for c in usable if any(k.startswith("m") for k in kinds)}
    if not size and len(widths) > 1:
        raise AssemblerError(
            f"{mnemonic} {_describe(kinds)}: the memory operand's width could be "
            f"{', '.join(map(str, sorted(widths)))} bits; say which with Mem(..., size=bits)"
        )
    build = _mov_imm64 if "IMM64" in best.slots else _build_function(kinds)
    wide = any(s[:3] in ("YMM", "ZMM") for s in best.slots)
    ends, distinct = mnemonic in ("ret", "jmp"), OpCodeInfo(best.code).requires_unique_reg_nums
    return Form(mnemonic, best.code, build, best.features, wide, ends, distinct)


def _describe(kinds: tuple[str, ...]) -> str:
    return "(" + ", ".join(_KIND_TEXT[k] for k in kinds) + ")"


def _no_form(mnemonic: str, kinds: tuple[str, ...], mask: bool, zero: bool, size: int, fitting: list[Candidate]) -> str:
    given = f"{mnemonic} {_describe(kinds)}" + (" masked" if mask else "") + (" zeroing" if zero else "")
    given += f" with a {size}-bit memory operand" if size else ""
    if fitting:
        needs = " or ".join(sorted({"+".join(sorted(c.features)) for c in fitting}))
        return f"{given} needs the CPU features {needs}, which this assembler was not given"
    legal = "\n  ".join(dict.fromkeys(c.text.lower() for c in candidates(mnemonic)))
    if any("SIBMEM" in c.slots for c in candidates(mnemonic)):
        legal += "\n(sibmem: memory; an index is the register that holds the distance of rows in bytes, none means 0)"
    return f"{given} has no encoding; the legal forms are\n  {legal}"
