"""The code of one register block on tiles: its multiplies, woven with the epilogue of the block before.

A block starts from the bias row, loaded with stride 0, multiplies, and leaves its accumulators in a buffer in scratch,
because the tile unit and the vector unit share no registers.  The vector unit then finishes them while the tile unit is
at the next block, which fills the other of two buffers: both streams stand in one sequence of instructions, evenly
mixed, so that neither waits for the other's place in the reorder buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vnnigen.isa.assembler import Assembler, Mem
from vnnigen.isa.encode import Insn
from vnnigen.kernels.amx_tiling import ROW_BYTES, KSteps, RowTile, TilePlan
from vnnigen.kernels.emit_common import add_const
from vnnigen.kernels.emit_epilogue import emit_epilogue, epilogue_registers
from vnnigen.kernels.emit_store import Tile
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.mac import Mac, TierCode

Reg = Any
#: Steps of K that are written out, mixed with an epilogue; a longer K goes on in loops.
WOVEN_STEPS = 64
#: Steps of K in the body of such a loop.
LOOP_STEPS = 8
#: Bytes from one line that is fetched ahead to the next: the processor's own prefetching into the L2 cache brings the
#: lines between (measured on Emerald Rapids: three of four), and few requests leave room for those of tile loads.
AHEAD_BYTES = 256
#: How far ahead weights are fetched that stream from beyond the L2 cache: pages of the source, read in between, make
#: the processor lose track of them.
STREAM_AHEAD = 8192
#: Vectors of outputs that are finished together.
EPILOGUE_VECTORS = 16


@dataclass(frozen=True)
class Registers:
    """The general registers of a block, and its slots on the stack.

    `done_off` and `done_col` say where the outputs of the block before go, `done` where its accumulators are; `fresh`
    will point at this block's. `buffers` holds the sum of both addresses, `start` the address of room for a row,
    `waiting` that of this block's accumulators between two parts of K. What is fetched ahead (see
    `kernels.ahead`) is at `ahead`, up to `ahead_end`. `bias` takes turns with `fresh`, or, where sums are stored late,
    with `k`, which only a longer K needs.
    """

    args: Reg
    consts: Reg
    src: Reg
    weights: Reg
    col: Reg
    done_off: Reg
    done_col: Reg
    done: Reg
    fresh: Reg
    bias: Reg
    ptr: Reg
    k: Reg
    stride: Reg
    width: Reg
    buffers: Mem
    start: Mem
    waiting: Mem
    outer_left: Mem
    inner_left: Mem
    ahead: Reg
    ahead_end: Any


@dataclass(frozen=True)
class KRuns:
    """How K lies in memory: `outer` x `inner` runs of `steps`, and the distances of runs in bytes of source."""

    outer: int
    inner: int
    steps: KSteps
    outer_stride: int
    inner_stride: int

    @property
    def step_weights(self) -> int:
        """Bytes of a panel that one step multiplies."""
        return self.steps.size // 4 * ROW_BYTES

    @property
    def run_weights(self) -> int:
        """Bytes of a panel that one run multiplies."""
        return self.steps.count * self.step_weights

    @property
    def panel_bytes(self) -> int:
        """Bytes of a panel."""
        return self.outer * self.inner * self.run_weights


@dataclass(frozen=True)
class BlockCode:
    """What all blocks of a kernel share. `pitches` are the bytes from line to line of tiles and from pixel to pixel."""

    a: Assembler
    tier: TierCode
    mac: Mac
    spec: EpilogueSpec
    lay: ConstLayout
    runs: KRuns
    plan: TilePlan
    rows: int
    pitches: tuple[int, int]
    out_pitches: tuple[int, int]
    tiles: Sequence[Reg]
    r: Registers
    #: Requests ahead with each step of K, and whether all weights are fetched a while before they are loaded.
    ahead: int = 0
    streams: bool = False


def weave(main: Sequence[Insn], side: Sequence[Insn]) -> list[Insn]:
    """Both sequences in one, each in its order, `side` spread evenly over `main`."""
    mixed: list[Insn] = []
    done = 0
    for count, item in enumerate(main, 1):
        mixed.append(item)
        upto = count * len(side) // len(main)
        mixed += side[done:upto]
        done = upto
    return mixed


@dataclass(frozen=True)
class Block:
    """One shape of block: its tiles, panels, live lanes of the last panel, and the filter rows that meet the image.

    `part`, if any, is (first, count) of the steps of a single run that it multiplies: one part of a split K.
    """

    code: BlockCode
    tiles: tuple[RowTile, ...]
    nr: int
    valid: int
    taps: tuple[int, int]
    part: tuple[int, int] | None = None

    @property
    def begins(self) -> bool:
        """Whether the block begins with the start values."""
        return self.part is None or self.part[0] == 0

    @property
    def ends(self) -> bool:
        """Whether its sums are complete."""
        return self.part is None or sum(self.part) == self.code.runs.steps.count

    # Multiplies

    def multiply(self, *, finish: bool) -> None:
        """Emit the block's multiplies and stores; with `finish` woven with the epilogue of one of the same shape."""
        with self._woven(", finish the last" * finish, finish) as (spare, skipped):
            self._begin(spare, skipped)
            rest = self._written_first()
            if rest is None:
                self._end()
        if rest is not None:
            rest()
            self._end()

    def multiply_late(self, *, store: bool, finish: bool) -> None:
        """Emit the multiplies of a block of few steps, which leaves its sums in tiles.

        With `store`, those of the block before, of the same shape, go to `fresh`, each right before its tile is needed
        again: a product and a store between products cost less than products and stores in a row (measured on Emerald
        Rapids: 82 cycles and 113 for four of each). With `finish` woven with the epilogue of the one before that.
        """
        a, r = self.code.a, self.code.r

        def turn(acc: Reg, at: int) -> None:
            if store:
                a.tilestored(self._buffered(r.fresh, at), acc)
            a.tileloadd(acc, Mem(r.bias, at % self.nr * ROW_BYTES))

        with self._woven(", store, finish" * finish, finish) as (spare, skipped):
            self._find_start(spare, skipped)
            if store:
                self._find_fresh()
            places = self._places(self._first_taps(), self.taps[1] - self.taps[0], self.code.runs.inner)
            self._steps(places, turn)
            if not places:  # all of it is padding
                for n in range(len(self.tiles) * self.nr):
                    turn(self.code.tiles[n], n)

    @contextmanager
    def _woven(self, more: str, finish: bool) -> Iterator[tuple[Reg | None, list[int]]]:
        """Mix what is emitted inside with an epilogue, if there is one to `finish`.

        Gives the filter rows that meet padding only, and a vector register where there are any.
        """
        a = self.code.a
        skipped = [t for t in range(self.code.lay.taps) if not self.taps[0] <= t < self.taps[1]]
        with a.scope(), a.section(f"multiply {len(self.tiles)}x{self.nr} tiles{more}"):
            spare = a.vec(self.code.tier.bits, "start") if skipped else None
            with a.aside() as side:
                if finish:
                    self.epilogue()
            with a.aside() as main:
                yield spare, skipped
            a.put(weave(main, side))

    def store_late(self) -> None:
        """Store the sums that the last block of its shape left in tiles."""
        self._find_fresh()
        self._move(self.code.r.fresh, self._tilestored)

    def _find_fresh(self) -> None:
        """Point at the buffer that is not `done`."""
        a, r = self.code.a, self.code.r
        a.mov(r.fresh, r.buffers)
        a.sub(r.fresh, r.done)

    def _begin(self, spare: Reg | None, skipped: list[int]) -> None:
        """Load the accumulators, and find the buffer for complete sums."""
        a = self.code.a
        if self.begins:
            self._start(spare, skipped)
        else:
            self._move_waiting(a.tileloadd)
        if self.ends:
            self._find_fresh()

    def _end(self) -> None:
        """Store the accumulators."""
        if self.ends:
            self._move(self.code.r.fresh, self._tilestored)
        else:
            self._move_waiting(self._tilestored)
        if self.part is not None:
            self._next_waiting()

    def _written_first(self) -> Callable[[], None] | None:
        """Write out the first steps of K, straight on; None if that was all, else what emits the rest."""
        runs = self.code.runs
        at = self._first_taps()
        outer, row_steps = self.taps[1] - self.taps[0], runs.inner * runs.steps.count
        if self.part is not None:
            first, count = self.part
            self._steps([self._place(at, 0, 0, first + c) for c in range(count)])
            return None
        if outer * row_steps <= WOVEN_STEPS:
            self._written_out(at, outer, runs.inner)
            return None
        if row_steps <= WOVEN_STEPS:
            self._written_out(at, 1, runs.inner)
            return lambda: self._further_rows(at, outer - 1)
        self._steps([self._place(at, 0, 0, c) for c in range(min(runs.steps.count, WOVEN_STEPS))])
        return lambda: self._further_steps(at, outer)

    def _place(self, at: tuple[int, int], outer: int, inner: int, step: int) -> tuple[int, int]:
        """Distances of a step's source and weights from the cursors."""
        runs = self.code.runs
        source = outer * runs.outer_stride + inner * runs.inner_stride + step * runs.steps.size
        return at[0] + source, at[1] + (outer * runs.inner + inner) * runs.run_weights + step * runs.step_weights

    def _first_taps(self) -> tuple[int, int]:
        """Distances from the cursors to the source and weights of the first filter row that meets the image."""
        runs = self.code.runs
        return runs.outer_stride * self.taps[0], runs.inner * runs.run_weights * self.taps[0]

    def _places(self, at: tuple[int, int], outer: int, inner: int) -> list[tuple[int, int]]:
        """Where the steps of `outer` x `inner` runs are."""
        count = self.code.runs.steps.count
        return [self._place(at, o, i, c) for o in range(outer) for i in range(inner) for c in range(count)]

    def _written_out(self, at: tuple[int, int], outer: int, inner: int) -> None:
        """All steps of `outer` x `inner` runs, without loops."""
        self._steps(self._places(at, outer, inner))

    def _start(self, spare: Reg | None, skipped: list[int]) -> None:
        """Load every accumulator with the start values of its columns, the same row 16 times."""
        self._find_start(spare, skipped)
        r = self.code.r
        for i in range(len(self.tiles)):
            for j in range(self.nr):
                self.code.a.tileloadd(self._acc(i, j), Mem(r.bias, j * ROW_BYTES))

    def _find_start(self, spare: Reg | None, skipped: list[int]) -> None:
        """Point `bias` at the row of start values; `fresh` is lost.

        Filter rows that meet padding only are not multiplied: what they add is part of the constants.
        """
        code, r = self.code, self.code.r
        a, lay = code.a, code.lay
        row = Mem(r.consts, lay.init, index=r.col, scale=4)
        if spare is None:
            a.lea(r.bias, row)
            return
        a.lea(r.fresh, row)
        a.mov(r.k, r.start)
        for j in range(self.nr):
            a.vmovups(spare, Mem(r.fresh, j * ROW_BYTES))
            for tap in skipped:
                a.vpaddd(spare, spare, Mem(r.fresh, lay.tap(tap) - lay.init + j * ROW_BYTES))
            a.vmovups(Mem(r.k, j * ROW_BYTES), spare)
        if r.bias is not r.k:
            a.mov(r.bias, r.k)

    def _move_waiting(self, move: Callable[[Reg, Mem], None]) -> None:
        """Load or store accumulators that wait for the next part of K."""
        self.code.a.mov(self.code.r.fresh, self.code.r.waiting)
        self._move(self.code.r.fresh, move)

    def _next_waiting(self) -> None:
        """Go on to where the next block's accumulators wait."""
        a, r = self.code.a, self.code.r
        a.mov(r.k, r.waiting)
        a.add(r.k, len(self.tiles) * self.nr * self.code.rows * ROW_BYTES)
        a.mov(r.waiting, r.k)

    def _acc(self, i: int, j: int) -> Reg:
        return self.code.tiles[i * self.nr + j]

    def _steps(self, places: Sequence[tuple[int, int]], turn: Callable[[Reg, int], None] | None = None) -> None:
        """Products of some steps, each step with all accumulators in turn, so that none waits for the one before.

        A register is loaded again right after the last product that needs what it holds. `turn` is called before the
        first product of each accumulator, with its register and number.
        """
        a, code, r = self.code.a, self.code, self.code.r
        pools = {"source": code.plan.source, "weights": code.plan.weights}
        holds: dict[int, tuple[str, int, int]] = {}
        last_use: dict[int, int] = {}
        turns = {"source": 0, "weights": 0}
        products: list[tuple[Reg, Reg, Reg]] = []
        loads: dict[int, list[tuple[Reg, Mem]]] = {}

        def operand(kind: str, which: int, step: int) -> Reg:
            pool = pools[kind]
            number = next((n for n in pool if holds.get(n) == (kind, which, step)), None)
            if number is None:
                number = pool[turns[kind] % len(pool)]
                turns[kind] += 1
                holds[number] = (kind, which, step)
                source, weights = places[step]
                if kind == "source":
                    tile = self.tiles[which]
                    disp = source + tile.line * code.pitches[0] + tile.pixel * code.pitches[1]
                    mem = Mem(r.src, disp, index=r.stride)
                else:
                    mem = Mem(r.weights, weights + which * code.runs.panel_bytes, index=r.width)
                loads.setdefault(last_use.get(number, -1) + 1, []).append((code.tiles[number], mem))
            last_use[number] = len(products)
            return code.tiles[number]

        for step in range(len(places)):
            for i in range(len(self.tiles)):
                for j in range(self.nr):
                    products.append((self._acc(i, j), operand("source", i, step), operand("weights", j, step)))
        requests = len(places) * code.ahead
        fetched = 0
        for number, (acc, x, w) in enumerate(products):
            if turn is not None and number < len(self.tiles) * self.nr:
                turn(acc, number)
            for tile, mem in loads.get(number, ()):
                a.tileloadd(tile, mem)
                if code.streams and mem.base is r.weights:
                    for line in range(0, code.runs.step_weights, ROW_BYTES):
                        a.prefetcht1(Mem(r.weights, mem.disp + STREAM_AHEAD + line))
            code.mac.multiply(a, acc, x, w, None)
            upto = (number + 1) * requests // len(products)
            for i in range(fetched, upto):
                a.prefetcht1(Mem(r.ahead, AHEAD_BYTES * i))
            fetched = upto
        if fetched:
            # Once all is here, on to what is near already.
            a.add(r.ahead, AHEAD_BYTES * fetched)
            a.cmp(r.ahead, r.ahead_end)
            a.cmovae(r.ahead, r.weights)

    def _further_rows(self, at: tuple[int, int], rows: int) -> None:
        """Filter rows after the first, one to a turn of a loop; cursors are put back."""
        a, r, runs = self.code.a, self.code.r, self.code.runs
        row_weights = runs.inner * runs.run_weights
        a.mov(r.k, rows)
        with a.loop(r.k):
            a.add(r.src, runs.outer_stride)
            a.add(r.weights, row_weights)
            self._written_out(at, 1, runs.inner)
        a.sub(r.src, rows * runs.outer_stride)
        a.sub(r.weights, rows * row_weights)

    def _further_steps(self, at: tuple[int, int], outer: int) -> None:
        """What follows the written-out steps of the first run: its rest, and all other runs; cursors are put back."""
        a, r, runs = self.code.a, self.code.r, self.code.runs
        count, run_bytes = runs.steps.count, runs.steps.count * runs.steps.size
        done = min(count, WOVEN_STEPS)
        add_const(a, r.src, done * runs.steps.size)
        add_const(a, r.weights, done * runs.step_weights)
        self._run(at, count - done)
        self._further_runs(at, runs.inner - 1, runs.inner_stride - run_bytes, r.inner_left)
        if outer > 1:
            a.mov(r.ptr, outer - 1)
            a.mov(r.outer_left, r.ptr)
            top = a.label("filter_rows")
            a.bind(top)
            add_const(a, r.src, runs.outer_stride - (runs.inner - 1) * runs.inner_stride - run_bytes)
            self._run(at, count)
            self._further_runs(at, runs.inner - 1, runs.inner_stride - run_bytes, r.inner_left)
            a.mov(r.ptr, r.outer_left)
            a.sub(r.ptr, 1)
            a.mov(r.outer_left, r.ptr)
            a.jnz(top)
        add_const(a, r.src, -((outer - 1) * runs.outer_stride + (runs.inner - 1) * runs.inner_stride + run_bytes))
        a.sub(r.weights, outer * runs.inner * runs.run_weights)

    def _further_runs(self, at: tuple[int, int], runs: int, to_next: int, left: Mem) -> None:
        """`runs` runs, each `to_next` bytes behind the end of the one before."""
        a, r = self.code.a, self.code.r
        if not runs:
            return
        a.mov(r.ptr, runs)
        a.mov(left, r.ptr)
        top = a.label("taps")
        a.bind(top)
        add_const(a, r.src, to_next)
        self._run(at, self.code.runs.steps.count)
        a.mov(r.ptr, left)
        a.sub(r.ptr, 1)
        a.mov(left, r.ptr)
        a.jnz(top)

    def _run(self, at: tuple[int, int], count: int) -> None:
        """`count` steps from the cursors, which move past them."""
        a, r, runs = self.code.a, self.code.r, self.code.runs
        turns, rest = divmod(count, LOOP_STEPS)
        if turns:
            a.mov(r.k, turns)
            with a.loop(r.k):
                self._steps([self._place(at, 0, 0, c) for c in range(LOOP_STEPS)])
                a.add(r.src, LOOP_STEPS * runs.steps.size)
                a.add(r.weights, LOOP_STEPS * runs.step_weights)
        self._steps([self._place(at, 0, 0, c) for c in range(rest)])
        add_const(a, r.src, rest * runs.steps.size)
        add_const(a, r.weights, rest * runs.step_weights)

    def _tilestored(self, tile: Reg, mem: Mem) -> None:
        self.code.a.tilestored(mem, tile)

    def _move(self, buffer: Reg, move: Callable[[Reg, Mem], None]) -> None:
        """Move all accumulators, which lie one behind the other in the buffer."""
        for n in range(len(self.tiles) * self.nr):
            move(self.code.tiles[n], self._buffered(buffer, n))

    def _buffered(self, buffer: Reg, n: int) -> Mem:
        """Where a buffer has the sums of accumulator `n`."""
        return Mem(buffer, n * self.code.rows * ROW_BYTES, index=self.code.r.width)

    # Epilogue

    def epilogue(self) -> None:
        """Emit the epilogue of the block whose accumulators are at `done`, without branches."""
        code = self.code
        down, along = code.out_pitches
        todo = [
            (i * self.nr * code.rows + row, y * down + x * along)
            for i, tile in enumerate(self.tiles)
            for row, y, x in tile.rows
        ]
        group = self._group()
        for first in range(0, len(todo), group):
            self._rows(todo[first : first + group])

    def _group(self) -> int:
        """Rows to finish together: as many as registers hold, in fours of vectors, which are stored together."""
        code = self.code
        room = code.tier.registers - 1 - epilogue_registers(code.spec, code.tier)
        rows = max(1, min(EPILOGUE_VECTORS, room) // self.nr)
        fours = {1: 4, 2: 2}.get(self.nr, 1)
        return rows // fours * fours or rows

    def _rows(self, rows: Sequence[tuple[int, int]]) -> None:
        """Load rows of accumulators from the buffer and finish them."""
        code, r = self.code, self.code.r
        a = code.a
        with a.scope():
            acc = [[a.vec(code.tier.bits, f"acc{i}_{j}") for j in range(self.nr)] for i in range(len(rows))]
            for (at, _), vectors in zip(rows, acc, strict=True):
                for j, v in enumerate(vectors):
                    a.vmovups(v, Mem(r.done, (at + j * code.rows) * ROW_BYTES))
            offsets = [out for _, out in rows]
            emit_epilogue(
                Tile(
                    a, code.tier, code.spec, code.lay, acc, offsets, self.valid, r.args, r.consts, r.done_col,
                    r.done_off, r.ptr,
                )
            )  # fmt: skip
