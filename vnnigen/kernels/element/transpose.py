"""Transposition between [batch, channels, pixels] and [batch, pixels, channels], fused with a conversion.

NCHW to NHWC and back are the same walk with source and destination changed over: chunks of pixels that stay in the L1
cache, in a chunk tiles of channels, in these tiles of pixels.  Rows of a tile are what is far apart in the source
(channels of NCHW, pixels of NHWC), its columns are the destination's rows.  Tiles are emitted by `transpose_tiles`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.kernels.element.common import (
    SIZE,
    NoScratch,
    by_last,
    check_offsets,
    loop_or_skip,
    only_last,
    steps_of,
)
from vnnigen.kernels.element.image_tiles import ImageTile, takes_images
from vnnigen.kernels.element.transpose_tiles import VBMI, DwordTile, LaneTile, TileCode, WidenTile
from vnnigen.kernels.emit_common import add_const, counted, div_const
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ARG_SRC
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.types import DType

Reg = Any
#: Bytes of a cache line, sets of the L1 cache, lines of a set that are sure to stay (Zen 5 has 12, others 8).
LINE, SETS, WAYS = 64, 64, 8


@dataclass(frozen=True)
class TransposeKey(NoScratch):
    """Everything the code depends on. `spec` is None where elements stay what they are.

    `extras`: features beside the tier's that the code may use (VPERMB, VCVTNEPS2BF16).
    """

    tier: TierCode
    batch: int
    channels: int
    pixels: int
    src: DType
    out: DType
    spec: EpilogueSpec | None
    has_init: bool
    per_channel: bool
    to_nhwc: bool
    extras: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The kernel's name: what moves, types, tier."""
        way = "nchw-nhwc" if self.to_nhwc else "nhwc-nchw"
        return f"reorder-{way}-{self.src}{self.out}-{self.tier.name}"

    @property
    def rows(self) -> int:
        """Rows of the source, columns of the destination."""
        return self.channels if self.to_nhwc else self.pixels

    @property
    def cols(self) -> int:
        """Columns of the source, rows of the destination."""
        return self.pixels if self.to_nhwc else self.channels

    @property
    def pitches(self) -> tuple[int, int]:
        """Bytes between rows of the source, and between rows of the destination."""
        return self.cols * SIZE[self.src], self.rows * SIZE[self.out]

    @property
    def image(self) -> bool:
        """Whether the channels are those of an image, and bytes can be permuted."""
        return VBMI in self.extras and takes_images(self.src, self.out, self.channels, converts=self.spec is not None)

    @property
    def code(self) -> TileCode:
        """How tiles are transposed."""
        if self.image:
            return ImageTile(self)
        if self.spec is None and SIZE[self.src] < 4:
            return LaneTile(self)
        if self.src in ("u8", "s8") and self.out == "f32" and VBMI in self.extras:
            return WidenTile(self)
        return DwordTile(self)

    @property
    def tile(self) -> tuple[int, int]:
        """Pixels and channels of a tile."""
        rows, cols = self.code.shape
        return (cols, rows) if self.to_nhwc else (rows, cols)

    @property
    def chunk(self) -> int:
        """Pixels of a chunk: a cache line of what is far apart, or runs that the hardware can follow."""
        size = SIZE[self.src if self.to_nhwc else self.out]
        if self.staged:
            return 128 if size > 1 else 256
        least = 64 // size if self.to_nhwc else 64
        return max(1, least // self.tile[0]) * self.tile[0]

    @property
    def staged(self) -> bool:
        """Whether planes go through scratch: where lines of all channels of a tile are in few sets of the L1 cache."""
        size = SIZE[self.src if self.to_nhwc else self.out]
        lines, rest = divmod(self.pixels * size, LINE)
        sets = SETS // math.gcd(lines, SETS)
        return not rest and min(self.channels, max(self.tile[1], 16)) >= WAYS * sets and self.pixels >= 256

    @property
    def fetches(self) -> bool:
        """Whether tiles prefetch."""
        return self.to_nhwc and not self.staged

    @property
    def stage_pitch(self) -> int:
        """Bytes between rows of the scratch."""
        return self.chunk * SIZE[self.src if self.to_nhwc else self.out] + 64

    @property
    def scratch(self) -> int:
        """Bytes of scratch one step needs."""
        return self.stage_pitch * self.tile[1] if self.staged else 0

    @property
    def split(self) -> tuple[int, int]:
        """Pixels per step, and steps per image."""
        return steps_of(self.pixels, self.channels * (SIZE[self.src] + SIZE[self.out]), self.chunk)

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.batch * self.split[1]

    @property
    def columns(self) -> int:
        """Columns of the constant block."""
        if not self.per_channel:
            return self.tier.lanes
        return self.channels * (self.tier.lanes if self.image else 1)

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return TransposeCode(self, None if features is None else features | self.extras).build()


class TransposeCode:
    """Emits one key: steps > chunks > tiles of channels > tiles of pixels."""

    def __init__(self, key: TransposeKey, features: frozenset[str] | None) -> None:
        self.key = key
        # Distances of neighbouring pixels and of neighbouring channels, in bytes.
        (src_row, dst_row), src, dst = key.pitches, SIZE[key.src], SIZE[key.out]
        self.src_px, self.src_ch = (src, src_row) if key.to_nhwc else (src_row, src)
        self.dst_px, self.dst_ch = (dst_row, dst) if key.to_nhwc else (dst, dst_row)
        px, ch = key.chunk, 64
        check_offsets(
            f"{key.pixels} pixels or {key.channels} channels",
            *(px * a + max(ch, key.channels) * b for a, b in ((self.src_px, self.src_ch), (self.dst_px, self.dst_ch))),
        )
        self.a = a = Assembler(
            key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features
        )
        self.args, self.index = a.load_argument("args"), a.load_argument("index")
        self.scratch = a.load_argument("scratch")
        names = ("consts", "src", "dst", "channel", "tmp", "stage", "chunks", "channels", "pixels")
        self.r: dict[str, Reg] = {name: a.gpr(name) for name in names}
        self.tile = key.code

    def build(self) -> Code:
        """Emit everything and encode it."""
        a, key, r = self.a, self.key, self.r
        share, parts = key.split
        a.mov(r["consts"], Mem(self.args, 8 * ARG_CONSTS))
        self.tile.setup(a, r)
        image = r["chunks"]
        if parts == 1:
            a.mov(image, self.index)
            a.mov(self.index, 0)
        else:
            div_const(a, image, self.index, parts, key.steps)
            a.imul(r["tmp"], image, -parts)
            a.add(self.index, r["tmp"])
        self._find_image(image)
        for pointer, px, slot in (("src", self.src_px, ARG_SRC), ("dst", self.dst_px, ARG_DST)):
            a.add(r[pointer], Mem(self.args, 8 * slot))
            a.imul(r["tmp"], self.index, share)
            a.imul(r["tmp"], r["tmp"], px)
            a.add(r[pointer], r["tmp"])
        chunk = key.chunk
        last = (key.pixels - (parts - 1) * share) // chunk
        by_last(a, r["chunks"], self.index, parts, share // chunk, last)
        if key.pixels >= chunk:
            loop_or_skip(a, r["chunks"], lambda: self._chunk(chunk), may_be_zero=last == 0)
        if key.pixels % chunk:
            only_last(a, self.index, parts, lambda: self._chunk(key.pixels % chunk))
        a.ret()
        return a.finalize().encode()

    def _find_image(self, image: Reg) -> None:
        """Set both cursors to the image's distance from the start, in bytes."""
        for pointer, size in (("src", self.key.src), ("dst", self.key.out)):
            self.a.imul(self.r[pointer], image, self.key.pixels)
            self.a.imul(self.r[pointer], self.r[pointer], self.key.channels * SIZE[size])

    def _move(self, pixels: int, channels: int) -> None:
        """Move both cursors."""
        add_const(self.a, self.r["src"], pixels * self.src_px + channels * self.src_ch)
        add_const(self.a, self.r["dst"], pixels * self.dst_px + channels * self.dst_ch)

    def _chunk(self, pixels: int) -> None:
        """`pixels` pixels, all channels of each; the cursors move on to the next pixels."""
        a, r, wide = self.a, self.r, self.key.tile[1]
        full, rest = divmod(self.key.channels, wide)
        a.mov(r["channel"], 0)
        if full:
            with counted(a, r["channels"], full):
                self._strip(pixels, wide)
                self._move(0, wide)
                a.add(r["channel"], wide)
        if rest:
            self._strip(pixels, rest)
        self._move(pixels, -full * wide)

    def _strip(self, pixels: int, channels: int) -> None:
        """`channels` channels of `pixels` pixels; whole chunks go through scratch where that is wanted."""
        key, r = self.key, self.r
        if not key.staged or pixels != key.chunk:
            self._tiles(pixels, channels)
            return
        side = "src" if key.to_nhwc else "dst"
        if key.to_nhwc:
            self._copy(channels, r["src"], self.src_ch, r["stage"], key.stage_pitch)
        plane, r[side] = r[side], r["stage"]
        self.a.mov(r["stage"], self.scratch)
        setattr(self.tile, f"{side}_pitch", key.stage_pitch)
        self._tiles(pixels, channels)
        r[side] = plane
        setattr(self.tile, f"{side}_pitch", self.src_ch if key.to_nhwc else self.dst_ch)
        if not key.to_nhwc:
            self._copy(channels, r["stage"], key.stage_pitch, r["dst"], self.dst_ch)

    def _copy(self, channels: int, src: Reg, src_pitch: int, dst: Reg, dst_pitch: int) -> None:
        """Copy a chunk of planes to scratch or back."""
        a, key = self.a, self.key
        a.mov(self.r["stage"], self.scratch)
        with a.scope():
            regs = [a.vec(key.tier.bits, f"copy{i}") for i in range(8)]
            with counted(a, self.r["pixels"], channels):
                offsets = list(range(0, key.stage_pitch - 64, key.tier.vector_bytes))
                for at in range(0, len(offsets), 8):
                    part = list(zip(regs, offsets[at : at + 8], strict=False))
                    for v, o in part:
                        a.vmovups(v, Mem(src, o))
                    for v, o in part:
                        a.vmovups(Mem(dst, o), v)
                add_const(a, src, src_pitch)
                add_const(a, dst, dst_pitch)
        add_const(a, src, -channels * src_pitch)
        add_const(a, dst, -channels * dst_pitch)

    def _tiles(self, pixels: int, channels: int) -> None:
        """All tiles of `channels` channels of `pixels` pixels."""
        long = self.key.tile[0]
        full, rest = divmod(pixels, long)
        if full:
            with counted(self.a, self.r["pixels"], full):
                self._tile(long, channels)
                self._move(long, 0)
        if rest:
            self._tile(rest, channels)
        self._move(-full * long, 0)

    def _tile(self, pixels: int, channels: int) -> None:
        rows, cols = (channels, pixels) if self.key.to_nhwc else (pixels, channels)
        with self.a.scope():
            self.tile.emit(rows, cols)
