"""Depthwise convolution: one filter per channel, vectors run along the channels.

The dot-product instructions sum groups of G neighbouring elements (G = 4 bytes for VPDPBUSD, 2 words for VPMADDWD).
A depthwise filter has nothing to sum along channels, so the kernel makes the neighbours: it loads the channels of
G columns of a source row and interleaves them with unpack instructions, so that each 32-bit lane holds G taps of
one channel.  One such group serves every output whose window touches it, each with its own arrangement of weights
(zero where a column is not its tap): with stride 1, the four columns c..c+3 give outputs c and c+1 of a 3-wide filter,
and rows are shared likewise by the outputs above each other.  For f32, G = 1 and nothing is interleaved.

Unpacking leaves a vector's channels in another order within groups of 4*G (`channel_order`); the constants are
packed in that order, and narrowing s32 to bytes puts the channels back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vnnigen.errors import ShapeError
from vnnigen.isa.assembler import Code, Mem
from vnnigen.kernels.blocking import TILES, Blocking, grid, other_grids
from vnnigen.kernels.emit_epilogue import emit_epilogue, epilogue_registers
from vnnigen.kernels.emit_store import Tile
from vnnigen.kernels.emit_tile import tile_offsets
from vnnigen.kernels.epilogue import Epilogue, EpilogueSpec
from vnnigen.kernels.geometry import Geometry
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.mac import CHAIN_EXACT, CHAIN_FAST, FMA, VNNI, Mac, MacStream, TierCode
from vnnigen.kernels.nest import LoopNest, NestKey
from vnnigen.kernels.packed import PackedRun, Pick, Weights, as_element
from vnnigen.kernels.packing import (
    Array,
    Columns,
    Run,
    aligned,
    fill_constants,
    pad_vector,
    safe_columns,
    start_values,
)
from vnnigen.kernels.types import DType

Reg = Any
#: Cache lines of a pixel that f32 kernels use at a time, by bits of a vector: (pitch, stride, lines) of the largest
#: power of two that divides the bytes from pixel to pixel, and the least stride, that need so many (see
#: `block_vectors`). Measured on Zen 5: on AVX-512, 1024 channels of 10x10 pixels took 29 us with one line, 25 with two,
#: 16 with four. With 16 registers, two lines leave tiles of two or four pixels, and rows are seldom shared.
LINES: dict[int, tuple[tuple[int, int, int], ...]] = {
    512: ((2048, 1, 4), (512, 1, 2)),
    256: ((2048, 1, 2), (1024, 2, 2)),
}
#: Largest tile that is considered.
TALLEST, WIDEST = 4, 4
#: Tap of each column of a group, None where the output does not use the column.
Taps = tuple["int | None", ...]


@dataclass(frozen=True)
class Window:
    """Size of the filter, its stride and dilation."""

    kh: int
    kw: int
    sh: int
    sw: int
    dh: int
    dw: int


@dataclass(frozen=True)
class Group:
    """G columns of one source row, and the outputs (pixel of the tile, filter row, taps) that use them."""

    row: int
    columns: tuple[int, ...]
    users: tuple[tuple[int, int, Taps], ...]


@lru_cache(maxsize=1024)
def plan_groups(win: Window, th: int, tw: int, size: int) -> tuple[Group, ...]:
    """Which groups of `size` columns a th x tw tile of outputs loads, and who uses them."""
    columns = sorted({j * win.sw + x * win.dw for j in range(tw) for x in range(win.kw)})
    groups = []
    for row in range((th - 1) * win.sh + (win.kh - 1) * win.dh + 1):
        for start in range(0, len(columns), size):
            part = tuple(columns[start : start + size])
            users = tuple(
                (i * tw + j, kr, _taps(part, j, win, size))
                for i in range(th)
                for j in range(tw)
                if (kr := _tap(row - i * win.sh, win.dh, win.kh)) is not None
                and any(t is not None for t in _taps(part, j, win, size))
            )
            if users:
                groups.append(Group(row, part, users))
    return tuple(groups)


def _tap(distance: int, dilation: int, count: int) -> int | None:
    """The tap at `distance` from the window's start, if there is one."""
    tap, off = divmod(distance, dilation)
    return tap if off == 0 and 0 <= tap < count else None


def _taps(columns: tuple[int, ...], j: int, win: Window, size: int) -> Taps:
    taps = [_tap(c - j * win.sw, win.dw, win.kw) for c in columns]
    return tuple(taps + [None] * (size - len(taps)))


@lru_cache(maxsize=256)
def weight_vectors(win: Window, size: int, th: int, tw: int) -> dict[tuple[int, Taps], int]:
    """All (filter row, taps) that tiles up to th x tw use, numbered: the order of the packed weights."""
    found: dict[tuple[int, Taps], int] = {}
    for w in range(1, tw + 1):
        for group in plan_groups(win, th, w, size):
            for _, kr, taps in group.users:
                found.setdefault((kr, taps), len(found))
    return found


def block_vectors(mac: Mac, tier: TierCode, channels: int, stride: int) -> int:
    """Accumulators of a pixel: G of integers; for f32, which nothing ties together, a few cache lines.

    Where pixels lie a large power of two apart, the same line of each shares a few sets of the cache with the others
    and they drive each other out, and each is in a page of its own: then more of every pixel is used at a time.
    """
    if mac.acc == "s32":
        return mac.k_per_dword
    pitch = math.gcd(4 * channels, 4096)
    lines = next((lines for least, s, lines in LINES[tier.bits] if pitch >= least and stride >= s), 1)
    return 64 * lines // tier.vector_bytes


def channel_order(size: int, lanes: int) -> NDArray[np.intp]:
    """Channel (within a block) of each accumulator lane after interleaving: [vector][lane], flattened."""
    q, lane128, j = np.meshgrid(np.arange(size), np.arange(lanes // 4), np.arange(4), indexing="ij")
    order: NDArray[np.intp] = (lane128 * 4 * size + q * 4 + j).reshape(-1)
    return order


def _room(tier: TierCode, mac: Mac, vectors: int, epilogue: int) -> int:
    """Pixels whose accumulators fit the registers, `epilogue` of them being taken."""
    return max(1, (tier.registers - max(mac.temps(tier.bits) + 7, epilogue)) // vectors)


@lru_cache(maxsize=1024)
def _tile_cost(win: Window, mac: Mac, vectors: int, th: int, tw: int) -> float:
    """Issue slots of a tile: loads, unpacks at half price, multiplies with their operands' loads."""
    size = mac.k_per_dword
    groups = plan_groups(win, th, tw, size)
    return sum(vectors * (1 + (size > 1) + len(g.users) * (0.5 + 2 * mac.cost)) for g in groups) + 6


@lru_cache(maxsize=1024)
def rank_tiles(
    win: Window, tier: TierCode, mac: Mac, vectors: int, oh: int, ow: int, epilogue: int
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    """Tiles that fit the registers, `epilogue` of them being taken, best first by estimate, tails included.

    `vectors` are the accumulators of a pixel (see `block_vectors`). Raises ShapeError where none fits.
    """
    room = _room(tier, mac, vectors, epilogue)
    costs = {}
    for th in range(1, min(TALLEST, oh) + 1):
        for tw in range(1, min(WIDEST, ow, room // th) + 1):
            rows, columns = ((th, oh // th), (oh % th, 1)), ((tw, ow // tw), (ow % tw, 1))
            costs[th, tw] = sum(
                m * n * _tile_cost(win, mac, vectors, h, w) for h, m in rows for w, n in columns if h and w and m and n
            )
    if not costs:
        raise ShapeError(f"no depthwise tile fits the registers of {tier.name}")
    return tuple(sorted(costs, key=lambda tile: costs[tile]))


def unordered(spec: EpilogueSpec, size: int) -> bool:
    """Whether the epilogue may work in interleaved channel order: bytes out, and no tensor to meet."""
    return size == 4 and spec.out in ("u8", "s8") and all(s.tensor is None for s in spec.steps)


@dataclass(frozen=True)
class DepthwiseKey(NestKey):
    """Key of a depthwise kernel; `g` has one group of all channels."""

    @property
    def window(self) -> Window:
        """The filter's geometry."""
        g = self.g
        return Window(g.kh, g.kw, g.sh, g.sw, g.dh, g.dw)

    @property
    def padded_columns(self) -> int:
        """Channels rounded up to whole blocks."""
        return -(-self.g.n // self.block_columns) * self.block_columns

    @property
    def layout(self) -> ConstLayout:
        """The constant block's layout."""
        return ConstLayout(self.padded_columns)

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code, using only instructions of `features`."""
        from vnnigen.kernels.depthwise_edges import EdgeDepthwise

        return (DepthwiseNest if self.blocking.copy else EdgeDepthwise)(self, features).build()


class DepthwiseNest(LoopNest):
    """Emits a depthwise kernel."""

    def __init__(self, key: DepthwiseKey, features: frozenset[str] | None):
        super().__init__(key, features)
        self.size = key.mac.k_per_dword
        self.width = block_vectors(key.mac, key.tier, key.g.ic, key.g.sw)
        self.window = key.window
        self.vectors = weight_vectors(key.window, self.size, *_packed_tile(key.tier, key.mac, self.width, key.spec))
        self.block_bytes = len(self.vectors) * self.width * key.tier.vector_bytes
        self.panel_bytes = self.block_bytes
        self.source_step = key.block_columns * key.mac.element_bytes

    def emit_tile(self, th: int, tw: int, nr: int, valid: int) -> None:
        """Emit th x tw outputs of one block of channels."""
        a, key, cur = self.a, self.key, self.cur
        bits, vb = key.tier.bits, key.tier.vector_bytes
        count = (nr - 1) * key.tier.lanes + valid
        # A tail of channels needs all of interleaved accumulators, but only so many of plain ones.
        width = nr if self.size == 1 else self.width
        with a.scope():
            acc = [[a.vec(bits, f"acc{p}_{q}") for q in range(width)] for p in range(th * tw)]
            for q in range(width):
                a.vmovups(acc[0][q], Mem(cur.consts, self.lay.init + q * vb, index=cur.col, scale=4))
                for pixel in acc[1:]:
                    a.vmovaps(pixel[q], acc[0][q])
            with a.scope(), a.section(f"taps {th}x{tw}"):
                self._taps(acc, plan_groups(self.window, th, tw, self.size))
            outs = tile_offsets(th, tw, key.g.ow * key.ldo, key.ldo)
            with a.section("epilogue"):
                self._epilogue(acc, outs, count)

    def _taps(self, acc: list[list[Reg]], groups: tuple[Group, ...]) -> None:
        a, key, cur, size, mac = self.a, self.key, self.cur, self.size, self.key.mac
        bits, vb = key.tier.bits, key.tier.vector_bytes
        stream = MacStream(a, mac, bits)
        work = [a.vec(bits, f"col{i}") for i in range({4: 5, 2: 3, 1: len(acc[0])}[size])]
        for group in groups:
            base = group.row * self.row_pitch
            sources = [Mem(cur.src, base + c * self.pixel) for c in group.columns]
            if size == 1:
                sources = [sources[0] + v * vb for v in range(len(acc[0]))]
            # A column that is not there meets zero weights: any data will do.
            sources += [sources[0]] * (size - len(sources))
            mixed = self._interleave(work, sources)
            for pixel, kr, taps in group.users:
                at = self.vectors[kr, taps] * self.width * vb
                for q, source in enumerate(mixed):
                    stream.add(acc[pixel][q], source, Mem(cur.weights, at + q * vb))
        stream.flush()

    def _interleave(self, r: list[Reg], sources: list[Mem]) -> list[Reg]:
        """Load the columns and interleave them."""
        for reg, mem in zip(r, sources, strict=False):
            self.a.vmovups(reg, mem)
        return self._mix(r)

    def _mix(self, r: list[Reg]) -> list[Reg]:
        """Interleave the first G registers: each lane of the G results has G taps of one channel."""
        a = self.a
        if self.size == 1:
            return r
        if self.size == 2:
            a.vpunpcklwd(r[2], r[0], r[1])
            a.vpunpckhwd(r[0], r[0], r[1])
            return [r[2], r[0]]
        a.vpunpcklbw(r[4], r[0], r[1])
        a.vpunpckhbw(r[0], r[0], r[1])
        a.vpunpcklbw(r[1], r[2], r[3])
        a.vpunpckhbw(r[2], r[2], r[3])
        a.vpunpcklwd(r[3], r[4], r[1])
        a.vpunpckhwd(r[4], r[4], r[1])
        a.vpunpcklwd(r[1], r[0], r[2])
        a.vpunpckhwd(r[0], r[0], r[2])
        return [r[3], r[4], r[1], r[0]]

    def _epilogue(self, acc: list[list[Reg]], outs: list[int], count: int) -> None:
        """Store `count` channels; in natural order where the epilogue needs it."""
        key, cur, lanes = self.key, self.cur, self.key.tier.lanes
        interleaved = unordered(key.spec, self.size)
        if not interleaved:
            nr = -(-count // lanes)
            acc = [self._natural(pixel)[:nr] for pixel in acc]
        else:
            nr = self.size
        emit_epilogue(
            Tile(
                self.a,
                key.tier,
                key.spec,
                self.lay,
                acc,
                outs,
                count - (nr - 1) * lanes,
                cur.args,
                cur.consts,
                cur.col,
                cur.off,
                cur.ptr,
                interleaved,
            )
        )

    def _natural(self, q: list[Reg]) -> list[Reg]:
        """Put a pixel's accumulators into channel order."""
        a = self.a
        if self.size == 1:
            return q
        with a.scope():
            t = [a.vec(self.key.tier.bits, f"turn{i}") for i in range(2)]
            if self.key.tier.bits == 256:
                return self._natural_ymm(q, t)
            if self.size == 2:
                return self._natural_words(q, t)
            a.vshufi32x4(t[0], q[0], q[1], 0x44)
            a.vshufi32x4(q[0], q[0], q[1], 0xEE)
            a.vshufi32x4(t[1], q[2], q[3], 0x44)
            a.vshufi32x4(q[2], q[2], q[3], 0xEE)
            a.vshufi32x4(q[1], t[0], t[1], 0xDD)
            a.vshufi32x4(q[3], q[0], q[2], 0xDD)
            a.vshufi32x4(q[2], q[0], q[2], 0x88)
            a.vshufi32x4(q[0], t[0], t[1], 0x88)
            return q

    def _natural_words(self, q: list[Reg], t: list[Reg]) -> list[Reg]:
        """Merge the lanes of two zmm: channels 8l..8l+3 of lane l are in the first, 8l+4..8l+7 in the second."""
        a = self.a
        # VPERMT2D replaces its first operand, which is a source of both halves: the lower half works on a copy.
        a.vmovaps(t[0], q[0])
        for half, dst in ((0, t[0]), (1, q[0])):
            lanes = (2 * half, 2 * half + 1)
            order = [i + 16 * h for lane in lanes for h in range(2) for i in range(4 * lane, 4 * lane + 4)]
            a.vmovups(t[1], a.const(np.array(order, dtype=np.int32)))
            a.vpermt2d(dst, t[1], q[1])
        a.vmovaps(q[1], q[0])
        a.vmovaps(q[0], t[0])
        return q

    def _natural_ymm(self, q: list[Reg], t: list[Reg]) -> list[Reg]:
        a = self.a
        a.vperm2i128(t[0], q[0], q[1], 0x31)
        a.vperm2i128(q[0], q[0], q[1], 0x20)
        if self.size == 2:
            a.vmovaps(q[1], t[0])
            return q
        a.vperm2i128(t[1], q[2], q[3], 0x31)
        a.vperm2i128(q[1], q[2], q[3], 0x20)
        a.vmovaps(q[2], t[0])
        a.vmovaps(q[3], t[1])
        return q


def _packed_tile(tier: TierCode, mac: Mac, vectors: int, spec: EpilogueSpec) -> tuple[int, int]:
    """The tile that the packed weights are made for, as wide as any shape may choose; its height does not matter."""
    return 1, max(1, min(WIDEST, _room(tier, mac, vectors, epilogue_registers(spec, tier))))


@dataclass(frozen=True, eq=False)
class PackedDepthwise:
    """Depthwise weights packed for a tier and a source type."""

    op: str
    tier: TierCode
    src: DType
    epilogue: Epilogue
    window: Window
    runs: tuple[PackedRun, ...]

    def keys_for(self, g: Geometry, pick: Pick | None = None) -> tuple[DepthwiseKey, ...]:
        """The kernel of a problem; `pick` is shown the candidates, best first by estimate, and says which to take."""
        run, spec = self.runs[0], self.epilogue.spec
        mac, flat = run.mac, replace(g, groups=1, n=g.ic)
        width = block_vectors(mac, self.tier, g.ic, g.sw)
        block = width * self.tier.lanes
        blocks = -(-g.ic // block)
        # Without byte masks, a tail of channels cannot be loaded in place.
        copy = not self.tier.masks and g.ic % block != 0
        macs = g.oh * g.ow * g.ic * g.kh * g.kw * g.images * 4

        def key(tile: tuple[int, int], cut: tuple[int, int] | None = None) -> DepthwiseKey:
            strip, chunk = cut or grid(flat, mac, tile[0], blocks, copy, macs=macs)
            blocking = Blocking(*tile, width, 0, 1, strip, chunk, copy)
            return DepthwiseKey(self.op, flat, self.tier, mac, spec, blocking, False, 0, g.ic, 0)

        tiles = rank_tiles(self.window, self.tier, mac, width, g.oh, g.ow, epilogue_registers(spec, self.tier))
        if pick is None:
            return (key(tiles[0]),)
        cuts = other_grids(flat, mac, tiles[0][0], blocks, copy, macs=macs)
        candidates = [*map(key, tiles[:TILES]), *(key(tiles[0], cut) for cut in cuts)]
        return (candidates[pick(candidates, run)],)

    @property
    def chains(self) -> tuple[tuple[int, int, str], ...]:
        """(first column, end, mac), for `explain`."""
        return tuple((r.run.start, r.run.stop, r.mac.name) for r in self.runs)


def why_not(w: Weights, _tier: TierCode) -> str | None:
    """None for depthwise weights, else why this family does not apply."""
    if w.groups == 1 or w.columns != 1 or w.values.shape[1] != 1:
        return "not depthwise: groups, input channels and output channels differ"
    if w.window is None:
        return "not a convolution"
    return None


def _vectors(w: Array, vectors: dict[tuple[int, Taps], int], size: int, order: NDArray[np.intp]) -> Array:
    """Weights [channels, kh, kw] as [blocks, vectors, channels of a block in `order`, G taps]."""
    channels, block = w.shape[0], len(order)
    padded = np.pad(w, ((0, -channels % block), (0, 0), (0, 0)))
    out = np.zeros((padded.shape[0] // block, len(vectors), block, size), dtype=w.dtype)
    for (kr, taps), index in vectors.items():
        for t, x in enumerate(taps):
            if x is not None:
                out[:, index, :, t] = padded[:, kr, x].reshape(-1, block)[:, order]
    return out


def pack(op: str, w: Weights, tier: TierCode, src: DType, x_zp: int, epilogue: Epilogue) -> PackedDepthwise:
    """Pack depthwise weights: VPDPBUSD or, where it is missing, the fast chain if safe, else the exact one.

    Weight zero points are subtracted into words, which takes the exact chain on every tier.
    """
    win = Window(*w.window) if w.window else Window(1, 1, 1, 1, 1, 1)
    taps = w.values.reshape(w.values.shape[0], *w.values.shape[2:])
    mac = _choose_mac(w, taps, win, tier, epilogue.spec)
    taps = as_element(taps, mac)
    size, width = mac.k_per_dword, block_vectors(mac, tier, len(taps), win.sw)
    block = width * tier.lanes
    if mac is CHAIN_EXACT:
        taps = taps.astype(np.int16)
        if w.zero_point is not None:
            taps = taps - w.zero_point.astype(np.int16)[:, None, None]
    vectors = weight_vectors(win, size, *_packed_tile(tier, mac, width, epilogue.spec))
    order = np.arange(block) if size == 1 else channel_order(size, tier.lanes)
    panels = _vectors(taps, vectors, size, order)
    packed = aligned(panels.nbytes)
    packed.view(panels.dtype)[:] = panels.ravel()
    channels = len(taps)
    shift = 128 if src == "s8" and mac.element == "u8" else 0
    if mac is FMA:
        start: Array = w.bias.astype(np.float32)
    else:
        parts = Columns(taps.astype(np.int64).sum(axis=(1, 2)), np.zeros(channels, np.int64), w.bias.astype(np.int64))
        start = start_values(parts, k=w.k, x_zp=x_zp, shift=shift, folded_zp=False)
    columns = -(-channels // block) * block
    lay = ConstLayout(columns)
    consts = fill_constants(
        lay, groups=1, columns=slice(None), start=start.reshape(1, -1), epilogue=epilogue,
        pad=pad_vector(mac, x_zp, shift), w_zp=None,
    )  # fmt: skip
    mixed = [lay.init]
    if unordered(epilogue.spec, size):
        mixed += [lay.m, lay.b, *(lay.vector(i) for i in range(len(epilogue.vectors)))]
    for offset in mixed:
        view = consts[offset : offset + 4 * columns].view(np.int32).reshape(-1, block)
        view[:] = view[:, order]
    return PackedDepthwise(
        op,
        tier,
        src,
        epilogue,
        win,
        (PackedRun(Run(0, channels, mac is not CHAIN_EXACT), mac, False, packed, consts),),
    )


def _choose_mac(w: Weights, taps: Array, win: Window, tier: TierCode, spec: EpilogueSpec) -> Mac:
    if w.kind != "int8":
        return FMA
    if w.zero_point is not None:
        return CHAIN_EXACT
    if tier.vnni:
        return VNNI
    vectors = weight_vectors(win, 4, *_packed_tile(tier, CHAIN_FAST, 4, spec))
    pairs = _vectors(taps, vectors, 4, channel_order(4, tier.lanes))
    return CHAIN_FAST if bool(safe_columns(pairs.reshape(1, 1, -1)).all()) else CHAIN_EXACT
