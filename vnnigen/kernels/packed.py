"""A weight tensor prepared for one tier: what a handle keeps, and the kernels a shape then needs.

Packing happens once per handle and source type; it does not depend on the spatial size, so that one set of panels
serves every input shape.  `keys_for` then says which kernels a problem needs: one, or, on tiers without VNNI, one for
each range of columns with the same chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vnnigen.kernels.blocking import choose_blocking
from vnnigen.kernels.epilogue import Epilogue
from vnnigen.kernels.geometry import Geometry
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.mac import CHAIN_EXACT, CHAIN_FAST, FMA, VNNI, Mac, TierCode
from vnnigen.kernels.nest import NestKey, register_need
from vnnigen.kernels.packing import (
    Array,
    Columns,
    Run,
    chain_runs,
    fill_constants,
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
    (kh, kw, stride h, w, dilation h, w).
    """

    values: Array
    groups: int
    merged: bool
    zero_point: NDArray[np.int64] | None
    bias: Array
    window: tuple[int, int, int, int, int, int] | None = None

    @property
    def columns(self) -> int:
        """Output columns of a group."""
        return int(self.values.shape[0]) // self.groups

    @property
    def k(self) -> int:
        """Multiply-accumulates of one output."""
        return int(np.prod(self.values.shape[1:]))


@dataclass(frozen=True, eq=False)
class PackedRun:
    """A range of columns, packed for one mac."""

    run: Run
    mac: Mac
    row_sums: bool
    weights: NDArray[np.uint8]
    consts: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights packed for a tier and a source type; the arrays' addresses go into the kernels' arguments."""

    op: str
    tier: TierCode
    src: DType
    epilogue: Epilogue
    runs: tuple[PackedRun, ...]

    def keys_for(self, g: Geometry) -> tuple[NestKey, ...]:
        """The kernels that compute geometry `g` (of all columns) with these weights."""
        keys = []
        for launch, r in enumerate(self.runs):
            part = _columns_of(g, r.run)
            need = register_need(r.mac, self.tier, r.row_sums)
            blocking = choose_blocking(part, self.tier, r.mac, need)
            keys.append(
                NestKey(
                    self.op,
                    part,
                    self.tier,
                    r.mac,
                    self.epilogue.spec,
                    blocking,
                    r.row_sums,
                    r.run.start,
                    g.ldo,
                    launch,
                )
            )
        return tuple(keys)

    @property
    def chains(self) -> tuple[tuple[int, int, str], ...]:
        """(first column, end, mac) of each range, for `explain`."""
        return tuple((r.run.start, r.run.stop, r.mac.name) for r in self.runs)


def _columns_of(g: Geometry, run: Run) -> Geometry:
    return g if run.stop - run.start == g.n else replace(g, n=run.stop - run.start)


def plan_runs(w: Weights, tier: TierCode) -> list[tuple[Run, Mac]]:
    """Which columns use which mac on this tier."""
    whole = Run(0, w.columns, True)
    if w.values.dtype == np.float32:
        return [(whole, FMA)]
    if tier.vnni:
        return [(whole, VNNI)]
    k = pad_runs(k_order(w.values, w.groups, w.merged), CHAIN_FAST.k_per_dword)
    safe = safe_columns(k)
    runs: Sequence[Run] = chain_runs(safe, 4 * tier.lanes) if w.groups == 1 else [Run(0, w.columns, bool(safe.all()))]
    return [(r, CHAIN_FAST if r.safe else CHAIN_EXACT) for r in runs]


def pack(op: str, w: Weights, tier: TierCode, src: DType, x_zp: int, epilogue: Epilogue) -> Packed:
    """Pack weights for `tier` and sources of type `src` with zero point `x_zp`."""
    runs = tuple(_pack_run(w, tier, src, x_zp, epilogue, run, mac) for run, mac in plan_runs(w, tier))
    return Packed(op, tier, src, epilogue, runs)


def _pack_run(w: Weights, tier: TierCode, src: DType, x_zp: int, epilogue: Epilogue, run: Run, mac: Mac) -> PackedRun:
    columns = slice(run.start, run.stop)
    ordered = k_order(w.values, w.groups, w.merged)
    shift = 128 if src == "s8" and mac.element == "u8" else 0
    zps = None if w.zero_point is None else w.zero_point.reshape(w.groups, w.columns)
    folded = mac.element == "s16" and zps is not None
    if mac.element == "s16":
        ordered = ordered.astype(np.int16)
        if zps is not None:
            ordered = ordered - zps.astype(np.int16)[:, :, None, None]
    panels = pack_panels(pad_runs(ordered, mac.k_per_dword)[:, columns], mac.k_per_dword, tier.lanes)
    if mac.element == "f32":
        start: Array = w.bias.astype(np.float32).reshape(w.groups, w.columns)
    else:
        sums = w.values.astype(np.int64).reshape(w.groups, w.columns, -1).sum(axis=2)
        zeros = np.zeros_like(sums)
        bias = w.bias.astype(np.int64).reshape(w.groups, w.columns)
        parts = Columns(sums, zeros if zps is None else zps, bias)
        start = start_values(parts, k=w.k, x_zp=x_zp, shift=shift, folded_zp=folded)
    padded = -(-(run.stop - run.start) // tier.lanes) * tier.lanes
    row_sums = zps is not None and not folded
    consts = fill_constants(
        ConstLayout(w.groups * padded), groups=w.groups, columns=columns, start=start, epilogue=epilogue,
        pad=pad_vector(mac, x_zp, shift), w_zp=zps if row_sums else None,
    )  # fmt: skip
    return PackedRun(run, mac, row_sums, panels, consts)
