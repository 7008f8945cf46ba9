"""The key of an AMX kernel: all that its code depends on, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass

from vnnigen.isa.assembler import Code
from vnnigen.kernels.amx_tiling import (
    ROW_BYTES,
    ROWS,
    KSteps,
    Shape,
    Variant,
    even_rows,
    k_parts,
    k_steps,
    plan_tiles,
)
from vnnigen.kernels.emit_copy import scratch_rows
from vnnigen.kernels.geometry import Geometry
from vnnigen.kernels.nest import NestKey

#: Bytes of weights from which on they come from beyond the L2 cache, and blocks of pixels too few to share them.
FAR_WEIGHTS, FEW_BLOCKS = 3 << 19, 2
#: Steps of K up to which storing sums takes a good part of a block's time.
FEW_STEPS = 8
WHOLE_TILE = KSteps(1, ROW_BYTES, 0)


@dataclass(frozen=True)
class AmxKey(NestKey):
    """Key of an AMX kernel. `source` is the geometry of what it reads, where `g` is that of pixels laid out anew."""

    steps_of_run: KSteps = WHOLE_TILE
    source: Geometry | None = None

    @property
    def stores_late(self) -> bool:
        """Whether sums stay in tiles until the next block has its first products: where there are few of these.

        Not where the epilogue reads tensors; there it was measured slower.
        """
        few = k_steps(self.g, self.steps_of_run) <= FEW_STEPS and Variant.SPLIT_K not in self.variant
        return few and not self.spec.reads_tensors

    @property
    def streams(self) -> bool:
        """Whether it fetches its own weights from beyond the L2 cache as it goes: where few pixels share them."""
        weights = self.padded_columns * self.g.k * self.mac.element_bytes
        return self.pixel_blocks <= FEW_BLOCKS and weights > FAR_WEIGHTS

    @property
    def leaves_own(self) -> bool:
        """Tile loads walk panels from end to end, which the processor foresees; other requests would be in the way."""
        return True

    @property
    def variant(self) -> Variant:
        """The blocking's variant."""
        return Variant(self.blocking.variant)

    @property
    def spreads(self) -> bool:
        """Whether rows are spread, not pixels folded (see `amx_fold`)."""
        return self.source is not None and self.g.kh == self.source.kh

    @property
    def merged(self) -> bool:
        """Whether tiles run on from row to row."""
        return Variant.MERGED_ROWS in self.variant

    def shape(self, th: int, tw: int, nr: int) -> Shape:
        """A block of this kernel."""
        pitch = 0
        if self.merged:
            rows = scratch_rows(self.g, self.mac, self.blocking.strip)
            pitch = rows.pitch // rows.pixel
        return Shape(th, tw, nr, pitch)

    @property
    def full(self) -> Shape:
        """The full block."""
        return self.shape(self.blocking.th, self.blocking.tw, self.blocking.nr)

    @property
    def rows(self) -> int:
        """Pixels of a tile."""
        return even_rows(self.full.length(self.g))

    @property
    def block_tiles(self) -> tuple[int, int]:
        """Accumulator tiles of a block: down the pixels, along the columns."""
        return self.full.down(self.g, self.rows), self.blocking.nr

    @property
    def folded_at(self) -> int:
        """Offset in scratch of the rows that are multiplied: behind those that are folded into them."""
        if self.source is None:
            return 0
        return -(-scratch_rows(self.source, self.mac, self.blocking.strip).size // 64) * 64

    @property
    def buffer_at(self) -> int:
        """Offset in scratch of the two buffers that take accumulator tiles."""
        rows = 0
        if self.blocking.copy:
            source = scratch_rows(self.g, self.mac, self.blocking.strip)
            # Where rows are merged, a block's last tile reads on beyond them.
            rows = source.size + (self.rows * source.pixel if self.merged else 0)
        return self.folded_at + -(-rows // 64) * 64

    @property
    def buffer_bytes(self) -> int:
        """Bytes of one of them."""
        down, across = self.block_tiles
        return down * across * self.rows * ROW_BYTES

    @property
    def scratch(self) -> int:
        """Bytes of scratch a step needs: source rows, two buffers, a row of start values, accumulators that wait."""
        waiting = self.blocking.strip // self.blocking.th if Variant.SPLIT_K in self.variant else 0
        return self.buffer_at + (2 + waiting) * self.buffer_bytes + self.blocking.nr * ROW_BYTES

    @property
    def k_parts(self) -> tuple[tuple[int, int] | None, ...]:
        """The parts of K that are multiplied one after the other, None for all of it."""
        if Variant.SPLIT_K not in self.variant:
            return (None,)
        step = (self.block_tiles[0] * self.rows + ROWS * self.blocking.nr) * self.steps_of_run.size
        return k_parts(self.steps_of_run.count, step)

    @property
    def tile_config(self) -> bytes:
        """The 64 bytes of LDTILECFG: accumulators first, then source tiles, then weight tiles."""
        plan = plan_tiles(*self.block_tiles)
        shapes = dict.fromkeys(range(plan.accumulators), (self.rows, ROW_BYTES))
        shapes |= dict.fromkeys(plan.source, (self.rows, self.steps_of_run.size))
        shapes |= dict.fromkeys(plan.weights, (self.steps_of_run.size // 4, ROW_BYTES))
        config = bytearray(64)
        config[0] = 1  # palette
        for tile, (rows, colsb) in shapes.items():
            config[16 + 2 * tile : 18 + 2 * tile] = colsb.to_bytes(2, "little")
            config[48 + tile] = rows
        return bytes(config)

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code, using only instructions of `features`."""
        from vnnigen.kernels.amx_nest import AmxNest

        return AmxNest(self, features).build()
