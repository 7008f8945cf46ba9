"""Ready-to-run kernels: random operands, a packed handle of the public API, and a call without arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

import vnnigen
from vnnigen.bench.post_op_string import parse_post_ops
from vnnigen.bench.problem_string import ConvShape, GemmShape
from vnnigen.errors import VnnigenError

DTYPES = ("u8s8", "s8s8", "f32")
OUT_DTYPES: dict[str, npt.DTypeLike] = {"u8": np.uint8, "s8": np.int8, "s32": np.int32, "f32": np.float32}
#: Largest weight magnitude: a pair of 64s cannot saturate VPMADDUBSW's s16 sums (255 * 128 = 32640).
WEIGHT_LIMIT = {"full": 127, "safe": 64}

_X_SCALE = 0.02
_W_SCALE = 0.005


@dataclass(frozen=True)
class Request:
    """What to run.

    `post_ops` is in the notation of `parse_post_ops`; `isa` None takes the best tier; `out_dtype` None is u8
    for int8 kernels and f32 for f32 ones.
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
        if self.dtype == "f32" and self.out != "f32":
            raise VnnigenError(f"an f32 kernel has no {self.out} output; leave the output dtype out")

    @property
    def out(self) -> str:
        """The output's dtype with the default filled in."""
        return self.out_dtype or ("f32" if self.dtype == "f32" else "u8")


@dataclass(frozen=True)
class Workload:
    """A request made runnable: `run()` is one inference into a fixed output buffer."""

    request: Request
    run: Callable[[], object]
    explanation: Any

    @property
    def tier(self) -> str:
        """Tier that dispatch chose."""
        return str(self.explanation.tier)

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        return str(self.explanation.kernel)

    @property
    def chain(self) -> Any:
        """Multiply step, or the shares of several."""
        return self.explanation.chain


def f32_request(request: Request, tier: str) -> Request:
    """Return the f32 problem to compare an int8 kernel of `tier` with: same shape, vectors and post-ops."""
    if tier.startswith(("avx512", "amx")):
        isa = "avx512"
    else:
        isa = "avx2" if tier.startswith("avx") else tier
    return replace(request, dtype="f32", out_dtype="f32", isa=isa)


def build_workload(request: Request) -> Workload:
    """Draw operands, pack the weights and run once, so that everything is compiled.

    Raises whatever the public API raises for the request: VnnigenError and its subclasses.
    """
    vnnigen.set_num_threads(request.threads)
    rng = np.random.default_rng(request.seed)
    gemm = isinstance(request.shape, GemmShape)
    x_shape, w_shape, y_shape = _shapes(request.shape)
    channels = y_shape[-1]
    options: dict[str, Any] = {"isa": request.isa, "post_ops": parse_post_ops(request.post_ops)}
    if isinstance(request.shape, ConvShape):
        h, w = request.shape.h, request.shape.w
        options |= {"stride": (h.stride, w.stride), "dilation": (h.dilation, w.dilation)}
        options |= {"padding": request.shape.padding, "groups": request.shape.g}
    x: npt.NDArray[Any]
    weights: npt.NDArray[Any]
    if request.dtype == "f32":
        x, weights = _normal(rng, x_shape), _normal(rng, w_shape)
        make = vnnigen.GemmF32 if gemm else vnnigen.Conv2dF32
    else:
        x, weights = (
            _bytes(rng, x_shape, request.dtype),
            _weights(rng, w_shape, WEIGHT_LIMIT[request.weights]),
        )
        options |= _quantization(request, x, weights, channels)
        make = vnnigen.GemmInt8 if gemm else vnnigen.Conv2dInt8
    bias = (
        rng.integers(-1000, 1000, channels, dtype=np.int32)
        if request.out == "s32"
        else _normal(rng, (channels,))
    )
    handle = make(weights, bias, **options)
    out = np.zeros(y_shape, OUT_DTYPES[request.out])

    def run() -> object:
        return handle(x, out=out)

    run()
    return Workload(request, run, handle.explain())


def _shapes(shape: ConvShape | GemmShape) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of source, weights and output."""
    if isinstance(shape, GemmShape):
        return (shape.m, shape.k), (shape.k, shape.n), (shape.m, shape.n)
    return shape.x_shape, shape.w_shape, shape.y_shape


def _quantization(
    request: Request, x: npt.NDArray[Any], weights: npt.NDArray[Any], channels: int
) -> dict[str, Any]:
    """Scales, the weights' per channel; the output is spread over its range, as calibration would do."""
    options: dict[str, Any] = {"x_scale": _X_SCALE}
    options["w_scale"] = np.full(channels, _W_SCALE, np.float32)
    options["out_dtype"] = OUT_DTYPES[request.out]
    if request.out in ("u8", "s8"):
        k = weights.size // channels
        spread = math.sqrt(
            k * float(np.mean(np.square(x, dtype=float)) * np.mean(np.square(weights, dtype=float)))
        )
        options["y_scale"] = max(spread, 1.0) * _X_SCALE * _W_SCALE * 4 / 255
    return options


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return rng.standard_normal(shape, dtype=np.float32)


def _bytes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    if dtype == "u8s8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.integers(-128, 128, shape, dtype=np.int8)


def _weights(rng: np.random.Generator, shape: tuple[int, ...], limit: int) -> npt.NDArray[np.int8]:
    return rng.integers(-limit, limit + 1, shape, dtype=np.int8)
