"""The multiply-accumulates: what one 32-bit step along K is on each tier.

Every GEMM and convolution kernel here walks K one *dword* at a time: a dword of the source row (four bytes, two
16-bit words or one f32) is broadcast to all lanes and multiplied with a vector of packed weights holding the same
K elements for one output column per lane.  A tier differs from another only in the instructions of that step, so
this table is the only place that changes when a tier is added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Assembler

Vec = Any  # a vector register of the assembler
Emit = Callable[[Assembler, Vec, Vec, Vec, tuple[Vec, ...]], None]


@dataclass(frozen=True)
class Mac:
    """One way to multiply and accumulate a dword of K.

    `element` is what the source row holds when it is multiplied: "u8" (s8 sources are shifted by +128 into it,
    the shift is compensated at packing), "s16" (bytes widened when the row is copied to scratch) or "f32".
    `temps` counts vector registers needed besides accumulators, weights and broadcast; the last `ones` of them
    hold a constant of 16-bit ones that must be loaded before the loop.  `cost` is the expected port-cycles of one step
    (two vector-multiply ports); `latency` the length of the accumulator's dependency chain in cycles.
    """

    name: str
    element: str
    temps: int
    ones: int
    cost: float
    latency: int
    emit: Emit

    @property
    def k_per_dword(self) -> int:
        """K elements in one dword: 4 bytes, 2 words or 1 float."""
        return {"u8": 4, "s16": 2, "f32": 1}[self.element]

    @property
    def element_bytes(self) -> int:
        """Bytes of one source element as multiplied."""
        return 4 // self.k_per_dword

    @property
    def acc(self) -> str:
        """Type of the accumulator: "s32" or "f32"."""
        return "f32" if self.element == "f32" else "s32"


def _vpdpbusd(a: Assembler, acc: Vec, src: Vec, w: Vec, _temps: tuple[Vec, ...]) -> None:
    a.vpdpbusd(acc, src, w)


def _fast(a: Assembler, acc: Vec, src: Vec, w: Vec, temps: tuple[Vec, ...]) -> None:
    # Exact only for chain-safe weights: VPMADDUBSW saturates its pair sums (Intel SDM vol. 2, PMADDUBSW).
    t, ones = temps
    a.vpmaddubsw(t, src, w)
    a.vpmaddwd(t, t, ones)
    a.vpaddd(acc, acc, t)


def _exact(a: Assembler, acc: Vec, src: Vec, w: Vec, temps: tuple[Vec, ...]) -> None:
    (t,) = temps
    a.vpmaddwd(t, src, w)
    a.vpaddd(acc, acc, t)


def _fma(a: Assembler, acc: Vec, src: Vec, w: Vec, _temps: tuple[Vec, ...]) -> None:
    a.vfmadd231ps(acc, src, w)


VNNI = Mac("vnni", "u8", temps=0, ones=0, cost=0.5, latency=4, emit=_vpdpbusd)
CHAIN_FAST = Mac("fast", "u8", temps=2, ones=1, cost=1.5, latency=1, emit=_fast)
CHAIN_EXACT = Mac("exact", "s16", temps=1, ones=0, cost=1.0, latency=1, emit=_exact)
FMA = Mac("fma", "f32", temps=0, ones=0, cost=0.5, latency=4, emit=_fma)

MACS: dict[str, Mac] = {m.name: m for m in (VNNI, CHAIN_FAST, CHAIN_EXACT, FMA)}


@dataclass(frozen=True)
class TierCode:
    """What code generation needs to know of a tier: register file, vector width, the int8 step, masks."""

    name: str
    bits: int
    registers: int
    vnni: bool

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector register."""
        return self.bits // 8

    @property
    def lanes(self) -> int:
        """32-bit lanes of a vector: the number of output columns in one packed panel."""
        return self.bits // 32

    @property
    def masks(self) -> bool:
        """Whether EVEX byte masks and embedded broadcast are at hand."""
        return self.bits == 512


TIER_CODE: dict[str, TierCode] = {
    t.name: t
    for t in (
        TierCode("avx512_vnni", 512, 32, vnni=True),
        TierCode("avx512", 512, 32, vnni=False),
        TierCode("avx_vnni", 256, 16, vnni=True),
        TierCode("avx2", 256, 16, vnni=False),
    )
}

#: 16-bit ones: the second factor of VPMADDWD that adds VPMADDUBSW's neighbouring pair sums.
ONES16 = np.full(32, 1, dtype=np.int16)
#: u8 ones: the weights whose dot product is the row sum that a weight zero point needs.
ONES8 = np.full(64, 1, dtype=np.int8)
