"""Stems: convolutions of few channels, laid out anew so that they fill tiles. Two ways.

*Folded pixels*: a strided convolution of few channels as one of stride 1 and many.  A stem's filter rows are shorter
than a tile's: 7 pixels of 3 channels fill 21 of 64 bytes.  At a stride of s, a block of s x s pixels becomes one pixel
of s*s times the channels (space to depth), and a filter of kh x kw pixels one of ceil(kh/s) x ceil(kw/s), the added
taps being zeros: 4 steps of 48 bytes where there were 7 of 21.  The source is copied to scratch in any case, for its
padding; from there it is folded.

*Spread rows*: for bf16, whose runs of K must be whole dwords without what lies behind them (0 times NaN is NaN).  Each
pixel of a row becomes all that one output reads of the row, filled up with zeros: a filter of kh x kw pixels is one of
kh x 1, a stride along the row is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Assembler, Mem
from vnnigen.kernels.amx_tiling import ROW_BYTES, cut_run
from vnnigen.kernels.emit_common import add_const, counted, set_mask
from vnnigen.kernels.emit_copy import ScratchRows
from vnnigen.kernels.geometry import Geometry
from vnnigen.kernels.packed import Weights

Reg = Any
#: Pixels that one turn of a loop writes.
UNROLL = 8


def fold_of(w: Weights) -> int:
    """The stride by which pixels are folded, 1 where that gives nothing.

    Integers only: what added taps meet may be anything, and 0 times NaN is NaN.
    """
    if w.kind != "int8" or w.window is None or w.groups != 1:
        return 1
    kh, _, sh, sw, dh, dw = w.window
    worth = kh > 1 and sh == sw > 1 and dh == dw == 1 and w.merged and 2 * w.run_elements <= ROW_BYTES
    channels = int(w.values.shape[1])
    return sh if worth and sh * channels <= ROW_BYTES else 1


def fold_weights(w: Weights, s: int) -> Weights:
    """The weights of the folded convolution: channels in the order (row, column, channel) of a folded pixel."""
    oc, ic, kh, kw = w.values.shape
    filled = np.pad(w.values, ((0, 0), (0, 0), (0, -kh % s), (0, -kw % s)))
    rows, columns = filled.shape[2] // s, filled.shape[3] // s
    blocks = filled.reshape(oc, ic, rows, s, columns, s).transpose(0, 3, 5, 1, 2, 4)
    return replace(w, values=blocks.reshape(oc, s * s * ic, rows, columns))


def fold_geometry(g: Geometry, s: int) -> Geometry:
    """The folded convolution's geometry; its source is what folding has written, padding included."""
    kh, kw = -(-g.kh // s), -(-g.kw // s)
    return replace(
        g, h=max(g.oh - 1 + kh, -(-g.h // s)), w=max(g.ow - 1 + kw, -(-g.w // s)), ic=s * s * g.ic, kh=kh, kw=kw,
        sh=1, sw=1, top=0, left=0, padded=False,
    )  # fmt: skip


def spread_of(w: Weights) -> int:
    """Elements, zeros included, of the pixels that rows are spread into; 0 where that is not needed or not worth it."""
    if w.kind != "bf16" or w.window is None or w.groups != 1 or not w.merged:
        return 0
    bytes_of_run = 2 * w.run_elements
    if cut_run(bytes_of_run, exact=True) is not None or bytes_of_run > ROW_BYTES:
        return 0
    return ROW_BYTES // 2


def spread_weights(w: Weights, elements: int) -> Weights:
    """The weights of the spread convolution: channels in the order (filter column, channel), then zeros."""
    oc, ic, kh, kw = w.values.shape
    values = np.zeros((oc, elements, kh, 1), w.values.dtype)
    values[:, : kw * ic, :, 0] = w.values.transpose(0, 3, 1, 2).reshape(oc, kw * ic, kh)
    return replace(w, values=values)


def spread_geometry(g: Geometry, elements: int) -> Geometry:
    """The spread convolution's geometry; its source is what spreading has written, padding included."""
    return replace(
        g, h=max(g.strip_rows(g.oh), g.h), w=g.ow, ic=elements, kw=1, sw=1, dw=1, top=0, left=0, padded=False
    )


def emit_spread(
    a: Assembler, source: Geometry, before: ScratchRows, after: ScratchRows, src: Reg, dst: Reg, counters: list[Reg]
) -> None:
    """Spread copied rows `before` at `src` into rows `after` at `dst`. Masked loads leave zeros behind a run."""
    step = source.sw * before.pixel
    with a.scope(), a.section("spread rows"):
        moved = [a.vec(512, f"run{i}") for i in range(4)]
        run = a.kreg("run")
        set_mask(a, run, source.kw * before.pixel, counters[0])

        def pixels(count: int) -> None:
            for i in range(count):
                a.vmovdqu8(moved[i % 4], Mem(src, i * step), mask=run, zero=True)
                a.vmovups(Mem(dst, i * after.pixel), moved[i % 4])

        walks = ((src, step, before.pitch), (dst, after.pixel, after.pitch))
        _emit_rows(a, after.rows, source.ow, pixels, walks, counters)


def emit_fold(
    a: Assembler, s: int, before: ScratchRows, after: ScratchRows, columns: int, src: Reg, dst: Reg, counters: list[Reg]
) -> None:
    """Fold copied rows `before` at `src` into rows `after` at `dst`, each of `columns` pixels.

    Whole vectors are moved, in the order of addresses: what they spill is written afterwards or never used. So is what
    is read beyond the copied rows.
    """
    chunk = s * before.pixel
    bits = next(b for b in (128, 256, 512) if chunk <= b // 8)
    with a.scope(), a.section("fold pixels"):
        moved = [a.vec(bits, f"pixels{i}") for i in range(4)]

        def pixels(count: int) -> None:
            for i in range(count * s):
                column, row = divmod(i, s)
                a.vmovups(moved[i % 4], Mem(src, column * chunk + row * before.pitch))
                a.vmovups(Mem(dst, i * chunk), moved[i % 4])

        walks = ((src, chunk, s * before.pitch), (dst, s * chunk, after.pitch))
        _emit_rows(a, after.rows, columns, pixels, walks, counters)


def _emit_rows(
    a: Assembler, rows: int, columns: int, pixels: Callable[[int], None], walks: Sequence[tuple[Reg, int, int]],
    counters: list[Reg],
) -> None:  # fmt: skip
    """Emit the loops over rows and their pixels, of which `pixels` moves some from where the cursors are.

    `walks` has each cursor with its bytes from pixel to pixel and from row to row.
    """

    def go(count: int) -> None:
        pixels(count)
        for cursor, step, _ in walks:
            add_const(a, cursor, count * step)

    turns, rest = divmod(columns, UNROLL)
    with counted(a, counters[0], rows):
        if turns:
            with counted(a, counters[1], turns):
                go(UNROLL)
        go(rest)
        for cursor, step, pitch in walks:
            add_const(a, cursor, pitch - columns * step)
