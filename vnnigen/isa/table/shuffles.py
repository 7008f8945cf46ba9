"""Shuffles, permutations, packs and unpacks. Sources: Intel SDM volume 2."""

from __future__ import annotations

import numpy as np

from vnnigen.isa.insn import insn
from vnnigen.isa.lanes import Lanes, saturate


def _fields(control: int, bits: int, count: int) -> list[int]:
    """Return the first `count` fields of `bits` bits of an immediate."""
    return [control >> (bits * i) & ((1 << bits) - 1) for i in range(count)]


# -- within 128 bits --------------------------------------------------------------------------------------


def _pack(name: str, source: str, to: str) -> None:
    @insn(name, lanes=f"{to} {source} {source}", rows=16, reads_all=True)
    def _(a: Lanes, b: Lanes) -> Lanes:
        return saturate(np.concatenate((a, b), axis=1), to)


_PACKS = (("ssdw", "i4", "i2"), ("usdw", "i4", "u2"), ("sswb", "i2", "i1"), ("uswb", "i2", "u1"))
for _name, _source, _to in _PACKS:
    _pack(f"vpack{_name}", _source, _to)


def _interleave(a: Lanes, b: Lanes) -> Lanes:
    return np.stack((a, b), axis=-1).reshape(len(a), -1)


def _unpack(suffix: str, lane: str) -> None:
    half = 8 // int(lane[1])

    @insn(f"vpunpckl{suffix}", lanes=lane, rows=16, reads_all=True)
    def _(a: Lanes, b: Lanes) -> Lanes:
        return _interleave(a[:, :half], b[:, :half])

    @insn(f"vpunpckh{suffix}", lanes=lane, rows=16, reads_all=True)
    def _(a: Lanes, b: Lanes) -> Lanes:
        return _interleave(a[:, half:], b[:, half:])


for _suffix, _lane in (("bw", "u1"), ("wd", "u2"), ("dq", "u4"), ("qdq", "u8")):
    _unpack(_suffix, _lane)


@insn("vpshufb", lanes="u1", rows=16, reads_all=True)
def _(a: Lanes, index: Lanes) -> Lanes:
    return np.where(index < 128, np.take_along_axis(a, (index & 15).astype(np.intp), axis=1), 0)


@insn("vpshufd", lanes="u4", rows=16, reads_all=True)
def _(a: Lanes, control: int) -> Lanes:
    return a[:, _fields(control, 2, 4)]


@insn("vpshuflw", lanes="u2", rows=16, reads_all=True)
def _(a: Lanes, control: int) -> Lanes:
    return a[:, [*_fields(control, 2, 4), 4, 5, 6, 7]]


@insn("vpshufhw", lanes="u2", rows=16, reads_all=True)
def _(a: Lanes, control: int) -> Lanes:
    return a[:, [0, 1, 2, 3, *(4 + i for i in _fields(control, 2, 4))]]


@insn("vshufps", lanes="u4", rows=16, reads_all=True)
def _(a: Lanes, b: Lanes, control: int) -> Lanes:
    select = _fields(control, 2, 4)
    return np.concatenate((a[:, select[:2]], b[:, select[2:]]), axis=1)


@insn("vpalignr", lanes="u1", rows=16, reads_all=True)
def _(a: Lanes, b: Lanes, by: int) -> Lanes:
    both = np.concatenate((b, a, np.zeros_like(a)), axis=1)
    start = min(by, 32)
    return both[:, start : start + 16]


# -- across the register ----------------------------------------------------------------------------------


def _permute(index: Lanes, table: Lanes) -> Lanes:
    out: Lanes = table[index & (table.size - 1)]
    return out


def _permute_two(low: Lanes, index: Lanes, high: Lanes) -> Lanes:
    both = np.concatenate((low, high))
    out: Lanes = both[index & (both.size - 1)]
    return out


for _suffix, _lane in (("b", "u1"), ("w", "u2"), ("d", "u4"), ("q", "u8")):
    insn(f"vpermt2{_suffix}", lanes=_lane, reads_dest=True, reads_all=True)(_permute_two)
insn("vpermb", lanes="u1", reads_all=True)(_permute)
insn("vpermw", lanes="u2", reads_all=True)(_permute)
insn("vpermd", "vpermps", lanes="u4", reads_all=True)(_permute)


@insn("vpermq", lanes="u8", rows=32, reads_all=True)
def _(a: Lanes, select: Lanes | int) -> Lanes:
    if isinstance(select, int):  # the immediate form works per 256 bits
        return a[:, _fields(select, 2, 4)]
    return _permute(a, select.ravel()).reshape(a.shape)  # indices first, then the table


@insn("vperm2i128", lanes="u8", rows=16)
def _(a: Lanes, b: Lanes, control: int) -> Lanes:
    parts = np.concatenate((a, b))
    out = parts[[control & 3, control >> 4 & 3]]
    out[0] *= np.uint64(not control & 8)
    out[1] *= np.uint64(not control & 128)
    return out


@insn("vshufi32x4", lanes="u4", rows=16, reads_all=True)
@insn("vshufi64x2", lanes="u8", rows=16, reads_all=True)
def _(a: Lanes, b: Lanes, control: int) -> Lanes:
    count = len(a)  # two rows take one bit each, four rows two
    select = _fields(control, count // 2, count)
    return np.concatenate((a[select[: count // 2]], b[select[count // 2 :]]))
