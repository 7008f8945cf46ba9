"""Pooling: the problem, its reference, and the tables and constants that kernels read.

Max pooling gives the largest element of a window, which starts as the type's lowest value: NaNs are ignored, and the
first of equal zeros is taken; like every bf16 output, one of denormals is zero. Average pooling sums `q - zero_point`
exactly in s32 (f32 and bf16 sources: in f32, tap by tap), and `v = f32(sum) * r[count]`, where `r[count] = f32(m /
count)`, m being the f32 factor of the scales; then the epilogue. The order of taps is kh, kw; but where neighbouring
windows share most of their columns (`PoolProblem.by_columns`), each column is summed (or its maximum taken) first, then
the columns are. A zero of a sum of floats is +0. `count` is the number of taps
inside the image, or kh*kw with `include_padding`; padding means 0. A window without any tap gives the lowest value
(max) or 0 (average).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vnnigen.errors import DTypeError, ShapeError
from vnnigen.kernels.bf16 import round_to_bf16
from vnnigen.kernels.element.affine import Affine
from vnnigen.kernels.element.common import SIZE
from vnnigen.kernels.epilogue import FLOATS, Epilogue, EpilogueSpec, reference_epilogue
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.packing import aligned, fill_constants
from vnnigen.kernels.problem import Pair, as_padding, as_pair
from vnnigen.kernels.types import INT_RANGE, NUMPY, Array, DType

#: Sums of so many bytes fit 16 bits.
MAX_WORD_TAPS = 256


@dataclass(frozen=True)
class PoolProblem:
    """Windows over x[n, h, w, c] of `src`; sizes as (height, width), `pad` as ((top, bottom), (left, right))."""

    n: int
    h: int
    w: int
    c: int
    kernel: Pair
    stride: Pair
    dilation: Pair
    pad: tuple[Pair, Pair]
    src: DType

    @classmethod
    def from_arguments(
        cls,
        shape: tuple[int, ...],
        src: DType,
        kernel: object,
        stride: object = None,
        padding: object = 0,
        dilation: object = 1,
    ) -> PoolProblem:
        """Check the arguments; `stride` defaults to `kernel`. Raises ShapeError where they do not fit."""
        if len(shape) != 4 or 0 in shape:
            raise ShapeError(f"x must have shape (batch, height, width, channels), no empty ones, not {shape}")
        size = as_pair(kernel, "kernel")
        p = cls(
            *shape, size, size if stride is None else as_pair(stride, "stride"), as_pair(dilation, "dilation"),
            as_padding(padding), src,
        )  # fmt: skip
        if p.oh < 1 or p.ow < 1:
            raise ShapeError(f"a {size} window does not fit into the padded image of {p.h} x {p.w}")
        return p

    def _out(self, axis: int) -> int:
        padded = (self.h, self.w)[axis] + sum(self.pad[axis])
        return (padded - self.dilation[axis] * (self.kernel[axis] - 1) - 1) // self.stride[axis] + 1

    @property
    def oh(self) -> int:
        """Output rows."""
        return self._out(0)

    @property
    def ow(self) -> int:
        """Output columns."""
        return self._out(1)

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output."""
        return self.n, self.oh, self.ow, self.c

    @property
    def taps(self) -> int:
        """Taps of a whole window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def by_columns(self) -> bool:
        """Whether columns of taps are taken together first: neighbouring outputs share most of theirs."""
        (kh, kw), sw = self.kernel, self.stride[1]
        shared = self.ow > 1 and any(k * self.dilation[1] % sw == 0 for k in range(1, kw))
        return shared and 4 * (kh * sw + kw - 1) <= 3 * kh * kw

    def valid(self, axis: int) -> npt.NDArray[np.int64]:
        """Per output index along `axis`: (first source index inside the image, taps inside it)."""
        size, k, d = (self.h, self.w)[axis], self.kernel[axis], self.dilation[axis]
        first = np.arange((self.oh, self.ow)[axis], dtype=np.int64) * self.stride[axis] - self.pad[axis][0]
        low = np.clip(-(first // d), 0, k)  # the first tap at or behind the edge
        high = np.clip(-((first - size) // d), 0, k)
        return np.stack([first + low * d, np.maximum(high - low, 0)], axis=1)


def lowest(src: DType) -> float:
    """What a maximum starts from."""
    return -np.inf if src in FLOATS else INT_RANGE[src][0]


def _windows(p: PoolProblem, x: Array) -> list[tuple[int, tuple[slice, slice], Array]]:
    """Per tap, in order: its column of taps, the outputs that have it, and the source elements there."""
    found = []
    taps = [(ky, kx) for ky in range(p.kernel[0]) for kx in range(p.kernel[1])]
    for ky, kx in sorted(taps, key=lambda tap: tap[1]) if p.by_columns else taps:
        rows = np.arange(p.oh) * p.stride[0] - p.pad[0][0] + ky * p.dilation[0]
        cols = np.arange(p.ow) * p.stride[1] - p.pad[1][0] + kx * p.dilation[1]
        ry, rx = np.flatnonzero((rows >= 0) & (rows < p.h)), np.flatnonzero((cols >= 0) & (cols < p.w))
        if len(ry) and len(rx):
            part = x[:, rows[ry]][:, :, cols[rx]]
            found.append((kx, (slice(ry[0], ry[-1] + 1), slice(rx[0], rx[-1] + 1)), part))
    return found


def _columns(p: PoolProblem, x: Array) -> list[list[tuple[tuple[slice, slice], Array]]]:
    """The taps that are summed before they are added to the others: all, or column by column."""
    groups: dict[int, list[tuple[tuple[slice, slice], Array]]] = {}
    for kx, where, part in _windows(p, x):
        groups.setdefault(kx if p.by_columns else 0, []).append((where, part))
    return list(groups.values())


def max_reference(p: PoolProblem, x: Array) -> Array:
    """Max pooling of x [n, h, w, c]."""
    y: Array = np.full(p.y_shape, lowest(p.src), np.float32 if p.src in FLOATS else NUMPY[p.src])
    for _, (rows, cols), part in _windows(p, x):
        old, new = y[:, rows, cols], part.astype(y.dtype)
        y[:, rows, cols] = np.where(new > old, new, old)
    return round_to_bf16(y) if p.src == "bf16" else y


@dataclass(frozen=True, eq=False)
class Average:
    """How sums become outputs: a folded epilogue and the factor and start value per number of taps."""

    epilogue: Epilogue
    factors: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int32]

    @classmethod
    def of(cls, p: PoolProblem, f: Affine, include_padding: bool) -> Average:
        """Take the scales out of an affine conversion (of one scale)."""
        if f.per_channel:
            raise DTypeError("average pooling takes one scale and zero point per tensor")
        e = f.epilogue
        m = 1.0 if e.m is None else float(e.m[0])
        counts = np.arange(p.taps + 1)
        divisors = np.full(p.taps + 1, p.taps) if include_padding else np.maximum(counts, 1)
        spec = replace(e.spec, acc="f32", has_m=False)
        starts = counts * int(f.start[0])
        return cls(replace(e, spec=spec, m=None), (m / divisors).astype(np.float32), starts.astype(np.int32))

    def reference(self, p: PoolProblem, x: Array) -> Array:
        """Average pooling of x [n, h, w, c]."""
        real = p.src in FLOATS
        total: Array = np.zeros(p.y_shape, np.float32 if real else np.int64)
        with np.errstate(all="ignore"):
            for column in _columns(p, x):
                some = np.zeros(p.y_shape, total.dtype)
                for (rows, cols), part in column:
                    some[:, rows, cols] += part.astype(total.dtype)
                total = total + some
            count = p.valid(0)[:, None, 1] * p.valid(1)[None, :, 1]
            if not real:
                total = total + self.starts[count][:, :, None]
            v = total.astype(np.float32) * self.factors[count][:, :, None] + np.float32(0)
        return reference_epilogue(v, self.epilogue)


@dataclass(frozen=True, eq=False)
class WordAverage:
    """Averages of bytes in 16 bits: y = (sum + add) * times >> 16, but at a tie perhaps one less.

    A tie is a product whose lower half is below `ties`; there y is to be even, or odd (an odd zero point is added to
    what is rounded to even). The constants are per number of taps (`rows` of [add, times, ties]) and proven by trying
    every sum. Sums are of unsigned bytes (s8 shifted), so is y.
    """

    rows: npt.NDArray[np.uint16]
    odd: bool

    @property
    def mode(self) -> str:
        """What y is to be at a tie."""
        return "odd" if self.odd else "even"

    @property
    def tie_counts(self) -> tuple[int, ...]:
        """Numbers of taps that have ties."""
        return tuple(np.flatnonzero(self.rows[:, 2]).tolist())

    @classmethod
    def of(cls, p: PoolProblem, average: Average, shift: int) -> WordAverage | None:
        """Find constants for all numbers of taps that windows have; None where there are none, or 16 bits too few."""
        e = average.epilogue
        if p.taps > MAX_WORD_TAPS or p.src != e.spec.out or p.src not in ("u8", "s8"):
            return None
        rows = np.zeros((p.taps + 1, 3), np.uint16)
        odd = bool(e.zero_point % 2)
        for count in np.unique(p.valid(0)[:, None, 1] * p.valid(1)[None, :, 1]):
            sums = np.arange(255 * count + 1, dtype=np.int64)
            start, factor = int(average.starts[count]) - int(count) * shift, average.factors[count]
            v = (sums + start).astype(np.float32) * factor
            want = reference_epilogue(v[:, None], e)[:, 0].astype(np.int64) + shift
            offset = (0.5 + e.zero_point + shift) / float(factor) + start
            found = next((row for row in _word_rows(float(factor), offset) if _gives(row, sums, want, odd)), None)
            if found is None:
                return None
            rows[count] = found
        return cls(rows, odd)


def _word_rows(factor: float, offset: float) -> list[tuple[int, int, int]]:
    """Constants (add, times, ties) near the exact ones, those without ties first."""
    near = [min(int(65536 * factor) + d, 65535) for d in (0, 1)]
    adds = sorted({round(offset + d) for d in (-1, -0.5, 0, 0.5, 1)})
    return [(add, times, times * ties) for ties in (0, 1) for times in near for add in adds if add >= 0 and times > 0]


def _gives(row: tuple[int, int, int], sums: npt.NDArray[np.int64], want: npt.NDArray[np.int64], odd: bool) -> bool:
    """Whether the constants are right for all sums, in 16 bits."""
    add, times, ties = row
    product = (sums + add) * times
    y = product >> 16
    y = y - (((product & 65535) < ties) & (y % 2 != odd))
    return bool(add + sums[-1] <= 65535 and (y == want).all())


@dataclass(frozen=True)
class PoolTables:
    """Byte offsets behind the constant block: rows and borders as (offset, taps), factors and starts per count.

    `words` are those of `WordAverage`, doubled to 32 bits: three tables, one after the other.
    """

    rows: int
    columns: int
    factors: int
    starts: int
    words: int
    size: int

    @classmethod
    def of(cls, p: PoolProblem) -> PoolTables:
        """Lay the tables out."""
        at = ConstLayout(0).size
        columns = at + 16 * p.oh
        factors = columns + 16 * p.ow
        starts = factors + 4 * (p.taps + 1)
        words = starts + 4 * (p.taps + 1)
        return cls(at, columns, factors, starts, words, words + 12 * (p.taps + 1) * (p.taps <= MAX_WORD_TAPS))


def pool_consts(
    p: PoolProblem, shift: int, average: Average | None, words: WordAverage | None = None
) -> npt.NDArray[np.uint8]:
    """The constant block of a pooling kernel; sums are of bytes plus `shift`."""
    tables, lay = PoolTables.of(p), ConstLayout(0)
    out = aligned(tables.size)
    pixel = p.c * SIZE[p.src]
    for at, axis, pitch in ((tables.rows, 0, p.w * pixel), (tables.columns, 1, pixel)):
        entries = p.valid(axis)
        entries[:, 0] *= pitch
        out[at : at + entries.nbytes] = entries.ravel().view(np.uint8)
    if average is not None:
        none = np.zeros((1, 0), np.int32)
        block = fill_constants(
            lay, groups=1, columns=slice(None), start=none, epilogue=average.epilogue, pad=np.zeros(1, np.uint8),
            w_zp=None,
        )  # fmt: skip
        out[: lay.size] = block
        counts = np.arange(p.taps + 1, dtype=np.int64)
        starts = (average.starts - counts * shift).astype(np.int32)
        out[tables.factors : tables.starts] = average.factors.view(np.uint8)
        out[tables.starts : tables.words] = starts.view(np.uint8)
    if words is not None:
        doubled = np.ascontiguousarray(words.rows.T.astype(np.uint32) * 0x10001)
        out[tables.words : tables.size] = doubled.ravel().view(np.uint8)
    return out


def plain_spec(src: DType) -> EpilogueSpec:
    """An epilogue that only stores, for maxima of floats."""
    return EpilogueSpec("f32", (), False, src, False, False, False, False)
