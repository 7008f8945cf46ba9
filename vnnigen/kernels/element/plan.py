"""From a conversion of rows to launches: which kernel, over which cut of the tensor, with which constants."""

from __future__ import annotations

from typing import Any

from vnnigen.kernels.element.affine import Affine
from vnnigen.kernels.element.common import SIZE, Run
from vnnigen.kernels.element.narrow import NarrowKey
from vnnigen.kernels.element.rows import WIDE, BytesKey, ConvertKey, Cut, RowsKey, cuts
from vnnigen.kernels.element.transpose import TransposeKey
from vnnigen.kernels.mac import TIER_CODE, TierCode
from vnnigen.kernels.packing import aligned

Launches = list[tuple[RowsKey, Run]]
#: Channels up to which images have kernels of their own.
NARROW = 4


def code_tier(bits: int) -> TierCode | None:
    """The tier that element kernels are generated for: they use no dot products, only the width matters."""
    return {512: TIER_CODE["avx512"], 256: TIER_CODE["avx2"]}.get(bits)


def convert_rows(
    f: Affine, tier: TierCode, rows: int, channels: int, *, op: str, vbmi: bool, dst_pitch: int | None = None,
    dst_offset: int = 0, slot: int = 0, first: int = 0,
) -> Launches:  # fmt: skip
    """Launches, numbered from `first`, that convert [rows, channels] into rows `dst_pitch` apart.

    `vbmi` allows the table kernel, which is as fast as a copy.
    """
    whole = dst_pitch in (None, channels)
    pitch = channels if dst_pitch is None else dst_pitch
    table = vbmi and tier.masks and f.tabulated and not f.identity
    if table or f.identity:
        size = SIZE[f.src]
        parts: tuple[Cut, ...] = (Cut(rows, channels * size),)
        if whole:
            parts = cuts(rows, channels * size, WIDE * tier.vector_bytes, per_channel=False)
        consts = Run(f.table() if table else aligned(64))
    else:
        parts = cuts(rows, channels, WIDE * tier.lanes, per_channel=f.per_channel) if whole else (Cut(rows, channels),)
        size, columns = 1, parts[0].cols
        consts = Run(f.consts(columns))
    launches: Launches = []
    for i, part in enumerate(parts):
        shape: dict[str, Any] = {
            "rows": part.rows, "cols": part.cols, "src_pitch": part.cols,
            "dst_pitch": part.cols if whole else pitch * size, "src_offset": part.offset,
            "dst_offset": part.offset + dst_offset * size, "slot": slot, "launch": first + i,
        }  # fmt: skip
        key: RowsKey
        if table or f.identity:
            key = BytesKey(op, tier, "u8", "u8", **shape, table=table)
        else:
            spec = f.epilogue.spec
            key = ConvertKey(op, tier, f.src, spec.out, **shape, spec=spec, has_init=f.has_init, columns=columns)
        launches.append((key, consts))
    return launches


def reorder_image(
    f: Affine, tier: TierCode, shape: tuple[int, int, int], *, to_nhwc: bool, extras: frozenset[str] = frozenset()
) -> list[tuple[NarrowKey | TransposeKey, Run]]:
    """The launch that converts images of (batch, channels, pixels) from NCHW to NHWC, or back."""
    batch, channels, pixels = shape
    spec = None if f.identity else f.epilogue.spec
    key = TransposeKey(
        tier, batch, channels, pixels, f.src, f.out, spec, f.has_init, f.per_channel, to_nhwc,
        extras if tier.masks else frozenset(),
    )  # fmt: skip
    if channels <= NARROW and not key.image and "bf16" not in (f.src, f.out):
        narrow = NarrowKey(tier, batch, channels, pixels, f.src, f.out, spec, f.has_init, to_nhwc)
        wide = f.spread(tier.lanes) if f.per_channel else f
        return [(narrow, Run(wide.consts(narrow.columns)))]
    # Constants are of the side that is f32: of a channel after the other there, or of neighbours.
    if key.image and f.per_channel and to_nhwc == (f.src == "f32"):
        f = f.spread(tier.lanes)
    return [(key, Run(f.consts(key.columns)))]
