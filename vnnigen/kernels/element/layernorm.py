"""Layer normalization of f32 along rows: mean, variance, then scale and bias in the epilogue of the other kernels.

    t = x, or x + r with a residual, rounded
    mean = (the sum of t) * f32(1/n),  d = t - mean,  var = (the sum of d*d, by FMA) * f32(1/n)
    y = epilogue(fma(d * (1 / sqrt(var + epsilon)), scale[c], bias[c]))

Both sums are made of 64 partial sums, of every 64th element in order, then halves added to halves; every operation is
rounded once. With e = (n/64 + 10) * 2**-24 the mean is off by at most e times the mean of |t|, the deviation by a
relative e besides; so y is within |scale| * e * (2|z| + 2 mean|t| / sqrt(var + epsilon)) + 2**-23 |y| of the exact one,
z being the exact normalized element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.errors import QuantizationError, ShapeError
from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.kernels.element.affine import Affine
from vnnigen.kernels.element.common import SIZE, NoScratch, by_last, check_offsets, load_lanes, steps_of
from vnnigen.kernels.emit_common import counted, lane_mask, set_mask
from vnnigen.kernels.emit_epilogue import emit_epilogue, epilogue_registers
from vnnigen.kernels.emit_store import Tile
from vnnigen.kernels.epilogue import EpilogueSpec, fold, reference_epilogue
from vnnigen.kernels.fma import fma32
from vnnigen.kernels.layout import ARG_CONSTS, ARG_SRC, ARG_TENSORS, ConstLayout
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.post_ops import PostOp
from vnnigen.kernels.types import F32, Array, DType

Reg = Any
#: Partial sums of a row, whatever the vectors' width.
PARTS = 64


def make_norm(
    n: int, out: DType, scale: Array | None, bias: Array | None, *, y_scale: float | None = None,
    y_zero_point: int = 0, post_ops: Sequence[PostOp] = (),
) -> Affine:  # fmt: skip
    """The end of a normalization of rows of n. ShapeError or QuantizationError for what does not fit."""
    vectors = []
    for name, values, usual in (("scale", scale, 1.0), ("bias", bias, 0.0)):
        vector = np.full(n, usual, np.float32) if values is None else np.asarray(values)
        if vector.shape != (n,):
            raise ShapeError(f"{name} has shape {vector.shape}, the last axis {n} elements")
        if not np.isfinite(vector).all():
            raise QuantizationError(f"{name} must be finite")
        vectors.append(vector.astype(np.float64))
    folded = fold(
        n=n, bias_f32=vectors[1], post_ops=post_ops, out=out, y_scale=y_scale, y_zero_point=y_zero_point, acc="f32"
    )
    unit = 1.0 if y_scale is None or folded.spec.post_scale else 1.0 / y_scale
    m = (vectors[0] * unit).astype(np.float32)
    epilogue = replace(folded, m=m, spec=replace(folded.spec, has_m=True))
    return Affine("f32", out, epilogue, np.zeros(n, np.int32), per_channel=True)


def row_sums(terms: F32, previous: Callable[[F32, F32], F32]) -> F32:
    """Sums of rows [rows, n] in the order of the kernels; `previous(part, sums)` adds."""
    rows, n = terms.shape
    padded = np.zeros((rows, -(-n // PARTS) * PARTS), np.float32)
    padded[:, :n] = terms
    sums = np.zeros((rows, PARTS), np.float32)
    for part in range(0, n, PARTS):
        sums = previous(padded[:, part : part + PARTS], sums)
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums


def norm_reference(x: F32, f: Affine, epsilon: float, residual: F32 | None = None) -> Array:
    """Normalize x [rows, n] as every kernel must."""
    with np.errstate(all="ignore"):
        t = x if residual is None else x + residual
        share = np.float32(1 / x.shape[1])
        mean = row_sums(t, lambda part, sums: sums + part) * share
        d = t - mean
        var = row_sums(d, lambda part, sums: fma32(part, part, sums)) * share
        z = d * (np.float32(1) / np.sqrt(var + np.float32(epsilon)))
    return reference_epilogue(z, f.epilogue)


@dataclass(frozen=True)
class NormKey(NoScratch):
    """Everything the code depends on: `rows` of `n` elements, the epilogue, whether a residual is added."""

    tier: TierCode
    rows: int
    n: int
    spec: EpilogueSpec
    residual: bool

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"layernorm-{'sum-' if self.residual else ''}f32{self.spec.out}-{self.tier.name}"

    @property
    def split(self) -> tuple[int, int]:
        """Rows per step, and steps."""
        return steps_of(self.rows, (4 + 4 * self.residual + SIZE[self.spec.out]) * self.n, 1)

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.split[1]

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _Norm(self, features).build()


def norm_consts(f: Affine, epsilon: float) -> npt.NDArray[np.uint8]:
    """The constant block: that of the epilogue, then 1/n and epsilon."""
    n = len(f.start)
    return np.concatenate([f.consts(n), np.array([1 / n, epsilon, 0, 0], np.float32).view(np.uint8)])


class _Norm:
    """Emits one key: rows of a step > three passes > turns of PARTS elements."""

    def __init__(self, key: NormKey, features: frozenset[str] | None) -> None:
        self.key = key
        check_offsets(f"{key.n} elements", 4 * key.n)
        self.a = a = Assembler(
            key.name, args=(Arg("args", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")), features=features
        )
        self.args, self.index = a.load_argument("args"), a.load_argument("index")
        a.release(a.load_argument("scratch"))
        names = ("src", "other", "off", "rows", "at", "count", "consts", "ptr", "tmp")
        self.r: dict[str, Reg] = {name: a.gpr(name) for name in names}
        self.lay = ConstLayout(key.n)
        self.per = PARTS // key.tier.lanes
        self.mask: Reg | None = None

    def _vec(self, name: str) -> Reg:
        return self.a.vec(self.key.tier.bits, name)

    def build(self) -> Code:
        """Emit everything and encode it."""
        a, key, r = self.a, self.key, self.r
        share, steps = key.split
        a.mov(r["consts"], Mem(self.args, 8 * ARG_CONSTS))
        a.imul(r["off"], self.index, share * key.n)
        for pointer, slot in (("src", ARG_SRC), ("other", ARG_TENSORS))[: 1 + key.residual]:
            a.mov(r[pointer], Mem(self.args, 8 * slot))
            a.lea(r[pointer], Mem(r[pointer], index=r["off"], scale=4))
        by_last(a, r["rows"], self.index, steps, share, key.rows - (steps - 1) * share)
        if key.tier.masks and key.n % key.tier.lanes:
            self.mask = a.kreg("tail")
            set_mask(a, self.mask, key.n % key.tier.lanes, r["tmp"])
        self.mean, self.factor = self._vec("mean"), self._vec("factor")
        with a.loop(r["rows"]):
            self._row()
            for pointer in ("src", "other")[: 1 + key.residual]:
                a.add(r[pointer], 4 * key.n)
        a.ret()
        return a.finalize().encode()

    def _row(self) -> None:
        a = self.a
        with a.scope():
            acc = [self._vec(f"acc{i}") for i in range(self.per)]
            t, one = self._vec("t"), self._vec("one")
            self._zero(acc)
            self._pass(lambda i, lanes: self._add(acc[i], t, i, lanes))
            total_lanes(a, self.key.tier, acc, t, a.vaddps)
            a.vmulps(self.mean, acc[0], self._constant(one, 0))
            self._zero(acc)
            self._pass(lambda i, lanes: self._add_square(acc[i], t, i, lanes))
            total_lanes(a, self.key.tier, acc, t, a.vaddps)
            a.vmulps(acc[0], acc[0], self._constant(one, 0))
            a.vaddps(acc[0], acc[0], self._constant(one, 1))
            a.vsqrtps(acc[0], acc[0])
            a.vmovups(one, a.const(np.full(self.key.tier.lanes, 1, np.float32)))
            a.vdivps(self.factor, one, acc[0])
        # Tiles of the last pass leave the epilogue its registers.
        free = self.key.tier.registers - 2 - epilogue_registers(self.key.spec, self.key.tier)
        self._turns(self.key.tier.lanes * max(n for n in (1, 2, 4) if n <= min(4, free)), self._finish)

    def _zero(self, registers: Sequence[Reg]) -> None:
        for v in registers:
            self.a.vxorps(v, v, v)

    def _constant(self, v: Reg, index: int) -> Reg:
        self.a.vbroadcastss(v, Mem(self.r["consts"], self.lay.size + 4 * index))
        return v

    def _turns(self, width: int, body: Callable[[int], None]) -> None:
        """Run over a row; the body gets the number of elements of a turn, whose start is `at`."""
        a, r = self.a, self.r
        full, tail = divmod(self.key.n, width)
        a.mov(r["at"], 0)
        if full:
            with counted(a, r["count"], full):
                body(width)
                a.add(r["at"], width)
        if tail:
            body(tail)

    def _pass(self, one: Callable[[int, int], None]) -> None:
        """Run over a row in turns of PARTS elements."""
        lanes = self.key.tier.lanes

        def body(count: int) -> None:
            for i in range(-(-count // lanes)):
                one(i, min(lanes, count - i * lanes))

        self._turns(PARTS, body)

    def _load(self, v: Reg, i: int, lanes: int) -> None:
        """V = t, vector i of the turn, zero behind the end."""
        a, r, tier = self.a, self.r, self.key.tier
        at = Mem(r["src"], 4 * i * tier.lanes, index=r["at"], scale=4)
        load_lanes(a, tier, v, at, "f32", lanes, self.mask)
        if not self.key.residual:
            return
        other = Mem(r["other"], at.disp, index=r["at"], scale=4)
        if lanes == tier.lanes:
            a.vaddps(v, v, other)
        elif tier.masks:
            a.vaddps(v, v, other, mask=self.mask)
        else:
            with a.scope():
                x = self._vec("x")
                load_lanes(a, tier, x, other, "f32", lanes, None)
                a.vaddps(v, v, x)

    def _add(self, acc: Reg, t: Reg, i: int, lanes: int) -> None:
        self._load(t, i, lanes)
        self.a.vaddps(acc, acc, t)

    def _add_square(self, acc: Reg, t: Reg, i: int, lanes: int) -> None:
        a, tier = self.a, self.key.tier
        self._load(t, i, lanes)
        if lanes == tier.lanes:
            a.vsubps(t, t, self.mean)
        elif tier.masks:
            a.vsubps(t, t, self.mean, mask=self.mask, zero=True)
        else:
            a.vsubps(t, t, self.mean)
            a.vandps(t, t, lane_mask(a, lanes))
        a.vfmadd231ps(acc, t, t)

    def _finish(self, count: int) -> None:
        """Normalize a turn and run the epilogue; the destination moves along."""
        a, r, tier = self.a, self.r, self.key.tier
        vectors = -(-count // tier.lanes)
        valid = count - (vectors - 1) * tier.lanes
        with a.scope():
            acc = [self._vec(f"v{i}") for i in range(vectors)]
            for i, v in enumerate(acc):
                self._load(v, i, valid if i == vectors - 1 else tier.lanes)
                a.vsubps(v, v, self.mean)
                a.vmulps(v, v, self.factor)
            emit_epilogue(
                Tile(
                    a, tier, self.key.spec, self.lay, [acc], [0], valid, self.args, r["consts"], r["at"], r["off"],
                    r["ptr"],
                )
            )  # fmt: skip
        a.add(r["off"], count)


def total_lanes(a: Assembler, tier: TierCode, acc: Sequence[Reg], t: Reg, op: Callable[[Reg, Reg, Reg], None]) -> None:
    """Combine all lanes of all vectors, lane k of all PARTS with lane k + half, from the top down: acc[0] gets it."""
    count = len(acc)
    while count > 1:
        count //= 2
        for i in range(count):
            op(acc[i], acc[i], acc[i + count])
    v = acc[0]
    if tier.bits == 512:
        for control in (0b01001110, 0b10110001):
            a.vshufi32x4(t, v, v, control)
            op(v, v, t)
    else:
        a.vperm2i128(t, v, v, 1)
        op(v, v, t)
    for control in (0b01001110, 0b10110001):
        a.vpshufd(t, v, control)
        op(v, v, t)
