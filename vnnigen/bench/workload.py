"""Ready-to-run kernels: random operands, a packed handle of the public API, and a call without arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

import vnnigen
from vnnigen.bench.post_op_string import parse_post_ops
from vnnigen.bench.problem_string import ConvShape, GemmShape
from vnnigen.errors import VnnigenError
from vnnigen.kernels.packing import aligned
from vnnigen.ops.explanation import Explanation, columns_by_chain

DTYPES = ("u8s8", "s8s8", "bf16", "f32")
OUT_DTYPES: dict[str, npt.DTypeLike] = {
    "u8": np.uint8, "s8": np.int8, "s32": np.int32, "bf16": ml_dtypes.bfloat16, "f32": np.float32
}  # fmt: skip
#: Largest weight magnitude: a pair of 64s cannot saturate VPMADDUBSW's s16 sums (255 * 128 = 32640).
WEIGHT_LIMIT = {"full": 127, "safe": 64}

_X_SCALE = 0.02
_W_SCALE = 0.005


@dataclass(frozen=True)
class Request:
    """What to run.

    `post_ops` is in the notation of `parse_post_ops`; `isa` None takes the best tier; `out_dtype` None is u8
    for int8 kernels and the source's type for others.
    """

    shape: ConvShape | GemmShape
    dtype: str = "u8s8"
    out_dtype: str | None = None
    isa: str | None = None
    threads: int = 1
    post_ops: str = ""
    weights: str = "full"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise VnnigenError where a field is not one of its legal values."""
        for what, value, legal in (
            ("dtype", self.dtype, DTYPES),
            ("output dtype", self.out, tuple(OUT_DTYPES)),
            ("kind of weights", self.weights, tuple(WEIGHT_LIMIT)),
        ):
            if value not in legal:
                raise VnnigenError(f"{what} {value!r} is not one of {', '.join(legal)}")
        if self.out not in {"f32": ("f32",), "bf16": ("bf16", "f32")}.get(self.dtype, tuple(OUT_DTYPES)):
            raise VnnigenError(f"a kernel of {self.dtype} has no {self.out} output; leave the output dtype out")

    @property
    def out(self) -> str:
        """The output's dtype with the default filled in."""
        return self.out_dtype or (self.dtype if self.dtype in ("f32", "bf16") else "u8")


@dataclass(frozen=True)
class Workload:
    """A request made runnable: `run()` is one inference into a fixed output buffer."""

    request: Request
    run: Callable[[], object]
    explanation: Explanation

    @property
    def chains(self) -> dict[str, int]:
        """Multiply steps, with the output columns (of a group) that each computes; {} for the reference."""
        return columns_by_chain(self.explanation.kernels)


def f32_request(request: Request, tier: str) -> Request:
    """Return the f32 problem to compare an int8 kernel of `tier` with: same shape, vectors and post-ops."""
    if tier.startswith(("avx512", "amx")):
        isa = "avx512"
    else:
        isa = "avx2" if tier.startswith("avx") else tier
    return replace(request, dtype="f32", out_dtype="f32", isa=isa)


def build_workload(request: Request) -> Workload:
    """Draw operands, pack the weights and run once, so that everything is compiled.

    Sets the process's number of threads. Raises whatever the public API raises for the request: VnnigenError
    and its subclasses.
    """
    operator, x, out = run_once(request)

    def run() -> object:
        return operator(x, out)

    return Workload(request, run, operator.explain())


def run_once(request: Request) -> tuple[vnnigen.Operator, npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the operator of a request, already run, with its source and output; see `build_workload`.

    Both begin at a cache line, as they do in a compiled network's arena and in the peers' own allocations: NumPy's are
    at any multiple of 16 bytes, and off a line each 64-byte load or store touches two.
    """
    vnnigen.set_num_threads(request.threads)
    rng = np.random.default_rng(request.seed)
    x_shape, w_shape, y_shape = _shapes(request.shape)
    x = _at_a_line(_source(rng, x_shape, request.dtype))
    handle = _handle(request, rng, x, w_shape, y_shape[-1])
    out = _at_a_line(np.zeros(y_shape, OUT_DTYPES[request.out]))
    handle(x, out)
    return handle, x, out


def _at_a_line(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Copy an array to memory that begins at a cache line."""
    copy: npt.NDArray[Any] = aligned(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _handle(
    request: Request, rng: np.random.Generator, x: npt.NDArray[Any], w_shape: tuple[int, ...], channels: int
) -> vnnigen.Operator:
    """Build the operator of the public API for a request."""
    options: dict[str, Any] = {"isa": request.isa, "post_ops": parse_post_ops(request.post_ops)}
    if isinstance(request.shape, ConvShape):
        h, w = request.shape.h, request.shape.w
        options |= {"stride": (h.stride, w.stride), "dilation": (h.dilation, w.dilation)}
        options |= {"padding": request.shape.padding, "groups": request.shape.g}
    bias: npt.NDArray[Any] = rng.standard_normal(channels, dtype=np.float32)
    if request.dtype == "f32":
        weights_f32 = rng.standard_normal(w_shape, dtype=np.float32)
        if isinstance(request.shape, GemmShape):
            return vnnigen.GemmF32(weights_f32, bias, **options)
        return vnnigen.Conv2dF32(weights_f32, bias, **options)
    if request.dtype == "bf16":
        options["out_dtype"] = OUT_DTYPES[request.out]
        weights_bf16 = rng.standard_normal(w_shape, dtype=np.float32).astype(ml_dtypes.bfloat16)
        if isinstance(request.shape, GemmShape):
            return vnnigen.GemmBf16(weights_bf16, bias, **options)
        return vnnigen.Conv2dBf16(weights_bf16, bias, **options)
    limit = WEIGHT_LIMIT[request.weights]
    weights = rng.integers(-limit, limit + 1, w_shape, dtype=np.int8)
    if request.out == "s32":
        bias = rng.integers(-1000, 1000, channels, dtype=np.int32)
    options["out_dtype"] = OUT_DTYPES[request.out]
    if request.out in ("u8", "s8"):
        options["y_scale"] = _y_scale(x, weights, channels)
    scales = _X_SCALE, np.full(channels, _W_SCALE, np.float32)
    if isinstance(request.shape, GemmShape):
        return vnnigen.GemmInt8(weights, bias, a_scale=scales[0], b_scale=scales[1], **options)
    return vnnigen.Conv2dInt8(weights, bias, x_scale=scales[0], w_scale=scales[1], **options)


def _shapes(shape: ConvShape | GemmShape) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of source, weights and output."""
    if isinstance(shape, GemmShape):
        return (shape.m, shape.k), (shape.k, shape.n), (shape.m, shape.n)
    return shape.x_shape, shape.w_shape, shape.y_shape


def _y_scale(x: npt.NDArray[Any], weights: npt.NDArray[Any], channels: int) -> float:
    """Spread the output over its range, as calibration would do."""
    taps = weights.size // channels
    power = np.mean(np.square(x, dtype=np.float64)) * np.mean(np.square(weights, dtype=np.float64))
    return max(math.sqrt(taps * float(power)), 1.0) * _X_SCALE * _W_SCALE * 4 / 255


def _source(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    if dtype in ("f32", "bf16"):
        return rng.standard_normal(shape, dtype=np.float32).astype(OUT_DTYPES[dtype])
    if dtype == "u8s8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.integers(-128, 128, shape, dtype=np.int8)
