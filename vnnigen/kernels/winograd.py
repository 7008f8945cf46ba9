"""Winograd's minimal filtering F(4x4, 3x3) for int8, exact: a quarter of the products, on 16-bit words.

A tile of 4x4 outputs of a 3x3 convolution reads 6x6 pixels d. With the transforms of A. Lavin and S. Gray, "Fast
Algorithms for Convolutional Neural Networks" (2015, section 4.1), Y = A'[(G g G') * (B' d B)]A: 36 products instead of
144 for each channel. They are multiplied by VPDPWSSD, or VPMADDWD, which do half as many as VPDPBUSD.

Two things make it exact in integers:

- Every entry of 24*G, after dividing its last row by 3, is an integer, and the entries of the transformed weights and
  of the transformed pixels fit 16 bits: the absolute row sums of that matrix are at most 12, and |U| <= 144*128; those
  of B' add up at most 5 * 255 of either sign in one direction, and |V| <= 50 * 255.
- All sums are taken modulo 2^32, in which they are 576 = 9 * 64 times the wanted ones. 9 has an inverse there; what
  remains is divided by 64 with an arithmetic shift, which is right if the wanted sum lies in [-2^25, 2^25). That is a
  property of the weights, checked when they are packed; others take the usual kernels.

Where it pays is a matter of the shape: transformed weights take eight times the bytes, and a tile's transforms cost the
same however many channels share them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vnnigen.isa.assembler import Code
from vnnigen.kernels import packed
from vnnigen.kernels.blocking import Blocking
from vnnigen.kernels.emit_copy import ScratchRows, scratch_rows
from vnnigen.kernels.epilogue import Epilogue
from vnnigen.kernels.geometry import Geometry
from vnnigen.kernels.mac import WINOGRAD, WINOGRAD_CHAIN, Mac, TierCode
from vnnigen.kernels.nest import NestKey
from vnnigen.kernels.packed import USUAL_THREADS, Packed, PackedRun, Pick, Weights, pack_run
from vnnigen.kernels.packing import Array, Run, aligned
from vnnigen.kernels.types import DType

#: Outputs of a tile, and pixels it reads, in one direction.
TILE, REACH = 4, 6
POINTS = REACH * REACH
#: 24 times G, the last row but 8 times: the output transform makes up for it.
WEIGHT_TRANSFORM = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 8]], np.float32)
#: Sums are 9 * 2^SHIFT times too large; INVERSE * 9 is 1 modulo 2^32.
INVERSE, SHIFT = 954437177, 6
#: The wanted sums must lie in [-LIMIT, LIMIT).
LIMIT = 1 << (31 - SHIFT)
#: Panels of a column block.
BLOCK = 2
#: Bytes of scratch of a step, about: what stays in an L2 cache, and where weights stream from beyond it anyway.
NEAR_ROOM, FAR_ROOM = 160 << 10, 1200 << 10
#: Bytes of transformed weights that an L2 cache holds beside a step's scratch.
NEAR_WEIGHTS = 512 << 10
#: Cache lines of the next kernel's weights that are fetched with every group of tiles.
AHEAD_LINES = 2
#: Estimated cycles, on cores that multiply two vectors a cycle: the transforms of a tile's vector of channels and of
#: outputs, bytes of weights that come from beyond the L2 cache in one, and the gain below which nothing is changed.
CHANNELS_CYCLES, OUTPUTS_CYCLES, FAR_BYTES, GAIN = 120.0, 110.0, 5.0, 1.08


@dataclass(frozen=True)
class WinogradKey(NestKey):
    """Key of a 3x3 convolution by Winograd's algorithm; `blocking` counts output pixels, tiles are 4x4 of them."""

    @property
    def columns_first(self) -> bool:
        """Whether all strips meet a part of the columns before the next: they do not."""
        return False

    @property
    def streams(self) -> bool:
        """Whether it fetches its own weights from beyond the L2 cache as it goes."""
        return weight_bytes(self.g, self.tier) > NEAR_WEIGHTS

    @property
    def across(self) -> int:
        """Tiles along a row of outputs."""
        return -(-self.g.ow // TILE)

    @property
    def tiles(self) -> int:
        """Tiles of a full strip."""
        return self.blocking.strip // TILE * self.across

    @property
    def group(self) -> int:
        """Tiles that are multiplied at a time."""
        return group_of(self.tiles, self.tier, self.mac)

    @property
    def tile_name(self) -> str:
        """Tiles and columns that are multiplied at a time."""
        return f"{self.group}x{self.block_columns}"

    @property
    def pixel_pitch(self) -> int:
        """Bytes from one tile's transformed pixel to the next one's."""
        return pixel_pitch(self.g.ic, self.tier)

    @property
    def copy_rows(self) -> ScratchRows:
        """The strip's source rows in scratch, up to where whole tiles end."""
        whole = replace(self.g, oh=self.blocking.strip, ow=self.across * TILE)
        return scratch_rows(whole, self.mac, self.blocking.strip)

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Offsets in scratch of a tile's half transformed pixels, of all transformed pixels, of the sums; its size."""
        vb = self.tier.vector_bytes
        half = -(-self.copy_rows.size // 64) * 64
        pixels = half + POINTS * vb
        sums = pixels + POINTS * self.tiles * self.pixel_pitch
        return half, pixels, sums, sums + POINTS * self.tiles * self.blocking.nr * vb

    @property
    def scratch(self) -> int:
        """Bytes of scratch a step needs."""
        return self.parts[3]

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        from vnnigen.kernels.emit_winograd import WinogradNest

        return WinogradNest(self, features).build()


def group_of(tiles: int, tier: TierCode, mac: Mac) -> int:
    """Cut tiles evenly into groups whose sums fit the registers, beside weights, source and products on their way."""
    most = (tier.registers - BLOCK - 1 - mac.temps(tier.bits)) // BLOCK
    return -(-tiles // -(-tiles // most))


def pixel_pitch(channels: int, tier: TierCode) -> int:
    """Bytes of a tile's transformed pixel, whole vectors; not a multiple of what lets rows meet in the L1 cache."""
    pitch = -(-2 * channels // tier.vector_bytes) * tier.vector_bytes
    return pitch + 64 if pitch % 1024 == 0 else pitch


@dataclass(frozen=True, eq=False)
class PackedWinograd(Packed):
    """Transformed weights."""

    def keys_for(
        self, g: Geometry, _pick: Pick | None = None, _threads: int = USUAL_THREADS
    ) -> tuple[NestKey, ...]:  # fmt: skip
        """The kernel of a convolution; there is nothing to tune."""
        (run,) = self.runs
        blocking, spec = choose_blocking(g, self.tier), self.epilogue.spec
        return (WinogradKey(self.op, g, self.tier, run.mac, spec, blocking, False, 0, g.ldo, 0, ahead=AHEAD_LINES),)


def weight_bytes(g: Geometry, tier: TierCode) -> int:
    """Bytes of the transformed weights."""
    return POINTS * -(-g.ic // 2) * -(-g.n // tier.lanes) * tier.vector_bytes


def choose_blocking(g: Geometry, tier: TierCode) -> Blocking:
    """Strips of rows of tiles; where all of an image is one strip, parts of the columns."""
    down, across = -(-g.oh // TILE), -(-g.ow // TILE)
    far = weight_bytes(g, tier) > NEAR_WEIGHTS
    per_tile = POINTS * (pixel_pitch(g.ic, tier) + BLOCK * tier.vector_bytes)
    rows = max(1, min(down, (FAR_ROOM if far else NEAR_ROOM) // (per_tile * across)))
    panels = -(-g.n // tier.lanes)
    blocks = -(-panels // BLOCK)
    chunk = blocks
    if g.images == 1 and rows == down:
        # Two steps at least. Each strip reads all weights, each part of the columns transforms all pixels.
        if far or down == 1:
            chunk = -(-blocks // 2)
        else:
            rows = -(-down // 2)
    rows = -(-down // -(-down // rows))
    return Blocking(TILE, TILE, BLOCK, BLOCK, 4, rows * TILE, chunk, copy=True)


def pays(g: Geometry, tier: TierCode, direct: Mac) -> bool:
    """Whether it is estimated to be faster than multiplying by `direct`, the usual kernel's multiply-accumulate."""
    if (g.kh, g.kw, g.sh, g.sw, g.dh, g.dw, g.groups) != (3, 3, 1, 1, 1, 1, 1) or g.ic < 16 or g.n < tier.lanes:
        return False
    panels, images = -(-g.n // tier.lanes), g.images
    usual = images * g.oh * g.ow * panels * 9 * -(-g.ic // direct.k_per_dword) * direct.cost
    tiles = images * -(-g.oh // TILE) * -(-g.ow // TILE)
    words = WINOGRAD.cost if tier.vnni else WINOGRAD_CHAIN.cost
    multiply = tiles * POINTS * panels * -(-g.ic // 2) * words / 0.95
    transforms = tiles * (-(-g.ic * 2 // tier.vector_bytes) * CHANNELS_CYCLES + panels * OUTPUTS_CYCLES)
    weights = weight_bytes(g, tier)
    if weights > NEAR_WEIGHTS:
        reads = images * -(-g.oh // choose_blocking(g, tier).strip)
        # What does not hide behind the products; the usual kernels read a quarter of the bytes.
        multiply = max(multiply, weights * reads / FAR_BYTES)
    return usual > GAIN * (multiply + transforms)


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedEither(Packed):
    """Weights that the usual kernels multiply, and what their transform is made of when a shape wants it."""

    weights: Weights
    x_zp: int

    def suited(self, g: Geometry) -> Packed:
        """The weights that geometry `g` wants."""
        if pays(g, self.tier, self.runs[0].mac) and self.transformed is not None:
            return self.transformed
        return super().suited(g)

    @cached_property
    def transformed(self) -> PackedWinograd | None:
        """The transformed weights, None where a sum might leave the range; made when the first shape wants them."""
        return transform(self.op, self.weights, self.tier, self.src, self.x_zp, self.epilogue)


def pack(op: str, w: Weights, tier: TierCode, src: DType, x_zp: int, epilogue: Epilogue) -> Packed:
    """Pack weights for the usual kernels, and, where they may be transformed, remember how."""
    usual = packed.pack(op, w, tier, src, x_zp, epilogue)
    if w.kind != "int8" or w.zero_point is not None or w.window != (3, 3, 1, 1, 1, 1) or w.groups != 1:
        return usual
    own = {f.name: getattr(usual, f.name) for f in fields(usual)}
    return PackedEither(**own, weights=w, x_zp=x_zp)


def transform(op: str, w: Weights, tier: TierCode, src: DType, x_zp: int, epilogue: Epilogue) -> PackedWinograd | None:
    """Transform and pack; None where the sum of some column might leave the range."""
    flat = w.values.reshape(w.columns, -1).astype(np.int64)
    # The kernel adds up x' = x (+ 128 for s8), which is 0..255.
    if max(255 * flat.clip(min=0).sum(axis=1).max(), -255 * flat.clip(max=0).sum(axis=1).min()) >= LIMIT:
        return None
    mac = WINOGRAD if tier.vnni else WINOGRAD_CHAIN
    usual = pack_run(w, tier, src, x_zp, epilogue, Run(0, w.columns, True), mac, mac.k_per_dword)
    run = PackedRun(usual.run, mac, False, _panels(transformed_weights(w.values), tier), usual.consts)
    return PackedWinograd(op, tier, src, epilogue, (run,))


def transformed_weights(values: Array) -> NDArray[np.int16]:
    """Weights [oc, ic, 3, 3] as [36, ic, oc]; all sums are integers below 2^24, which f32 holds exactly."""
    oc, ic = values.shape[:2]
    both = np.kron(WEIGHT_TRANSFORM, WEIGHT_TRANSFORM)
    u = both @ values.reshape(oc, ic, 9).transpose(2, 1, 0).reshape(9, -1).astype(np.float32)
    words: NDArray[np.int16] = u.astype(np.int16).reshape(POINTS, ic, oc)
    return words


def _panels(u: NDArray[np.int16], tier: TierCode) -> NDArray[np.uint8]:
    """[36, ic, oc] as [column block][point][dword of K][panel of the block][column][2 elements of K]."""
    points, ic, oc = u.shape
    lanes = tier.lanes
    u = np.pad(u, ((0, 0), (0, ic % 2), (0, -oc % lanes)))
    panels = u.reshape(points, -1, 2, u.shape[2] // lanes, lanes)
    out = aligned(u.nbytes)
    whole = panels.shape[3] // BLOCK * BLOCK
    split = panels[:, :, :, :whole].reshape(*panels.shape[:3], -1, BLOCK, lanes).transpose(3, 0, 1, 4, 5, 2)
    rest = panels[:, :, :, whole:].transpose(0, 1, 3, 4, 2)
    view = out.view(np.int16)
    view[: split.size].reshape(split.shape)[:] = split
    view[split.size :].reshape(rest.shape)[:] = rest
    return out
