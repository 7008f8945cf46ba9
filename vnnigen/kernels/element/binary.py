"""Kernels that combine two tensors with broadcasting: rows are loaded, widened, combined, and end in the epilogue.

With fa = f32(a - a_zero_point), exact, fb alike, and every operation rounded once:

    add, sub    v = fma(fb, +-sb, fa * sa)
    min, max    v = op(fa * sa, fb * sb): the second one where either is NaN, or both are equal
    prelu       v = fma(fb * sb, min(fa * sa, 0), max(fa * sa, 0))
    mul, div    v = (fa op fb) * (sa op sb), the last product in the epilogue

then the epilogue of the other kernels. Where the post-ops are piecewise linear, the output's scale is part of sa and sb
(of sa alone for prelu), so that it costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from vnnigen.errors import QuantizationError
from vnnigen.isa.assembler import Code, Mem
from vnnigen.kernels.element.affine import Affine
from vnnigen.kernels.element.common import SIZE, Run, load_lanes
from vnnigen.kernels.element.strided import (
    Strided,
    StridedKey,
    blocks,
    broadcast_strides,
    collapse,
    dense,
    make_launches,
)
from vnnigen.kernels.emit_common import set_mask
from vnnigen.kernels.emit_epilogue import emit_epilogue, epilogue_registers
from vnnigen.kernels.emit_store import Tile
from vnnigen.kernels.epilogue import FLOATS, Epilogue, EpilogueSpec, fold, reference_epilogue
from vnnigen.kernels.fma import fma32
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.post_ops import PostOp
from vnnigen.kernels.qparams import check_scale, check_zero_point
from vnnigen.kernels.types import F32, Array, DType

Reg = Any
BinaryFn = Literal["add", "sub", "mul", "div", "min", "max", "prelu"]
FUNCTIONS: tuple[BinaryFn, ...] = ("add", "sub", "mul", "div", "min", "max", "prelu")
#: Bytes of zero points and scales behind the constant block: za, sa, zb, sb.
SCALARS = 64


@dataclass(frozen=True, eq=False)
class BinaryMath:
    """The numbers of a combination: zero points and scales of both sources, and the epilogue."""

    fn: BinaryFn
    kinds: tuple[DType, DType]
    zero_points: tuple[int, int]
    scales: tuple[np.float32, np.float32]
    epilogue: Epilogue

    def reference(self, a: Array, b: Array) -> Array:
        """Combine as every kernel must."""
        with np.errstate(all="ignore"):
            fa, fb = (x.astype(np.float32) - np.float32(z) for x, z in zip((a, b), self.zero_points, strict=True))
            v = _REFERENCE[self.fn](fa, fb, *self.scales)
        return reference_epilogue(v[..., None], self.epilogue)[..., 0]


def _scaled(f: F32, scale: np.float32) -> F32:
    product: F32 = f if scale == 1 else f * scale
    return product


def _prelu(fa: F32, fb: F32, sa: np.float32, sb: np.float32) -> F32:
    a, b, zero = _scaled(fa, sa), _scaled(fb, sb), np.float32(0)
    return fma32(b, np.where(a < zero, a, zero), np.where(zero > a, zero, a))


def _add(fa: F32, fb: F32, sa: np.float32, sb: np.float32) -> F32:
    return fma32(fb, sb, _scaled(fa, sa))


def _max(fa: F32, fb: F32, sa: np.float32, sb: np.float32) -> F32:
    a, b = np.broadcast_arrays(_scaled(fa, sa), _scaled(fb, sb))
    return np.where(a > b, a, b)


def _min(fa: F32, fb: F32, sa: np.float32, sb: np.float32) -> F32:
    a, b = np.broadcast_arrays(_scaled(fa, sa), _scaled(fb, sb))
    return np.where(a < b, a, b)


_REFERENCE: dict[BinaryFn, Any] = {
    "add": _add, "sub": lambda fa, fb, sa, sb: _add(fa, fb, sa, -sb), "max": _max, "min": _min, "prelu": _prelu,
    "mul": lambda fa, fb, _sa, _sb: fa * fb, "div": lambda fa, fb, _sa, _sb: fa / fb,
}  # fmt: skip


def make_binary(
    fn: BinaryFn, kinds: tuple[DType, DType], out: DType, *, scales: Sequence[float] = (1.0, 1.0),
    zero_points: Sequence[int] = (0, 0), y_scale: float | None = None, y_zero_point: int = 0,
    post_ops: Sequence[PostOp] = (),
) -> BinaryMath:  # fmt: skip
    """Check and fold scales. Raises QuantizationError for what does not fit the types."""
    if fn not in FUNCTIONS:
        raise QuantizationError(f"the function must be one of {', '.join(FUNCTIONS)}, not {fn!r}")
    names = ("a", "b")
    zps, reals = [], []
    for name, kind, scale, zp in zip(names, kinds, scales, zero_points, strict=True):
        if kind in FLOATS and (scale != 1 or zp):
            raise QuantizationError(f"{name} is {kind}: its scale must be 1 and its zero point 0")
        zps.append(0 if kind in FLOATS else int(check_zero_point(zp, kind, f"{name}_zero_point")))
        reals.append(float(check_scale(scale, f"{name}_scale")))
    sa, sb = reals
    arguments: dict[str, Any] = {"out": out, "n": 1, "post_ops": post_ops, "acc": "f32"}
    if out not in FLOATS or y_scale is not None:
        arguments |= {"y_scale": y_scale, "y_zero_point": y_zero_point}
    if fn in ("mul", "div"):
        epilogue = fold(w_scale=sa * sb if fn == "mul" else sa / sb, **arguments)
        return BinaryMath(fn, kinds, (zps[0], zps[1]), (np.float32(1), np.float32(1)), epilogue)
    epilogue = fold(**arguments)
    if y_scale is not None and all(op.piecewise_linear for op in post_ops):
        # What the epilogue would multiply by goes into the sources' scales.
        epilogue = replace(epilogue, m=None, spec=replace(epilogue.spec, has_m=False))
        sa, sb = sa / float(y_scale), sb / (1.0 if fn == "prelu" else float(y_scale))
    return BinaryMath(fn, kinds, (zps[0], zps[1]), (np.float32(sa), np.float32(sb)), epilogue)


@dataclass(frozen=True)
class BinaryKey(StridedKey):
    """A combination of two sources. `zero_points` and `scaled`: which of them have a zero point, a scale."""

    fn: BinaryFn = "add"
    spec: EpilogueSpec = None  # type: ignore[assignment]
    zero_points: tuple[bool, bool] = (False, False)
    scaled: tuple[bool, bool] = (False, False)

    @property
    def vectors(self) -> int:
        """Vectors of a tile: as many as the epilogue, or the sources' constants, leave registers for."""
        temps = max(epilogue_registers(self.spec, self.tier), 4 + sum(self.zero_points) + sum(self.scaled))
        return min(16 if self.tier.masks else 8, self.tier.registers - temps)

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _Binary(self, features).build()


def binary_launches(
    f: BinaryMath, tier: TierCode, shapes: tuple[tuple[int, ...], tuple[int, ...]], y_shape: tuple[int, ...]
) -> list[tuple[BinaryKey, Run]]:
    """Launches that combine dense tensors of two shapes."""
    spec = f.epilogue.spec
    kinds = (*f.kinds, spec.out)
    strides = [*(broadcast_strides(s, y_shape) for s in shapes), dense(y_shape)]
    zero_points = (bool(f.zero_points[0]), bool(f.zero_points[1]))
    scaled = (bool(f.scales[0] != 1), bool(f.scales[1] != 1))
    none = (0, 0, 0)
    key = BinaryKey(
        f"binary_{f.fn}", tier, kinds, 1, 1, none, none, none, 1, 1, 0, fn=f.fn, spec=spec, zero_points=zero_points,
        scaled=scaled,
    )  # fmt: skip

    def tile_rows(cols: int) -> int:
        return replace(key, cols=cols, rows=1 << 20).tile_rows

    parts = blocks(
        collapse(y_shape, strides), 3, tier.lanes, tile_rows, lambda cols: cols * sum(SIZE[k] for k in kinds)
    )
    # Constants are alike for all columns: as many as a tile has.
    plain = Affine(f.kinds[0], spec.out, f.epilogue, np.zeros(1, np.int32), per_channel=False)
    consts = plain.consts(_columns(tier))
    scalars = np.zeros(SCALARS // 4, np.float32)
    scalars[:4] = (f.zero_points[0], f.scales[0], f.zero_points[1], f.scales[1])
    whole = np.concatenate([consts, scalars.view(np.uint8)])
    return [(k, Run(c)) for k, c in make_launches(key, parts, whole)]


def _columns(tier: TierCode) -> int:
    return 4 * tier.lanes


class _Binary(Strided):
    """Tiles of 32-bit lanes."""

    key: BinaryKey

    def setup(self) -> None:
        """Set the mask of the last vector, and the register that says that all columns have the same constants."""
        a, key = self.a, self.key
        self.mask = None
        if key.tier.masks and key.cols % key.unit:
            self.mask = a.kreg("tail")
            set_mask(a, self.mask, key.cols % key.unit, self.ptr)
        self.lay = ConstLayout(_columns(key.tier))
        self.col = a.gpr("column")
        a.mov(self.col, 0)

    def _scalar(self, index: int) -> Reg:
        v = self.a.vec(self.key.tier.bits, f"scalar{index}")
        self.a.vbroadcastss(v, Mem(self.consts, self.lay.size + 4 * index))
        return v

    def _real(self, operand: int, v: Reg, i: int, j: int, lanes: int, params: tuple[Reg | None, Reg | None]) -> None:
        """Make v = (f32(q) - zero point) * scale of row i, vector j."""
        a, key = self.a, self.key
        kind, size = key.kinds[operand], key.size(operand)
        tier, along = key.tier, key.col[operand]
        mem = Mem(self.src[operand], (i * key.row[operand] + j * tier.lanes * along) * size)
        if along:
            load_lanes(a, tier, v, mem, kind, lanes, self.mask)
        elif size == 4:
            a.vbroadcastss(v, mem)
        elif kind == "bf16":
            a.vpbroadcastw(v, mem)
            a.vpslld(v, v, 16)
        else:
            a.vpbroadcastb(v.xmm, mem)
            (a.vpmovzxbd if kind == "u8" else a.vpmovsxbd)(v, v.xmm)
        if kind not in FLOATS:
            a.vcvtdq2ps(v, v)
        zero_point, scale = params
        if zero_point is not None:
            a.vsubps(v, v, zero_point)
        if scale is not None:
            a.vmulps(v, v, scale)

    def tile(self, th: int, count: int) -> None:
        """Load both, combine, run the epilogue."""
        a, key, lanes = self.a, self.key, self.key.tier.lanes
        nr = -(-count // lanes)
        valid = count - (nr - 1) * lanes
        with a.scope():
            acc = [[a.vec(key.tier.bits, f"v{i}_{j}") for j in range(nr)] for i in range(th)]
            with a.scope():
                params = [
                    (
                        self._scalar(2 * n) if key.zero_points[n] else None,
                        self._scalar(2 * n + 1) if key.scaled[n] else None,
                    )
                    for n in range(2)
                ]
                for i, row in enumerate(acc):
                    for j, v in enumerate(row):
                        self._real(0, v, i, j, valid if j == nr - 1 else lanes, params[0])
                x, t = a.vec(key.tier.bits, "x"), a.vec(key.tier.bits, "t")
                zero_point, scale = params[1]
                fused = scale if key.fn in ("add", "sub") else None
                cells = [(i, j) for i in range(th) for j in range(nr)]
                if key.col[1]:
                    cells.sort(key=lambda c: c[1])
                held = None
                for i, j in cells:
                    # What all rows, or all columns, share is loaded once.
                    place = (i if key.row[1] else 0, j if key.col[1] else 0)
                    if place != held:
                        self._real(1, x, i, j, valid if j == nr - 1 else lanes, (zero_point, None if fused else scale))
                    held = place
                    self._combine(acc[i][j], x, t, fused)
            offsets = [i * key.row[2] for i in range(th)]
            emit_epilogue(
                Tile(
                    a, key.tier, key.spec, self.lay, acc, offsets, valid, self.args, self.consts, self.col, self.off,
                    self.ptr,
                )
            )  # fmt: skip

    def _combine(self, v: Reg, x: Reg, t: Reg, scale: Reg | None) -> None:
        """V = v op x (x * scale where there is one)."""
        a, fn = self.a, self.key.fn
        if scale is not None:
            (a.vfmadd231ps if fn == "add" else a.vfnmadd231ps)(v, x, scale)
        elif fn == "prelu":
            zero = a.const(np.zeros(self.key.tier.lanes, np.float32))
            a.vminps(t, v, zero)
            with a.scope():
                none = a.vec(self.key.tier.bits, "zero")
                a.vmovups(none, zero)
                a.vmaxps(v, none, v)
            a.vfmadd231ps(v, x, t)
        else:
            getattr(a, f"v{fn}ps")(v, v, x)
