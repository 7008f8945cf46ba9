"""Tiles: how K is cut, how pixels lie in tiles, and the model that ranks register blocks. Pure functions.

The model adds up what does not hide behind each other: products and the loads of their operands do, storing sums and
finishing them do not, although they are mixed (measured on Emerald Rapids, kernel by kernel with parts left out; of 33
problems, what the model ranks first takes 3 % more time than the best candidate in the mean).  Its figures are those
that Intel publishes (Optimization Reference Manual, chapter "Intel AMX": a product takes a cycle per row of A, 16 at
most, and 52 cycles until its result is there; a tile load 8 cycles, two lines a cycle; a store 16) and the widths of
the caches; the tuner measures what it ranks first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from itertools import pairwise

from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.geometry import Geometry

ROWS = 16
ROW_BYTES = 64
TILE_REGISTERS = 8
#: Shortest K step worth a tile instruction, in bytes; shorter ones waste most of the multiplier.
SHORTEST_STEP = 16
#: Cycles between a product and the next on the same accumulator, beyond one per row.
LATENCY = 36
#: Cycles that a line of a tile takes when it comes from the L1 cache, L2 or beyond.
L1_LINE, L2_LINE, FAR_LINE = 0.5, 1.2, 5.0
#: Bytes that stay in the L1 cache (of 48 KiB) beside two buffers of accumulators and the outputs, and in the L2 cache
#: (of 2 MiB), between two uses.
L1_ROOM, L2_ROOM = 36 << 10, 1536 << 10
#: Bytes that may come between two taps of a filter row, which read much the same source, and leave it in the L1 cache.
TAP_ROOM = 48 << 10
#: Bytes of source that one step of the grid reads again for every column block.
STRIP_ROOM = 1 << 20
#: Cycles of a block that hide behind nothing: its loop, and the wait for its last products.
BLOCK_START = 24.0
#: Ways of the L1 cache: as many rows a multiple of 4096 bytes apart does it hold.
L1_WAYS = 12


class Variant(IntFlag):
    """What a blocking of tiles can say beside sizes.

    COLUMNS_INSIDE: blocks run along the columns first, so that their rows of A stay in the L1 cache, not their panels.
    MERGED_ROWS: tiles run on from one row of (copied, padded) pixels to the next; pixels on padding are not stored.
    SPLIT_K: all blocks of a column multiply one part of K after the other, so that a part of the panels stays in L1;
    accumulators wait in scratch in between (sums are taken in the same order).
    """

    COLUMNS_INSIDE = 1
    MERGED_ROWS = 2
    SPLIT_K = 4


# --- K ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KSteps:
    """How a run of K is cut: `count` tile instructions of `size` bytes; `pad` bytes of the last are beyond the run."""

    count: int
    size: int
    pad: int


def cut_run(run_bytes: int, *, exact: bool) -> KSteps | None:
    """Cut a run of `run_bytes` into equal steps of whole dwords, at most 64 bytes each.

    Padding is read from the bytes that follow and meets zero weights, which is right for integers only (0 times NaN
    is NaN): `exact` allows none, and None says that there is no such cut with steps worth having.
    """
    fewest = -(-run_bytes // ROW_BYTES)
    for count in range(fewest, max(fewest, run_bytes // SHORTEST_STEP) + 1):
        if run_bytes % (4 * count) == 0 and (exact or count <= fewest + fewest // 4):
            return KSteps(count, run_bytes // count, 0)
    if exact:
        return None
    size = -(-run_bytes // (4 * fewest)) * 4
    return KSteps(fewest, size, fewest * size - run_bytes)


def run_elements(g: Geometry) -> tuple[int, bool]:
    """Elements of a run of K, and whether it spans the taps of a filter row."""
    merged = g.groups == 1 and (g.dw == 1 or g.kw == 1)
    return (g.kw * g.ic if merged else g.icg), merged


def k_steps(g: Geometry, steps: KSteps) -> int:
    """Tile steps of all of K."""
    return g.kh * (1 if run_elements(g)[1] else g.kw) * steps.count


def k_parts(steps: int, bytes_of_step: int) -> tuple[tuple[int, int], ...]:
    """(first step, steps) of the parts of K whose operands, `bytes_of_step` a step, stay in the L1 cache."""
    parts = max(1, -(-steps * bytes_of_step // L1_ROOM))
    ends = [steps * i // parts for i in range(parts + 1)]
    return tuple((first, end - first) for first, end in pairwise(ends))


# --- pixels -----------------------------------------------------------------------------------------------


def even_rows(length: int) -> int:
    """Rows of each tile when `length` pixels are spread evenly over as few tiles as hold them."""
    return -(-length // -(-length // ROWS))


@dataclass(frozen=True)
class Shape:
    """A register block: `th` x `tw` pixels by `nr` panels; `pitch` pixels from row to row where rows are merged."""

    th: int
    tw: int
    nr: int
    pitch: int = 0

    def length(self, g: Geometry) -> int:
        """Pixels of one line of tiles: down a single column, over merged rows, or along a row."""
        return self.th if g.ow == 1 else (self.th - 1) * self.pitch + self.tw if self.pitch else self.tw

    def lines(self, g: Geometry) -> int:
        """Lines of tiles."""
        return 1 if g.ow == 1 or self.pitch else self.th

    def down(self, g: Geometry, rows: int) -> int:
        """Tiles of `rows` rows."""
        return self.lines(g) * -(-self.length(g) // rows)


@dataclass(frozen=True)
class RowTile:
    """Pixels of one accumulator tile: the first one's distance from the block's, (lines, pixels along), and its rows.

    `rows` are those to store: (row of the tile, output row, output column), counted from the block's first.
    """

    line: int
    pixel: int
    rows: tuple[tuple[int, int, int], ...]


def row_tiles(g: Geometry, shape: Shape, rows: int) -> tuple[RowTile, ...]:
    """The tiles of a block, `rows` high. A short one is moved back over pixels already done, or, where rows are merged,
    reads on beyond the last (copied sources have room for that).
    """  # noqa: D205
    length, found = shape.length(g), []
    for line in range(shape.lines(g)):
        for start in range(0, length, rows):
            count = min(rows, length - start)
            back = 0 if shape.pitch else rows - count
            kept = []
            for r in range(count):
                at = start + r
                y, x = (at, 0) if g.ow == 1 else divmod(at, shape.pitch) if shape.pitch else (line, at)
                if x < shape.tw:
                    kept.append((back + r, y, x))
            found.append(RowTile(line, start - back, tuple(kept)))
    return tuple(tile for tile in found if tile.rows)


# --- tile registers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TilePlan:
    """Tile registers by use; those of an operand take turns."""

    accumulators: int
    source: tuple[int, ...]
    weights: tuple[int, ...]


def plan_tiles(down: int, across: int) -> TilePlan:
    """Split the eight tiles: all accumulators stay; each operand has a register to load while another is in use."""
    acc = down * across
    free = TILE_REGISTERS - acc
    source = min(2 * down, free // 2)
    weights = min(2 * across, free - source)
    source = min(2 * down, free - weights)
    at = acc + source
    return TilePlan(acc, tuple(range(acc, at)), tuple(range(at, at + weights)))


# --- costs ------------------------------------------------------------------------------------------------


def epilogue_slots(spec: EpilogueSpec, nr: int) -> float:
    """Instructions on the two vector ports that finish one vector of outputs of a block of `nr` panels."""
    slots = float(spec.acc == "s32" and spec.out != "s32") + (spec.has_m or spec.has_b)
    slots += spec.post_scale + spec.clamp_hi + sum(3 if s.tensor else 1 for s in spec.steps)
    if spec.out in ("u8", "s8"):
        # Convert, two narrowings of four vectors, a permutation; what is not the lowest quarter must be moved to it.
        slots += 1 + 0.5 + 0.25 + 0.25 + 0.5 * spec.add_zp + {1: 0.75, 2: 0.25}.get(nr, 0.0)
    elif spec.out == "bf16":
        slots += 1.0
    return slots


@dataclass(frozen=True)
class CostModel:
    """Estimated cycles of blocks on a core like Sapphire Rapids. `steps` counts the tile steps of all of K."""

    g: Geometry
    spec: EpilogueSpec
    element_bytes: int
    panels: int
    steps: int
    step_bytes: int

    def block(self, shape: Shape, rows: int, variant: Variant) -> float:
        """Cycles of one block among many like it."""
        down, across = shape.down(self.g, rows), shape.nr
        acc, vectors = down * across, shape.th * shape.tw * across
        parts = len(self.parts(shape, rows)) if Variant.SPLIT_K in variant else 1
        multiply = self.steps * max(acc * rows, rows + LATENCY)
        load = self._operands(shape, down, rows, variant) + (acc * rows + 1.25 * vectors) * L1_LINE
        # Accumulators that wait go to L2 and come from there, and the products around them wait, too.
        wait = (parts - 1) * acc * rows * (3 + L2_LINE)
        finish = vectors * epilogue_slots(self.spec, across) / 2
        return BLOCK_START * parts + max(multiply, load) + wait + acc * rows + finish

    @property
    def one_run(self) -> bool:
        """Whether the problem is a product of matrices, whose K is a single run."""
        g = self.g
        return g.ow == 1 and g.kh == g.kw == g.groups == 1

    def parts(self, shape: Shape, rows: int) -> tuple[tuple[int, int], ...]:
        """The parts of K where it is split: a step's bytes of one block's rows and panels."""
        return k_parts(self.steps, (shape.down(self.g, rows) * rows + ROWS * shape.nr) * self.step_bytes)

    def _operands(self, shape: Shape, down: int, rows: int, variant: Variant) -> float:
        """Cycles of the load ports, or of the way from the cache where the operands are, for all tile loads."""
        g = self.g
        panel = self.steps * self.step_bytes * ROWS
        columns, weights = shape.nr * panel, self.panels * panel
        source_rows = g.strip_rows(shape.th)
        wide = (shape.tw - 1) * g.sw + (g.kw - 1) * g.dw + 1
        fresh = source_rows * wide * g.icg * self.element_bytes
        source = min(g.h * g.w * g.icg * self.element_bytes, STRIP_ROOM)
        loads_a, loads_b = float(down * rows * self.steps), columns / ROW_BYTES
        near = 0 if Variant.SPLIT_K in variant else fresh + columns
        inside = Variant.COLUMNS_INSIDE in variant
        a_line = _line(near if inside else source + columns)
        b_line = _line(weights + fresh if inside else near)
        lines_from_afar = min(loads_a, fresh / ROW_BYTES)
        between_taps = (down * rows + ROWS * shape.nr) * g.icg * self.element_bytes
        again = L2_LINE if g.kw > 1 and between_taps > TAP_ROOM else L1_LINE
        cycles = lines_from_afar * a_line + (loads_a - lines_from_afar) * again
        return cycles + loads_b * b_line

    def problem(self, shape: Shape, rows: int, variant: Variant) -> float:
        """Cycles of the whole problem, tails included."""
        g, total = self.g, 0.0
        for th, h_count in ((shape.th, g.oh // shape.th), (g.oh % shape.th, 1)):
            for tw, w_count in ((shape.tw, g.ow // shape.tw), (g.ow % shape.tw, 1)):
                for nr, v_count in ((shape.nr, self.panels // shape.nr), (self.panels % shape.nr, 1)):
                    if th and tw and nr and h_count and w_count and v_count:
                        part = Shape(th, tw, nr, shape.pitch)
                        total += h_count * w_count * v_count * self.block(part, rows, variant)
        return total * g.images * g.groups


def _line(distance: float) -> float:
    """Cycles of a line that was last used `distance` bytes ago."""
    return L1_LINE if distance <= L1_ROOM else L2_LINE if distance <= L2_ROOM else FAR_LINE


@dataclass(frozen=True)
class RankedTiles:
    """A register block, the rows of its tiles, how it is walked, and its estimated cycles over the problem."""

    shape: Shape
    rows: int
    variant: Variant
    cost: float


def _even(length: int, unit: int, most: int) -> int:
    """The longest of the parts of `length`, cut evenly into as few as hold at most `most` units each."""
    units = -(-length // unit)
    return -(-length // -(-units // most))


def _shapes(g: Geometry, panels: int, pitch: int) -> Iterator[Shape]:
    """Register blocks of at most four accumulators; `pitch` is 0 where rows cannot be merged."""
    for down, across in ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)):
        if across > panels:
            continue
        if g.ow == 1:
            yield Shape(_even(g.oh, ROWS, down), 1, across)
            yield Shape(min(g.oh, ROWS * down), 1, across)
            continue
        if g.ow > ROWS:
            yield Shape(1, _even(g.ow, ROWS, down), across)
            yield Shape(1, min(g.ow, ROWS * down), across)
        yield Shape(min(down, g.oh), even_rows(g.ow), across)
        if pitch:
            most = (ROWS * down - g.ow) // pitch + 1
            if most > 0:
                yield Shape(_even(g.oh, most, 1), g.ow, across, pitch)


def rank_tiles(model: CostModel, pitch: int = 0) -> tuple[RankedTiles, ...]:
    """Register blocks and orders, best first by estimate, all different; `pitch` > 0 allows rows to be merged."""
    found = {}
    for shape in _shapes(model.g, model.panels, pitch):
        rows = even_rows(shape.length(model.g))
        variants = [Variant(0), Variant.COLUMNS_INSIDE]
        if shape.pitch:
            variants = [v | Variant.MERGED_ROWS for v in variants]
        elif model.one_run and len(model.parts(shape, rows)) > 1:
            variants.append(Variant.SPLIT_K)
        for variant in variants:
            found[shape, variant] = RankedTiles(shape, rows, variant, model.problem(shape, rows, variant))
    return tuple(sorted(found.values(), key=lambda r: r.cost))


def aliased(g: Geometry, element_bytes: int, rows: int) -> bool:
    """Whether the rows of a tile, read in place, all fall into one set of the L1 cache, and are more than it has ways.

    Copied rows lie elsewhere; the copy pays where several column blocks read it.
    """
    pixel = g.ic * element_bytes
    distance = g.sh * g.w * pixel if g.ow == 1 else g.sw * pixel
    return rows > L1_WAYS and distance % 4096 == 0 and g.n >= 8 * ROWS
