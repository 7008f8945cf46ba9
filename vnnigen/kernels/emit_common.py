"""Small pieces of generated code that several kernels need: partial vectors, division by a constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from vnnigen.errors import ShapeError
from vnnigen.isa.assembler import Assembler, Mem

Reg = Any


def load_bytes(a: Assembler, xmm: Reg, mem: Mem, count: int) -> None:
    """Load exactly `count` (1..16) bytes into an xmm register, the rest zero, touching nothing beyond them."""
    if count == 16:
        a.vmovdqu(xmm, mem)
        return
    done = 8 if count >= 8 else 4 if count >= 4 else 0
    if done == 8:
        a.vmovq(xmm, mem)
    elif done == 4:
        a.vmovd(xmm, mem)
    else:
        a.vpxor(xmm, xmm, xmm)
    for size, insert in ((4, a.vpinsrd), (2, a.vpinsrw), (1, a.vpinsrb)):
        if count - done >= size:
            insert(xmm, xmm, mem + done, done // size)
            done += size


def store_bytes(a: Assembler, mem: Mem, xmm: Reg, count: int) -> None:
    """Store exactly the lowest `count` (1..16) bytes of an xmm register."""
    if count == 16:
        a.vmovdqu(mem, xmm)
        return
    done = 0
    if count >= 8:
        a.vmovq(mem, xmm)
        done = 8
    for size, extract in ((4, a.vpextrd), (2, a.vpextrw), (1, a.vpextrb)):
        if count - done >= size:
            extract(mem + done, xmm, done // size)
            done += size


def set_mask(a: Assembler, k: Reg, count: int, tmp: Reg) -> None:
    """Set the lowest `count` bits of a mask register."""
    a.mov(tmp, (1 << count) - 1)
    a.kmovq(k, tmp)


@contextmanager
def counted(a: Assembler, counter: Reg, count: int) -> Iterator[None]:
    """Run the body `count` (a constant) times; no loop is emitted for one."""
    if count == 1:
        yield
        return
    a.mov(counter, count)
    with a.loop(counter):
        yield


def div_const(a: Assembler, quotient: Reg, value: Reg, divisor: int, limit: int) -> None:
    """Quotient = value // divisor for 0 <= value < limit, by a multiplication.

    With magic = floor(2^32/d) + 1 the error value * (magic*d - 2^32) / (d * 2^32) stays below 1/d while
    value * d < 2^32 (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
    """
    if divisor * limit >= 1 << 32:
        raise ShapeError(f"{limit} parallel steps of {divisor} are too many to index; split the problem")
    a.mov(quotient, (1 << 32) // divisor + 1)
    a.imul(quotient, value)
    a.shr(quotient, 32)


def add_const(a: Assembler, reg: Reg, value: int) -> None:
    """Reg += value, nothing for 0."""
    if value > 0:
        a.add(reg, value)
    elif value < 0:
        a.sub(reg, -value)


def lane_mask(a: Assembler, valid: int) -> Mem:
    """A constant for VPMASKMOVD: the sign bits of the lowest `valid` of 8 lanes set."""
    mask = np.zeros(8, dtype=np.int32)
    mask[:valid] = -1
    return a.const(mask)


Body = Callable[[], None]
