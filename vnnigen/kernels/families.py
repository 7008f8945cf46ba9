"""Kernel families: the ordered candidates that dispatch asks, each of which says why not.

A family packs weights and names the kernels of a problem.  Within a tier the first family that does not object is
taken; a more special one stands before a more general one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vnnigen.kernels import amx, depthwise, packed, thin, winograd
from vnnigen.kernels.epilogue import Epilogue
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.packed import Packed, Weights
from vnnigen.kernels.types import DType

WhyNot = Callable[[Weights, TierCode], "str | None"]
Pack = Callable[[str, Weights, TierCode, DType, int, Epilogue], "Packed | depthwise.PackedDepthwise | amx.PackedAmx"]


@dataclass(frozen=True)
class Family:
    """`why_not(weights, tier)` is None where the family applies; `pack` prepares weights for it."""

    name: str
    why_not: WhyNot
    pack: Pack


FAMILIES: tuple[Family, ...] = (
    Family("depthwise", depthwise.why_not, depthwise.pack),
    Family("tiles", amx.why_not, amx.pack),
    Family("thin", thin.why_not, thin.pack),
    Family("dot", packed.dot_why_not, packed.pack_dot),
    Family("implicit-gemm", lambda _w, _t: None, winograd.pack),
)
