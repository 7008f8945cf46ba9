"""A weight tensor prepared for one tier: what a handle keeps, and the kernels a shape then needs.

Packing happens once per handle and source type; it does not depend on the spatial size, so that one set of panels
serves every input shape.  `keys_for` then says which kernels a problem needs: one, or, on tiers without VNNI, one for
each range of columns with the same chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vnnigen.kernels.ahead import lines_per_turn
from vnnigen.kernels.blocking import L2_BLOCK, choose_blocking, rank_blockings
from vnnigen.kernels.epilogue import Epilogue
from vnnigen.kernels.geometry import Geometry
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.mac import BF16, CHAIN_EXACT, CHAIN_EXACT_NARROW, CHAIN_FAST, FMA, VNNI, Mac, TierCode
from vnnigen.kernels.nest import NestKey, register_need
from vnnigen.kernels.packing import (
    Array,
    Columns,
    Run,
    chain_runs,
    fill_constants,
    filter_cells,
    filter_rows,
    k_order,
    pack_panels,
    pad_runs,
    pad_vector,
    safe_columns,
    start_values,
)
from vnnigen.kernels.types import DType


@dataclass(frozen=True, eq=False)
class Weights:
    """Logical weights of a convolution or GEMM: values [oc, icg, kh, kw] and what belongs to each channel.

    `zero_point` is None when all are 0; `bias` is in accumulator units (s32) or, for f32 weights, f32.
    `merged` says that a row of the kernel is one run of K (see `geometry.segments`); `window` is a convolution's
    (kh, kw, stride h, w, dilation h, w). `known` is False where the values come with the call.
    """

    values: Array
    groups: int
    merged: bool
    zero_point: NDArray[np.int64] | None
    bias: Array
    window: tuple[int, int, int, int, int, int] | None = None
    known: bool = True

    @property
    def columns(self) -> int:
        """Output columns of a group."""
        return int(self.values.shape[0]) // self.groups

    @property
    def k(self) -> int:
        """Multiply-accumulates of one output."""
        return int(np.prod(self.values.shape[1:]))

    @property
    def kind(self) -> str:
        """The kind of operands: "int8", "bf16" or "f32"."""
        return {"int8": "int8", "bfloat16": "bf16", "float32": "f32"}[self.values.dtype.name]

    @property
    def run_elements(self) -> int:
        """Elements of one run of K."""
        _, icg, _, kw = self.values.shape
        return int(kw * icg) if self.merged else int(icg)


@dataclass(frozen=True, eq=False)
class PackedRun:
    """A range of columns, packed for one mac."""

    run: Run
    mac: Mac
    row_sums: bool
    weights: NDArray[np.uint8]
    consts: NDArray[np.uint8]
    finite: bool = True

    @property
    def skip_padding(self) -> bool:
        """Whether filter rows on padding may be left out: not if row sums must see them, nor if 0 * w may be NaN."""
        return self.finite and not self.row_sums


#: Takes a launch's candidates and arrays, gives the index of one.
Pick = Callable[[Sequence[NestKey], PackedRun], int]
#: Threads that a grid is cut for where nobody says how many there are.
USUAL_THREADS = 8


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights packed for a tier and a source type; the arrays' addresses go into the kernels' arguments."""

    op: str
    tier: TierCode
    src: DType
    epilogue: Epilogue
    runs: tuple[PackedRun, ...]
    #: Packs the narrow runs again, as words.
    widen: Callable[[], tuple[PackedRun, ...]] | None = field(default=None, kw_only=True)

    def suited(self, g: Geometry) -> Packed:
        """These weights as geometry `g` wants them: bytes that are widened when loaded if few pixels share them."""
        return self if self.widen is None or is_thin(g, self.tier) else self.wide

    @cached_property
    def wide(self) -> Packed:
        """The same with no narrow run; packed when the first problem wants it."""
        return self if self.widen is None else replace(self, runs=self.widen(), widen=None)

    def keys_for(
        self, g: Geometry, pick: Pick | None = None, _threads: int = USUAL_THREADS
    ) -> tuple[NestKey, ...]:  # fmt: skip
        """The kernels that compute geometry `g` (of all columns) with these weights.

        `pick` is shown each launch's candidates, best first by estimate, and says which to take; without it, the first.
        """
        keys = []
        for launch, r in enumerate(self.runs):
            part = _columns_of(g, r.run)
            need = register_need(r.mac, self.tier, r.row_sums, self.epilogue.spec)
            blocking = choose_blocking(part, self.tier, r.mac, need)
            key = NestKey(
                self.op, part, self.tier, r.mac, self.epilogue.spec, blocking, r.row_sums, r.run.start, g.ldo, launch,
                r.skip_padding,
            )  # fmt: skip
            if pick is not None:
                candidates = [replace(key, blocking=b) for b in rank_blockings(part, self.tier, r.mac, need)]
                key = candidates[pick(candidates, r)]
            keys.append(replace(key, ahead=lines_per_turn(key)))
        return tuple(keys)

    @property
    def chains(self) -> tuple[tuple[int, int, str], ...]:
        """(first column, end, mac) of each range, for `explain`."""
        return tuple((r.run.start, r.run.stop, r.mac.name) for r in self.runs)


#: Bytes of weights, as words, beyond which an L3 cache may not hold them.
L3_WEIGHTS = 8 << 20


def suited(packed: Any, g: Geometry) -> Any:
    """Packed weights of any family as geometry `g` wants them; only those of this module differ."""
    return packed.suited(g) if isinstance(packed, Packed) else packed


def is_thin(g: Geometry, tier: TierCode) -> bool:
    """Whether the exact chain's time is that of reading weights, so that half the bytes pay for widening them.

    How many pixels that takes depends on where weights come from: measured on Zen 5, the two ways meet there.
    """
    pixels, weights = g.images * g.oh * g.ow, 2 * g.groups * g.n * g.k
    few = tier.lanes // 16 if weights <= L2_BLOCK else tier.lanes // 4 if weights <= L3_WEIGHTS else 16
    return pixels <= few


def _columns_of(g: Geometry, run: Run) -> Geometry:
    return g if run.stop - run.start == g.n else replace(g, n=run.stop - run.start)


def as_element(values: Array, mac: Mac) -> Array:
    """Weights in the type that is multiplied; bf16 as its bits, which NumPy can pad and reshape."""
    if values.dtype.name != "bfloat16":
        return values
    return values.astype(np.float32) if mac.element == "f32" else values.view(np.uint16)


def plan_runs(w: Weights, tier: TierCode) -> list[tuple[Run, Mac]]:
    """Which columns use which mac on this tier."""
    whole = Run(0, w.columns, True)
    if w.kind != "int8":
        return [(whole, FMA)]
    if tier.vnni:
        return [(whole, VNNI)]
    k = pad_runs(k_order(w.values, w.groups, w.merged), CHAIN_FAST.k_per_dword)
    safe = safe_columns(k)
    runs: Sequence[Run] = chain_runs(safe, 4 * tier.lanes) if w.groups == 1 else [Run(0, w.columns, bool(safe.all()))]
    exact = CHAIN_EXACT_NARROW if w.zero_point is None else CHAIN_EXACT
    return [(r, CHAIN_FAST if r.safe else exact) for r in runs]


def pack_dot(op: str, w: Weights, tier: TierCode, src: DType, x_zp: int, epilogue: Epilogue) -> Packed:
    """Pack bf16 weights for VDPBF16PS."""
    whole = Run(0, w.columns, True)
    return Packed(op, tier, src, epilogue, (pack_run(w, tier, src, x_zp, epilogue, whole, BF16, BF16.k_per_dword),))


def dot_why_not(w: Weights, tier: TierCode) -> str | None:
    """None where VDPBF16PS can compute these weights."""
    if w.kind != "bf16":
        return "not bf16"
    if not tier.bf16:
        return f"{tier.name} has no VDPBF16PS"
    return None


def pack(op: str, w: Weights, tier: TierCode, src: DType, x_zp: int, epilogue: Epilogue) -> Packed:
    """Pack weights for `tier` and sources of type `src` with zero point `x_zp`."""

    def packed(run: Run, mac: Mac) -> PackedRun:
        return pack_run(w, tier, src, x_zp, epilogue, run, mac, mac.k_per_dword)

    plan = plan_runs(w, tier)
    runs = tuple(packed(run, mac) for run, mac in plan)

    def widen() -> tuple[PackedRun, ...]:
        return tuple(packed(r.run, CHAIN_EXACT) if r.mac.narrow else r for r in runs)

    return Packed(op, tier, src, epilogue, runs, widen=widen if any(mac.narrow for _, mac in plan) else None)


def pack_run(
    w: Weights, tier: TierCode, src: DType, x_zp: int, epilogue: Epilogue, run: Run, mac: Mac, quantum: int
) -> PackedRun:
    """Pack a range of columns; runs of K are filled up to multiples of `quantum` elements."""
    columns = slice(run.start, run.stop)
    ordered = k_order(as_element(w.values, mac), w.groups, w.merged)
    shift = 128 if src == "s8" and mac.element == "u8" else 0
    zps = None if w.zero_point is None else w.zero_point.reshape(w.groups, w.columns)
    folded = mac.element == "s16" and zps is not None
    if mac.element == "s16" and not mac.narrow:
        ordered = ordered.astype(np.int16)
        if zps is not None:
            ordered = ordered - zps.astype(np.int16)[:, :, None, None]
    panels = pack_panels(pad_runs(ordered, quantum)[:, columns], mac.k_per_dword, tier.lanes)
    if mac.acc == "f32":
        start: Array = w.bias.astype(np.float32).reshape(w.groups, w.columns)
    else:
        sums = w.values.astype(np.int64).reshape(w.groups, w.columns, -1).sum(axis=2)
        zeros = np.zeros_like(sums)
        bias = w.bias.astype(np.int64).reshape(w.groups, w.columns)
        parts = Columns(sums, zeros if zps is None else zps, bias)
        start = start_values(parts, k=w.k, x_zp=x_zp, shift=shift, folded_zp=folded)
    kh, kw = w.values.shape[2:]

    def on_padding(parts: int) -> NDArray[np.int32] | None:
        """What each of `parts` of K adds on padding, where all is x_zp'; modulo 2^32 as the start values."""
        if not parts:
            return None
        part: NDArray[np.int64] = ordered.astype(np.int64).reshape(w.groups, w.columns, parts, -1).sum(axis=3)
        values = ((part * (x_zp + shift)) & 0xFFFFFFFF).astype(np.uint32)
        signed: NDArray[np.int32] = values.view(np.int32).transpose(2, 0, 1)
        return signed

    padded = -(-(run.stop - run.start) // tier.lanes) * tier.lanes
    row_sums = zps is not None and not folded
    consts = fill_constants(
        ConstLayout(w.groups * padded), groups=w.groups, columns=columns, start=start, epilogue=epilogue,
        pad=pad_vector(mac, x_zp, shift), w_zp=zps if row_sums else None,
        padding=on_padding(filter_rows(mac, kh)), cells=on_padding(filter_cells(mac, kh, kw)),
    )  # fmt: skip
    finite = w.kind == "int8" or bool(np.isfinite(w.values.astype(np.float32)).all())
    return PackedRun(run, mac, row_sums, panels, consts, finite)
