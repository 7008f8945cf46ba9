"""AMX kernels: GEMM and convolution on tile registers.

A tile holds 16 rows of 64 bytes.  TDPBUSD and its kin multiply 16 pixels x 64 bytes of K with 64 bytes of K x 16
columns (Intel SDM vol. 1, chapter "Intel AMX"); the packed panels of the other kernels, 16 columns wide and one
dword of K after another, are such tiles already.  A register block is mt x nt accumulator tiles.  They start from
the bias row, loaded with stride 0, and end in a small buffer in scratch, from which the ordinary epilogue takes
vectors: the tile unit and the vector unit share no registers.

One tile configuration serves a whole kernel, because reloading it clears all tiles: a block that has fewer pixels
than a tile has rows is moved back over pixels already done, and only its new rows go through the epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vnnigen.isa.assembler import Code, Mem
from vnnigen.kernels.blocking import TILES, Blocking, grid, other_grids
from vnnigen.kernels.emit_common import add_const, counted
from vnnigen.kernels.emit_copy import scratch_rows
from vnnigen.kernels.emit_epilogue import emit_epilogue, epilogue_registers
from vnnigen.kernels.emit_store import Tile
from vnnigen.kernels.epilogue import Epilogue
from vnnigen.kernels.geometry import Geometry, Segments
from vnnigen.kernels.mac import AMX, TierCode
from vnnigen.kernels.nest import LoopNest, NestKey
from vnnigen.kernels.packed import PackedRun, Pick, Weights, pack_run
from vnnigen.kernels.packing import Run
from vnnigen.kernels.types import DType

Reg = Any
ROWS = 16
ROW_BYTES = 64
TILE_REGISTERS = 8
#: Shortest K step worth a tile instruction, in bytes; shorter ones waste most of the multiplier.
SHORTEST_STEP = 16


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


def _run_elements(g: Geometry) -> tuple[int, bool]:
    """Elements of a run of K, and whether it spans the taps of a filter row."""
    merged = g.groups == 1 and (g.dw == 1 or g.kw == 1)
    return (g.kw * g.ic if merged else g.icg), merged


@dataclass(frozen=True)
class AmxKey(NestKey):
    """Key of an AMX kernel."""

    steps_of_run: KSteps = KSteps(1, 64, 0)

    @property
    def rows(self) -> int:
        """Pixels of a tile."""
        return min(ROWS, self.g.oh if self.g.ow == 1 else self.g.ow)

    @property
    def block_tiles(self) -> tuple[int, int]:
        """Accumulator tiles of a block: down the pixels, along the columns."""
        b = self.blocking
        down = -(-b.th // ROWS) if self.g.ow == 1 else b.th * -(-b.tw // ROWS)
        return down, b.nr

    @property
    def buffer_at(self) -> int:
        """Offset in scratch of the buffer that takes accumulator tiles."""
        rows = scratch_rows(self.g, self.mac, self.blocking.strip).size if self.blocking.copy else 0
        return -(-rows // 64) * 64

    @property
    def scratch(self) -> int:
        """Bytes of scratch a step needs."""
        down, across = self.block_tiles
        return self.buffer_at + down * across * ROWS * ROW_BYTES

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
        return AmxNest(self, features).build()


@dataclass(frozen=True)
class TilePlan:
    """Tile registers by use. With fewer weight (source) registers than weight (source) tiles they take turns."""

    accumulators: int
    source: tuple[int, ...]
    weights: tuple[int, ...]


def plan_tiles(down: int, across: int) -> TilePlan:
    """Split the eight tiles: all accumulators stay, one operand stays whole, the other may rotate."""
    acc = down * across
    free = TILE_REGISTERS - acc
    source = min(down, free - 1) if down >= across else down
    weights = min(across, free - source)
    at = acc + source
    return TilePlan(acc, tuple(range(acc, at)), tuple(range(at, at + weights)))


def rank_tiles(g: Geometry, panels: int) -> tuple[tuple[int, int, int], ...]:
    """(th, tw, nr) of register blocks, best first by estimate: 2x2 tiles, then rows and columns of them.

    Two by two needs the fewest tile loads per multiplication (one), so it comes first where both sides have two tiles;
    where there is one tile only, a row or column of four.
    """
    flat = g.ow == 1
    tiles = -(-g.oh // ROWS) if flat else g.oh * -(-g.ow // ROWS)
    first = (1, min(4, panels)) if tiles == 1 else (min(4, tiles), 1) if panels == 1 else (2, 2)
    found = []
    for down, across in (first, (1, 4), (4, 1), (1, 3), (3, 1), (2, 2), (1, 2), (2, 1)):
        nr = min(across, panels)
        if flat:
            found.append((min(g.oh, ROWS * down), 1, nr))
        elif g.ow <= ROWS:
            found.append((min(down, g.oh), g.ow, nr))
        else:
            found.append((1, min(g.ow, ROWS * down), nr))
            found.append((min(down, g.oh), ROWS, nr))  # tiles below each other
    return tuple(dict.fromkeys(found))


def choose_tiles(g: Geometry, panels: int) -> tuple[int, int, int]:
    """(th, tw, nr) of the register block: the first of `rank_tiles`."""
    return rank_tiles(g, panels)[0]


def _strip(g: Geometry, strip: int, th: int, copy: bool) -> int:
    """Lengthen strips until the last has a whole tile of rows to move back over (copied rows start at the strip)."""
    while copy and g.ow == 1 and 0 < g.oh % strip < ROWS <= g.oh:
        strip += th
    return strip


@dataclass(frozen=True, eq=False)
class PackedAmx:
    """Weights packed for tiles."""

    op: str
    tier: TierCode
    src: DType
    epilogue: Epilogue
    runs: tuple[PackedRun, ...]

    def keys_for(self, g: Geometry, pick: Pick | None = None) -> tuple[AmxKey, ...]:
        """The kernel of a problem; `pick` is shown the candidates, best first by estimate, and says which to take."""
        run = self.runs[0]
        mac = run.mac
        elements, _ = _run_elements(g)
        steps = cut_run(elements * mac.element_bytes, exact=mac.element == "bf16")
        assert steps is not None  # `why_not` has seen to that
        panels = -(-g.n // self.tier.lanes)
        copy = g.padded or g.src != mac.element or steps.pad > 0
        # A step of the grid should last as long as on the vector tiers, which multiply about eight times slower.
        work = {"macs": g.macs // 8, "weights": g.n * g.k * mac.element_bytes}

        def key(tile: tuple[int, int, int], cut: tuple[int, int] | None = None) -> AmxKey:
            th, tw, nr = tile
            strip, chunk = cut or grid(g, mac, th, -(-panels // nr), copy, **work)
            blocking = Blocking(th, tw, nr, 0, 2, _strip(g, strip, th, copy), chunk, copy)
            spec = self.epilogue.spec
            return AmxKey(self.op, g, self.tier, mac, spec, blocking, False, 0, g.ldo, 0, steps_of_run=steps)

        tiles = rank_tiles(g, panels)
        if pick is None:
            return (key(tiles[0]),)
        th, _, nr = tiles[0]
        cuts = other_grids(g, mac, th, -(-panels // nr), copy, **work)
        candidates = list(dict.fromkeys((*map(key, tiles[:TILES]), *(key(tiles[0], cut) for cut in cuts))))
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
    if w.kind == "bf16" and cut_run(2 * w.run_elements, exact=True) is None:
        return f"runs of {w.run_elements} bf16 values cannot be cut into whole tile rows"
    return None


def pack(op: str, w: Weights, tier: TierCode, src: DType, x_zp: int, epilogue: Epilogue) -> PackedAmx:
    """Pack weights for tiles: runs of K are padded to whole steps; s8 sources need no shift."""
    mac = AMX[src]
    steps = cut_run(w.run_elements * mac.element_bytes, exact=mac.element == "bf16")
    assert steps is not None
    quantum = steps.count * steps.size // mac.element_bytes
    run = pack_run(w, tier, src, x_zp, epilogue, Run(0, w.columns, True), mac, quantum)
    return PackedAmx(op, tier, src, epilogue, (run,))


@dataclass(frozen=True)
class _RowTile:
    """Pixels of one accumulator tile: source offset of its first row, and the rows to store with their outputs."""

    src: int
    first: int
    outs: tuple[int, ...]


class AmxNest(LoopNest):
    """Emits an AMX kernel."""

    def __init__(self, key: AmxKey, features: frozenset[str] | None):
        super().__init__(key, features)
        self.tiles_key = key
        self.steps = key.steps_of_run
        _, merged = _run_elements(key.g)
        g = key.g
        self.seg = Segments(
            outer=g.kh, inner=1 if merged else g.kw, elements=0, dwords=self.steps.count * self.steps.size // 4,
            tail=0, outer_stride=g.dh * self.row_pitch, inner_stride=g.dw * self.pixel,
        )  # fmt: skip
        self.panel_bytes = self.seg.total_dwords * ROW_BYTES
        self.block_bytes = key.blocking.nr * self.panel_bytes
        self.two_taps = self.seg.inner > 1

    def _row_tiles(self, th: int, tw: int) -> list[_RowTile]:
        """The accumulator tiles of a th x tw block; short ones are moved back over pixels already done."""
        g, rows = self.key.g, self.tiles_key.rows
        flat = g.ow == 1
        step = g.sh * self.row_pitch if flat else g.sw * self.pixel
        out_step = self.key.ldo
        lines = [(0, 0, th)] if flat else [(h * g.sh * self.row_pitch, h * g.ow * out_step, tw) for h in range(th)]
        tiles = []
        for src, out, length in lines:
            for start in range(0, length, rows):
                count = min(rows, length - start)
                outs = tuple(out + (start + i) * out_step for i in range(count))
                tiles.append(_RowTile(src + (start + count - rows) * step, rows - count, outs))
        return tiles

    def emit_tile(self, th: int, tw: int, nr: int, valid: int) -> None:
        """Multiply one block on tiles, then run the epilogue over its rows."""
        a = self.a
        tiles = self._row_tiles(th, tw)
        plan = plan_tiles(*self.tiles_key.block_tiles)
        t = [a.tile(f"tile{i}") for i in range(TILE_REGISTERS)]
        acc = [[t[i * nr + j] for j in range(nr)] for i in range(len(tiles))]
        with a.scope(), a.section(f"multiply {len(tiles)}x{nr} tiles"):
            stride, width = a.gpr("pixel_stride"), a.gpr("row_bytes")
            self._start(acc, stride)
            a.mov(stride, self._pixel_stride())
            a.mov(width, ROW_BYTES)
            self._multiply(acc, tiles, [t[i] for i in plan.source], [t[i] for i in plan.weights], stride, width)
        a.release(*t)
        with a.scope():
            buffer = a.gpr("buffer")
            a.mov(buffer, self._slot(self.SCRATCH))
            add_const(a, buffer, self.tiles_key.buffer_at)
            with a.scope(), a.section("tiles to memory"):
                pitch = a.gpr("buffer_pitch")
                a.mov(pitch, nr * ROW_BYTES)
                for i, row in enumerate(acc):
                    for j, tile in enumerate(row):
                        a.tilestored(Mem(buffer, (i * ROWS * nr + j) * ROW_BYTES, index=pitch), tile)
            for i, row_tile in enumerate(tiles):
                self._epilogue(row_tile, buffer, i * ROWS * nr * ROW_BYTES, nr, valid)

    def _pixel_stride(self) -> int:
        g = self.key.g
        return g.sh * self.row_pitch if g.ow == 1 else g.sw * self.pixel

    def _start(self, acc: list[list[Reg]], zero: Reg) -> None:
        """Load every accumulator with the start values of its columns, the same row 16 times."""
        a, cur = self.a, self.cur
        a.mov(zero, 0)
        a.lea(cur.ptr, Mem(cur.consts, self.lay.init, index=cur.col, scale=4))
        for row in acc:
            for j, tile in enumerate(row):
                a.tileloadd(tile, Mem(cur.ptr, j * ROW_BYTES, index=zero))

    def _multiply(
        self, acc: list[list[Reg]], tiles: list[_RowTile], source: list[Reg], weights: list[Reg], stride: Reg,
        width: Reg,
    ) -> None:  # fmt: skip
        """All K steps: loops over filter rows, taps and steps; cursors are put back."""
        a, cur, seg, size = self.a, self.cur, self.seg, self.steps.size
        step_weights = size // 4 * ROW_BYTES
        with counted(a, cur.outer, seg.outer):
            with counted(a, cur.inner, seg.inner):
                unroll = 2 if self.steps.count % 2 == 0 else 1
                with counted(a, cur.k, self.steps.count // unroll):
                    for u in range(unroll):
                        self._step(acc, tiles, source, weights, stride, width, u * size, u * step_weights)
                    a.add(cur.src, unroll * size)
                    a.add(cur.weights, unroll * step_weights)
                add_const(a, cur.src, seg.inner_stride * (seg.inner > 1) - self.steps.count * size)
            back = seg.inner_stride * seg.inner * (seg.inner > 1)
            add_const(a, cur.src, seg.outer_stride * (seg.outer > 1) - back)
        add_const(a, cur.src, -seg.outer_stride * seg.outer * (seg.outer > 1))
        a.sub(cur.weights, self.panel_bytes)

    def _step(
        self, acc: list[list[Reg]], tiles: list[_RowTile], source: list[Reg], weights: list[Reg], stride: Reg,
        width: Reg, src_at: int, weights_at: int,
    ) -> None:  # fmt: skip
        """One K step of all accumulators; the operand with fewer registers than tiles is loaded in turn."""
        a, cur = self.a, self.cur
        loaded: dict[Reg, tuple[str, int]] = {}

        def load(kind: str, index: int, registers: list[Reg]) -> Reg:
            tile = registers[index % len(registers)]
            if loaded.get(tile) != (kind, index):
                if kind == "source":
                    a.tileloadd(tile, Mem(cur.src, tiles[index].src + src_at, index=stride))
                else:
                    a.tileloadd(tile, Mem(cur.weights, weights_at + index * self.panel_bytes, index=width))
                loaded[tile] = (kind, index)
            return tile

        for i, row in enumerate(acc):
            for j, tile in enumerate(row):
                x, w = load("source", i, source), load("weights", j, weights)
                self.key.mac.multiply(a, tile, x, w, None)

    def _epilogue(self, tile: _RowTile, buffer: Reg, at: int, nr: int, valid: int) -> None:
        """Epilogue of one accumulator row of tiles, as many pixels at a time as fit the vector registers."""
        key, count = self.key, len(tile.outs)
        room = key.tier.registers - epilogue_registers(key.spec, key.tier)
        group = max(1, min(8, room // nr))
        pitch = nr * ROW_BYTES
        first = at + tile.first * pitch
        whole, rest = divmod(count, group)
        if whole > 1:
            a, cur = self.a, self.cur
            add_const(a, cur.off, tile.outs[0])
            with a.scope():
                a.mov(cur.k, whole)
                with a.loop(cur.k):
                    self._rows(buffer, first, tuple(i * key.ldo for i in range(group)), nr, valid)
                    a.add(buffer, group * pitch)
                    a.add(cur.off, group * key.ldo)
            if rest:
                self._rows(buffer, first, tuple(i * key.ldo for i in range(rest)), nr, valid)
            add_const(a, cur.off, -tile.outs[0] - whole * group * key.ldo)
            a.sub(buffer, whole * group * pitch)
            return
        for start in range(0, count, group):
            self._rows(buffer, first + start * pitch, tile.outs[start : start + group], nr, valid)

    def _rows(self, buffer: Reg, at: int, outs: tuple[int, ...], nr: int, valid: int) -> None:
        """Load rows of accumulators from the buffer and finish them."""
        a, key, cur = self.a, self.key, self.cur
        with a.scope(), a.section(f"epilogue {len(outs)}x{nr}"):
            acc = [[a.vec(512, f"acc{i}_{j}") for j in range(nr)] for i in range(len(outs))]
            for i, row in enumerate(acc):
                for j, v in enumerate(row):
                    a.vmovups(v, Mem(buffer, at + (i * nr + j) * ROW_BYTES))
            emit_epilogue(
                Tile(
                    a, key.tier, key.spec, self.lay, acc, list(outs), valid, cur.args, cur.consts, cur.col, cur.off,
                    cur.ptr,
                )
            )

