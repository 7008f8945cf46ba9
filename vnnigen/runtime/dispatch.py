"""Dispatch: which tier and which kernel family computes a problem, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass

from vnnigen.errors import ISAError
from vnnigen.isa import tiers
from vnnigen.kernels.families import FAMILIES, Family
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.kernels.packed import Weights
from vnnigen.runtime.peak import peak_for

#: Ways to compute bf16 that a caller may pin, and the families they name.
STRATEGIES = {"tiles": "tiles", "dot": "dot", "fma": "implicit-gemm"}


def candidates(kind: str) -> tuple[str, ...]:
    """Tiers that have kernels for a kind of operands, best first; the NumPy reference is the last resort."""
    return (*(t.name for t in TIER_CODE.values() if kind in t.kinds), "reference")


@dataclass(frozen=True)
class Choice:
    """The chosen tier and family (None for the reference) and what was decided about every candidate."""

    tier: str
    family: Family | None
    considered: tuple[tuple[str, str | None], ...]


def choose(w: Weights, isa: str | None, strategy: str = "auto") -> Choice:
    """Ask every candidate in order; the first that does not object is taken.

    `isa` forces a tier, `strategy` ("tiles", "dot", "fma") a way to compute bf16. Raises ISAError where they are
    unknown, have no such kernels, or cannot be used here.
    """
    if strategy != "auto" and strategy not in STRATEGIES:
        raise ISAError(f"strategy must be auto, {', '.join(STRATEGIES)}, not {strategy!r}")
    names = candidates(w.kind)
    forced = None if isa is None else tiers.resolve_tier(isa, names)
    considered: list[tuple[str, str | None]] = []
    found: tuple[str, Family | None] | None = None
    for name in names:
        reason = f"isa={forced} was asked for" if forced not in (None, name) else tiers.why_not(name)
        if name == "reference":
            considered.append((name, reason if found is None else "a generated kernel is better"))
            found = found or (name, None)
            continue
        for family in FAMILIES:
            why = reason or family.why_not(w, TIER_CODE[name])
            if why is None and found is not None:
                why = "an earlier candidate was taken"
            # Asked last: it may have to measure instructions.
            why = why or _strategy_why_not(w, family, strategy)
            considered.append((f"{name}/{family.name}", why))
            if why is None:
                found = (name, family)
    if found is None or (strategy != "auto" and found[1] is None):
        raise ISAError(f"strategy={strategy} cannot be used: " + "; ".join(f"{n}: {why}" for n, why in considered))
    return Choice(found[0], found[1], tuple(considered))


def _strategy_why_not(w: Weights, family: Family, strategy: str) -> str | None:
    """Why a bf16 family is not the strategy asked for, or not the faster one by measurement."""
    if w.kind != "bf16":
        return None
    if family.name == "depthwise":
        return None if strategy in ("auto", "fma") else f"strategy={strategy} was asked for, and this family widens"
    if strategy != "auto":
        return None if family.name == STRATEGIES[strategy] else f"strategy={strategy} was asked for"
    if family.name != "dot":
        return None
    # VDPBF16PS starts once in two cycles on some cores, and then f32 FMA is faster.
    dot, fma = peak_for("avx512_bf16", {"bf16": 1.0}), peak_for("avx512", {"fma": 1.0})
    if dot is not None and fma is not None and dot < fma:
        return f"VDPBF16PS was measured at {dot:.0f} GOP/s here, VFMADD231PS at {fma:.0f}: widening to f32 is faster"
    return None
