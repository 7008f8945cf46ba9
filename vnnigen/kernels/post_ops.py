"""Post-operations: what happens to the f32 value between the accumulator and the output.

A post-op is a small frozen object that a user lists, in order, in `post_ops=(...)`. It lowers itself to
steps, the few primitive kinds that kernels know (`kernels/steps.py`). Adding a post-op means adding one class,
and, where no kind fits, one kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

from vnnigen.errors import DTypeError, QuantizationError
from vnnigen.kernels.steps import Step
from vnnigen.kernels.types import INT_RANGE, Array, DType, dtype_name

SUM_DTYPES: tuple[DType, ...] = ("u8", "s8", "s32", "f32", "bf16")


class PostOp:
    """What all post-ops share. `piecewise_linear` ones let the output scale be folded through them."""

    piecewise_linear: ClassVar[bool]

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to steps, the value being in units of `1/s` (s > 0; 1 unless `piecewise_linear`)."""
        raise NotImplementedError


class TensorOp(PostOp):
    """A post-op with a tensor: its own, or one given at the call."""

    tensor: Array | None
    dtype: npt.DTypeLike | None

    @property
    def takes_tensor(self) -> bool:
        """Whether a kernel reads a tensor of the output's shape (not: one constant per channel)."""
        return True

    def _check(self, scale: object, zero_point: object) -> None:
        """Check all fields; the zero point's range too where the tensor's type is known already."""
        name = type(self).__name__
        _finite(scale, f"{name} scale")
        if isinstance(zero_point, bool) or not isinstance(zero_point, (int, np.integer)):
            raise DTypeError(f"{name} zero_point must be an integer, not {zero_point!r}")
        if self.tensor is not None:
            if not isinstance(self.tensor, np.ndarray):
                raise DTypeError(f"{name} tensor must be a NumPy array, not {type(self.tensor).__name__}")
            if self.dtype is not None:
                raise DTypeError(f"{name} dtype is for a tensor given at the call; this {name} has its own tensor")
        dtype = self._dtype()
        if dtype is not None:
            check_sum_zero_point(int(zero_point), dtype)

    def _dtype(self) -> DType | None:
        """The tensor's type, None where it is the output's."""
        given = self.tensor.dtype if self.tensor is not None else self.dtype
        what = "tensor" if self.tensor is not None else "dtype"
        return None if given is None else dtype_name(given, f"{type(self).__name__} {what}", SUM_DTYPES)


@dataclass(frozen=True, eq=False)
class Sum(TensorOp):
    """Add `scale * (t - zero_point)`; `t` is `tensor` or, where None, given at the call or the old `out`.

    `tensor` has the output's shape and type u8, s8, s32, f32 or bf16; the zero point must be 0 for all but u8, s8.
    `dtype` is the type of a tensor given at the call; None means the output's type.
    The scale is real units per step of `t`. Raises QuantizationError or DTypeError for a bad argument.
    """

    scale: float = 1.0
    zero_point: int = 0
    tensor: Array | None = None
    dtype: npt.DTypeLike | None = None
    piecewise_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        self._check(self.scale, self.zero_point)

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `sum` step."""
        return (Step("sum", (float(self.scale) * s,), int(self.zero_point), self.tensor, self._dtype()),)


BinaryOp = Literal["add", "sub", "mul", "max", "min"]


@dataclass(frozen=True, eq=False)
class Binary(TensorOp):
    """`v op x` with `x = scale * (t - zero_point)`; op is "add", "sub", "mul", "max" or "min".

    `tensor` has the output's shape and type u8, s8, s32, f32 or bf16, or is an f32 vector of shape [oc], one value per
    output channel, which is copied. Where None, it is given at the call (of type `dtype`) or the old `out`, as for Sum.
    The zero point must be 0 for all but u8 and s8. "add" and "sub" round once, fma(t - zp, scale, v); the others round
    x, then, for "mul", the product. In "max" and "min" a NaN of v becomes x.
    Raises QuantizationError or DTypeError for a bad argument; a vector of another length is a ShapeError when the
    operator is used first.
    """

    op: BinaryOp
    tensor: Array | None = None
    scale: float = 1.0
    zero_point: int = 0
    dtype: npt.DTypeLike | None = None
    piecewise_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.op not in ("add", "sub", "mul", "max", "min"):
            raise QuantizationError(f"Binary op must be add, sub, mul, max or min, not {self.op!r}")
        self._check(self.scale, self.zero_point)
        if self.tensor is not None and not self.takes_tensor:
            if self.tensor.dtype != np.float32:
                raise DTypeError(f"a Binary vector, one value per channel, must be float32, not {self.tensor.dtype}")
            if not np.isfinite(self.tensor).all():
                raise QuantizationError("a Binary vector must be finite")
            object.__setattr__(self, "tensor", self.tensor.copy())

    @property
    def takes_tensor(self) -> bool:
        """Whether a kernel reads a tensor of the output's shape (not: one constant per channel)."""
        return self.tensor is None or self.tensor.ndim != 1

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one step, on a tensor or on a constant per channel."""
        scale = float(self.scale) * (1.0 if self.op == "mul" else s) * (-1 if self.op == "sub" else 1)
        op = "add" if self.op == "sub" else self.op
        if self.tensor is not None and not self.takes_tensor:
            return (Step(f"channel_{op}", (), 0, self.tensor.astype(np.float64) * scale),)
        kind = "sum" if op == "add" else f"tensor_{op}"
        return (Step(kind, (scale,), int(self.zero_point), self.tensor, self._dtype()),)


@dataclass(frozen=True)
class Linear(PostOp):
    """`alpha * v + beta`, one rounding. Raises QuantizationError unless both are finite."""

    alpha: float
    beta: float
    piecewise_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        _finite(self.alpha, "Linear alpha")
        _finite(self.beta, "Linear beta")

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `linear` step."""
        return (Step("linear", (float(self.alpha), float(self.beta) * s)),)


@dataclass(frozen=True)
class ReLU(PostOp):
    """`max(v, 0)`; NaN becomes 0."""

    piecewise_linear: ClassVar[bool] = True

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `max` step."""
        return (Step("max", (0.0,)),)


@dataclass(frozen=True)
class Clip(PostOp):
    """`min(max(v, lo), hi)`, as in ReLU6 = Clip(0, 6); NaN becomes `lo`. A bound may be infinite.

    Raises QuantizationError unless `lo <= hi`, `lo < inf` and `hi > -inf`.
    """

    lo: float
    hi: float
    piecewise_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        lo, hi = _number(self.lo, "Clip lo"), _number(self.hi, "Clip hi")
        if not lo <= hi or lo == math.inf or hi == -math.inf:
            raise QuantizationError(f"Clip needs lo <= hi, not lo={lo} and hi={hi}")

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to `max` then `min`: the order keeps NaN away from `min`."""
        return Step("max", (float(self.lo) * s,)), Step("min", (float(self.hi) * s,))


@dataclass(frozen=True)
class LeakyReLU(PostOp):
    """`v` where v >= 0, else `alpha * v`. Raises QuantizationError unless alpha is finite."""

    alpha: float = 0.01
    piecewise_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        _finite(self.alpha, "LeakyReLU alpha")

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `leaky` step."""
        return (Step("leaky", (float(self.alpha),)),)


@dataclass(frozen=True)
class HardSwish(PostOp):
    """`v * min(max(v + 3, 0), 6) / 6`, within 3 ulp."""

    piecewise_linear: ClassVar[bool] = False

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `hardswish` step."""
        return (Step("hardswish", ()),)


@dataclass(frozen=True)
class Sigmoid(PostOp):
    """`1 / (1 + exp(-v))`, within 3 ulp."""

    piecewise_linear: ClassVar[bool] = False

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `sigmoid` step."""
        return (Step("sigmoid", ()),)


@dataclass(frozen=True)
class Tanh(PostOp):
    """`tanh(v)`, within 3 ulp."""

    piecewise_linear: ClassVar[bool] = False

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `tanh` step."""
        return (Step("tanh", ()),)


@dataclass(frozen=True)
class SiLU(PostOp):
    """`v / (1 + exp(-alpha * v))`, also called Swish, within 3 ulp for alpha = 1, else 3 + |alpha v|.

    Raises QuantizationError unless alpha is finite and above zero.
    """

    alpha: float = 1.0
    piecewise_linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the fields."""
        _finite(self.alpha, "SiLU alpha")
        if not self.alpha > 0:
            raise QuantizationError(f"SiLU alpha must be above 0, not {self.alpha}")

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `silu` step."""
        return (Step("silu", (float(self.alpha),)),)


@dataclass(frozen=True)
class GELU(PostOp):
    """`v * Phi(v)`, Phi the normal distribution: by erf, or, with `approximate="tanh"`, as BERT approximates it.

    "none": within 8 ulp. "tanh", `v/2 * (1 + tanh(u))`, u = sqrt(2/pi) (v + 0.044715 v**3): within
    3 + 5|u| ulp of that formula. Raises QuantizationError for another word.
    """

    approximate: Literal["none", "tanh"] = "none"
    piecewise_linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.approximate not in ("none", "tanh"):
            raise QuantizationError(f'GELU approximate must be "none" or "tanh", not {self.approximate!r}')

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `gelu` or `gelu_tanh` step."""
        return (Step("gelu" if self.approximate == "none" else "gelu_tanh", ()),)


FunctionName = Literal[
    "exp", "erf", "softplus", "mish", "sqrt", "rsqrt", "reciprocal", "abs", "square", "cube"
]  # fmt: skip


@dataclass(frozen=True)
class Function(PostOp):
    """A function by its name; how exact each is says `kernels.approx` (sqrt, reciprocal, abs, square: half an ulp).

    Raises QuantizationError for a name that is none of these.
    """

    name: FunctionName
    piecewise_linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the name."""
        if self.name not in get_args(FunctionName):
            raise QuantizationError(f"Function takes one of {', '.join(get_args(FunctionName))}, not {self.name!r}")

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one step of that kind."""
        return (Step(self.name, ()),)


def check_sum_zero_point(zero_point: int, dtype: DType) -> None:
    """Raise QuantizationError unless a Sum of a tensor of `dtype` may have this zero point."""
    low, high = INT_RANGE[dtype] if dtype in ("u8", "s8") else (0, 0)
    if not low <= zero_point <= high:
        raise QuantizationError(f"zero_point {zero_point} is not in [{low}, {high}] for a {dtype} tensor")


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise DTypeError(f"{name} must be a number, not {value!r}")
    return float(value)


def _finite(value: object, name: str) -> None:
    if not math.isfinite(_number(value, name)):
        raise QuantizationError(f"{name} must be finite, not {value!r}")
