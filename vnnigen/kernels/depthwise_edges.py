"""Depthwise convolution that reads its source in place, padding included.

Copying a strip into padded scratch rows costs a depthwise kernel a third of its time, for it has little else to do.
Here tiles at the image's edges are code of their own: where a column or row is padding, a register that holds the
padding's value takes the place of the load.  Which tiles those are is known when the code is generated, so rows and
columns of tiles are cut into *classes* with the same padding, most of them one tile thick.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vnnigen.isa.assembler import Mem
from vnnigen.kernels.depthwise import DepthwiseKey, DepthwiseNest, Group
from vnnigen.kernels.emit_common import add_const, set_mask
from vnnigen.kernels.emit_copy import WIDEN
from vnnigen.kernels.geometry import SRC_BYTES, tile_classes
from vnnigen.kernels.mac import MacStream

Reg = Any


class EdgeDepthwise(DepthwiseNest):
    """Emits a depthwise kernel without a copy stage."""

    def __init__(self, key: DepthwiseKey, features: frozenset[str] | None):
        super().__init__(key, features)
        g, b = key.g, key.blocking
        self.column_classes = tile_classes(g.ow, b.tw, g.w, g.sw, g.kw, g.dw, g.left)
        self.live = key.block_columns
        self.source_step = key.block_columns * SRC_BYTES[g.src]
        self.widen = WIDEN.get((g.src, key.mac.element))

    def _begin_strip(self, nr: int, valid: int) -> None:
        """Put the cursor on the window of the first output, which begins `left` columns before the image."""
        self.live = (nr - 1) * self.key.tier.lanes + valid
        super()._begin_strip(nr, valid)
        add_const(self.a, self.cur.src, -self.key.g.left * self.pixel)

    def _taps(self, acc: list[list[Reg]], groups: tuple[Group, ...]) -> None:
        """As in the copied form, with the padding register in place of loads outside the image."""
        a, key, cur, size = self.a, self.key, self.cur, self.size
        bits, vb = key.tier.bits, key.tier.vector_bytes
        stream = MacStream(a, key.mac, bits)
        work = [a.vec(bits, f"col{i}") for i in range({4: 5, 2: 3, 1: len(acc[0])}[size])]
        pad = a.vec(bits, "pad")
        a.vmovups(pad, Mem(cur.consts, self.lay.pad))
        flip = None
        if key.g.src == "s8" and key.mac.element == "u8":
            flip = a.vec(bits, "flip")
            a.vmovups(flip, a.const(np.full(vb, 0x80, dtype=np.uint8)))
        mask = None
        per_load = size * key.tier.lanes
        if self.live % per_load:
            mask = a.kreg("channels")
            set_mask(a, mask, self.live % per_load, a.gpr("mask_bits"))
        for group in groups:
            row = self.rows_inside[group.row]
            there = [c if row and self.columns_inside[c] else None for c in group.columns]
            mixed = [pad] * len(acc[0])
            if any(c is not None for c in there):
                self._load(work, group.row, there, pad, flip, mask)
                mixed = self._mix(work)
            for pixel, kr, taps in group.users:
                at = self.vectors[kr, taps] * self.width * vb
                for q, source in enumerate(mixed):
                    stream.add(acc[pixel][q], source, Mem(cur.weights, at + q * vb))
        stream.flush()

    def _load(
        self, work: list[Reg], row: int, columns: list[int | None], pad: Reg, flip: Reg | None, mask: Reg | None
    ) -> None:
        """Load the columns of a group into the first work registers; spare ones meet zero weights.

        For f32, a group is one column, of as many vectors as there are work registers.
        """
        a = self.a
        plain = self.size == 1
        step = self.key.tier.lanes * SRC_BYTES[self.key.g.src]
        for i in range(len(work) if plain else self.size):
            column = columns[0] if plain else columns[i] if i < len(columns) else None
            if column is None:
                a.vmovaps(work[i], pad)
                continue
            source = Mem(self.cur.src, row * self.row_pitch + column * self.pixel + i * step * plain)
            last = mask is not None and (not plain or i == len(work) - 1)
            move = "vmovdqu8" if last and SRC_BYTES[self.key.g.src] == 1 else "vmovups"
            masked = {"mask": mask, "zero": True} if last else {}
            getattr(a, self.widen or move)(work[i], source, **masked)
            if self.key.g.src == "bf16":
                a.vpslld(work[i], work[i], 16)
            if flip is not None:
                a.vxorps(work[i], work[i], flip)
