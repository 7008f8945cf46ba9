"""What the element kernels share: typed loads, the split of rows into a parallel grid, the loop over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vnnigen.errors import ShapeError
from vnnigen.isa.assembler import Assembler, Mem
from vnnigen.kernels.emit_common import lane_mask, load_bytes, store_bytes
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.types import DType

Reg = Any

SIZE: dict[DType, int] = {"u8": 1, "s8": 1, "s32": 4, "f32": 4, "bf16": 2}
#: Bytes that a grid step reads and writes: enough to forget what starting a step costs, within the L2 cache.
STEP_BYTES = 1 << 16
_WIDEN = {"u8": "vpmovzxbd", "s8": "vpmovsxbd", "bf16": "vpmovzxwd"}


@dataclass(frozen=True, eq=False)
class Run:
    """Constants of one launch; element kernels have no weights, the slot holds the constants too."""

    consts: NDArray[np.uint8]

    @property
    def weights(self) -> NDArray[np.uint8]:
        """What fills the slot of weights."""
        return self.consts


class NoScratch:
    """What keys of kernels without scratch and tiles say."""

    @property
    def scratch(self) -> int:
        """No scratch."""
        return 0

    @property
    def tile_config(self) -> bytes | None:
        """No AMX tiles."""
        return None


def steps_of(rows: int, row_bytes: int, multiple: int) -> tuple[int, int]:
    """Split `rows` into (rows per step, steps); steps are multiples of `multiple` rows, the last one aside."""
    per = max(1, STEP_BYTES // max(row_bytes, 1))
    per = min(-(-per // multiple) * multiple, -(-rows // multiple) * multiple)
    return per, -(-rows // per)


def load_lanes(a: Assembler, tier: TierCode, dst: Reg, mem: Mem, kind: DType, lanes: int, mask: Reg | None) -> None:
    """Load `lanes` elements into 32-bit lanes (integers as s32, floats as f32); exactly these bytes are read.

    `mask` selects the lowest `lanes` lanes where the tier has masks and the vector is not full.
    """
    full = lanes == tier.lanes
    masked = {} if full else {"mask": mask, "zero": True}
    widen = _WIDEN.get(kind)
    if tier.masks:
        getattr(a, widen or "vmovups")(dst, mem, **masked)
    elif full:
        getattr(a, widen or "vmovups")(dst, mem)
    elif widen:
        load_bytes(a, dst.xmm, mem, lanes * SIZE[kind])
        getattr(a, widen)(dst, dst.xmm)
    else:
        a.vmovups(dst, lane_mask(a, lanes))
        a.vmaskmovps(dst, dst, mem)
    if kind == "bf16":
        a.vpslld(dst, dst, 16)


def load_some(a: Assembler, tier: TierCode, v: Reg, mem: Mem, count: int, mask: Reg | None) -> None:
    """Load `count` bytes into a vector; `mask` selects the lowest `count` bytes where the tier has masks."""
    if count == tier.vector_bytes:
        a.vmovups(v, mem)
    elif tier.masks:
        a.vmovdqu8(v, mem, mask=mask, zero=True)
    elif count <= 16:
        load_bytes(a, v.xmm, mem, count)
    else:
        with a.scope():
            high = a.xmm("high")
            load_bytes(a, high, mem + 16, count - 16)
            a.vmovdqu(v.xmm, mem)
            a.vinserti128(v, v, high, 1)


def store_some(a: Assembler, tier: TierCode, mem: Mem, v: Reg, count: int, mask: Reg | None) -> None:
    """Store the lowest `count` bytes of a vector; `mask` as for `load_some`."""
    if count == tier.vector_bytes:
        a.vmovups(mem, v)
    elif tier.masks:
        a.vmovdqu8(mem, v, mask=mask)
    elif count <= 16:
        store_bytes(a, mem, v.xmm, count)
    else:
        with a.scope():
            high = a.xmm("high")
            a.vextracti128(high, v, 1)
            a.vmovdqu(mem, v.xmm)
            store_bytes(a, mem + 16, high, count - 16)


def check_offsets(what: str, *distances: int) -> None:
    """Raise ShapeError where a distance within a tile does not fit the 32-bit offsets of x86 addressing."""
    if max(distances) >= 1 << 31:
        raise ShapeError(f"rows of {what} are too long for the 32-bit offsets of a kernel; split the tensor")


def by_last(a: Assembler, dst: Reg, index: Reg, steps: int, usual: int, last: int) -> None:
    """Dst = `usual`, or `last` in the last of `steps` steps."""
    a.mov(dst, last)
    if steps > 1 and usual != last:
        done = a.label("last_step")
        a.cmp(index, steps - 1)
        a.jz(done)
        a.mov(dst, usual)
        a.bind(done)


def loop_or_skip(a: Assembler, counter: Reg, body: Callable[[], None], *, may_be_zero: bool) -> None:
    """Run the body as often as `counter` says."""
    end = a.label("loop_end")
    if may_be_zero:
        a.test(counter, counter)
        a.jz(end)
    with a.loop(counter):
        body()
    a.bind(end)


def only_last(a: Assembler, index: Reg, steps: int, body: Callable[[], None]) -> None:
    """Run the body only in the last of `steps` steps."""
    skip = a.label("not_last")
    if steps > 1:
        a.cmp(index, steps - 1)
        a.jnz(skip)
    body()
    a.bind(skip)
