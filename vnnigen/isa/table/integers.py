"""Packed integer arithmetic, logic, comparisons, shifts and dot products. Sources: Intel SDM volume 2."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from vnnigen.isa.flags import Flags
from vnnigen.isa.insn import insn
from vnnigen.isa.lanes import Lanes, saturate

BWDQ = (("b", 1), ("w", 2), ("d", 4), ("q", 8))

# -- add, subtract, multiply, minimum, maximum ------------------------------------------------------------

for _s, _size in BWDQ:
    insn(f"vpadd{_s}", lanes=f"i{_size}")(np.add)
    insn(f"vpsub{_s}", lanes=f"i{_size}")(np.subtract)
for _s, _size in BWDQ[:3]:
    insn(f"vpabs{_s}", lanes=f"i{_size}")(np.abs)
    insn(f"vpmins{_s}", lanes=f"i{_size}")(np.minimum)
    insn(f"vpmaxs{_s}", lanes=f"i{_size}")(np.maximum)
    insn(f"vpminu{_s}", lanes=f"u{_size}")(np.minimum)
    insn(f"vpmaxu{_s}", lanes=f"u{_size}")(np.maximum)


def _saturating(name: str, lane: str, op: Callable[[Lanes, Lanes], Lanes]) -> None:
    @insn(name, lanes=lane)
    def _(a: Lanes, b: Lanes) -> Lanes:
        return saturate(op(a.astype("i4"), b), lane)


for _s, _size in BWDQ[:2]:
    _saturating(f"vpadds{_s}", f"i{_size}", operator.add)
    _saturating(f"vpaddus{_s}", f"u{_size}", operator.add)
    _saturating(f"vpsubs{_s}", f"i{_size}", operator.sub)
    _saturating(f"vpsubus{_s}", f"u{_size}", operator.sub)

insn("vpmullw", lanes="i2")(np.multiply)
insn("vpmulld", lanes="i4")(np.multiply)


@insn("vpmulhw", lanes="i2")
@insn("vpmulhuw", lanes="u2")
def _(a: Lanes, b: Lanes) -> Lanes:
    return (a.astype("i8") * b) >> 16


# -- sums of products -------------------------------------------------------------------------------------


def _pairs(p: Lanes) -> Lanes:
    return p[0::2] + p[1::2]


def _fours(p: Lanes) -> Lanes:
    return _pairs(_pairs(p))


@insn("vpmaddwd", lanes="i4 i2 i2", reads_all=True)
def _(a: Lanes, b: Lanes) -> Lanes:
    return _pairs(np.multiply(a, b, dtype="i4"))


@insn("vpmaddubsw", lanes="i2 u1 i1", reads_all=True)
def _(a: Lanes, b: Lanes) -> Lanes:
    return saturate(_pairs(np.multiply(a, b, dtype="i4")), "i2")


@insn("vpdpbusd", lanes="i4 u1 i1", reads_dest=True)
def _(acc: Lanes, a: Lanes, b: Lanes) -> Lanes:
    # A product fits s16, a sum of two fits s32 but not s16: widen after the product.
    return acc + _fours(np.multiply(a, b, dtype="i2").astype("i4"))


@insn("vpdpbusds", lanes="i4 u1 i1", reads_dest=True)
def _(acc: Lanes, a: Lanes, b: Lanes) -> Lanes:
    return saturate(acc.astype("i8") + _fours(np.multiply(a, b, dtype="i4")), "i4")


@insn("vpdpwssd", lanes="i4 i2 i2", reads_dest=True)
def _(acc: Lanes, a: Lanes, b: Lanes) -> Lanes:
    return acc + _pairs(np.multiply(a, b, dtype="i4"))


@insn("vpdpwssds", lanes="i4 i2 i2", reads_dest=True)
def _(acc: Lanes, a: Lanes, b: Lanes) -> Lanes:
    return saturate(acc.astype("i8") + _pairs(np.multiply(a, b, dtype="i8")), "i4")


# -- logic ------------------------------------------------------------------------------------------------


def _andnot(a: Lanes, b: Lanes) -> Lanes:
    return ~a & b


_LOGIC = (("and", np.bitwise_and), ("andn", _andnot), ("or", np.bitwise_or), ("xor", np.bitwise_xor))
for _name, _op in _LOGIC:
    insn(f"vp{_name}", f"v{_name}ps", f"vp{_name}d", lanes="u4")(_op)
    insn(f"vp{_name}q", lanes="u8")(_op)


@insn("vpternlogd", lanes="u4", reads_dest=True)
@insn("vpternlogq", lanes="u8", reads_dest=True)
def _(a: Lanes, b: Lanes, c: Lanes, table: int) -> Lanes:
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


# -- comparisons ------------------------------------------------------------------------------------------


def _never(a: Lanes, _b: Lanes) -> Lanes:
    return np.zeros(a.shape, bool)


def _always(a: Lanes, _b: Lanes) -> Lanes:
    return np.ones(a.shape, bool)


_PREDICATES = (np.equal, np.less, np.less_equal, _never, np.not_equal, np.greater_equal, np.greater, _always)


def _compare(a: Lanes, b: Lanes, predicate: int) -> Lanes:
    return np.asarray(_PREDICATES[predicate & 7](a, b))


for _s, _size in BWDQ:
    insn(f"vpcmpeq{_s}", lanes=f"i{_size}", compare=True)(np.equal)
    insn(f"vpcmpgt{_s}", lanes=f"i{_size}", compare=True)(np.greater)
    insn(f"vpcmp{_s}", lanes=f"i{_size}")(_compare)
    insn(f"vpcmpu{_s}", lanes=f"u{_size}")(_compare)


def _tests(suffix: str, size: int) -> None:
    @insn(f"vptestm{suffix}", lanes=f"u{size}")
    def _(a: Lanes, b: Lanes) -> Lanes:
        return np.not_equal(a & b, 0)

    @insn(f"vptestnm{suffix}", lanes=f"u{size}")
    def _(a: Lanes, b: Lanes) -> Lanes:
        return np.equal(a & b, 0)


for _s, _size in BWDQ:
    _tests(_s, _size)


@insn("vptest", lanes="u8", dest=False)
def _(f: Flags, a: Lanes, b: Lanes) -> None:
    f.set(cf=int(not (~a & b).any()), zf=int(not (a & b).any()), sf=0, of=0, pf=0)


# -- shifts -----------------------------------------------------------------------------------------------


def _shift(name: str, lane: str, op: Callable[[Lanes, int], Lanes], arithmetic: bool) -> None:
    bits = 8 * int(lane[1])
    kind = lane.replace("u", "i") if arithmetic else lane

    @insn(name, lanes=f"{kind} {kind} u8", reads_all=bits == 16, whole=2)
    def _(a: Lanes, count: Lanes | int) -> Lanes:
        # The count is an immediate, or the low 64 bits of an xmm register or m128.
        by = count if isinstance(count, int) else int(count[0])
        if by >= bits:
            return op(a, bits - 1) if arithmetic else np.zeros_like(a)
        return op(a, by)


for _s, _size in BWDQ[1:]:
    _shift(f"vpsll{_s}", f"u{_size}", np.left_shift, False)
    _shift(f"vpsrl{_s}", f"u{_size}", np.right_shift, False)
    _shift(f"vpsra{_s}", f"u{_size}", np.right_shift, True)


@insn("vpslldq", lanes="u1", rows=16)
def _(a: Lanes, by: int) -> Lanes:
    out = np.zeros_like(a)
    out[:, by:] = a[:, : max(16 - by, 0)]
    return out


@insn("vpsrldq", lanes="u1", rows=16)
def _(a: Lanes, by: int) -> Lanes:
    out = np.zeros_like(a)
    out[:, : max(16 - by, 0)] = a[:, by:]
    return out
