"""Dispatch: which tier and which kernel family computes a problem, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass

from vnnigen.errors import ISAError
from vnnigen.isa import tiers
from vnnigen.kernels.families import FAMILIES, Family
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.kernels.packed import Weights

#: Tiers that have GEMM and convolution kernels, best first; the NumPy reference is the last resort.
CANDIDATES: tuple[str, ...] = (*TIER_CODE, "reference")


@dataclass(frozen=True)
class Choice:
    """The chosen tier and family (None for the reference) and what was decided about every candidate."""

    tier: str
    family: Family | None
    considered: tuple[tuple[str, str | None], ...]


def choose(w: Weights, isa: str | None) -> Choice:
    """Ask every candidate in order; the first that does not object is taken.

    `isa` forces a tier. Raises ISAError where it is unknown, has no such kernels, or cannot be used here.
    """
    forced = None if isa is None else tiers.resolve_tier(isa, CANDIDATES)
    considered: list[tuple[str, str | None]] = []
    found: tuple[str, Family | None] | None = None
    for name in CANDIDATES:
        reason = f"isa={forced} was asked for" if forced not in (None, name) else tiers.why_not(name)
        if name == "reference":
            considered.append((name, reason if found is None else "a generated kernel is better"))
            found = found or (name, None)
            continue
        for family in FAMILIES:
            why = reason or family.why_not(w, TIER_CODE[name])
            if why is None and found is not None:
                why = "an earlier candidate was taken"
            considered.append((f"{name}/{family.name}", why))
            if why is None:
                found = (name, family)
    if found is None:  # the reference never objects
        raise ISAError("no candidate kernel; this is a bug in dispatch")
    return Choice(found[0], found[1], tuple(considered))
