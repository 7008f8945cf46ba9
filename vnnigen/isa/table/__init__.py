"""The instruction table: each entry is a mnemonic with its executable meaning."""

from vnnigen.isa.table import floats, integer, integers, moves, shuffles

__all__ = ["floats", "integer", "integers", "moves", "shuffles"]
