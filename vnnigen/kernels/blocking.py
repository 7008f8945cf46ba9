"""Blocking: one pure function from a problem and a tier to the sizes of tiles, strips and chunks.

Register tile: `th x tw` output pixels by `nr` vectors of output columns.  Strip: `strip` rows of outputs that one step
of the parallel grid computes, from source rows that fit the L2 cache.  Chunk: `chunk` column blocks of one step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from vnnigen.errors import ShapeError
from vnnigen.kernels.geometry import Geometry, needs_copy, row_classes, segments
from vnnigen.kernels.mac import Mac, TierCode
from vnnigen.kernels.taps import column_classes, cuts_columns, tile_taps

#: Bytes of source that a step may keep in scratch or re-read per column block: half of a small L2 (1 MiB).
STRIP_BYTES = 256 << 10
#: Bytes of a column block's weights that stay in the L1 cache beside the source rows.
L1_BLOCK = 32 << 10
#: Bytes of a column block's weights that stay in the L2 cache beside a tile's source rows.
L2_BLOCK = 640 << 10
#: Bytes of source of a strip where weights stream from beyond the L2 cache: read in place, and copied to scratch.
HIGH_STRIP_BYTES, HIGH_COPY_BYTES = 8 << 20, 2 << 20
#: Strips' worth of weights from which on a copied source is cut into high strips.
FAR_COPY = 8
#: Panels that a tile may stream from beyond the L2 cache, and what more of them cost.
STREAMS, STREAMED = 4, 1.1
#: What a tile costs whose rows drive each other out of the L1 cache.
ALIASED = 1.3
#: Grid steps wanted when there is work enough; two to eight threads balance on this many.
TARGET_STEPS = 16
#: Work below which splitting costs more than it gives (multiply-accumulates of one grid step).
MIN_STEP_MACS = 1 << 19
#: Cycles to start a tile, and to finish an accumulator; what those beyond the first `ACC_HIDDEN` wait, whose epilogue
#: the next tile's multiplies no longer hide.
TILE_START, ACC_END, ACC_WAIT, ACC_HIDDEN = 8.0, 10.0, 6.0, 12
#: Cycles of an issue slot that a load takes from the multiplies.
LOAD_ISSUE = 0.25
#: Tiles among the candidates, and how much slower than the best their estimate may be.
TILES, NEAR = 7, 1.3


@dataclass(frozen=True)
class Blocking:
    """Sizes of a kernel's loops. `resident` is the number of weight vectors kept in registers per K step."""

    th: int
    tw: int
    nr: int
    resident: int
    unroll: int
    strip: int
    chunk: int
    copy: bool
    #: Kernels on tiles: a sum of `amx_tiling.Variant` flags.
    variant: int = 0

    @property
    def mr(self) -> int:
        """Output pixels of the register tile."""
        return self.th * self.tw


@dataclass(frozen=True)
class Registers:
    """Vector registers a tile needs besides its accumulators."""

    temps: int
    row_sums: bool
    epilogue: int

    def fits(self, tier: TierCode, mr: int, nr: int, resident: int) -> bool:
        """Whether an `mr` x `nr` tile fits the register file in the K loop and in the epilogue."""
        acc = mr * nr + (mr if self.row_sums else 0)
        loop = resident + 1 + self.temps + (1 if self.row_sums else 0)
        return acc + loop <= tier.registers and mr * nr + self.epilogue <= tier.registers


def _pairs(tier: TierCode, mac: Mac, need: Registers, nr_max: int, mr_max: int) -> list[tuple[int, int, int]]:
    """All (mr, nr, resident) that fit, `resident` as large as possible; weights that are widened must all be."""
    found = []
    for nr in range(1, min(nr_max, 8) + 1):
        for mr in range(1, mr_max + 1):
            for resident in range(nr, nr - 1 if mac.narrow else -1, -1):
                if need.fits(tier, mr, nr, resident):
                    found.append((mr, nr, resident))
                    break
    return found


@dataclass(frozen=True)
class TileKind:
    """`count` tiles of `mr` pixels; (pixels, share of K that matters to so many) says what they leave out."""

    count: int
    mr: int
    shares: tuple[tuple[int, float], ...]


def tile_kinds(g: Geometry, mac: Mac, th: int, tw: int) -> tuple[TileKind, ...]:
    """The tiles that an image is cut into, with the tails' own; edges are of their own kind where they differ."""
    if not cuts_columns(g, mac):
        return tuple(
            TileKind(h_count * w_count, h * w, ((h * w, 1.0),))
            for h, h_count in ((th, g.oh // th), (g.oh % th, 1))
            for w, w_count in ((tw, g.ow // tw), (g.ow % tw, 1))
            if h and w and h_count and w_count
        )
    kinds = []
    for rows in row_classes(g, th):
        for cols in column_classes(g, tw):
            taps = tile_taps(g, rows, cols).by_pixels()
            shares = tuple((pixels, count / (g.kh * g.kw)) for pixels, count in taps.items())
            kinds.append(TileKind(rows.count * cols.count, rows.size * cols.size, shares))
    return tuple(kinds)


@dataclass(frozen=True)
class CostModel:
    """Estimated cycles of tiles; the constants were fitted to measurements of all vector tiers on Zen 5.

    `kd` counts the K steps of a tile, `pixels` those of the whole problem, `weights` the bytes of all weights.
    """

    tier: TierCode
    mac: Mac
    kd: int
    pixels: int
    weights: int = 0

    def step(self, mr: int, pixels: int, nr: int, resident: int) -> float:
        """Cycles of a step of K that matters to `pixels` of a tile's `mr`.

        The slowest of multiply ports, load ports, accumulator latency and B's way from L2.
        """
        mac, vector = self.mac, self.mac.panel_step(self.tier)
        from_memory = (nr - resident) * pixels
        loads = pixels + resident + from_memory
        latency = mac.latency if mac.latency > 1 else 1.0
        step = max(pixels * nr * mac.cost, loads / 2, latency, nr * vector / 24)
        # Loads that hide behind the multiplies still take issue slots; those that are a multiply's operand fewer.
        step += (pixels + resident + from_memory / 4) * LOAD_ISSUE
        if self.kd * nr * vector > L1_BLOCK or mr == self.pixels:
            # Weights that come from L2 for every tile are not always there in time, those from beyond it never, which
            # matters where many tiles could share them.
            far = self.kd * nr * vector > L2_BLOCK and self.pixels > 16 * mr
            step += nr * vector / (64 if far else 512)
        if mr == self.pixels and nr > STREAMS and self.weights > L2_BLOCK:
            step *= STREAMED
        return step

    def tile(self, kind: TileKind, nr: int, resident: int) -> float:
        """Cycles of one tile of `nr` vectors."""
        steps = sum(share * self.step(kind.mr, pixels, nr, resident) for pixels, share in kind.shares if pixels)
        # A tile's end overlaps the next one's multiplies only as far as the reorder buffer reaches.
        acc = kind.mr * nr
        return self.kd * steps + TILE_START + acc * ACC_END + max(0, acc - ACC_HIDDEN) * ACC_WAIT

    def problem(self, kinds: Sequence[TileKind], panels: int, nr: int, resident: int) -> float:
        """Cycles of all tiles of `kinds` over all panels."""
        cost = 0.0
        for v, v_count in ((nr, panels // nr), (panels % nr, 1)):
            if v:
                cost += v_count * sum(kind.count * self.tile(kind, v, min(v, resident)) for kind in kinds)
        return cost


def _tile(g: Geometry, mr: int) -> tuple[int, int]:
    """The way to lay up to `mr` pixels over an output image: along a row, or over several short rows."""
    if g.ow == 1:
        return min(mr, g.oh), 1
    if g.ow > mr:
        return 1, mr
    return min(mr // g.ow, g.oh), g.ow


@dataclass(frozen=True)
class _Scored:
    """A register tile and its estimated cycles over the whole problem."""

    cost: float
    tile: tuple[int, int]
    nr: int
    resident: int


def aliased_rows(g: Geometry, mac: Mac) -> int:
    """Rows of a tile whose lines an L1 cache of 64 sets and 8 ways holds, given how far apart the rows are.

    Rows a multiple of 4096 bytes apart all share one set. Copied rows are laid out to avoid that.
    """
    pitch = g.ic * mac.element_bytes
    if needs_copy(g, mac) or pitch % 64:
        return 1 << 30
    return 8 * 64 // math.gcd(pitch // 64, 64)


def _ranked_tiles(g: Geometry, tier: TierCode, mac: Mac, need: Registers) -> list[_Scored]:
    """All register tiles that fit, best first."""
    panels = -(-g.n // tier.lanes)
    dwords = segments(g, mac, row_pitch=0, pixel_pitch=0).total_dwords
    model = CostModel(tier, mac, dwords, g.oh * g.ow, g.n * g.k * mac.weight_bytes)
    scored = []
    kinds = dict[tuple[int, int], tuple[TileKind, ...]]()
    # A tile larger than the problem only wastes registers.
    for mr, nr, resident in _pairs(tier, mac, need, panels, min(tier.registers, g.oh * g.ow)):
        tile = _tile(g, mr)
        if tile[0] * tile[1] == mr:  # otherwise the tile comes up again with its own mr
            if tile not in kinds:
                kinds[tile] = tile_kinds(g, mac, *tile)
            cost = model.problem(kinds[tile], panels, nr, resident)
            if mr > aliased_rows(g, mac):
                cost *= ALIASED
            scored.append(_Scored(cost, tile, nr, resident))
    if not scored:
        raise ShapeError(f"no register tile fits tier {tier.name} with {need.epilogue} epilogue registers")
    return sorted(scored, key=lambda s: s.cost)


def rank_blockings(g: Geometry, tier: TierCode, mac: Mac, need: Registers) -> tuple[Blocking, ...]:
    """Blockings worth trying, best first by estimate, all different; the analytic choice is the first.

    The best tiles with the grid that suits them, then the best one with other grids and another unrolling. They differ
    in speed only: K is summed in one order whatever the blocking. Raises ShapeError as `choose_blocking` does.
    """
    ranked = _ranked_tiles(g, tier, mac, need)
    panels = -(-g.n // tier.lanes)
    copy, weights = needs_copy(g, mac), g.n * g.k * mac.weight_bytes

    def blocking(s: _Scored, cut: tuple[int, int] | None = None) -> Blocking:
        th, tw = s.tile
        strip, chunk = cut or grid(g, mac, th, -(-panels // s.nr), copy, macs=g.macs, weights=weights)
        return Blocking(th, tw, s.nr, s.resident, max(1, min(4, 128 // (th * tw * s.nr))), strip, chunk, copy)

    # The best of each width first: estimates of tiles of one width are alike, and so are their errors.
    near = [s for s in ranked if s.cost <= NEAR * ranked[0].cost]
    widest = list({s.nr: s for s in reversed(near)}.values())[::-1]
    tiles = sorted(widest, key=lambda s: s.cost)[: TILES - 2]
    tiles += [s for s in near if s not in tiles][: TILES - len(tiles)]
    first = ranked[0]
    result = [blocking(s) for s in tiles]
    blocks = -(-panels // first.nr)
    cuts = other_grids(g, mac, first.tile[0], blocks, copy, macs=g.macs, weights=weights)
    result += [blocking(first, cut) for cut in cuts]
    result.append(replace(result[0], unroll=max(1, result[0].unroll // 2)))
    return tuple(dict.fromkeys(result))


@lru_cache(maxsize=4096)
def choose_blocking(g: Geometry, tier: TierCode, mac: Mac, need: Registers) -> Blocking:
    """The blocking with the least estimated time, the first of `rank_blockings`.

    Raises:
        ShapeError: when no tile fits the registers (an epilogue that needs too many of them).

    """
    return rank_blockings(g, tier, mac, need)[0]


def grid(
    g: Geometry, mac: Mac, th: int, blocks: int, copy: bool, *, macs: int, weights: int = 0, most: int = TARGET_STEPS,
    high_copy: int = HIGH_COPY_BYTES,
) -> tuple[int, int]:  # fmt: skip
    """Rows per strip (a multiple of `th`) and column blocks per chunk.

    `macs` measures the work to be split, `weights` the bytes of weights that every strip reads; `most` steps are wanted
    at most. A strip that is copied has at most `high_copy` bytes.
    """
    row_bytes = g.padded_w * g.ic * mac.element_bytes * g.sh
    halo = g.strip_rows(1) * g.padded_w * g.ic * mac.element_bytes
    # Where every strip streams weights that no L2 cache holds, fewer and higher strips matter more than a source that
    # stays in L2: a tile reads its rows once for all of a block's columns. A copy that leaves L2 costs more, so that
    # this takes more weights.
    if copy:
        room = high_copy if weights > FAR_COPY * STRIP_BYTES else STRIP_BYTES
    else:
        room = HIGH_STRIP_BYTES if weights > 2 * STRIP_BYTES else STRIP_BYTES
    fit = max(1, (room - halo) // max(1, row_bytes) + 1)
    rows = -(-g.oh // th) * th if fit >= g.oh else max(th, fit // th * th)
    wanted = max(1, min(most, macs // MIN_STEP_MACS))
    by_rows = -(-wanted // (g.images * _column_cuts(g, weights, blocks, copy, wanted)))
    if copy and g.kh > 1:
        # A strip reads (kh-1)*dh rows more than it advances: no thinner than that halo's double.
        floor = max(th, 2 * (g.kh - 1) * g.dh // max(1, g.sh))
    else:
        floor = th
    rows = max(min(rows, -(-g.oh // by_rows)), min(rows, floor))
    rows = max(th, -(-rows // th) * th)
    strips = -(-g.oh // rows)
    # Even strips: the last one is not a sliver.
    even = -(-g.oh // strips)
    rows = -(-even // th) * th
    steps = g.images * -(-g.oh // rows)
    chunk = blocks
    if g.groups == 1 and steps < wanted:
        chunk = max(1, -(-blocks // -(-wanted // steps)))
    return rows, chunk


def _column_cuts(g: Geometry, weights: int, blocks: int, copy: bool, wanted: int) -> int:
    """Parts that the columns are cut into before the rows are.

    More than one where every strip would read weights from beyond the L2 cache again. Each part copies the source,
    which must stay a small part of its work.
    """
    if g.groups > 1 or weights <= 2 * STRIP_BYTES:
        return 1
    most = max(1, g.n * g.kh * g.kw // (256 * g.sh * g.sw)) if copy else blocks
    return min(blocks, most, -(-wanted // g.images))


def other_grids(
    g: Geometry, mac: Mac, th: int, blocks: int, copy: bool, *, macs: int, weights: int = 0, most: int = TARGET_STEPS,
    high_copy: int = HIGH_COPY_BYTES,
) -> list[tuple[int, int]]:  # fmt: skip
    """Grids other than `grid`'s that may suit a machine better, as (strip, chunk).

    Thinner and thicker strips, and strips as high as fit with the columns split instead.
    """
    strip, chunk = grid(g, mac, th, blocks, copy, macs=macs, weights=weights, most=most, high_copy=high_copy)
    whole = -(-g.oh // th) * th
    wanted = max(1, min(most, macs // MIN_STEP_MACS) // g.images)
    found = [(max(th, strip // (2 * th) * th), chunk), (min(whole, 2 * strip), chunk)]
    row_bytes = g.padded_w * g.ic * mac.element_bytes * g.sh
    if g.groups == 1 and (not copy or whole * row_bytes <= 4 * STRIP_BYTES):
        found.append((whole, max(1, -(-blocks // wanted))))
    return [cut for cut in dict.fromkeys(found) if cut != (strip, chunk)]
