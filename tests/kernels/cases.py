"""Problems for kernel tests: a small description, the operator it stands for, and random data that fit it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

import vnnigen as v
from vnnigen.kernels.epilogue import reference_epilogue
from vnnigen.kernels.fma import fma32
from vnnigen.kernels.problem import ConvProblem
from vnnigen.kernels.thin import MAX_COLUMNS

TIERS = ("avx512_vnni", "avx512", "avx_vnni", "avx2")
"""All tiers with generated kernels, whether this machine has them or not."""

NUMPY: dict[str, Any] = {
    "u8": np.uint8, "s8": np.int8, "s32": np.int32, "f32": np.float32, "bf16": ml_dtypes.bfloat16,
}  # fmt: skip
PostOps = Callable[[], tuple[v.PostOp, ...]]


def no_post_ops() -> tuple[v.PostOp, ...]:
    return ()


@dataclass(frozen=True)
class Case:
    """A convolution, or a GEMM where `x` has two dimensions (then `w` is (n, k)).

    `weights`: "safe" ones suit the fast chain, "full" ones span s8, "mixed" ones are safe in every other 64
    columns; for bf16, "small" ones are integers, as is the source then, whose sums are exact in any order.
    `bias`: None, "s32" or "f32". `sums` are the types of the Sum and Binary post-ops' tensors.
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
    post_ops: PostOps = field(default=no_post_ops, repr=False)
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
        if self.src == "bf16":
            return random_array(rng, self.w, self.weights if self.weights == "small" else "bf16")
        w = rng.integers(-128, 128, self.w)
        if self.weights == "safe":
            w = rng.integers(-64, 65, self.w)
        if self.weights == "mixed":
            w[(np.arange(len(w)) // 64) % 2 == 0] //= 2
        return w.astype(np.int8)

    def operator(self, isa: str | None, **more: Any) -> v.Operator:
        """The operator on a tier; `more` are arguments of its class."""
        rng = self.rng
        w = self.weight_values()
        n = self.w[0]
        arguments: dict[str, Any] = {"post_ops": self.post_ops(), "isa": isa, **more}
        bias = None
        if self.bias is not None:
            bias = rng.integers(-3000, 3000, n).astype(np.int32) if self.bias == "s32" else rng.standard_normal(n)
            bias = bias if self.bias == "s32" else bias.astype(np.float32)
        if not self.is_gemm:
            arguments |= {
                "stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups,
            }  # fmt: skip
        if self.src == "bf16":
            bf16 = v.GemmBf16 if self.is_gemm else v.Conv2dBf16
            return bf16(w.T if self.is_gemm else w, bias, out_dtype=NUMPY[self.out], **arguments)
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
        small = self.src == "bf16" and self.weights == "small"
        return random_array(self.rng, self.x, "small" if small else self.src)

    def tensors(self, y_shape: Sequence[int]) -> tuple[np.ndarray[Any, Any], ...]:
        return tuple(random_array(self.rng, tuple(y_shape), t) for t in self.sums)


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Uniform over the whole of a byte type; moderate numbers otherwise."""
    if dtype == "f32":
        return rng.standard_normal(shape).astype(np.float32) * np.float32(8)
    if dtype == "bf16":
        return rng.standard_normal(shape).astype(np.float32).astype(NUMPY["bf16"])
    if dtype == "small":
        return rng.integers(-8, 9, shape).astype(np.float32).astype(NUMPY["bf16"])
    low, high = {"u8": (0, 256), "s8": (-128, 128), "s32": (-300, 300)}[dtype]
    return rng.integers(low, high, shape).astype(NUMPY[dtype])


def out_shape(op: v.Operator, case: Case) -> tuple[int, ...]:
    """The output's shape; ShapeError where the problem does not fit together."""
    return op._y_shape(op._problem(case.x, case.src))  # type: ignore[arg-type]


def assert_same_bits(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any], what: object) -> None:
    """Equal bit for bit, with NaNs and signed zeros told apart."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[got.itemsize]
    wrong = got.view(bits) != want.view(bits)
    if wrong.any():
        at = np.argwhere(wrong)
        raise AssertionError(
            f"{what}: {len(at)} of {got.size} differ, first at {at[0].tolist()}: {got[wrong][0]} for {want[wrong][0]}"
        )


def _chain(*ops: v.PostOp) -> PostOps:
    return lambda: ops


POST_OPS: dict[str, tuple[PostOps, tuple[str, ...]]] = {
    "none": (no_post_ops, ()),
    "relu": (_chain(v.ReLU()), ()),
    "relu6": (_chain(v.Clip(0, 6)), ()),
    "clip": (_chain(v.Clip(-3.5, 2.25)), ()),
    "leaky": (_chain(v.LeakyReLU(0.1)), ()),
    "leaky-negative": (_chain(v.LeakyReLU(-0.7)), ()),
    "linear": (_chain(v.Linear(-1.5, 0.3)), ()),
    "linear-relu-linear": (_chain(v.Linear(0.5, 1), v.ReLU(), v.Linear(-2, 3)), ()),
    # oneDNN's names: beta is the sum's scale, gamma the scale of the element-wise operation.
    "acc(beta).eltwise(gamma)": (_chain(v.Sum(0.3), v.ReLU(), v.Linear(0.7, 0)), ("out",)),
    "eltwise(gamma).acc(beta)": (_chain(v.ReLU(), v.Linear(0.7, 0), v.Sum(0.3)), ("out",)),
    "sum-u8": (_chain(v.Sum(0.02, 131, dtype=np.uint8)), ("u8",)),
    "sum-s8-relu": (_chain(v.Sum(-0.05, -7, dtype=np.int8), v.ReLU()), ("s8",)),
    "relu-sum-s8": (_chain(v.ReLU(), v.Sum(0.05, 100, dtype=np.int8)), ("s8",)),
    "sum-s32": (_chain(v.Sum(0.01, dtype=np.int32)), ("s32",)),
    "sum-f32-leaky": (_chain(v.Sum(0.5, dtype=np.float32), v.LeakyReLU(0.2)), ("f32",)),
    "four-sums": (
        _chain(
            v.Sum(0.02, 3, dtype=np.uint8), v.ReLU(), v.Sum(0.03, dtype=np.int8), v.Linear(0.9, -0.2),
            v.Sum(0.01, dtype=np.int32), v.LeakyReLU(0.3), v.Sum(-0.5, dtype=np.float32), v.Clip(-2, 9),
        ),
        ("u8", "s8", "s32", "f32"),
    ),
}  # fmt: skip
"""Chains of post-ops, with the types of the tensors that they take at a call ("out": the output's own)."""

Pick = Callable[[Sequence[Any]], Any]


def random_numbers(case: Case, pick: Pick, src: str | None = None) -> Case:
    """Choose everything that is not shape: types, zero points, bias, kind of weights, post-ops.

    `pick` takes one of a sequence: Hypothesis', or a seeded generator's. `src` forces the source's type.
    """
    seed = pick(range(1 << 16))
    src = src or pick(("u8", "s8", "u8", "s8", "f32"))
    if src == "f32":
        chain, sums = POST_OPS[pick(sorted(POST_OPS))]
        sums = tuple("f32" if s == "out" else s for s in sums)
        return replace(case, src="f32", out="f32", bias=pick((None, "f32")), post_ops=chain, sums=sums, seed=seed)
    out = pick(("u8", "s8", "s32", "f32"))
    low, high = (0, 255) if src == "u8" else (-128, 127)
    y_low, y_high = (0, 255) if out == "u8" else (-128, 127)
    chain, sums = POST_OPS[pick(sorted(POST_OPS)) if out != "s32" else "none"]
    return replace(
        case, src=src, out=out, x_zp=pick((0, 0, low, 77, high)), w_zp=pick((False, False, True)),
        y_zp=pick((0, y_low, y_high, 10)) if out in ("u8", "s8") else 0,
        bias=pick((None, "s32", "f32") if out != "s32" else (None, "s32")),
        weights=pick(("safe", "full", "mixed")), post_ops=chain,
        sums=tuple(out if s == "out" else s for s in sums), seed=seed,
    )  # fmt: skip


def seeded(seed: int) -> Pick:
    """A `pick` that needs no Hypothesis."""
    rng = random.Random(seed)
    return rng.choice


def f32_in_order(case: Case, x: Any, w: Any) -> np.ndarray[Any, Any]:
    """Accumulate in the documented order (kh, kw, ic) with one FMA each, from zero: what every tier must give."""
    if case.is_gemm and case.w[0] <= MAX_COLUMNS:
        return thin_f32_in_order(x, w)
    if case.is_gemm:
        x, w = x[:, None, None, :], w[:, :, None, None]
    p = ConvProblem.from_arguments(
        x.shape, w.shape, stride=case.stride, padding=case.padding, dilation=case.dilation, groups=case.groups,
        src="f32", dst="f32",
    )  # fmt: skip
    padded = np.pad(x, ((0, 0), *p.pad, (0, 0)))
    acc = np.zeros((p.n, p.oh, p.ow, p.groups, p.ocg), np.float32)
    for i in range(p.kh):
        rows = slice(i * p.dilation[0], i * p.dilation[0] + (p.oh - 1) * p.stride[0] + 1, p.stride[0])
        for j in range(p.kw):
            cols = slice(j * p.dilation[1], j * p.dilation[1] + (p.ow - 1) * p.stride[1] + 1, p.stride[1])
            for c in range(p.icg):
                values = padded[:, rows, cols, c :: p.icg]
                acc = fma32(values[..., None], w[:, c, i, j].reshape(p.groups, p.ocg), acc)
    return acc.reshape(p.n * p.oh * p.ow, p.oc) if case.is_gemm else acc.reshape(p.y_shape)


def thin_f32_in_order(x: Any, w: Any) -> np.ndarray[Any, Any]:
    """The order of products with few columns: 16 partial sums of every 16th element, added by halves."""
    m, k = x.shape
    x, w = (np.pad(array, ((0, 0), (0, -k % 16))).reshape(len(array), -1, 16) for array in (x, w))
    acc = np.zeros((m, len(w), 16), np.float32)
    for i in range(x.shape[1]):
        acc = fma32(x[:, None, i], w[None, :, i], acc)
    for half in (8, 4, 2, 1):
        acc = acc[..., :half] + acc[..., half:]
    return acc[..., 0]


def float64_sums(case: Case, x: Any, w: Any) -> np.ndarray[Any, Any]:
    """Accumulators in float64, which products of bf16 and moderate sums of them fit exactly."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    if case.is_gemm:
        return x @ w.T  # type: ignore[no-any-return]
    p = ConvProblem.from_arguments(
        x.shape, w.shape, stride=case.stride, padding=case.padding, dilation=case.dilation, groups=case.groups,
        src="bf16", dst="f32",
    )  # fmt: skip
    padded = np.pad(x, ((0, 0), *p.pad, (0, 0)))
    acc = np.zeros((p.n, p.oh, p.ow, p.groups, p.ocg))
    weights = w.reshape(p.groups, p.ocg, p.icg, p.kh, p.kw)
    for i in range(p.kh):
        rows = slice(i * p.dilation[0], i * p.dilation[0] + (p.oh - 1) * p.stride[0] + 1, p.stride[0])
        for j in range(p.kw):
            cols = slice(j * p.dilation[1], j * p.dilation[1] + (p.ow - 1) * p.stride[1] + 1, p.stride[1])
            values = padded[:, rows, cols].reshape(p.n, p.oh, p.ow, p.groups, p.icg)
            acc += np.einsum("nhwgi,goi->nhwgo", values, weights[..., i, j])
    return acc.reshape(p.y_shape)


def expected(case: Case, op: v.Operator, x: Any, tensors: Sequence[Any]) -> np.ndarray[Any, Any]:
    """What every generated kernel must compute, bit for bit; `op` is of the reference tier.

    bf16 sums have an error bound instead, but those of "small" integers are exact.
    """
    if case.src == "bf16":
        acc = float64_sums(case, x, case.weight_values()) + 0.0  # sums start at +0: none is -0
        return reference_epilogue(acc.astype(np.float32), op._prepare("bf16").epilogue, tensors)
    if case.src != "f32":
        return op(x, tensors=tensors)
    return reference_epilogue(f32_in_order(case, x, case.weight_values()), op._prepare("f32").epilogue, tensors)
