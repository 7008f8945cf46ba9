"""The instruction table, by family; importing this package declares everything."""

from vnnigen.isa.table import pending

__all__ = ["pending"]
