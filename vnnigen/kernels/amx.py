"""AMX kernels: GEMM and convolution on tile registers.

A tile holds 16 rows of 64 bytes.  TDPBUSD and its kin multiply 16 pixels x 64 bytes of K with 64 bytes of K x 16
columns (Intel SDM vol. 1, chapter "Intel AMX"); the packed panels of the other kernels, 16 columns wide and one
dword of K after another, are such tiles already.  `amx_tiling` cuts K and pixels into tiles and ranks register blocks,
`amx_block` is the code of one, `amx_nest` the loop over them, `amx_key` what both depend on.

One tile configuration serves a whole kernel, because reloading it clears all tiles: a block that has fewer pixels
than a tile has rows is moved back over pixels already done, and only its new rows go through the epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass

from vnnigen.kernels.amx_fold import (
    fold_geometry,
    fold_of,
    fold_weights,
    spread_geometry,
    spread_of,
    spread_weights,
)
from vnnigen.kernels.amx_key import AmxKey
from vnnigen.kernels.amx_tiling import (
    STRIP_ROOM,
    CostModel,
    RankedTiles,
    aliased,
    cut_run,
    k_steps,
    rank_tiles,
    run_elements,
)
from vnnigen.kernels.blocking import TARGET_STEPS, TILES, Blocking, grid, other_grids
from vnnigen.kernels.emit_copy import scratch_rows
from vnnigen.kernels.epilogue import Epilogue
from vnnigen.kernels.geometry import Geometry
from vnnigen.kernels.mac import AMX, Mac, TierCode
from vnnigen.kernels.packed import USUAL_THREADS, PackedRun, Pick, Weights, pack_run
from vnnigen.kernels.packing import Run
from vnnigen.kernels.types import DType

#: Steps of the grid for each thread where every step copies its source.
COPIES_A_THREAD = 2


def mergeable(g: Geometry, mac: Mac) -> int:
    """Pixels from one copied row to the next where tiles may run on from row to row, else 0."""
    if g.ow == 1 or g.sh != 1 or g.sw != 1:
        return 0
    rows = scratch_rows(g, mac, 1)
    return rows.pitch // rows.pixel if rows.pitch % rows.pixel == 0 else 0


def _strip(g: Geometry, strip: int, th: int, rows: int, copy: bool) -> int:
    """Lengthen strips until the last has a whole tile of rows to move back over (copied rows start at the strip)."""
    while copy and g.ow == 1 and 0 < g.oh % strip < rows <= g.oh:
        strip += th
    return strip


@dataclass(frozen=True, eq=False)
class PackedAmx:
    """Weights packed for tiles; `fold` is by how much pixels are folded, `spread` into what rows are (`amx_fold`)."""

    op: str
    tier: TierCode
    src: DType
    epilogue: Epilogue
    runs: tuple[PackedRun, ...]
    fold: int = 1
    spread: int = 0

    def keys_for(self, g: Geometry, pick: Pick | None = None, threads: int = USUAL_THREADS) -> tuple[AmxKey, ...]:
        """The kernel of a problem; `pick` is shown the candidates, best first by estimate, and says which to take.

        Steps that copy their source take a good part of a tile's time for that, and neighbours copy some of it twice:
        there are only as many as balance on `threads`.
        """
        run = self.runs[0]
        mac = run.mac
        source = None
        if self.fold > 1 or self.spread:
            source, g = g, spread_geometry(g, self.spread) if self.spread else fold_geometry(g, self.fold)
        steps = cut_run(run_elements(g)[0] * mac.element_bytes, exact=mac.element == "bf16")
        assert steps is not None  # `why_not` has seen to that
        panels = -(-g.n // self.tier.lanes)
        padded = source is not None or g.padded or g.src != mac.element or steps.pad > 0
        # A step of the grid should last as long as on the vector tiers, which multiply about eight times slower.
        work = {"macs": g.macs // 8, "weights": g.n * g.k * mac.element_bytes, "high_copy": STRIP_ROOM}
        most = {False: TARGET_STEPS, True: min(TARGET_STEPS, COPIES_A_THREAD * threads)}
        model = CostModel(g, self.epilogue.spec, mac.element_bytes, panels, k_steps(g, steps), steps.size)
        # Sums over padding are part of the constants for integers only.
        skip = run.skip_padding and mac.acc == "s32"

        def key(tiles: RankedTiles, cut: tuple[int, int] | None = None) -> AmxKey:
            shape = tiles.shape
            copy = padded or aliased(g, mac.element_bytes, tiles.rows)
            strip, chunk = cut or grid(g, mac, shape.th, -(-panels // shape.nr), copy, **work, most=most[copy])
            row_bytes = g.sh * g.w * g.ic * mac.element_bytes
            strip = min(strip, max(1, STRIP_ROOM // (row_bytes * shape.th)) * shape.th)
            strip = _strip(g, strip, shape.th, tiles.rows, copy)
            blocking = Blocking(shape.th, shape.tw, shape.nr, 0, 1, strip, chunk, copy, int(tiles.variant))
            spec = self.epilogue.spec
            return AmxKey(self.op, g, self.tier, mac, spec, blocking, False, 0, g.ldo, 0, skip, steps, source, ahead=1)

        ranked = rank_tiles(model, mergeable(g, mac) if padded else 0)
        first = key(ranked[0])
        if pick is None:
            return (first,)
        th, nr = first.blocking.th, first.blocking.nr
        copy = first.blocking.copy
        cuts = other_grids(g, mac, th, -(-panels // nr), copy, **work, most=most[copy])
        candidates = list(dict.fromkeys((*map(key, ranked[:TILES]), *(key(ranked[0], cut) for cut in cuts))))
        return (candidates[pick(candidates, run)],)

    @property
    def chains(self) -> tuple[tuple[int, int, str], ...]:
        """(first column, end, mac), for `explain`."""
        return tuple((r.run.start, r.run.stop, r.mac.name) for r in self.runs)


def why_not(w: Weights, tier: TierCode) -> str | None:
    """None where tiles can compute these weights, else why not."""
    if w.kind not in tier.tiles:
        return f"{tier.name} has no {w.kind} tiles"
    if w.zero_point is not None:
        return "weight zero points need row sums of the source, which tiles do not give"
    if w.kind == "bf16" and cut_run(2 * w.run_elements, exact=True) is None and not spread_of(w):
        return f"runs of {w.run_elements} bf16 values cannot be cut into whole tile rows"
    return None


def pack(op: str, w: Weights, tier: TierCode, src: DType, x_zp: int, epilogue: Epilogue) -> PackedAmx:
    """Pack weights for tiles: runs of K are padded to whole steps; s8 sources need no shift."""
    mac, fold, spread = AMX[src], fold_of(w), spread_of(w)
    if fold > 1:
        w = fold_weights(w, fold)
    elif spread:
        w = spread_weights(w, spread)
    steps = cut_run(w.run_elements * mac.element_bytes, exact=mac.element == "bf16")
    assert steps is not None
    quantum = steps.count * steps.size // mac.element_bytes
    run = pack_run(w, tier, src, x_zp, epilogue, Run(0, w.columns, True), mac, quantum)
    return PackedAmx(op, tier, src, epilogue, (run,), fold, spread)
