"""Vector moves: loads, stores, broadcasts, parts, blends, widening, narrowing. Sources: Intel SDM volume 2."""

from __future__ import annotations

import numpy as np

from vnnigen.isa.insn import insn
from vnnigen.isa.lanes import Lanes, saturate

# -- whole registers --------------------------------------------------------------------------------------


@insn("vmovdqu", "vmovups", "vmovdqu32", lanes="u4")
@insn("vmovdqa", "vmovaps", "vmovdqa32", "vmovntdq", "vmovntps", lanes="u4", aligned=True)
@insn("vmovdqu8", lanes="u1")
@insn("vmovdqu16", lanes="u2")
@insn("vmovdqu64", lanes="u8")
@insn("vmovdqa64", lanes="u8", aligned=True)
@insn("vmaskmovps", "vpmaskmovd", lanes="u4", lane_mask=1)
def _(a: Lanes) -> Lanes:
    return a


# -- one element ------------------------------------------------------------------------------------------


@insn("vmovd", lanes="u4", cut=True)
@insn("vmovq", lanes="u8", cut=True)
@insn("vpbroadcastb", lanes="u1")
@insn("vpbroadcastw", lanes="u2")
@insn("vpbroadcastd", "vbroadcastss", lanes="u4")
@insn("vpbroadcastq", lanes="u8")
def _(a: Lanes) -> Lanes:
    return a[:1]


@insn("vmovss", lanes="u4", cut=True, scalar=True)
def _(a: Lanes, *b: Lanes) -> Lanes:
    return np.concatenate((b[0][:1], a[1:])) if b else a[:1]


@insn("vmovhlps", lanes="u8")
def _(a: Lanes, b: Lanes) -> Lanes:
    return np.array((b[1], a[1]))


@insn("vmovlhps", lanes="u8")
def _(a: Lanes, b: Lanes) -> Lanes:
    return np.array((a[0], b[0]))


@insn("vpinsrb", lanes="u1")
@insn("vpinsrw", lanes="u2")
@insn("vpinsrd", lanes="u4")
@insn("vpinsrq", lanes="u8")
def _(a: Lanes, b: Lanes, where: int) -> Lanes:
    out = np.copy(a)
    out[where % a.size] = b[0]
    return out


@insn("vpextrb", lanes="u1")
@insn("vpextrw", lanes="u2")
@insn("vpextrd", lanes="u4")
@insn("vpextrq", lanes="u8")
def _(a: Lanes, where: int) -> Lanes:
    where %= a.size
    return a[where : where + 1]


# -- parts of 128 and 256 bits ----------------------------------------------------------------------------


@insn("vbroadcasti128", "vbroadcasti32x4", lanes="u4", rows=16)
@insn("vbroadcasti64x4", lanes="u8", rows=32)
def _(a: Lanes) -> Lanes:
    return a


@insn("vinserti128", "vinserti32x4", lanes="u4", reads_all=True)
@insn("vinserti64x4", lanes="u8", reads_all=True)
def _(a: Lanes, b: Lanes, where: int) -> Lanes:
    out = np.copy(a)
    out.reshape(-1, b.size)[where % (a.size // b.size)] = b
    return out


def _extracts(lanes_per_part: int, lane: str, *names: str) -> None:
    @insn(*names, lanes=lane, reads_all=True)
    def _(a: Lanes, where: int) -> Lanes:
        parts = a.reshape(-1, lanes_per_part)
        part: Lanes = parts[where % len(parts)]
        return part


_extracts(4, "u4", "vextracti128", "vextracti32x4")
_extracts(4, "u8", "vextracti64x4")

# -- blends -----------------------------------------------------------------------------------------------


@insn("vpblendmb", lanes="u1", merge=1)
@insn("vpblendmw", lanes="u2", merge=1)
@insn("vpblendmd", "vblendmps", lanes="u4", merge=1)
def _(_a: Lanes, b: Lanes) -> Lanes:
    return b


@insn("vpblendd", lanes="u4")
def _(a: Lanes, b: Lanes, which: int) -> Lanes:
    return np.where(which >> np.arange(a.size) & 1, b, a)


@insn("vpblendvb", lanes="i1")
@insn("vblendvps", lanes="i4")
def _(a: Lanes, b: Lanes, mask: Lanes) -> Lanes:
    return np.where(mask < 0, b, a)


# -- widening and narrowing -------------------------------------------------------------------------------


def _same(a: Lanes) -> Lanes:
    # A copy, because NumPy's assignment between overlapping lanes of different sizes is not safe.
    return np.copy(a)


def _narrowing(name: str, to: str, wide: str) -> None:
    @insn(name, lanes=f"{to} {wide}", cut=True)
    def _(a: Lanes) -> Lanes:
        return saturate(a, to)


_WIDENING = (("bw", 2, 1), ("bd", 4, 1), ("bq", 8, 1), ("wd", 4, 2), ("wq", 8, 2), ("dq", 8, 4))
for _suffix, _wide, _narrow in _WIDENING:
    insn(f"vpmovzx{_suffix}", lanes=f"u{_wide} u{_narrow}", cut=True)(_same)
    insn(f"vpmovsx{_suffix}", lanes=f"i{_wide} i{_narrow}", cut=True)(_same)
for _suffix, _wide, _narrow in (("wb", 2, 1), ("db", 4, 1), ("dw", 4, 2)):
    insn(f"vpmov{_suffix}", lanes=f"u{_narrow} u{_wide}", cut=True)(_same)
    _narrowing(f"vpmovs{_suffix}", f"i{_narrow}", f"i{_wide}")
    _narrowing(f"vpmovus{_suffix}", f"u{_narrow}", f"u{_wide}")

# -- vector <-> mask --------------------------------------------------------------------------------------


def _negative(a: Lanes) -> Lanes:
    return a < 0


for _suffix, _size in (("b", 1), ("w", 2), ("d", 4), ("q", 8)):
    insn(f"vpmovm2{_suffix}", lanes=f"i{_size}", compare=True)(_same)
    insn(f"vpmov{_suffix}2m", lanes=f"i{_size}")(_negative)


@insn("vpmovmskb", lanes="i1")
@insn("vmovmskps", lanes="i4")
def _(a: Lanes) -> int:
    return int.from_bytes(np.packbits(a < 0, bitorder="little").tobytes(), "little")
