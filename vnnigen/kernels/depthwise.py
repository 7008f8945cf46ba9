"""Depthwise convolution: one filter per channel, vectors run along the channels.

The dot-product instructions sum groups of G neighbouring elements (G = 4 bytes for VPDPBUSD, 2 words for VPMADDWD).
A depthwise filter has nothing to sum along channels, so the kernel makes the neighbours: it loads the channels of
G columns of a source row and interleaves them with unpack instructions, so that each 32-bit lane holds G taps of
one channel.  One such group serves every output whose window touches it, each with its own arrangement of weights
(zero where a column is not its tap): with stride 1, the four columns c..c+3 give outputs c and c+1 of a 3-wide filter,
and rows are shared likewise by the outputs above each other.  For f32, G = 1 and nothing is interleaved.

Unpacking leaves a vector's channels in another order within groups of 4*G (`channel_order`); the constants are
packed in that order, and narrowing s32 to bytes puts the channels back.  Likewise bf16: two vectors of f32 hold the
even and the odd channels of a vector of bf16, which takes one shift and one AND, and narrowing puts them back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vnnigen.errors import ShapeError
from vnnigen.isa.assembler import Code
from vnnigen.kernels.blocking import TILES, Blocking, grid, other_grids
from vnnigen.kernels.emit_epilogue import epilogue_registers
from vnnigen.kernels.epilogue import Epilogue, EpilogueSpec
from vnnigen.kernels.geometry import SRC_BYTES, Geometry
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.mac import CHAIN_EXACT, CHAIN_FAST, FMA, VNNI, Mac, TierCode
from vnnigen.kernels.nest import NestKey
from vnnigen.kernels.packed import USUAL_THREADS, PackedRun, Pick, Weights, as_element
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

#: Largest tile that is considered.
TALLEST, WIDEST = 4, 4
#: Bytes of sources and outputs that a tile of all its blocks of channels may touch: where all is in the L2 cache, half
#: of an L1 cache, else more. And the fewest consecutive bytes of a pixel worth walking.
NEAR_TILE, FAR_TILE, SHORTEST_RUN = 24 << 10, 48 << 10, 256
#: Bytes from pixel to pixel, a multiple of which leaves few sets of the L1 cache to a line of each; vectors used then.
ALIASED_PITCH, ALIASED_VECTORS = 2048, 4
#: Bytes of an L2 cache, and instructions that a core looks ahead.
L2_BYTES, WINDOW = 1 << 20, 200
#: Registers that f32 taps use besides accumulators and weights: a column, the padding, a mask of odd halves.
FLOAT_TEMPS = 3
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

    def reach(self, th: int, tw: int) -> tuple[int, int]:
        """Source rows and columns from the first to the last that th x tw outputs use."""
        return (th - 1) * self.sh + (self.kh - 1) * self.dh + 1, (tw - 1) * self.sw + (self.kw - 1) * self.dw + 1

    def pixels(self, th: int, tw: int) -> int:
        """Pixels that a tile touches, of the source and of the output."""
        rows, columns = self.reach(th, tw)
        return rows * columns + th * tw


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
    for row in range(win.reach(th, tw)[0]):
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


def plan_registers(uses: Sequence[int], slots: int) -> tuple[tuple[int | None, bool], ...]:
    """Where each use in turn finds its value: (register or None for memory, whether to load the register first).

    What is used next the latest makes room, which is optimal (Belady, "A study of replacement algorithms for a
    virtual-storage computer", 1966); a value that is not used again, or later than all that is held, stays in memory.
    """
    never = len(uses)
    following, seen = [never] * never, dict[int, int]()
    for i in reversed(range(never)):
        following[i] = seen.get(uses[i], never)
        seen[uses[i]] = i
    held, due = dict[int, int](), dict[int, int]()
    plan: list[tuple[int | None, bool]] = []
    for value, later in zip(uses, following, strict=True):
        load = value not in held
        if load:
            slot: int | None = len(held) if len(held) < slots else None
            if slot is None and held:
                farthest = max(held, key=due.__getitem__)
                slot = held.pop(farthest) if due[farthest] > later else None
            if slot is None or later == never:
                plan.append((None, False))
                continue
            held[value] = slot
        due[value] = later
        plan.append((held[value], load))
    return tuple(plan)


def is_interleaved(spec: EpilogueSpec, tier: TierCode, mac: Mac, src: str, channels: int) -> bool:
    """Whether accumulators reach the epilogue with their channels interleaved, and are put right by narrowing.

    That is so for bytes to bytes and for bf16 to bf16, unless the epilogue has a tensor to meet, or vectors of bf16
    would be cut by cache lines: then they are loaded by halves.
    """
    if spec.reads_tensors:
        return False
    if mac.k_per_dword == 4:
        return spec.out in ("u8", "s8")
    return src == spec.out == "bf16" and tier.bf16 and channels % (2 * tier.lanes) == 0


def block_vectors(mac: Mac, tier: TierCode, interleaved: bool, channels: int) -> int:
    """Accumulators of a pixel: G of integers, for f32 one, or two where a vector of bf16 becomes two of f32.

    Where pixels lie a large power of two apart, the same line of each shares a few sets of the L1 cache with those of
    others: what is fetched ahead of one line is gone before its turn.  Then, if registers allow, neighbouring lines are
    used together (measured with AVX-512 on Zen 5: 1024 channels of 10x10 pixels took 20 us with one, 13 with four).
    """
    if mac.k_per_dword > 1:
        return mac.k_per_dword
    if interleaved:
        return 2
    return ALIASED_VECTORS if tier.registers == 32 and 4 * channels % ALIASED_PITCH == 0 else 1


def channel_order(size: int, lanes: int) -> NDArray[np.intp]:
    """Channel (within a block) of each accumulator lane after interleaving: [vector][lane], flattened."""
    q, lane128, j = np.meshgrid(np.arange(size), np.arange(lanes // 4), np.arange(4), indexing="ij")
    order: NDArray[np.intp] = (lane128 * 4 * size + q * 4 + j).reshape(-1)
    return order


def _order(mac: Mac, vectors: int, lanes: int, interleaved: bool) -> NDArray[np.intp]:
    """Channel of each accumulator lane of a block."""
    if mac.k_per_dword > 1:
        return channel_order(mac.k_per_dword, lanes)
    order: NDArray[np.intp] = np.arange(vectors * lanes)
    return order.reshape(lanes, vectors).T.reshape(-1) if interleaved else order


def _room(tier: TierCode, mac: Mac, vectors: int, epilogue: int) -> int:
    """Pixels whose accumulators fit the registers, `epilogue` of them being taken."""
    taps = FLOAT_TEMPS + 1 if mac.k_per_dword == 1 else mac.temps(tier.bits) + 7
    return max(1, (tier.registers - max(taps, epilogue)) // vectors)


@dataclass(frozen=True)
class CacheUse:
    """What a tile finds in the caches.

    `lines` of the L1 cache serve one line of every pixel that a tile touches: fewer than all where pixels lie a large
    power of two apart. `far` says that the image and its outputs do not fit the L2 cache.
    """

    lines: int
    far: bool

    def blocks(self, win: Window, th: int, tw: int, block_bytes: int) -> int:
        """Blocks of channels that a tile walks before the next one begins.

        The longer, the better what is ahead can be fetched; but if all is near, columns shared with the next tile are
        to be in the L1 cache still.
        """
        room = FAR_TILE if self.far else NEAR_TILE
        return max(-(-SHORTEST_RUN // block_bytes), room // (win.pixels(th, tw) * block_bytes))


def cache_use(g: Geometry) -> CacheUse:
    """The caches' part in a problem: an L1 cache of 64 sets and 8 ways, an L2 cache of 1 MiB."""
    pitch = g.ic * SRC_BYTES[g.src]
    lines = 8 * 64 // math.gcd(pitch // 64, 64) if pitch % 64 == 0 else 8 * 64
    return CacheUse(lines, g.images * (g.h * g.w + g.oh * g.ow) * pitch > L2_BYTES)


@lru_cache(maxsize=1024)
def _tile_cost(win: Window, tier: TierCode, mac: Mac, vectors: int, th: int, tw: int, cache: CacheUse) -> float:
    """Estimated time of a tile; the constants were fitted to measurements on Zen 5.

    Integers: issue slots of loads, unpacks at half price, multiplies with their operands' loads. f32: the slower of
    multiplies and loads, what all of them issue, the lines that no tile before has fetched, tiles too long for a core
    to see the next one's loads, and lines that drive each other out of the L1 cache.
    """
    size = mac.k_per_dword
    groups = plan_groups(win, th, tw, size)
    multiplies = sum(len(g.users) for g in groups)
    if size > 1:
        return vectors * (2 * len(groups) + multiplies * (0.5 + 2 * mac.cost)) + 6
    packed = weight_vectors(win, 1, 1, 1)
    uses = [packed[kr, taps] for g in groups for _, kr, taps in g.users]
    plan = plan_registers(uses, tier.registers - FLOAT_TEMPS - th * tw * vectors)
    loads = len(groups) + sum(slot is None or load for slot, load in plan)
    cost = vectors * (max(multiplies, loads) + (multiplies + loads) / 2 + 4 * th * tw)
    if cache.far:
        cost += 1.5 * (win.reach(th, tw)[0] * tw * win.sw + th * tw)
        cost *= 1 + max(0, vectors * (multiplies + loads) - WINDOW) / 2500
    return cost * (1 + 0.2 * min(2, max(0, win.pixels(th, tw) / cache.lines - 1)))


@lru_cache(maxsize=1024)
def rank_tiles(
    win: Window, tier: TierCode, mac: Mac, vectors: int, oh: int, ow: int, epilogue: int, cache: CacheUse
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
                m * n * _tile_cost(win, tier, mac, vectors, h, w, cache)
                for h, m in rows
                for w, n in columns
                if h and w and m and n
            )
    if not costs:
        raise ShapeError(f"no depthwise tile fits the registers of {tier.name}")
    return tuple(sorted(costs, key=lambda tile: costs[tile]))


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

    @property
    def interleaved(self) -> bool:
        """Whether the epilogue works on interleaved channels."""
        return is_interleaved(self.spec, self.tier, self.mac, self.g.src, self.g.ic)

    @property
    def weight_vectors(self) -> dict[tuple[int, Taps], int]:
        """The order of the packed weights."""
        tile = _packed_tile(self.tier, self.mac, self.blocking.nr, self.spec)
        return weight_vectors(self.window, self.mac.k_per_dword, *tile)

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code, using only instructions of `features`."""
        from vnnigen.kernels.emit_depthwise import DepthwiseNest

        return DepthwiseNest(self, features).build()


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

    def keys_for(
        self, g: Geometry, pick: Pick | None = None, _threads: int = USUAL_THREADS
    ) -> tuple[DepthwiseKey, ...]:  # fmt: skip
        """The kernel of a problem; `pick` is shown the candidates, best first by estimate, and says which to take."""
        run, spec = self.runs[0], self.epilogue.spec
        mac, flat = run.mac, replace(g, groups=1, n=g.ic)
        interleaved = is_interleaved(spec, self.tier, mac, self.src, g.ic)
        width = block_vectors(mac, self.tier, interleaved, g.ic)
        block, cache = width * self.tier.lanes, cache_use(g)
        blocks = -(-g.ic // block)
        # Without byte masks, a tail of channels cannot be loaded in place.
        copy = not self.tier.masks and g.ic % block != 0
        macs = g.oh * g.ow * g.ic * g.kh * g.kw * g.images * 4

        def part(tile: tuple[int, int]) -> tuple[Geometry, int]:
            """What `grid` is to cut, each chunk of channels as if it were an image; and the blocks of a chunk."""
            chunks = -(-blocks // cache.blocks(self.window, *tile, block * SRC_BYTES[g.src]))
            chunk = -(-blocks // chunks)
            return replace(flat, images=g.images * chunks, ic=chunk * block), chunk

        def key(tile: tuple[int, int], cut: tuple[int, int] | None = None) -> DepthwiseKey:
            whole, most = part(tile)
            strip, chunk = cut or grid(whole, mac, tile[0], most, copy, macs=macs)
            blocking = Blocking(*tile, width, 0, 1, strip, chunk, copy)
            skip = mac is FMA and run.skip_padding
            return DepthwiseKey(self.op, flat, self.tier, mac, spec, blocking, False, 0, flat.ldo, 0, skip)

        epilogue = epilogue_registers(spec, self.tier)
        tiles = rank_tiles(self.window, self.tier, mac, width, g.oh, g.ow, epilogue, cache)
        if pick is None:
            return (key(tiles[0]),)
        whole, most = part(tiles[0])
        cuts = other_grids(whole, mac, tiles[0][0], most, copy, macs=macs)
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
    interleaved = is_interleaved(epilogue.spec, tier, mac, src, len(taps))
    size, width = mac.k_per_dword, block_vectors(mac, tier, interleaved, len(taps))
    block = width * tier.lanes
    if mac is CHAIN_EXACT:
        taps = taps.astype(np.int16)
        if w.zero_point is not None:
            taps = taps - w.zero_point.astype(np.int16)[:, None, None]
    vectors = weight_vectors(win, size, *_packed_tile(tier, mac, width, epilogue.spec))
    order = _order(mac, width, tier.lanes, interleaved)
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
    if interleaved:
        mixed += [lay.m, lay.b, *(lay.vector(i) for i in range(len(epilogue.vectors)))]
    for offset in mixed:
        view = consts[offset : offset + 4 * columns].view(np.int32).reshape(-1, block)
        view[:] = view[:, order]
    finite = w.kind == "int8" or bool(np.isfinite(w.values.astype(np.float32)).all())
    return PackedDepthwise(
        op,
        tier,
        src,
        epilogue,
        win,
        (PackedRun(Run(0, channels, mac is not CHAIN_EXACT), mac, False, packed, consts, finite),),
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
