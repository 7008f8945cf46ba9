"""The multiply-accumulates: what one 32-bit step along K is on each tier.

Every GEMM and convolution kernel but those on tiles walks K one *dword* at a time: a dword of the source row (four
bytes, two 16-bit words or one f32) is broadcast to all lanes and multiplied with a vector of packed weights holding the
same K elements for one output column per lane.  Tiers differ in the instructions of that step, in the width of vectors
and in having masks, all of which this module says; CONTRIBUTING.md lists what a new tier needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Assembler

Vec = Any  # a vector register of the assembler
Multiply = Callable[[Assembler, Vec, Vec, Vec, Vec], None]
Accumulate = Callable[[Assembler, Vec, Vec], None]


@dataclass(frozen=True)
class Mac:
    """One way to multiply and accumulate a dword of K.

    `element` is what the source row holds when it is multiplied: "u8" (s8 sources are shifted by +128 into it,
    the shift is compensated at packing), "s8" as it is (tiles), "s16" (bytes widened when the row is copied to
    scratch), "bf16" or "f32" (a bf16 source is widened when it is copied).
    `multiply(a, dst, src, weights, ones)` adds to `dst`, or, where `accumulate(a, acc, product)` is given, replaces it.
    `ones` says that `multiply` needs a register of 16-bit ones. `lag` is how many products stay unadded, by vector
    width: the additions of a chain are emitted that many steps after their multiplications. Additions may go to any
    vector port, and next to their multiplications they take the multipliers' (measured on Zen 5: 84 % of the exact
    chain's peak with 1 product in flight, 93 % with 12). `cost` is the multiply instructions of one step over the two
    ports that multiply; `latency` the length of the accumulator's dependency chain in cycles. `narrow` says that
    weights lie in memory as bytes and are widened to words when they are loaded.
    """

    name: str
    element: str
    cost: float
    latency: int
    multiply: Multiply
    accumulate: Accumulate | None = None
    ones: bool = False
    lag512: int = 0
    lag256: int = 0
    narrow: bool = False

    @property
    def k_per_dword(self) -> int:
        """K elements in one dword: 4 bytes, 2 words or 1 float."""
        return {"u8": 4, "s8": 4, "s16": 2, "bf16": 2, "f32": 1}[self.element]

    @property
    def element_bytes(self) -> int:
        """Bytes of one source element as multiplied."""
        return 4 // self.k_per_dword

    @property
    def weight_bytes(self) -> int:
        """Bytes of one packed weight."""
        return 1 if self.narrow else self.element_bytes

    def panel_step(self, tier: TierCode) -> int:
        """Bytes of a packed panel that one step along K multiplies."""
        return tier.lanes * self.k_per_dword * self.weight_bytes

    @property
    def acc(self) -> str:
        """Type of the accumulator: "s32" or "f32"."""
        return "f32" if self.element in ("f32", "bf16") else "s32"

    def temps(self, bits: int) -> int:
        """Vector registers needed besides accumulators, weights and broadcast."""
        return (self.lag512 if bits == 512 else self.lag256) + self.ones


class MacStream:
    """Emits multiply-accumulates, each addition `lag` products after its multiplication."""

    def __init__(self, a: Assembler, mac: Mac, bits: int) -> None:
        """Allocate the stream's registers in the assembler's current scope."""
        self.a, self.mac = a, mac
        self.ones = a.vec(bits, "ones") if mac.ones else None
        if self.ones is not None:
            a.vmovups(self.ones, a.const(ONES16[: bits // 16]))
        self.ring = [a.vec(bits, f"product{i}") for i in range(mac.temps(bits) - mac.ones)]
        self.pending: list[tuple[Vec, Vec]] = []
        self.turn = 0

    def add(self, acc: Vec, src: Vec, weights: Any) -> None:
        """Acc += src . weights (a register or memory)."""
        if self.mac.accumulate is None:
            self.mac.multiply(self.a, acc, src, weights, self.ones)
            return
        if len(self.pending) == len(self.ring):
            self._finish_one()
        product = self.ring[self.turn % len(self.ring)]
        self.turn += 1
        self.mac.multiply(self.a, product, src, weights, self.ones)
        self.pending.append((acc, product))

    def _finish_one(self) -> None:
        acc, product = self.pending.pop(0)
        assert self.mac.accumulate is not None
        self.mac.accumulate(self.a, acc, product)

    def flush(self) -> None:
        """Add what is pending; needed before the code branches and before accumulators are read."""
        while self.pending:
            self._finish_one()


def _vpdpbusd(a: Assembler, acc: Vec, src: Vec, w: Vec, _ones: Vec) -> None:
    a.vpdpbusd(acc, src, w)


def _fma(a: Assembler, acc: Vec, src: Vec, w: Vec, _ones: Vec) -> None:
    a.vfmadd231ps(acc, src, w)


def _vdpbf16ps(a: Assembler, acc: Vec, src: Vec, w: Vec, _ones: Vec) -> None:
    a.vdpbf16ps(acc, src, w)


def _tdpbusd(a: Assembler, acc: Vec, src: Vec, w: Vec, _ones: Vec) -> None:
    a.tdpbusd(acc, src, w)


def _tdpbssd(a: Assembler, acc: Vec, src: Vec, w: Vec, _ones: Vec) -> None:
    a.tdpbssd(acc, src, w)


def _tdpbf16ps(a: Assembler, acc: Vec, src: Vec, w: Vec, _ones: Vec) -> None:
    a.tdpbf16ps(acc, src, w)


def _maddubsw(a: Assembler, product: Vec, src: Vec, w: Vec, ones: Vec) -> None:
    # Exact only for chain-safe weights: VPMADDUBSW saturates its pair sums (Intel SDM vol. 2, PMADDUBSW).
    a.vpmaddubsw(product, src, w)
    a.vpmaddwd(product, product, ones)


def _maddwd(a: Assembler, product: Vec, src: Vec, w: Vec, _ones: Vec) -> None:
    a.vpmaddwd(product, src, w)


def _vpdpwssd(a: Assembler, acc: Vec, src: Vec, w: Vec, _ones: Vec) -> None:
    a.vpdpwssd(acc, src, w)


def _add(a: Assembler, acc: Vec, product: Vec) -> None:
    a.vpaddd(acc, acc, product)


#: 16-bit ones: the second factor of VPMADDWD that adds VPMADDUBSW's neighbouring pair sums.
ONES16 = np.full(32, 1, dtype=np.int16)
#: u8 ones: the weights whose dot product is the row sum that a weight zero point needs.
ONES8 = np.full(64, 1, dtype=np.int8)

VNNI = Mac("vnni", "u8", 0.5, 4, _vpdpbusd)
CHAIN_FAST = Mac("fast", "u8", 1.0, 1, _maddubsw, _add, ones=True, lag512=3, lag256=2)
CHAIN_EXACT = Mac("exact", "s16", 0.5, 1, _maddwd, _add, lag512=11, lag256=5)
#: Where no zero point widens the weights, they can stay bytes: a matrix-vector product waits for them and nothing else.
CHAIN_EXACT_NARROW = replace(CHAIN_EXACT, narrow=True)
#: Words of transformed pixels and weights (see `winograd`); the source is copied as bytes.
WINOGRAD = Mac("winograd", "u8", 0.5, 4, _vpdpwssd)
WINOGRAD_CHAIN = Mac("winograd", "u8", 0.5, 1, _maddwd, _add, lag512=3, lag256=1)
FMA = Mac("fma", "f32", 0.5, 4, _fma)

BF16 = Mac("bf16", "bf16", 0.5, 6, _vdpbf16ps)
#: Tile instructions by source type; `cost` and `latency` mean nothing for them.
AMX: dict[str, Mac] = {
    "u8": Mac("amx", "u8", 0.5, 1, _tdpbusd),
    "s8": Mac("amx", "s8", 0.5, 1, _tdpbssd),
    "bf16": Mac("amx", "bf16", 0.5, 1, _tdpbf16ps),
}


@dataclass(frozen=True)
class TierCode:
    """What code generation needs to know of a tier.

    Width and number of vector registers; whether it has VPDPBUSD and VDPBF16PS; for which kinds of operands ("int8",
    "bf16", "f32") it has tiles, and for which it is a candidate at all (a tier that adds nothing for a kind is not).
    """

    name: str
    bits: int
    registers: int
    vnni: bool
    bf16: bool = False
    tiles: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("int8", "bf16", "f32")

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
        TierCode("amx_bf16", 512, 32, vnni=True, bf16=True, tiles=("bf16",), kinds=("bf16",)),
        TierCode("amx_int8", 512, 32, vnni=True, tiles=("int8",), kinds=("int8",)),
        TierCode("avx512_bf16", 512, 32, vnni=True, bf16=True, kinds=("bf16",)),
        TierCode("avx512_vnni", 512, 32, vnni=True),
        TierCode("avx512", 512, 32, vnni=False),
        TierCode("avx_vnni", 256, 16, vnni=True),
        TierCode("avx2", 256, 16, vnni=False),
    )
}
