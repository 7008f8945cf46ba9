"""Problem descriptors: what is to be computed, checked once, hashable, without any data.

Everything downstream (dispatch, blocking, generation) reads these and trusts them.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.errors import DTypeError, QuantizationError, ShapeError
from vnnigen.kernels.types import F64, INT_RANGE, Array, DType, itemsize

Pair = tuple[int, int]

_MAX_DIM = 2**31 - 1  # a dimension fits the s32 immediates and counters of kernels
_MAX_BYTES = 2**40  # an array fits an address space with room for index arithmetic
_S32_MAX = 2**31 - 1

# Which outputs each source type may have.
_OUTPUTS: dict[DType, tuple[DType, ...]] = {
    "u8": ("u8", "s8", "s32", "f32", "bf16"),
    "s8": ("u8", "s8", "s32", "f32", "bf16"),
    "f32": ("f32",),
    "bf16": ("bf16", "f32"),
}


# --- arguments ------------------------------------------------------------------------------------------


def as_int(value: object, name: str, minimum: int = 0) -> int:
    """Return an integer argument (NumPy integers too); ShapeError for anything else or below `minimum`."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ShapeError(f"{name} must be an integer, not {value!r}") from None
    if not minimum <= number <= _MAX_DIM:
        raise ShapeError(f"{name} must be in [{minimum}, {_MAX_DIM}], not {number}")
    return number


def as_pair(value: object, name: str, minimum: int = 1) -> Pair:
    """Return a (height, width) argument given as one integer or as two; ShapeError for anything else."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ShapeError(f"{name} must be an integer or (height, width), not {value!r}")
        return as_int(value[0], name, minimum), as_int(value[1], name, minimum)
    number = as_int(value, name, minimum)
    return number, number


def as_padding(value: object) -> tuple[Pair, Pair]:
    """Return `((top, bottom), (left, right))` from an int, (ph, pw) or that; else ShapeError."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ShapeError(f"padding must be an integer, (ph, pw) or ((top, bottom), (left, right)), not {value!r}")
        return as_pair(value[0], "padding", 0), as_pair(value[1], "padding", 0)
    both = as_pair(value, "padding", 0)
    return both, both


# --- problems -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvProblem:
    """A 2-D convolution: x[n, ih, iw, ic] by w[oc, ic/groups, kh, kw] -> y[n, oh, ow, oc].

    `pad` is ((top, bottom), (left, right)); weights are s8 for u8 and s8 sources and f32 for f32.
    Raises ShapeError or DTypeError on construction when the parts do not fit together.
    """

    n: int
    ih: int
    iw: int
    ic: int
    oc: int
    kh: int
    kw: int
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    pad: tuple[Pair, Pair] = ((0, 0), (0, 0))
    groups: int = 1
    src: DType = "u8"
    dst: DType = "u8"
    w_zero_point: bool = False

    def __post_init__(self) -> None:
        """Check every field and every relation between them."""
        for name in ("n", "ih", "iw", "ic", "oc", "kh", "kw", "groups"):
            as_int(getattr(self, name), name, 1)
        as_pair(self.stride, "stride")
        as_pair(self.dilation, "dilation")
        as_padding(self.pad)
        _check_types(self.src, self.dst)
        if self.ic % self.groups or self.oc % self.groups:
            raise ShapeError(
                f"groups={self.groups} must divide the input channels ({self.ic}) and the output channels ({self.oc})"
            )
        if self.oh < 1 or self.ow < 1:
            raise ShapeError(
                f"the output would be empty: input {self.ih}x{self.iw} with padding {self.pad} is smaller "
                f"than the kernel {self.kh}x{self.kw} dilated by {self.dilation}"
            )
        (top, bottom), (left, right) = self.pad
        padded = (self.n, self.ih + top + bottom, self.iw + left + right, self.ic)
        _check_size(padded, self.src, "the padded input")
        _check_size(self.w_shape, self.wei, "the weights")
        _check_size(self.y_shape, self.dst, "the output")

    @classmethod
    def from_arguments(
        cls,
        x_shape: tuple[int, ...],
        w_shape: tuple[int, ...],
        *,
        stride: object = 1,
        padding: object = 0,
        dilation: object = 1,
        groups: object = 1,
        src: DType = "u8",
        dst: DType = "u8",
        w_zero_point: bool = False,
    ) -> ConvProblem:
        """Build a problem from an NHWC input shape, an OIHW weight shape and arguments as users give them."""
        if len(x_shape) != 4:
            raise ShapeError(f"x must have 4 dimensions (batch, height, width, channels), not {x_shape}")
        if len(w_shape) != 4:
            raise ShapeError(f"w must have 4 dimensions (out, in/groups, height, width), not {w_shape}")
        if 0 in x_shape or 0 in w_shape:
            raise ShapeError(f"arrays must not be empty: x has shape {x_shape}, w has shape {w_shape}")
        n, ih, iw, ic = x_shape
        oc, icg, kh, kw = w_shape
        group_count = as_int(groups, "groups", 1)
        if icg * group_count != ic:
            raise ShapeError(
                f"w has {icg} input channels per group and groups={group_count}, so x must have "
                f"{icg * group_count} channels, not {ic}"
            )
        return cls(
            n, ih, iw, ic, oc, kh, kw, as_pair(stride, "stride"), as_pair(dilation, "dilation"),
            as_padding(padding), group_count, src, dst, w_zero_point,
        )  # fmt: skip

    @property
    def oh(self) -> int:
        """The output's height."""
        return _out_size(self.ih + sum(self.pad[0]), self.kh, self.stride[0], self.dilation[0])

    @property
    def ow(self) -> int:
        """The output's width."""
        return _out_size(self.iw + sum(self.pad[1]), self.kw, self.stride[1], self.dilation[1])

    @property
    def icg(self) -> int:
        """Input channels of one group."""
        return self.ic // self.groups

    @property
    def ocg(self) -> int:
        """Output channels of one group."""
        return self.oc // self.groups

    @property
    def depthwise(self) -> bool:
        """Whether every channel is its own group, with one output channel each."""
        return self.groups > 1 and self.icg == 1 and self.ocg == 1

    @property
    def wei(self) -> DType:
        """The type of the weights."""
        return self.src if self.src in ("f32", "bf16") else "s8"

    @property
    def acc(self) -> DType:
        """The type of the accumulators."""
        return "f32" if self.src in ("f32", "bf16") else "s32"

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """The shape of the source, NHWC."""
        return self.n, self.ih, self.iw, self.ic

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        """The shape of the weights, OIHW."""
        return self.oc, self.icg, self.kh, self.kw

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """The shape of the output, NHWC."""
        return self.n, self.oh, self.ow, self.oc

    @property
    def macs(self) -> int:
        """Multiply-accumulates, padding taps included."""
        return self.n * self.oh * self.ow * self.oc * self.icg * self.kh * self.kw


@dataclass(frozen=True)
class GemmProblem:
    """A matrix product: a[m, k] by b[k, n] -> c[m, n]; b is s8 for u8 and s8 sources and f32 for f32.

    Raises ShapeError or DTypeError on construction when the parts do not fit together.
    """

    m: int
    n: int
    k: int
    src: DType = "u8"
    dst: DType = "u8"
    w_zero_point: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("m", "n", "k"):
            as_int(getattr(self, name), name, 1)
        _check_types(self.src, self.dst)
        _check_size((self.m, self.k), self.src, "a")
        _check_size((self.k, self.n), self.wei, "b")
        _check_size((self.m, self.n), self.dst, "the output")

    @classmethod
    def from_arguments(
        cls,
        a_shape: tuple[int, ...],
        b_shape: tuple[int, ...],
        *,
        src: DType = "u8",
        dst: DType = "u8",
        w_zero_point: bool = False,
    ) -> GemmProblem:
        """Build a problem from the shapes of a and b; ShapeError when they do not multiply."""
        if len(a_shape) != 2 or len(b_shape) != 2:
            raise ShapeError(f"a and b must have 2 dimensions, not shapes {a_shape} and {b_shape}")
        if 0 in a_shape or 0 in b_shape:
            raise ShapeError(f"arrays must not be empty: a has shape {a_shape}, b has shape {b_shape}")
        if a_shape[1] != b_shape[0]:
            raise ShapeError(f"a has {a_shape[1]} columns but b has {b_shape[0]} rows; they must be equal")
        return cls(a_shape[0], b_shape[1], a_shape[1], src, dst, w_zero_point)

    @property
    def wei(self) -> DType:
        """The type of b."""
        return self.src if self.src in ("f32", "bf16") else "s8"

    @property
    def acc(self) -> DType:
        """The type of the accumulators."""
        return "f32" if self.src in ("f32", "bf16") else "s32"

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.m * self.n * self.k


def _out_size(padded: int, kernel: int, stride: int, dilation: int) -> int:
    return (padded - dilation * (kernel - 1) - 1) // stride + 1


def _check_types(src: DType, dst: DType) -> None:
    if src not in _OUTPUTS:
        raise DTypeError(f"the source type must be one of {', '.join(_OUTPUTS)}, not {src!r}")
    if dst not in _OUTPUTS[src]:
        raise DTypeError(f"a {src} source can give {', '.join(_OUTPUTS[src])}, not {dst!r}")


def _check_size(shape: tuple[int, ...], dtype: DType, what: str) -> None:
    if max(shape) > _MAX_DIM or math.prod(shape) * itemsize(dtype) > _MAX_BYTES:
        raise ShapeError(f"{what} would have shape {shape}, beyond what can be addressed")


# --- accumulators ---------------------------------------------------------------------------------------


def centered_weights(w: Array, zero_point: npt.ArrayLike = 0, axis: int = 0) -> npt.NDArray[np.int16]:
    """Return `w - zero_point` as int16, the zero point being a scalar or one value per index along `axis`."""
    zeros = np.asarray(zero_point, dtype=np.int16)
    if zeros.ndim:
        zeros = zeros.reshape([-1 if i == axis else 1 for i in range(w.ndim)])
    return w.astype(np.int16) - zeros


def acc_bound(
    w: npt.NDArray[Any],
    src: DType,
    x_zero_point: int = 0,
    *,
    w_zero_point: npt.ArrayLike = 0,
    bias: Array | None = None,
    axis: int = 0,
) -> F64:
    """Bound the accumulators' magnitude over every possible source, per output channel (along `axis` of w).

    That is the largest `|sum (x - x_zero_point) * (w - w_zero_point)| + |bias|` for x in the range of `src`,
    from the actual weights. Partial sums may wrap around, which two's complement undoes; the total may not.
    Returns float64 of shape (channels,). Raises QuantizationError if a total could leave s32.
    """
    others = tuple(i for i in range(w.ndim) if i != axis)
    centered = centered_weights(w, w_zero_point, axis)
    positive = np.maximum(centered, 0).sum(axis=others, dtype=np.int64)
    negative = np.minimum(centered, 0).sum(axis=others, dtype=np.int64)
    low, high = (end - int(x_zero_point) for end in INT_RANGE[src])
    largest, smallest = positive * high + negative * low, positive * low + negative * high
    bound = np.maximum(largest, -smallest)
    if bias is not None:
        bound = bound + np.abs(bias.astype(np.int64))
    if bound.max() > _S32_MAX:
        raise QuantizationError(
            f"K too large: output channel {int(bound.argmax())} can sum up to {int(bound.max())}, beyond "
            "s32; split the reduction or use smaller weights"
        )
    result: F64 = bound.astype(np.float64)
    return result
