"""Products with one to four columns: vectors run along K, and their lanes are added up at the end.

Where lanes are output columns, a product with one column leaves all lanes but one idle.  Here a vector holds
consecutive elements of a source row and meets the same elements of a column; a tile of R rows by n columns ends with
R*n vectors, which a tree of shuffles and additions turns into one: lane r*n + c holds row r's sum with column c.  Rows
of the output follow each other in memory, so that this vector is a piece of the output as it is, and the constants of
the epilogue are the columns' repeated.

f32 is summed in an order of its own (16 partial sums of every 16th element, then the tree) that is the same on all
tiers: narrow vectors take two accumulators.  It depends on the number of columns only, never on threads or tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Assembler, Code, Mem
from vnnigen.kernels import blocking
from vnnigen.kernels.blocking import Blocking
from vnnigen.kernels.emit_common import counted, lane_mask, load_bytes, set_mask
from vnnigen.kernels.emit_epilogue import emit_epilogue
from vnnigen.kernels.emit_store import Tile, splat
from vnnigen.kernels.epilogue import Epilogue
from vnnigen.kernels.geometry import SRC_BYTES, Geometry
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.mac import CHAIN_EXACT, FMA, VNNI, Mac, TierCode
from vnnigen.kernels.nest import LoopNest, NestKey
from vnnigen.kernels.packed import USUAL_THREADS, Packed, PackedRun, Pick, Weights
from vnnigen.kernels.packing import Array, Columns, Run, aligned, fill_constants, pad_vector, start_values
from vnnigen.kernels.types import DType

Reg = Any
#: The widest product.
MAX_COLUMNS = 4
#: Partial sums of an f32 product.
F32_PARTS = 16
#: Multiply instructions of a turn of the K loop, and of all of K that is written out without a loop.
TURN, WHOLE = 32, 96


@dataclass(frozen=True)
class Piece:
    """Elements `first` .. `first + count - 1` of K, multiplied by one instruction."""

    first: int
    count: int


def pieces(k: int, mac: Mac, tier: TierCode) -> tuple[Piece, ...]:
    """Cut K into vectors; bytes that no mask can load leave in pieces of at most 16."""
    size = tier.vector_bytes // mac.element_bytes
    found = [Piece(i, size) for i in range(0, k - size + 1, size)]
    first = k - k % size
    tail = size if tier.masks or mac.element == "f32" else 16
    found += [Piece(i, min(tail, k - i)) for i in range(first, k, tail)]
    return tuple(found)


def accumulators(mac: Mac, tier: TierCode) -> int:
    """Accumulators of one sum: as many as hold all partial sums."""
    return F32_PARTS // tier.lanes if mac.acc == "f32" else 1


@dataclass(frozen=True)
class ThinKey(NestKey):
    """Key of a product with few columns. One tile fills one vector with sums; `blocking.th` rows do."""

    @property
    def tile_name(self) -> str:
        """Rows and columns of a tile."""
        return f"{self.blocking.mr}x{self.g.n}k"

    @property
    def per_pass(self) -> int:
        """Rows whose accumulators fit the registers at a time, beside the sums of all rows of the tile."""
        n, parts, rows = self.g.n, accumulators(self.mac, self.tier), self.blocking.th
        # A source vector, a product, the sums that wait for the row sums; the columns' weights, if rows share them.
        free = self.tier.registers - rows * n - 1 - (self.mac is CHAIN_EXACT) - self.row_sums
        fit = max((r for r in range(2, rows + 1) if r * n * (parts - 1) + n <= free), default=1)
        return -(-rows // -(-rows // fit))

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return Thin(self, features).build()


class Thin(LoopNest):
    """Emits a product with few columns."""

    block_bytes = panel_bytes = 0  # a problem has one column block

    def __init__(self, key: ThinKey, features: frozenset[str] | None):
        super().__init__(key, features)
        self.thin = key
        self.pieces = pieces(key.g.k, key.mac, key.tier)
        # Row sums are a column of ones.
        self.packed_columns = key.g.n + key.row_sums

    def emit_tile(self, th: int, tw: int, nr: int, valid: int) -> None:
        """Emit `th` rows of all columns."""
        a, key, cur, columns = self.a, self.key, self.cur, self.key.g.n
        add = a.vaddps if key.mac.acc == "f32" else a.vpaddd
        with a.scope():
            out = a.vec(key.tier.bits, "out")
            self._sums(out, th, 0, columns)
            if key.row_sums:
                self._subtract_row_sums(out, th)
            add(out, out, Mem(cur.consts, self.lay.init))
            with a.section("epilogue"):
                tile = Tile(
                    a, key.tier, key.spec, self.lay, [[out]], [0], th * columns, cur.args, cur.consts, cur.col, cur.off,
                    cur.ptr,
                )  # fmt: skip
                emit_epilogue(tile)

    def _subtract_row_sums(self, out: Reg, rows: int) -> None:
        """Out -= w_zero_point * (sum of the source row)."""
        a, tier, columns = self.a, self.key.tier, self.key.g.n
        with a.scope():
            sums = a.vec(tier.bits, "row_sums")
            self._sums(sums, rows, columns, 1)
            if columns > 1:
                with a.scope():
                    index = a.vec(tier.bits, "row_of_lane")
                    a.vmovups(index, a.const((np.arange(tier.lanes) // columns).astype(np.int32)))
                    a.vpermd(sums, index, sums)
            a.vpmulld(sums, sums, Mem(self.cur.consts, self.lay.w_zp))
            a.vpsubd(out, out, sums)

    def _sums(self, out: Reg, rows: int, column: int, count: int) -> None:
        """Out[r*count + c] = the sum of products of row r with packed column `column + c`."""
        a, key = self.a, self.thin
        pitch = self.row_pitch
        with a.scope(), a.section(f"multiply {rows}x{count}"):
            acc = [out, *(a.vec(key.tier.bits, f"sum{i}") for i in range(1, rows * count))]
            done = 0
            while done < rows:
                part = min(key.per_pass, rows - done)
                self._pass(acc[done * count : (done + part) * count], [(done + r) * pitch for r in range(part)], column)
                done += part
            add_lanes(a, key.tier, acc, f32=key.mac.acc == "f32")

    def _pass(self, acc: list[Reg], rows: list[int], column: int) -> None:
        """Multiply rows at distances `rows` from the source cursor, over all of K."""
        a, key, cur = self.a, self.key, self.cur
        bits, count = key.tier.bits, len(acc) // len(rows)
        with a.scope():
            parts = [acc]
            for p in range(1, accumulators(key.mac, key.tier)):
                parts.append([a.vec(bits, f"part{p}_{i}") for i in range(len(acc))])
            for v in (v for part in parts for v in part):
                a.vpxord(v, v, v) if key.tier.masks else a.vpxor(v.xmm, v.xmm, v.xmm)
            with a.scope():
                step = _Step(self, parts, rows, column, count)
                whole = sum(p.count == self.pieces[0].count for p in self.pieces)
                unroll = max(1, TURN // len(acc)) // len(parts) * len(parts) or len(parts)
                turns = whole // unroll if len(self.pieces) * len(acc) > WHOLE else 0
                if turns:
                    ahead = unroll * step.source_bytes, unroll * step.weight_bytes
                    with counted(a, cur.k, turns):
                        for i in range(unroll):
                            step.emit(i, i, self.pieces[i])
                        a.add(cur.src, ahead[0])
                        a.add(cur.weights, ahead[1])
                for i in range(turns * unroll, len(self.pieces)):
                    step.emit(i, i - turns * unroll, self.pieces[i])
                if turns:
                    a.sub(cur.src, turns * ahead[0])
                    a.sub(cur.weights, turns * ahead[1])
            for part in parts[1:]:
                for v, other in zip(acc, part, strict=True):
                    a.vaddps(v, v, other)


class _Step:
    """One piece of K for the rows of a pass."""

    def __init__(self, nest: Thin, parts: list[list[Reg]], rows: list[int], column: int, count: int) -> None:
        """Allocate the step's registers in the assembler's current scope."""
        self.a, self.key, self.cur, self.nest = nest.a, nest.key, nest.cur, nest
        self.parts, self.rows, self.column, self.count = parts, rows, column, count
        tier, mac, a = self.key.tier, self.key.mac, self.a
        self.source = a.vec(tier.bits, "src")
        self.product = a.vec(tier.bits, "product") if mac is CHAIN_EXACT else None
        self.weights = [a.vec(tier.bits, f"w{c}") for c in range(count)] if len(rows) > 1 else []
        self.mask: Reg | None = None
        tail = nest.pieces[-1]
        if tier.masks and tail.count != tier.vector_bytes // mac.element_bytes:
            self.mask = a.kreg("tail")
            set_mask(a, self.mask, tail.count, self.cur.k)

    @property
    def source_bytes(self) -> int:
        """Bytes of source of a whole piece."""
        mac = self.key.mac
        return self.key.tier.vector_bytes // mac.element_bytes * SRC_BYTES[self.key.g.src]

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights of a piece."""
        return self.nest.packed_columns * self.key.tier.vector_bytes

    def emit(self, index: int, at: int, piece: Piece) -> None:
        """Multiply piece `index`, which is the one `at` from the cursors."""
        a, cur, tier, first = self.a, self.cur, self.key.tier, self.nest.pieces[index - at].first
        acc = self.parts[index % len(self.parts)]
        disp = at * self.weight_bytes + self.column * tier.vector_bytes
        operands: Sequence[Any] = [Mem(cur.weights, disp + c * tier.vector_bytes) for c in range(self.count)]
        if self.weights:
            for w, mem in zip(self.weights, operands, strict=True):
                a.vmovups(w, mem)
            operands = self.weights
        start = (piece.first - first) * SRC_BYTES[self.key.g.src]
        for r, row in enumerate(self.rows):
            source = self._load(Mem(cur.src, row + start), piece.count)
            for c, w in enumerate(operands):
                self._multiply(acc[r * self.count + c], source, w)

    def _multiply(self, acc: Reg, source: Any, w: Any) -> None:
        a, mac = self.a, self.key.mac
        if isinstance(source, Mem):
            mac.multiply(a, acc, w, source, None)
        elif self.product is None:
            mac.multiply(a, acc, source, w, None)
        else:
            mac.multiply(a, self.product, source, w, None)
            a.vpaddd(acc, acc, self.product)

    def _load(self, mem: Mem, count: int) -> Any:
        """Return `count` elements as they are multiplied: in a register, the rest zero, or still in memory."""
        a, tier, mac, src = self.a, self.key.tier, self.key.mac, self.key.g.src
        v, whole = self.source, count == tier.vector_bytes // mac.element_bytes
        if mac.acc == "f32":
            if whole and self.count == 1 and self.weights:
                return mem
            if whole:
                a.vmovups(v, mem)
            elif tier.masks:
                a.vmovups(v, mem, mask=self.mask, zero=True)
            else:
                a.vmovups(v, lane_mask(a, count))
                a.vmaskmovps(v, v, mem)
            return v
        widen = {"u8": a.vpmovzxbw, "s8": a.vpmovsxbw}[src] if mac is CHAIN_EXACT else None
        if whole:
            (widen or a.vmovups)(v, mem)
        elif tier.masks:
            (widen or a.vmovdqu8)(v, mem, mask=self.mask, zero=True)
        else:
            load_bytes(a, v.xmm, mem, count)
            if widen:
                widen(v, v.xmm)
        if src == "s8" and widen is None:
            # What lies past the end becomes 128 and meets zeros.
            (a.vpxord if tier.masks else a.vpxor)(v, v, splat(a, tier, np.int32(-0x7F7F7F80)))
        return v


def add_lanes(a: Assembler, tier: TierCode, vectors: Sequence[Reg], *, f32: bool) -> None:
    """Lane i of the first register becomes the sum of the lanes of register i; the others lose their values.

    Each level takes two registers, brings one half of the lanes of both into one vector and the other half into
    another, and adds these.
    """
    levels: tuple[tuple[int, str, tuple[int, ...]], ...] = ((4, "vperm2i128", (0x20, 0x31)),)
    if tier.bits == 512:
        levels = (4, "vshufi32x4", (0x44, 0xEE)), (8, "vshufi32x4", (0x88, 0xDD))
    with a.scope(), a.section("add lanes"):
        low = a.vec(tier.bits, "low")
        live = dict(enumerate(vectors))
        for distance, mnemonic, immediates in (*levels, (1, "vpunpck{}dq", ()), (2, "vpunpck{}qdq", ())):
            for i in sorted(live):
                if i & distance or i not in live:
                    continue
                x, y = live[i], live.pop(i + distance, live[i])
                for half, dst in enumerate((low, x)):
                    getattr(a, mnemonic.format("lh"[half]))(dst, x, y, *immediates[half : half + 1])
                (a.vaddps if f32 else a.vpaddd)(x, low, x)


@dataclass(frozen=True, eq=False)
class PackedThin(Packed):
    """Few columns, packed for a tier and a source type."""

    def keys_for(
        self, g: Geometry, _pick: Pick | None = None, _threads: int = USUAL_THREADS
    ) -> tuple[NestKey, ...]:  # fmt: skip
        """The kernel of a product; there is nothing to tune."""
        (run,) = self.runs
        rows = self.tier.lanes // g.n
        steps = max(1, min(blocking.TARGET_STEPS, g.macs // blocking.MIN_STEP_MACS))
        strip = -(-g.oh // (steps * rows)) * rows
        cut = Blocking(rows, 1, 1, 0, 1, strip, 1, copy=False)
        return (ThinKey(self.op, g, self.tier, run.mac, self.epilogue.spec, cut, run.row_sums, 0, g.ldo, 0),)


def why_not(w: Weights, _tier: TierCode) -> str | None:
    """None for a product with few columns."""
    if w.window is not None:
        return "not a product of matrices"
    if w.columns > MAX_COLUMNS:
        return f"more than {MAX_COLUMNS} columns"
    if w.kind == "bf16":
        return "no such kernel for bf16"
    if not w.known:
        return "its columns come with the call, and panels are what the packing kernel makes"
    return None


def pack(op: str, w: Weights, tier: TierCode, src: DType, x_zp: int, epilogue: Epilogue) -> PackedThin:
    """Pack columns side by side, K in the pieces that are multiplied; words without VNNI, zero points subtracted."""
    mac = FMA if w.kind == "f32" else VNNI if tier.vnni else CHAIN_EXACT
    columns = w.values.reshape(w.columns, -1)
    zps, shift = w.zero_point, 128 if src == "s8" and mac is VNNI else 0
    folded = mac is CHAIN_EXACT
    if folded:
        columns = columns.astype(np.int16)
        if zps is not None:
            columns = columns - zps.astype(np.int16)[:, None]
    row_sums = zps is not None and not folded
    if row_sums:
        columns = np.concatenate([columns, np.ones_like(columns[:1])])
    cut = pieces(w.k, mac, tier)
    panels = np.zeros((len(cut), len(columns), tier.vector_bytes // mac.element_bytes), columns.dtype)
    for i, piece in enumerate(cut):
        panels[i, :, : piece.count] = columns[:, piece.first : piece.first + piece.count]
    packed = aligned(panels.nbytes)
    packed.view(panels.dtype)[:] = panels.ravel()
    if mac is FMA:
        start: Array = w.bias.astype(np.float32)
    else:
        sums = w.values.astype(np.int64).reshape(w.columns, -1).sum(axis=1)
        parts = Columns(sums, np.zeros_like(sums) if zps is None else zps, w.bias.astype(np.int64))
        start = start_values(parts, k=w.k, x_zp=x_zp, shift=shift, folded_zp=folded)

    def lanes(values: Any) -> Any:
        """Repeat the columns' values over a vector."""
        return None if values is None else np.resize(values, tier.lanes)

    wide = replace(
        epilogue, m=lanes(epilogue.m), b=lanes(epilogue.b), vectors=tuple(lanes(x) for x in epilogue.vectors)
    )
    consts = fill_constants(
        ConstLayout(tier.lanes), groups=1, columns=slice(None), start=lanes(start).reshape(1, -1), epilogue=wide,
        pad=pad_vector(mac, x_zp, shift), w_zp=lanes(zps)[None] if row_sums else None,
    )  # fmt: skip
    run = PackedRun(Run(0, w.columns, True), mac, row_sums, packed, consts)
    return PackedThin(op, tier, src, epilogue, (run,))
