"""Packing: weights into panels, scales and compensations into the constant block.

A panel is one vector of output columns: `panel[dword of K][column][K elements of the dword]`, the order in which
the microkernel reads it.  Everything that depends on the weights alone is settled here: which chain is safe, and
the start value of every accumulator, which holds the bias and what zero points and the s8 shift add to the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vnnigen.errors import ShapeError
from vnnigen.kernels.epilogue import Epilogue
from vnnigen.kernels.layout import MAX_LAUNCHES, MAX_SCALARS, ConstLayout
from vnnigen.kernels.mac import Mac

Array = NDArray[Any]


@dataclass(frozen=True)
class Run:
    """A range of output columns (of each group) that one launch computes with one chain."""

    start: int
    stop: int
    safe: bool


def aligned(nbytes: int, align: int = 64) -> NDArray[np.uint8]:
    """A zeroed byte array whose data starts at a multiple of `align`."""
    raw = np.zeros(nbytes + align, dtype=np.uint8)
    start = -raw.ctypes.data % align
    out: NDArray[np.uint8] = raw[start : start + nbytes]
    return out


def k_order(w: Array, groups: int, merged: bool) -> Array:
    """Weights [oc, icg, kh, kw] as [groups, columns, runs, elements]: K in the order of the source's bytes."""
    oc, icg, kh, kw = w.shape
    hwi: Array = w.reshape(groups, oc // groups, icg, kh, kw).transpose(0, 1, 3, 4, 2)
    runs: Array = hwi.reshape(groups, oc // groups, -1, kw * icg if merged else icg)
    return runs


def pad_runs(runs: Array, per: int) -> Array:
    """[groups, columns, runs, elements] as [groups, columns, K]: each run filled up to whole dwords with zeros."""
    fill = -runs.shape[3] % per
    return np.pad(runs, ((0, 0), (0, 0), (0, 0), (0, fill))).reshape(*runs.shape[:2], -1)


def pack_panels(k: Array, per: int, lanes: int) -> NDArray[np.uint8]:
    """[groups, columns, K] as packed panels, columns filled up to whole panels with zeros; 64-byte aligned."""
    groups, columns, length = k.shape
    fill = -columns % lanes
    panels = np.pad(k, ((0, 0), (0, fill), (0, 0)))
    panels = panels.reshape(groups, -1, lanes, length // per, per).transpose(0, 1, 3, 2, 4)
    out = aligned(panels.nbytes)
    out.view(panels.dtype)[:] = panels.ravel()
    return out


def safe_columns(k: Array) -> NDArray[np.bool_]:
    """Which columns of [groups, columns, K] never saturate VPMADDUBSW, whatever the u8 source holds.

    The instruction adds neighbouring products in s16; the extremes of the sum are taken by x = 255 on all weights of
    one sign (docs/numerics.md, "Why u8 times s8 is delicate without VNNI").
    """
    pairs = np.asarray(k, dtype=np.int32).reshape(*k.shape[:2], -1, 2)
    high = 255 * np.maximum(pairs, 0).sum(axis=3)
    low = 255 * np.minimum(pairs, 0).sum(axis=3)
    safe: NDArray[np.bool_] = ((high <= 32767) & (low >= -32768)).all(axis=(0, 2))
    return safe


def chain_runs(safe: NDArray[np.bool_], block: int) -> tuple[Run, ...]:
    """Column ranges, in blocks of `block` columns, by the chain they may use; at most MAX_LAUNCHES of them.

    A block is safe when all its columns are. Too many changes are resolved towards the exact chain.
    """
    n = len(safe)
    blocks = [bool(safe[s : s + block].all()) for s in range(0, n, block)]

    def runs_of(flags: list[bool]) -> list[Run]:
        runs: list[Run] = []
        for i, flag in enumerate(flags):
            if runs and runs[-1].safe == flag:
                runs[-1] = Run(runs[-1].start, min(n, (i + 1) * block), flag)
            else:
                runs.append(Run(i * block, min(n, (i + 1) * block), flag))
        return runs

    while len(runs := runs_of(blocks)) > MAX_LAUNCHES:
        smallest = min((r for r in runs if r.safe), key=lambda r: r.stop - r.start)
        for i in range(smallest.start // block, -(-smallest.stop // block)):
            blocks[i] = False
    return tuple(runs)


@dataclass(frozen=True)
class Columns:
    """Per-column integers of a quantized operator: weights' K sums and zero points, bias, in int64 [groups, n]."""

    w_sum: NDArray[np.int64]
    w_zp: NDArray[np.int64]
    bias: NDArray[np.int64]


def start_values(c: Columns, *, k: int, x_zp: int, shift: int, folded_zp: bool) -> NDArray[np.int32]:
    """Start values of the s32 accumulators, so that they end at sum (x - x_zp)(w - w_zp) + bias.

    The sum that the kernel adds is of x' = x + shift with w (or, `folded_zp`, with w - w_zp). Expanding the product:
    -x_zp'*sum(w) + K*x_zp'*w_zp, while -w_zp*sum(x') needs the source and is subtracted at run time. All of it is
    taken modulo 2^32, as the accumulation itself: only the result must fit (checked by `problem`).
    """
    zp = x_zp + shift
    if folded_zp:
        init = c.bias - zp * (c.w_sum - k * c.w_zp)
    else:
        init = c.bias - zp * c.w_sum + k * zp * c.w_zp
    return (init & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


def filter_rows(mac: Mac, kh: int) -> int:
    """Filter rows whose sum over padding the constant block holds: those of integer kernels higher than one row.

    Floating-point padding is 0 and adds nothing.
    """
    return kh if mac.acc == "s32" and kh > 1 else 0


def filter_cells(mac: Mac, kh: int, kw: int) -> int:
    """Taps whose sum over padding the constant block holds: those of integer kernels wider than one, but on tiles."""
    return kh * kw if mac.acc == "s32" and kw > 1 and mac.name != "amx" else 0


def fill_constants(
    lay: ConstLayout,
    *,
    groups: int,
    columns: slice,
    start: Array,
    epilogue: Epilogue,
    pad: Array,
    w_zp: NDArray[np.int64] | None,
    padding: NDArray[np.int32] | None = None,
    cells: NDArray[np.int32] | None = None,
) -> NDArray[np.uint8]:
    """The constant block of one launch: `columns` of each group, everything padded to the layout's columns.

    `padding`, [taps, groups, n], is what each filter row adds where it meets padding only, `cells` what each tap does.
    """
    rows, taps = (() if values is None else values for values in (padding, cells))
    lay = replace(lay, vectors=len(epilogue.vectors), taps=len(rows), cells=len(taps))
    out = aligned(lay.size)
    per_group = lay.columns // groups
    total = start.shape[1]

    def put(offset: int, values: Array, dtype: type) -> None:
        part = np.asarray(values).reshape(groups, total)[:, columns]
        view: Array = out[offset : offset + 4 * lay.columns].view(dtype).reshape(groups, per_group)
        view[:, : part.shape[1]] = part

    out[lay.pad : lay.pad + 64] = np.resize(pad, 64 // pad.itemsize).view(np.uint8)
    out[lay.zero_point : lay.zero_point + 64].view(np.int16)[:] = epilogue.zero_point
    if len(epilogue.scalars) > MAX_SCALARS:
        raise ShapeError(f"the post-ops need {len(epilogue.scalars)} scalars, at most {MAX_SCALARS} are supported")
    out[lay.scalars : lay.scalars + 4 * len(epilogue.scalars)].view(np.float32)[:] = epilogue.scalars
    put(lay.init, start, start.dtype.type)
    for offset, values, dtype in (
        (lay.m, epilogue.m, np.float32),
        (lay.b, epilogue.b, np.float32),
        (lay.w_zp, w_zp, np.int32),
        *((lay.tap(i), values, np.int32) for i, values in enumerate(rows)),
        *((lay.cell(i), values, np.int32) for i, values in enumerate(taps)),
        *((lay.vector(i), values, np.float32) for i, values in enumerate(epilogue.vectors)),
    ):
        if values is not None:
            put(offset, values, dtype)
    return out


def pad_vector(mac: Mac, x_zp: int, shift: int) -> Array:
    """One element of what spatial padding holds, in the type that is multiplied."""
    if mac.acc == "f32":
        return np.zeros(1, dtype=np.float32)
    if mac.element == "s16":
        return np.array([x_zp], dtype=np.int16)
    return np.array([x_zp + shift], dtype=np.int8 if mac.element == "s8" else np.uint8)
