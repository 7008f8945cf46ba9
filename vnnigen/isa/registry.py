"""The instructions this project can assemble and emulate: name -> `Insn`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vnnigen.isa import table  # noqa: F401  (fills TABLE)
from vnnigen.isa.insn import TABLE, Insn, insn

__all__ = ["MNEMONICS", "Insn", "insn"]

MNEMONICS: Mapping[str, Insn] = MappingProxyType(TABLE)
"""Every known mnemonic. Aliases (`jz`, `cmovz`) map to the record of iced's name (`je`, `cmove`)."""
