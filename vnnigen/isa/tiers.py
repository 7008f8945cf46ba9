"""Instruction-set tiers: named feature sets, the cap that a user may put on them, and their choice.

A tier is usable if this machine has all its features and the cap allows them. The cap is the feature set of a
tier too: `avx_vnni` is not allowed under the cap `avx512`, `avx2` is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vnnigen.errors import ISAError
from vnnigen.isa.features import cpu_features, features
from vnnigen.runtime import native

_ENV = "VNNIGEN_MAX_ISA"


@dataclass(frozen=True, slots=True)
class Tier:
    """A named set of CPU features, closed under prerequisites; `vector_bits` is its widest vector's width."""

    name: str
    features: frozenset[str]
    vector_bits: int


_AVX2 = frozenset({"sse3", "ssse3", "sse4_1", "sse4_2", "popcnt", "avx", "f16c", "fma", "avx2", "bmi1", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_VNNI = _AVX512 | {"avx512_vnni"}
_BF16 = _VNNI | {"avx512_bf16"}
_AMX_INT8 = _VNNI | {"amx_tile", "amx_int8"}

TIERS: tuple[Tier, ...] = (
    # Every CPU with AMX-BF16 has AMX-INT8 and AVX512-BF16: as a cap, the top tier leaves nothing out.
    Tier("amx_bf16", _AMX_INT8 | _BF16 | {"amx_bf16"}, 512),
    Tier("amx_int8", _AMX_INT8, 512),
    Tier("avx512_bf16", _BF16, 512),
    Tier("avx512_vnni", _VNNI, 512),
    Tier("avx512", _AVX512, 512),
    Tier("avx_vnni", _AVX2 | {"avx_vnni"}, 256),
    Tier("avx2", _AVX2, 256),
    Tier("reference", frozenset(), 0),
)
"""All tiers, best first. `reference` is NumPy, which works everywhere."""

_BY_NAME = {tier.name: tier for tier in TIERS}
_cap: str | None = None


def tier(name: str) -> Tier:
    """Return the tier called `name`; ISAError listing the legal names if there is none."""
    try:
        return _BY_NAME[name.strip().lower()]
    except (KeyError, AttributeError):
        raise ISAError(f"no instruction-set tier {name!r}; the tiers are {', '.join(_BY_NAME)}") from None


def set_max_isa(name: str | None) -> None:
    """Cap the tiers at `name` for this process; None leaves the cap to the environment's VNNIGEN_MAX_ISA."""
    global _cap
    _cap = None if name is None else tier(name).name


def max_isa() -> str | None:
    """Return the cap in force, or None. ISAError if VNNIGEN_MAX_ISA does not name a tier."""
    if _cap is not None:
        return _cap
    wish = os.environ.get(_ENV, "")
    if not wish.strip():
        return None
    try:
        return tier(wish).name
    except ISAError as error:
        raise ISAError(f"the environment variable {_ENV} is wrong: {error}") from None


def allowed_features() -> frozenset[str]:
    """Return the features that kernels may use here: the machine's, within the cap."""
    cap = max_isa()
    return features() if cap is None else features() & tier(cap).features


def why_not(name: str) -> str | None:
    """Return why the tier `name` cannot be used now, or None if it can; ISAError for an unknown name."""
    wanted = tier(name)
    cap = max_isa()
    if not wanted.features:
        return None
    if not native.is_x86():
        return "this is not an x86-64 machine"
    missing = wanted.features - cpu_features()
    if missing:
        return f"this CPU lacks {', '.join(sorted(missing))}"
    disabled = wanted.features - features()
    if disabled:
        return f"the operating system or hypervisor does not enable {', '.join(sorted(disabled))}"
    if cap is not None and not wanted.features <= tier(cap).features:
        return f"the instruction set is capped at {cap} (set_max_isa or {_ENV})"
    return None


def tiers() -> tuple[str, ...]:
    """Return the names of the usable tiers, best first; `reference` is always the last."""
    return tuple(t.name for t in TIERS if why_not(t.name) is None)


def resolve_tier(isa: str | None, candidates: Sequence[str]) -> str:
    """Choose a tier from `candidates` (in order of preference): the wish `isa`, or the first usable one.

    Raises ISAError if `isa` is not a candidate or not usable, or if no candidate is, saying why.
    """
    if isa is not None:
        name = tier(isa).name
        if name not in candidates:
            raise ISAError(f"{name} is not implemented here; choose from {', '.join(candidates)}")
        reason = why_not(name)
        if reason is not None:
            raise ISAError(f"{name} cannot be used: {reason}")
        return name
    reasons = {name: why_not(name) for name in candidates}
    for name, reason in reasons.items():
        if reason is None:
            return name
    raise ISAError("no tier can be used: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))


def require(needed: Iterable[str], what: str) -> None:
    """Raise ISAError, naming `what` and the features in question, if some `needed` ones may not be used."""
    needed = frozenset(needed)
    missing = needed - features()
    if missing:
        raise ISAError(f"{what} needs {', '.join(sorted(missing))}, which this machine does not offer")
    capped = needed - allowed_features()
    if capped:
        raise ISAError(f"{what} needs {', '.join(sorted(capped))}, beyond the cap {max_isa()}")
