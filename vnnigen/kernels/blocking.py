"""Blocking: one pure function from a problem and a tier to the sizes of tiles, strips and chunks.

Register tile: `th x tw` output pixels by `nr` vectors of output columns.  Strip: `strip` rows of outputs that one step
of the parallel grid computes, from source rows that fit the L2 cache.  Chunk: `chunk` column blocks of one step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vnnigen.errors import ShapeError
from vnnigen.kernels.geometry import Geometry, needs_copy, segments
from vnnigen.kernels.mac import Mac, TierCode

#: Bytes of source that a step may keep in scratch or re-read per column block: half of a small L2 (1 MiB).
STRIP_BYTES = 256 << 10
#: Bytes of a column block's weights that stay in the L1 cache beside the source rows.
L1_BLOCK = 32 << 10
#: Grid steps wanted when there is work enough; two to eight threads balance on this many.
TARGET_STEPS = 16
#: Work below which splitting costs more than it gives (multiply-accumulates of one grid step).
MIN_STEP_MACS = 1 << 19


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


def _pairs(tier: TierCode, need: Registers, nr_max: int, mr_max: int) -> list[tuple[int, int, int]]:
    """All (mr, nr, resident) that fit, `resident` as large as possible."""
    found = []
    for nr in range(1, min(nr_max, 8) + 1):
        for mr in range(1, mr_max + 1):
            for resident in range(nr, -1, -1):
                if need.fits(tier, mr, nr, resident):
                    found.append((mr, nr, resident))
                    break
    return found


def _tile_cost(mr: int, nr: int, resident: int, kd: int, mac: Mac, epilogue: float) -> float:
    """Cycles of one tile: the slowest of multiply ports, load ports, accumulator latency and B's way from L2."""
    loads = (mr + resident + (nr - resident) * mr) / 2
    latency = mac.latency if mac.latency > 1 else 1.0
    # Loads that hide behind the multiplies still take issue slots: of equals, the tile with fewer wins.
    step = max(mr * nr * mac.cost, loads, latency, nr * 64 / 24) + loads / 8
    if kd * nr * 64 > L1_BLOCK:
        step += nr / 4  # weights that come from L2 for every tile are not always there in time
    return kd * step + 12 + mr * nr * epilogue


def _shape_cost(
    rows: int, cols: int, panels: int, tile: tuple[int, int], pick: tuple[int, int, int], kd: int, mac: Mac
) -> float:
    """Cycles of an oh x ow x panels problem cut into th x tw x nr tiles, with the tails' own tiles."""
    th, tw = tile
    _, nr, resident = pick
    cost = 0.0
    for h, h_count in ((th, rows // th), (rows % th, 1)):
        for w, w_count in ((tw, cols // tw), (cols % tw, 1)):
            for v, v_count in ((nr, panels // nr), (panels % nr, 1)):
                if h and w and v:
                    t = _tile_cost(h * w, v, min(v, resident), kd, mac, 2.5)
                    cost += h_count * w_count * v_count * t
    return cost


def _tiles(g: Geometry, mr: int) -> list[tuple[int, int]]:
    """Ways to lay `mr` pixels over an output image: along a row, or over several short rows."""
    if g.ow == 1:
        return [(min(mr, g.oh), 1)]
    if g.ow > mr:
        return [(1, mr)]
    return [(min(mr // g.ow, g.oh), g.ow)]


@lru_cache(maxsize=4096)
def choose_blocking(g: Geometry, tier: TierCode, mac: Mac, need: Registers) -> Blocking:
    """The blocking with the least estimated time.

    Raises:
        ShapeError: when no tile fits the registers (an epilogue that needs too many of them).

    """
    kd = segments(g, mac, row_pitch=0, pixel_pitch=0).total_dwords
    panels = -(-g.n // tier.lanes)
    best: tuple[float, tuple[int, int], tuple[int, int, int]] | None = None
    # A tile larger than the problem only wastes registers.
    for pick in _pairs(tier, need, panels, min(tier.registers, g.oh * g.ow)):
        for tile in _tiles(g, pick[0]):
            cost = _shape_cost(g.oh, g.ow, panels, tile, pick, kd, mac)
            if best is None or cost < best[0] * 0.999:
                best = (cost, tile, pick)
    if best is None:
        raise ShapeError(f"no register tile fits tier {tier.name} with {need.epilogue} epilogue registers")
    _, (th, tw), (_, nr, resident) = best
    copy = needs_copy(g, mac)
    strip, chunk = grid(g, mac, th, -(-panels // nr), copy, macs=g.macs)
    unroll = max(1, min(4, 128 // max(1, th * tw * nr)))
    return Blocking(th, tw, nr, resident, unroll, strip, chunk, copy)


def grid(g: Geometry, mac: Mac, th: int, blocks: int, copy: bool, *, macs: int) -> tuple[int, int]:
    """Rows per strip (a multiple of `th`) and column blocks per chunk; `macs` measures the work to be split."""
    row_bytes = g.padded_w * g.ic * mac.element_bytes * g.sh
    halo = g.strip_rows(1) * g.padded_w * g.ic * mac.element_bytes
    fit = max(1, (STRIP_BYTES - halo) // max(1, row_bytes) + 1)
    rows = -(-g.oh // th) * th if fit >= g.oh else max(th, fit // th * th)
    wanted = max(1, min(TARGET_STEPS, macs // MIN_STEP_MACS))
    by_rows = -(-wanted // g.images)
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
