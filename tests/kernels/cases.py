"""Problems for kernel tests: a small description, the operator it stands for, and random data that fit it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import vnnigen as v

TIERS = ("avx512_vnni", "avx512", "avx_vnni", "avx2")
"""All tiers with generated kernels, whether this machine has them or not."""

NUMPY = {"u8": np.uint8, "s8": np.int8, "s32": np.int32, "f32": np.float32}
PostOps = Callable[[], tuple[v.PostOp, ...]]


def no_post_ops() -> tuple[v.PostOp, ...]:
    return ()


@dataclass(frozen=True)
class Case:
    """A convolution, or a GEMM where `x` has two dimensions (then `w` is (n, k)).

    `weights`: "safe" ones suit the fast chain, "full" ones span s8, "mixed" ones are safe in every other 64
    columns. `bias`: None, "s32" or "f32". `sums` are the types of the Sum post-ops' tensors.
    """

    x: tuple[int, ...]
    w: tuple[int, ...]
    src: str = "u8"
    out: str = "u8"
    x_zp: int = 0
    w_zp: bool = False
    y_zp: int = 0
    bias: str | None = None
    weights: str = "full"
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    post_ops: PostOps = no_post_ops
    sums: tuple[str, ...] = ()
    seed: int = 0
    note: str = field(default="", compare=False)

    def __str__(self) -> str:
        """What pytest shows."""
        parts = [self.note, "x".join(map(str, self.x)), "x".join(map(str, self.w)), self.src, self.out, self.weights]
        return "-".join(p for p in parts if p)

    @property
    def is_gemm(self) -> bool:
        return len(self.x) == 2

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def weight_values(self) -> np.ndarray[Any, Any]:
        """Weights [oc, ic/groups, kh, kw] or [n, k]."""
        rng = self.rng
        if self.src == "f32":
            return rng.standard_normal(self.w).astype(np.float32)
        w = rng.integers(-128, 128, self.w)
        if self.weights == "safe":
            w = rng.integers(-64, 65, self.w)
        if self.weights == "mixed":
            w[(np.arange(len(w)) // 64) % 2 == 0] //= 2
        return w.astype(np.int8)

    def operator(self, isa: str | None) -> v.Operator:
        rng = self.rng
        w = self.weight_values()
        n = self.w[0]
        arguments: dict[str, Any] = {"post_ops": self.post_ops(), "isa": isa}
        bias = None
        if self.bias is not None:
            bias = rng.integers(-3000, 3000, n).astype(np.int32) if self.bias == "s32" else rng.standard_normal(n)
            bias = bias if self.bias == "s32" else bias.astype(np.float32)
        if not self.is_gemm:
            arguments |= {
                "stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups,
            }  # fmt: skip
        if self.src == "f32":
            make = v.GemmF32 if self.is_gemm else v.Conv2dF32
            return make(w.T if self.is_gemm else w, bias, **arguments)
        depth = int(np.prod(self.w[1:]))
        a, b = ("a", "b") if self.is_gemm else ("x", "w")
        arguments |= {
            "out_dtype": NUMPY[self.out], f"{a}_scale": 0.02, f"{a}_zero_point": self.x_zp,
            f"{b}_scale": rng.random(n) * 0.02 + 0.001,
            f"{b}_zero_point": rng.integers(-128, 128, n) if self.w_zp else 0,
        }  # fmt: skip
        if self.out in ("u8", "s8"):
            # Outputs spread over the type's range and beyond it at both ends.
            arguments |= {"y_scale": 0.02 * 0.01 * 2500 * depth**0.5 / 50, "y_zero_point": self.y_zp}
        make = v.GemmInt8 if self.is_gemm else v.Conv2dInt8
        return make(w.T if self.is_gemm else w, bias, **arguments)

    def source(self) -> np.ndarray[Any, Any]:
        return random_array(self.rng, self.x, self.src)

    def tensors(self, y_shape: Sequence[int]) -> tuple[np.ndarray[Any, Any], ...]:
        return tuple(random_array(self.rng, tuple(y_shape), t) for t in self.sums)


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Uniform over the whole of a byte type; moderate numbers otherwise."""
    if dtype == "f32":
        return rng.standard_normal(shape).astype(np.float32) * np.float32(8)
    low, high = {"u8": (0, 256), "s8": (-128, 128), "s32": (-300, 300)}[dtype]
    return rng.integers(low, high, shape).astype(NUMPY[dtype])


def out_shape(op: v.Operator, case: Case) -> tuple[int, ...]:
    """The output's shape; ShapeError where the problem does not fit together."""
    return op._y_shape(op._problem(case.x, case.src))  # type: ignore[arg-type]


def assert_same_bits(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any], what: object) -> None:
    """Equal bit for bit, with NaNs and signed zeros told apart."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    bits = np.uint8 if got.itemsize == 1 else np.uint32
    wrong = got.view(bits) != want.view(bits)
    if wrong.any():
        at = np.argwhere(wrong)
        raise AssertionError(
            f"{what}: {len(at)} of {got.size} differ, first at {at[0].tolist()}: {got[wrong][0]} for {want[wrong][0]}"
        )
