"""The instruction table: each entry is a mnemonic with its executable meaning."""

from vnnigen.isa.table import amx, floats, integer, integers, moves, shuffles

__all__ = ["amx", "floats", "integer", "integers", "moves", "shuffles"]
