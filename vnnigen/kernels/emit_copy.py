"""The copy stage: source rows into padded, widened or shifted scratch rows, a strip at a time.

Only the strip that a grid step multiplies is copied, into the calling thread's scratch, where it stays in the cache;
there is no im2col buffer.  Scratch ends in slack, so stores may run over the end of a row: what they spill into is
written after them or never used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vnnigen.isa.assembler import Assembler, Mem
from vnnigen.kernels.emit_common import counted, load_bytes, set_mask
from vnnigen.kernels.geometry import SRC_BYTES, Geometry
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.mac import Mac, TierCode

Reg = Any
#: Instructions that widen source elements to what is multiplied (bf16 is then shifted into the upper half of f32).
WIDEN = {("u8", "s16"): "vpmovzxbw", ("s8", "s16"): "vpmovsxbw", ("bf16", "f32"): "vpmovzxwd"}
#: Bytes that stores and dword reads may run past the last scratch row.
SLACK = 128


@dataclass(frozen=True)
class ScratchRows:
    """Byte sizes of a scratch row: left padding, copied part, right padding, and the pitch of all."""

    left: int
    body: int
    right: int
    pitch: int
    pixel: int
    rows: int

    @property
    def size(self) -> int:
        """Bytes of scratch for the strip."""
        return self.rows * self.pitch + SLACK


def scratch_rows(g: Geometry, mac: Mac, strip: int) -> ScratchRows:
    """Layout of a strip's scratch; rows keep 4-byte alignment and avoid 4096-byte aliasing."""
    pixel = g.ic * mac.element_bytes
    left = g.left * pixel
    width = g.padded_w
    body = max(0, min(g.w, width - g.left)) * pixel
    used = width * pixel
    pitch = -(-used // 4) * 4
    if pitch > 512:
        pitch = -(-pitch // 64) * 64
        # Tiles read sixteen pixels in a row, whose lines meet in any case, and may run on from row to row.
        if pitch % 1024 == 0 and mac.name != "amx":
            pitch += 64
    left = min(left, used)
    return ScratchRows(left, body, pitch - left - body, pitch, pixel, g.strip_rows(strip))


@dataclass
class CopyRegs:
    """Registers of the copy stage: first source row's number, its address, the scratch cursor."""

    row: Reg
    src: Reg
    dst: Reg
    consts: Reg
    count: Reg
    inner: Reg
    limit: Reg


class CopyStage:
    """Emits the copy of one strip."""

    def __init__(self, a: Assembler, tier: TierCode, g: Geometry, mac: Mac, lay: ConstLayout, rows: ScratchRows):
        self.a, self.tier, self.g, self.mac, self.lay, self.rows = a, tier, g, mac, lay, rows
        self.widen = WIDEN.get((g.src, mac.element))
        self.shift = g.src == "s8" and mac.element == "u8"

    def emit(self, r: CopyRegs) -> None:
        """Copy `rows.rows` source rows from number r.row on (rows outside the image become padding)."""
        a, rows = self.a, self.rows
        vb = self.tier.vector_bytes
        with a.scope(), a.section("copy the strip to scratch"):
            pad = a.vec(self.tier.bits, "pad")
            a.vmovups(pad, Mem(r.consts, self.lay.pad))
            flip = None
            if self.shift:
                flip = a.vec(self.tier.bits, "flip")
                a.vmovups(flip, a.const(np.full(vb, 0x80, dtype=np.uint8)))
            unit = vb // (2 if self.widen else 1)
            source_bytes = rows.body // (2 if self.widen else 1)
            k = None
            if self.tier.masks and source_bytes % unit:
                k = a.kreg("row_tail")
                set_mask(a, k, source_bytes % unit // (SRC_BYTES[self.g.src] if self.widen else 1), r.limit)
            a.mov(r.limit, self.g.h)
            a.mov(r.count, rows.rows)
            with a.loop(r.count):
                outside, done = a.label("outside"), a.label("row_done")
                # One unsigned comparison rejects rows above (negative) and below the image.
                a.cmp(r.row, r.limit)
                a.jae(outside)
                self._fill(r, pad, 0, rows.left)
                self._row(r, flip, k, source_bytes, unit)
                self._fill(r, pad, rows.left + rows.body, rows.right)
                a.jmp(done)
                a.bind(outside)
                self._fill(r, pad, 0, rows.pitch)
                a.bind(done)
                a.add(r.row, 1)
                a.add(r.src, self.g.w * self.g.ic * SRC_BYTES[self.g.src])
                a.add(r.dst, rows.pitch)

    def _fill(self, r: CopyRegs, pad: Reg, start: int, count: int) -> None:
        """Fill `count` bytes from `start` of the scratch row, in whole vectors."""
        a = self.a
        vb = self.tier.vector_bytes
        vectors = -(-count // vb)
        if vectors <= 8:
            for v in range(vectors):
                a.vmovups(Mem(r.dst, start + v * vb), pad)
            return
        with a.scope():
            at = a.gpr("fill_at")
            a.lea(at, Mem(r.dst, start))
            with counted(a, r.inner, vectors):
                a.vmovups(Mem(at), pad)
                a.add(at, vb)

    def _row(self, r: CopyRegs, flip: Reg | None, k: Reg | None, count: int, unit: int) -> None:
        """Copy `count` source bytes in units that fill a vector of scratch; the tail never reads past the row."""
        a, base = self.a, self.rows.left
        vb = self.tier.vector_bytes
        full, tail = divmod(count, unit)
        with a.scope():
            regs = [a.vec(self.tier.bits, f"row{i}") for i in range(4)]
            looped = full // 4 if full >= 12 else 0
            at = Mem(r.src)
            to = Mem(r.dst, base)
            if looped:
                src, dst = a.gpr("row_src"), a.gpr("row_dst")
                a.mov(src, r.src)
                a.lea(dst, to)
                at, to = Mem(src), Mem(dst)
                with counted(a, r.inner, looped):
                    for u in range(4):
                        self._move(regs[u], at + u * unit, to + u * vb, flip)
                    a.add(src, 4 * unit)
                    a.add(dst, 4 * vb)
            for u in range(full - 4 * looped):
                self._move(regs[u % 4], at + u * unit, to + u * vb, flip)
            if tail:
                u = full - 4 * looped
                self._tail(regs, at + u * unit, to + u * vb, flip, k, full, tail, unit)

    def _move(self, v: Reg, src: Mem, dst: Mem, flip: Reg | None, k: Reg | None = None) -> None:
        a = self.a
        masked = {} if k is None else {"mask": k, "zero": True}
        if self.widen:
            self._widen(v, src, **masked)
        elif k is not None:
            a.vmovdqu8(v, src, **masked)
        else:
            a.vmovups(v, src)
        if flip is not None:
            a.vxorps(v, v, flip)
        a.vmovups(dst, v)

    def _widen(self, v: Reg, src: Any, **masked: Any) -> None:
        """Widen source elements; a bf16 is the upper half of the f32 of the same value."""
        getattr(self.a, self.widen or "")(v, src, **masked)
        if self.g.src == "bf16":
            self.a.vpslld(v, v, 16)

    def _tail(
        self,
        regs: list[Reg],
        src: Mem,
        dst: Mem,
        flip: Reg | None,
        k: Reg | None,
        full: int,
        tail: int,
        unit: int,
    ) -> None:
        if k is not None:
            self._move(regs[0], src, dst, flip, k)
            return
        vb = self.tier.vector_bytes
        if full:
            # Overlap: the row's last whole unit again.
            self._move(regs[0], src + (tail - unit), dst + (tail - unit) * (vb // unit), flip)
            return
        # A short row without byte masks: up to 16 bytes at a time into the low half of a vector.
        for start in range(0, tail, 16):
            n = min(16, tail - start)
            load_bytes(self.a, regs[0].xmm, src + start, n)
            if self.widen:
                self._widen(regs[0], regs[0].xmm)
            if flip is not None:
                self.a.vxorps(regs[0], regs[0], flip)
            self.a.vmovups(dst + start * (vb // unit), regs[0])
