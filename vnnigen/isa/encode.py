"""From a recorded program to bytes: `Program` -> `Code`, and the annotated listing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from iced_x86 import BlockEncoder, Decoder, Formatter, FormatterSyntax, Instruction

from vnnigen.errors import AssemblerError
from vnnigen.isa.forms import Form
from vnnigen.isa.registers import POOL_BASE, Label, Mask, Mem, Operand, Reg


class Insn(NamedTuple):
    """One instruction of a program: its encoding and operands."""

    form: Form
    operands: tuple[Operand, ...]
    mask: Mask | None = None
    zero: bool = False


class Note(NamedTuple):
    """What stands between instructions; `kind` is label, comment, section, end (of a section) or ret."""

    kind: str
    text: str = ""
    label: Label | None = None


Item = Insn | Note


@dataclass(frozen=True, slots=True)
class Program:
    """A finished, immutable program: instructions and notes in order, and the constants that precede them."""

    name: str
    items: tuple[Item, ...]
    constants: bytes = b""

    def encode(self) -> Code:
        """Encode to machine code: constants first, then the code, 64-byte aligned.

        Raises AssemblerError if an operand cannot be encoded.
        """
        insns = [item for item in self.items if isinstance(item, Insn)]
        targets = self.label_numbers()
        encoder = BlockEncoder(64)
        for number, insn in enumerate(insns, 1):
            encoder.add(_build(insn, number, targets))
        entry = -(-len(self.constants) // 64) * 64
        try:
            text = encoder.encode(POOL_BASE + entry)
        except ValueError as error:
            raise AssemblerError(f"{self.name}: cannot be encoded: {error}") from error
        features = frozenset[str]().union(*{insn.form.features for insn in insns})
        return Code(self.name, self.constants.ljust(entry, b"\0") + text, entry, features, len(insns), self)

    def label_numbers(self) -> dict[Label, int]:
        """Return for each label the number, counted from 1, of the instruction that it marks."""
        number = 1
        numbers: dict[Label, int] = {}
        for item in self.items:
            if isinstance(item, Insn):
                number += 1
            elif item.label is not None:
                numbers[item.label] = number
        return numbers


def _build(insn: Insn, number: int, targets: dict[Label, int]) -> Instruction:
    """Make the iced-x86 instruction. Its `ip` is its number: that is how branches find it."""
    form, operands, mask, zero = insn
    if form.distinct:
        _check_distinct(insn)
    raw: list[Any] = []
    for o in operands:
        if o.__class__ is int:
            raw.append(o)
        else:
            raw.append(targets[o] if o.__class__ is Label else o.raw)  # type: ignore
    built = form.build(form.code, *raw)
    built.ip = number
    if mask is not None:
        built.op_mask = mask.raw  # type: ignore[assignment]
        built.zeroing_masking = zero
    return built


def _check_distinct(insn: Insn) -> None:
    registers = [o for o in insn.operands if isinstance(o, Reg)]
    if len({r.index for r in registers}) < len(registers):
        names = ", ".join(r.asm for r in registers)
        raise AssemblerError(f"{insn.form.mnemonic} {names}: the registers must all be different")


@dataclass(frozen=True)
class Code:
    """Position-independent machine code: `data` begins with constants; execution begins at offset `entry`."""

    name: str
    data: bytes = field(repr=False)
    entry: int
    features: frozenset[str]
    instruction_count: int
    program: Program = field(repr=False, compare=False)

    @cached_property
    def _lines(self) -> list[tuple[int | None, str]]:
        return list(_listing_lines(self))

    @property
    def listing(self) -> str:
        """Annotated assembly: sections, labels, offsets, bytes, text, register names and comments."""
        return "\n".join(line for _, line in self._lines) + "\n"

    def line_at(self, offset: int) -> str:
        """Return the listing line of the instruction at `offset` in `data` ('' if none starts there)."""
        return next((line.strip() for at, line in self._lines if at == offset), "")


def _listing_lines(code: Code) -> Iterator[tuple[int | None, str]]:
    """Yield (offset of the instruction or None, line)."""
    yield None, f"; {code.name}: {code.instruction_count} instructions, {len(code.data) - code.entry} bytes"
    yield None, f"; needs {', '.join(sorted(code.features)) or 'nothing beyond x86-64'}"
    if code.entry:
        yield None, f"; {len(code.program.constants)} bytes of constants at 0, entry at {code.entry:#x}"
    formatter = _formatter()
    decoder = iter(Decoder(64, code.data[code.entry :], ip=code.entry))
    comments: list[str] = []
    depth = 0
    for item in code.program.items:
        if isinstance(item, Insn):
            decoded = next(decoder)
            yield decoded.ip, _insn_line(code, item, decoded, formatter, comments)
            comments = []
        elif item.kind == "comment":
            comments.append(item.text)
        elif item.kind == "label":
            yield None, f"{item.text}:"
        elif item.kind == "section":
            depth += 1
            yield None, f"; {'==' * depth} {item.text}"
        else:
            depth -= 1


def _formatter() -> Formatter:
    formatter = Formatter(FormatterSyntax.INTEL)
    formatter.space_after_operand_separator = True
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    formatter.small_hex_numbers_in_decimal = True
    formatter.uppercase_hex = False
    formatter.rip_relative_addresses = True
    return formatter


def _insn_line(code: Code, insn: Insn, decoded: Instruction, formatter: Formatter, comments: list[str]) -> str:
    raw = code.data[decoded.ip : decoded.ip + decoded.len].hex()
    text = formatter.format(decoded)
    target = next((o.name for o in insn.operands if isinstance(o, Label)), None)
    if target is not None:
        text = f"{insn.form.mnemonic} {target}"
    names = ", ".join(map(_operand_names, insn.operands))
    notes = [names] if any(c.isalpha() for c in names) and target is None else []
    line = f"  {decoded.ip:06x}  {raw:<22}  {text}"
    remark = "; ".join(notes + comments)
    return f"{line:<88} ; {remark}" if remark else line


def _operand_names(operand: Operand) -> str:
    """Return what the author called an operand; '_' for what has no name."""
    if isinstance(operand, Mem):
        if operand.base.kind == "rip":
            return f"constant@{operand.disp:#x}"
        parts = [operand.base.name or operand.base.asm]
        if operand.index is not None:
            parts.append(f"{operand.index.name or operand.index.asm}*{operand.scale}")
        parts += [str(operand.disp)] if operand.disp else []
        return "[" + "+".join(parts).replace("+-", "-") + "]"
    if isinstance(operand, int):
        return str(operand)
    return operand.name or "_"
