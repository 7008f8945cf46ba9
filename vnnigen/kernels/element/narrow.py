"""NCHW to NHWC and back for two to four channels: images, where a transposition in squares would be mostly empty.

The channels of one pixel are neighbours in NHWC, so a vector of pixels is two to four vectors there.  Bytes are put
together with a pack and VPSHUFB within 128-bit lanes and VPERMD across them; dwords are gathered from all vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.kernels.element.common import (
    SIZE,
    NoScratch,
    by_last,
    check_offsets,
    load_lanes,
    load_some,
    loop_or_skip,
    only_last,
    steps_of,
    store_some,
)
from vnnigen.kernels.element.shuffles import gather
from vnnigen.kernels.emit_common import div_const, lane_mask, set_mask, store_bytes
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ARG_SRC, ConstLayout
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.steps import S32_TOP
from vnnigen.kernels.types import DType

Reg = Any


@dataclass(frozen=True)
class NarrowKey(NoScratch):
    """Everything the code depends on: `channels` planes of `pixels` elements, `to_nhwc` or from it.

    `spec` is None where elements stay what they are. Constants hold a vector for every channel.
    """

    tier: TierCode
    batch: int
    channels: int
    pixels: int
    src: DType
    out: DType
    spec: EpilogueSpec | None
    has_init: bool
    to_nhwc: bool

    @property
    def name(self) -> str:
        """The kernel's name: what moves, types, tier."""
        way = "nchw-nhwc" if self.to_nhwc else "nhwc-nchw"
        return f"reorder-{way}-{self.channels}ch-{self.src}{self.out}-{self.tier.name}"

    @property
    def split(self) -> tuple[int, int]:
        """Pixels per step, and steps per image."""
        return steps_of(self.pixels, self.channels * (SIZE[self.src] + SIZE[self.out]), 64)

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.batch * self.split[1]

    @property
    def columns(self) -> int:
        """Columns of the constant block."""
        return self.channels * self.tier.lanes

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _Narrow(self, features).build()


class _Narrow:
    """Emits one key."""

    def __init__(self, key: NarrowKey, features: frozenset[str] | None) -> None:
        self.key = key
        self.n, self.lanes, self.bits = key.channels, key.tier.lanes, key.tier.bits
        check_offsets(f"{key.pixels} pixels", 4 * key.pixels * key.channels)
        self.lay = ConstLayout(key.columns)
        self.a = a = Assembler(
            key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features
        )
        self.args, self.index = a.load_argument("args"), a.load_argument("index")
        a.release(a.load_argument("scratch"))
        names = ("consts", "src", "dst", "tmp", "count")
        self.r: dict[str, Reg] = {name: a.gpr(name) for name in names}
        self.masks: dict[tuple[int, int], Reg] = {}
        self.bound: Reg | None = None

    def build(self) -> Code:
        """Emit everything and encode it."""
        a, key, r = self.a, self.key, self.r
        share, parts = key.split
        a.mov(r["consts"], Mem(self.args, 8 * ARG_CONSTS))
        self._constants()
        image = r["count"]
        if parts == 1:
            a.mov(image, self.index)
            a.mov(self.index, 0)
        else:
            div_const(a, image, self.index, parts, key.steps)
            a.imul(r["tmp"], image, -parts)
            a.add(self.index, r["tmp"])
        for pointer, slot, size, planes in (
            ("src", ARG_SRC, SIZE[key.src], key.to_nhwc),
            ("dst", ARG_DST, SIZE[key.out], not key.to_nhwc),
        ):
            a.imul(r[pointer], image, key.pixels * self.n * size)
            a.add(r[pointer], Mem(self.args, 8 * slot))
            a.imul(r["tmp"], self.index, share * size * (1 if planes else self.n))
            a.add(r[pointer], r["tmp"])
        last = (key.pixels - (parts - 1) * share) // self.lanes
        by_last(a, r["count"], self.index, parts, share // self.lanes, last)
        if key.pixels >= self.lanes:
            loop_or_skip(a, r["count"], lambda: self._tile(self.lanes), may_be_zero=last == 0)
        if key.pixels % self.lanes:
            only_last(a, self.index, parts, lambda: self._tile(key.pixels % self.lanes))
        a.ret()
        return a.finalize().encode()

    def _constants(self) -> None:
        a, key, spec = self.a, self.key, self.key.spec
        if spec is not None and spec.clamp_hi:
            self.bound = self._vec("bound")
            a.vbroadcastss(self.bound, Mem(self.r["consts"], self.lay.scalars + 4 * spec.clamp_slot))
        if spec is not None and key.out == "s32":
            self.bound = self._vec("bound")
            a.vbroadcastss(self.bound, a.const(S32_TOP, align=4))
        if not key.tier.masks:
            return
        for pixels in {self.lanes, key.pixels % self.lanes} - {0}:
            for size in (SIZE[key.src], SIZE[key.out]):
                for count in self._pieces(pixels * self.n) if size == 4 else [pixels * self.n, pixels]:
                    self._mask(count, size)
            self._mask(pixels, 4)

    def _mask(self, count: int, size: int) -> Reg | None:
        """The mask of the lowest `count` elements, None for a whole vector."""
        if not self.key.tier.masks or count * size == self.key.tier.vector_bytes:
            return None
        if (count, 0) not in self.masks:
            self.masks[count, 0] = self.a.kreg(f"lowest{count}")
            set_mask(self.a, self.masks[count, 0], count, self.r["tmp"])
        return self.masks[count, 0]

    def _vec(self, name: str) -> Reg:
        return self.a.vec(self.bits, name)

    def _pieces(self, count: int) -> list[int]:
        """Split `count` dwords into vectors."""
        return [min(self.lanes, count - at) for at in range(0, count, self.lanes)]

    def _tile(self, pixels: int) -> None:
        """A vector of pixels; the cursors move on."""
        a, key, r = self.a, self.key, self.r
        with a.scope():
            rows = [self._vec(f"channel{c}") for c in range(self.n)]
            if key.to_nhwc:
                for c, v in enumerate(rows):
                    mem = Mem(r["src"], c * key.pixels * SIZE[key.src])
                    load_lanes(a, key.tier, v, mem, key.src, pixels, self._mask(pixels, 4))
            elif SIZE[key.src] == 1:
                self._split_bytes(rows, pixels)
            else:
                self._split_dwords(rows, pixels)
            for c, v in enumerate(rows):
                self._convert(v, c)
            if not key.to_nhwc:
                self._store_planes(rows, pixels)
            elif SIZE[key.out] == 1:
                self._join_bytes(rows, pixels)
            else:
                self._join_dwords(rows, pixels)
        for pointer, size, planes in (
            ("src", SIZE[key.src], key.to_nhwc),
            ("dst", SIZE[key.out], not key.to_nhwc),
        ):
            a.add(r[pointer], pixels * size * (1 if planes else self.n))

    def _convert(self, v: Reg, c: int) -> None:
        """32-bit lanes of channel c as the output's 32-bit lanes (bytes: not yet narrowed)."""
        a, spec, consts = self.a, self.key.spec, self.r["consts"]
        at = c * self.key.tier.vector_bytes
        if spec is None:
            return
        if self.key.has_init:
            a.vpaddd(v, v, Mem(consts, self.lay.init + at))
        if spec.acc == "s32":
            a.vcvtdq2ps(v, v)
        if spec.has_m and spec.has_b:
            with a.scope():
                m = self._vec("m")
                a.vmovups(m, Mem(consts, self.lay.m + at))
                a.vfmadd213ps(v, m, Mem(consts, self.lay.b + at))
        elif spec.has_m:
            a.vmulps(v, v, Mem(consts, self.lay.m + at))
        elif spec.has_b:
            a.vaddps(v, v, Mem(consts, self.lay.b + at))
        if self.bound is not None:
            a.vminps(v, self.bound, v)
        if self.key.out != "f32":
            a.vcvtps2dq(v, v)

    # Bytes.

    def _narrow(self, rows: list[Reg]) -> Reg:
        """Saturate up to four vectors of s32 to bytes: four neighbours of each in every 128-bit lane."""
        a, key = self.a, self.key
        pack = a.vpackuswb if key.out == "u8" else a.vpacksswb
        for low in range(0, len(rows), 2):
            a.vpackssdw(rows[low], rows[low], rows[min(low + 1, len(rows) - 1)])
            if key.spec is not None and key.spec.add_zp:
                a.vpaddsw(rows[low], rows[low], Mem(self.r["consts"], self.lay.zero_point))
        pack(rows[0], rows[0], rows[2] if len(rows) > 2 else rows[0])
        return rows[0]

    def _permute_dwords(self, v: Reg, order: list[int]) -> None:
        with self.a.scope():
            index = self._vec("index")
            self.a.vmovups(index, self.a.const(np.array(order, dtype=np.int32)))
            self.a.vpermd(v, index, v)

    def _join_bytes(self, rows: list[Reg], pixels: int) -> None:
        a, n, lanes128 = self.a, self.n, self.bits // 128
        v = self._narrow(rows)
        order = [c * 4 + p for p in range(4) for c in range(n)] + [0x80] * (16 - 4 * n)
        a.vpshufb(v, v, a.const(np.tile(np.array(order, np.uint8), lanes128)))
        if n < 4:
            packed = [4 * lane + i for lane in range(lanes128) for i in range(n)]
            self._permute_dwords(v, packed + [0] * (self.lanes - len(packed)))
        count = pixels * n
        self._store(Mem(self.r["dst"]), v, count, 1)

    def _split_bytes(self, rows: list[Reg], pixels: int) -> None:
        a, n, lanes128 = self.a, self.n, self.bits // 128
        with a.scope():
            v = self._vec("pixels")
            load_some(a, self.key.tier, v, Mem(self.r["src"]), pixels * n, self._mask(pixels * n, 1))
            if n < 4:
                self._permute_dwords(v, [lane * n + min(i, n - 1) for lane in range(lanes128) for i in range(4)])
            for c, row in enumerate(rows):
                order = np.full((4, 4), 0x80, np.uint8)
                order[:, 0 if self.key.src == "u8" else 3] = np.arange(4) * n + c
                a.vpshufb(row, v, a.const(np.tile(order.ravel(), lanes128)))
                if self.key.src == "s8":
                    a.vpsrad(row, row, 24)

    # Dwords.

    def _join_dwords(self, rows: list[Reg], pixels: int) -> None:
        n, size = self.n, self.key.tier.vector_bytes
        for o, count in enumerate(self._pieces(pixels * n)):
            with self.a.scope():
                v = self._vec("joined")
                places = [o * self.lanes + k for k in range(self.lanes)]
                gather(self.a, self.key.tier, v, rows, [(e % n, e // n) for e in places])
                self._store(Mem(self.r["dst"], o * size), v, count, 4)

    def _split_dwords(self, rows: list[Reg], pixels: int) -> None:
        a, n, size = self.a, self.n, self.key.tier.vector_bytes
        with a.scope():
            loaded = [self._vec(f"loaded{o}") for o in range(n)]
            for o, count in enumerate(self._pieces(pixels * n)):
                mem = Mem(self.r["src"], o * size)
                load_lanes(a, self.key.tier, loaded[o], mem, self.key.src, count, self._mask(count, 4))
            for c, row in enumerate(rows):
                places = [k * n + c for k in range(self.lanes)]
                gather(a, self.key.tier, row, loaded, [(e // self.lanes, e % self.lanes) for e in places])

    # Stores.

    def _store_planes(self, rows: list[Reg], pixels: int) -> None:
        size = SIZE[self.key.out]
        for c, v in enumerate(rows):
            mem = Mem(self.r["dst"], c * self.key.pixels * size)
            if size == 1:
                self._narrow([v])
                low = [4 * lane for lane in range(self.bits // 128)]
                self._permute_dwords(v, low + [0] * (self.lanes - len(low)))
            self._store(mem, v, pixels, size)

    def _store(self, mem: Mem, v: Reg, count: int, size: int) -> None:
        """Store the lowest `count` elements of `size` bytes."""
        a, tier = self.a, self.key.tier
        if size == 1:
            if count == 16:
                a.vmovdqu(mem, v.xmm)
            elif tier.masks or count > 16:
                store_some(a, tier, mem, v, count, self._mask(count, 1))
            else:
                store_bytes(a, mem, v.xmm, count)
        elif count == self.lanes:
            a.vmovups(mem, v)
        elif tier.masks:
            a.vmovups(mem, v, mask=self._mask(count, 4))
        else:
            with a.scope():
                mask = self._vec("mask")
                a.vmovups(mask, lane_mask(a, count))
                a.vmaskmovps(mem, mask, v)
