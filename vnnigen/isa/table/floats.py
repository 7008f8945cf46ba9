"""Arithmetic and conversions of float32 and bfloat16 under MXCSR 0x1F80. Sources: Intel SDM volume 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vnnigen.isa.insn import insn
from vnnigen.isa.lanes import Lanes, f32_to_bf16, flush, fma, fma_flushed, nan_rule

Op = Callable[..., Any]


def _low_lane(op: Op) -> Op:
    """Make the scalar form of a packed meaning: lane 0 is computed, the others are the first source's."""

    def scalar(a: Lanes, *others: Lanes) -> Lanes:
        out: Lanes = a.copy()
        out[:1] = op(a[:1], *(x[:1] for x in others))
        return out

    return scalar


# -- arithmetic -------------------------------------------------------------------------------------------


def _binary(op: Op) -> Op:
    def meaning(a: Lanes, b: Lanes) -> Lanes:
        return nan_rule(op(a, b), a, b)

    return meaning


def _max(a: Lanes, b: Lanes) -> Lanes:
    return np.where(a > b, a, b)  # the second source when unordered or equal, not made quiet


def _min(a: Lanes, b: Lanes) -> Lanes:
    return np.where(a < b, a, b)


for _name, _op in (
    ("add", _binary(np.add)),
    ("sub", _binary(np.subtract)),
    ("mul", _binary(np.multiply)),
    ("div", _binary(np.divide)),
    ("max", _max),
    ("min", _min),
):
    insn(f"v{_name}ps", lanes="f4")(_op)
    insn(f"v{_name}ss", lanes="f4", scalar=True)(_low_lane(_op))


@insn("vsqrtps", lanes="f4")
def _(a: Lanes) -> Lanes:
    return nan_rule(np.sqrt(a), a)


def _fused(form: str, product_sign: int, addend_sign: int) -> Op:
    order = [int(c) - 1 for c in form]

    def meaning(*sources: Lanes) -> Lanes:
        x, y, z = (sources[i] for i in order)
        r = fma(x if product_sign > 0 else -x, y, z if addend_sign > 0 else -z)
        return nan_rule(r, x, y, z)

    return meaning


for _form in ("132", "213", "231"):
    for _name, _p, _a in (("fmadd", 1, 1), ("fmsub", 1, -1), ("fnmadd", -1, 1), ("fnmsub", -1, -1)):
        _meaning = _fused(_form, _p, _a)
        insn(f"v{_name}{_form}ps", lanes="f4", reads_dest=True)(_meaning)
        insn(f"v{_name}{_form}ss", lanes="f4", reads_dest=True, scalar=True)(_low_lane(_meaning))


# -- comparison -------------------------------------------------------------------------------------------

# Predicates 0..15; 16..31 differ only in which NaNs signal.
_ORDERED: tuple[Op, ...] = (
    lambda a, b: a == b,
    lambda a, b: a < b,
    lambda a, b: a <= b,
    lambda a, b: np.isnan(a) | np.isnan(b),
    lambda a, b: a != b,
    lambda a, b: ~(a < b),
    lambda a, b: ~(a <= b),
    lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    lambda a, b: ~((a < b) | (a > b)),
    lambda a, b: ~(a >= b),
    lambda a, b: ~(a > b),
    lambda a, b: np.zeros(a.shape, bool),
    lambda a, b: (a < b) | (a > b),
    lambda a, b: a >= b,
    lambda a, b: a > b,
    lambda a, b: np.ones(a.shape, bool),
)


@insn("vcmpps", lanes="i4 f4", compare=True)
def _(a: Lanes, b: Lanes, predicate: int) -> Lanes:
    out: Lanes = _ORDERED[predicate & 15](a, b)
    return out


# -- conversion -------------------------------------------------------------------------------------------


@insn("vcvtdq2ps", lanes="f4 i4")
def _(a: Lanes) -> Lanes:
    return a.astype("f4")


def _to_int(rounded: Lanes) -> Lanes:
    """float32 integers to s32; what does not fit, and NaN, becomes the "integer indefinite" 0x80000000."""
    fits = (rounded >= -(2.0**31)) & (rounded < 2.0**31)
    return np.where(fits, rounded, np.float32(-(2.0**31))).astype("i4")


@insn("vcvtps2dq", lanes="i4 f4")
def _(a: Lanes) -> Lanes:
    return _to_int(np.rint(a))


@insn("vcvttps2dq", lanes="i4 f4")
def _(a: Lanes) -> Lanes:
    return _to_int(np.trunc(a))


_ROUND: tuple[Op, ...] = (np.rint, np.floor, np.ceil, np.trunc)


def _round(a: Lanes, control: int, fraction_bits: int) -> Lanes:
    op = _ROUND[0 if control & 4 else control & 3]  # bit 2: MXCSR's mode, which is nearest
    scale = 2.0**fraction_bits
    r = (op(a.astype("f8") * scale) / scale).astype("f4")
    return nan_rule(r, a)


@insn("vroundps", lanes="f4")
def _(a: Lanes, control: int) -> Lanes:
    return _round(a, control, 0)


@insn("vrndscaleps", lanes="f4")
def _(a: Lanes, control: int) -> Lanes:
    return _round(a, control, control >> 4)


# -- bfloat16 ---------------------------------------------------------------------------------------------


@insn("vcvtneps2bf16", lanes="u2 f4", cut=True)
def _(a: Lanes) -> Lanes:
    return f32_to_bf16(a)


@insn("vcvtne2ps2bf16", lanes="u2 f4 f4", reads_all=True)
def _(a: Lanes, b: Lanes) -> Lanes:
    return f32_to_bf16(np.concatenate((b, a)))


_ODD = np.uint32(0xFFFF0000)


@insn("vdpbf16ps", lanes="f4 u4 u4", reads_dest=True)
def _(acc: Lanes, a: Lanes, b: Lanes) -> Lanes:
    # Two FMAs, the odd element first; nearest even, denormal inputs are zeros and denormal results are
    # flushed, whatever MXCSR says (SDM, VDPBF16PS, operation).
    acc = flush(acc)
    for x_bits, y_bits in ((a & _ODD, b & _ODD), (a << 16, b << 16)):  # each as float32
        x, y = flush(x_bits.view("f4")), flush(y_bits.view("f4"))
        acc = nan_rule(fma_flushed(x, y, acc), x, y, acc)
    return acc


# -- float16 ----------------------------------------------------------------------------------------------


@insn("vcvtph2ps", lanes="f4 f2", cut=True)
def _(a: Lanes) -> Lanes:
    return nan_rule(wide := a.astype("f4"), wide)


@insn("vcvtps2ph", lanes="u2 f4", cut=True)
def _(a: Lanes, control: int) -> Lanes:
    near = a.astype("f2")
    mode = 0 if control & 4 else control & 3  # bit 2: MXCSR's mode, which is nearest
    if mode:  # 1 down, 2 up, 3 to zero: a step back where nearest went the other way
        target = np.where(a > 0, -np.inf, np.inf) if mode == 3 else np.full(a.shape, (-np.inf, np.inf)[mode - 1])
        beyond = np.abs(near) > np.abs(a) if mode == 3 else (near > a if mode == 1 else near < a)
        near = np.where(beyond, np.nextafter(near, target.astype("f2")), near)
    bits = a.view("u4")
    nan = (bits >> 16 & 0x8000) | 0x7E00 | (bits >> 13 & 0x1FF)
    return np.where(np.isnan(a), nan, near.view("u2"))
