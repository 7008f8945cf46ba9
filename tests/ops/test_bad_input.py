"""Bad arguments: each a VnnigenError whose message names the argument, or a documented correct result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vnnigen as v
from vnnigen import DTypeError, ISAError, QuantizationError, ShapeError, VnnigenError

X = np.arange(2 * 5 * 6 * 4, dtype=np.uint8).reshape(2, 5, 6, 4)
W = np.arange(3 * 4 * 3 * 3, dtype=np.int8).reshape(3, 4, 3, 3)
A = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7)
B = np.arange(7 * 3, dtype=np.int8).reshape(7, 3)
NAN, INF = float("nan"), float("inf")


def conv(**changes: Any) -> Any:
    """A good convolution, with changes."""
    arguments: dict[str, Any] = {"x": X, "w": W, "y_scale": 100.0}
    arguments |= changes
    return v.conv_int8(**arguments)


def gemm(**changes: Any) -> Any:
    """A good matrix product, with changes."""
    arguments: dict[str, Any] = {"a": A, "b": B, "y_scale": 100.0}
    arguments |= changes
    return v.gemm_int8(**arguments)


def read_only(array: Any) -> Any:
    array.setflags(write=False)
    return array


def out(shape: tuple[int, ...] = (2, 3, 4, 3), dtype: Any = np.uint8) -> Any:
    return np.zeros(shape, dtype)


Row = tuple[str, type[VnnigenError], str, dict[str, Any]]

CONV: list[Row] = [
    # the source
    ("x a list", DTypeError, "x must be a NumPy array", {"x": [[1]]}),
    ("x None", DTypeError, "x must be a NumPy array", {"x": None}),
    ("x f32", DTypeError, "x has type", {"x": X.astype(np.float32)}),
    ("x s16", DTypeError, "x has type", {"x": X.astype(np.int16)}),
    ("x bool", DTypeError, "x has type", {"x": X > 3}),
    ("x of objects", DTypeError, "x has type", {"x": X.astype(object)}),
    ("x rank 3", ShapeError, "x must have 4", {"x": X[0]}),
    ("x rank 5", ShapeError, "x must have 4", {"x": X[None]}),
    ("x rank 0", ShapeError, "x must have 4", {"x": np.zeros((), np.uint8)}),
    ("x channels", ShapeError, "x must have 4 channels, not 3", {"x": X[..., :3]}),
    ("x empty batch", ShapeError, "empty", {"x": X[:0]}),
    ("x no rows", ShapeError, "empty", {"x": X[:, :0]}),
    ("x no channels", ShapeError, "empty", {"x": X[..., :0]}),
    ("x below the kernel", ShapeError, "output would be empty", {"x": X[:, :2]}),
    ("x layout", ShapeError, "x must have 4 channels", {"x": X.transpose(0, 3, 1, 2)}),
    ("x NCHW rank", ShapeError, "x must have 4", {"x": X[0], "layout": "NCHW"}),
    ("x NCHW a list", VnnigenError, "x must", {"x": [1], "layout": "NCHW"}),
    # the weights
    ("w a list", DTypeError, "w must", {"w": [[1]]}),
    ("w u8", DTypeError, "w must be int8", {"w": W.astype(np.uint8)}),
    ("w f32", DTypeError, "w must be int8", {"w": W.astype(np.float32)}),
    ("w rank 2", ShapeError, "w must have shape", {"w": W[0, 0]}),
    ("w empty", ShapeError, "w must have shape", {"w": W[:0]}),
    ("w no taps", ShapeError, "w must have shape", {"w": W[..., :0]}),
    # geometry
    ("groups zero", ShapeError, "groups", {"groups": 0}),
    ("groups negative", ShapeError, "groups", {"groups": -1}),
    ("groups 2 of 3", ShapeError, "groups", {"groups": 2}),
    ("groups times icg", ShapeError, "groups", {"groups": 3}),
    ("groups a float", ShapeError, "groups", {"groups": 1.0}),
    ("groups None", ShapeError, "groups", {"groups": None}),
    ("stride zero", ShapeError, "stride", {"stride": 0}),
    ("stride negative", ShapeError, "stride", {"stride": (1, -1)}),
    ("stride of three", ShapeError, "stride", {"stride": (1, 1, 1)}),
    ("stride a float", ShapeError, "stride", {"stride": 1.5}),
    ("stride a string", ShapeError, "stride", {"stride": "1"}),
    ("stride huge", ShapeError, "stride", {"stride": 2**40}),
    ("dilation zero", ShapeError, "dilation", {"dilation": 0}),
    ("dilation too far", ShapeError, "output would be empty", {"dilation": 7}),
    ("dilation huge", ShapeError, "dilation", {"dilation": 2**40}),
    ("padding negative", ShapeError, "padding", {"padding": -1}),
    ("padding negative left", ShapeError, "padding", {"padding": ((0, 0), (-1, 0))}),
    ("padding of three", ShapeError, "padding", {"padding": (1, 1, 1)}),
    ("padding of four", ShapeError, "padding", {"padding": (1, 1, 1, 1)}),
    ("padding a float", ShapeError, "padding", {"padding": 0.5}),
    ("padding a string", ShapeError, "padding", {"padding": "same"}),
    ("padding overflows", ShapeError, "beyond what can be addressed", {"padding": 2**31 - 1}),
    ("padding huge", ShapeError, "padding", {"padding": 2**60}),
    ("layout", ShapeError, "layout", {"layout": "NHCW"}),
    ("layout None", ShapeError, "layout", {"layout": None}),
    # quantization
    *[(f"{name} {bad}", QuantizationError, name, {name: bad})
      for name in ("x_scale", "w_scale", "y_scale") for bad in (NAN, 0.0, -1.0, INF, -INF)],
    *[(f"{name} {bad!r}", VnnigenError, name, {name: bad})
      for name in ("x_scale", "w_scale", "y_scale") for bad in ("1", [1.0, 2.0], 1j)],
    ("x_scale None", VnnigenError, "x_scale", {"x_scale": None}),
    ("w_scale with a NaN", QuantizationError, "w_scale", {"w_scale": [1, NAN, 1]}),
    ("w_scale with a zero", QuantizationError, "w_scale", {"w_scale": [1, 0, 1]}),
    ("w_scale of 2", VnnigenError, "w_scale", {"w_scale": [1, 1]}),
    ("w_scale of rank 2", VnnigenError, "w_scale", {"w_scale": [[1, 1, 1]]}),
    ("scales overflow", QuantizationError, "scale", {"x_scale": 1e30, "w_scale": 1e30}),
    ("scales underflow", QuantizationError, "scale", {"x_scale": 1e-30, "w_scale": 1e-30}),
    ("y_scale tiny", QuantizationError, "scale", {"y_scale": 1e-320}),
    ("x_zero_point 256", QuantizationError, "x_zero_point", {"x_zero_point": 256}),
    ("x_zero_point -1 of u8", QuantizationError, "x_zero_point", {"x_zero_point": -1}),
    ("x_zero_point 128 of s8", QuantizationError, "x_zero_point", {"x_zero_point": 128, "x": X.view(np.int8)}),
    ("x_zero_point a float", VnnigenError, "x_zero_point", {"x_zero_point": 1.5}),
    ("x_zero_point NaN", VnnigenError, "x_zero_point", {"x_zero_point": NAN}),
    ("x_zero_point None", VnnigenError, "x_zero_point", {"x_zero_point": None}),
    ("x_zero_point of two", VnnigenError, "x_zero_point", {"x_zero_point": [1, 2]}),
    ("w_zero_point 128", QuantizationError, "w_zero_point", {"w_zero_point": 128}),
    ("w_zero_point -129", QuantizationError, "w_zero_point", {"w_zero_point": [0, 0, -129]}),
    ("w_zero_point of 2", VnnigenError, "w_zero_point", {"w_zero_point": [1, 2]}),
    ("w_zero_point a float", VnnigenError, "w_zero_point", {"w_zero_point": 1.5}),
    ("y_zero_point 256", QuantizationError, "y_zero_point", {"y_zero_point": 256}),
    ("y_zero_point 128 of s8", QuantizationError, "y_zero_point", {"y_zero_point": 128, "out_dtype": np.int8}),
    ("y_zero_point a float", VnnigenError, "y_zero_point", {"y_zero_point": 0.5}),
    ("y_zero_point of f32", QuantizationError, "y_zero_point", {"y_zero_point": 1, "out_dtype": "f4", "y_scale": None}),
    ("y_scale missing", QuantizationError, "y_scale", {"y_scale": None}),
    ("y_scale missing s8", QuantizationError, "y_scale", {"y_scale": None, "out_dtype": np.int8}),
    ("y_scale of s32", QuantizationError, "y_scale", {"out_dtype": np.int32}),
    ("y_scale of f32", QuantizationError, "y_scale", {"out_dtype": np.float32}),
    ("out_dtype f64", DTypeError, "out_dtype", {"out_dtype": np.float64}),
    ("out_dtype None", DTypeError, "out_dtype", {"out_dtype": None}),
    ("out_dtype nonsense", DTypeError, "out_dtype", {"out_dtype": "nonsense"}),
    # bias
    ("bias s64", DTypeError, "bias", {"bias": np.zeros(3, np.int64)}),
    ("bias of 2", ShapeError, "bias", {"bias": np.zeros(2, np.int32)}),
    ("bias scalar", ShapeError, "bias", {"bias": np.int32(1)}),
    ("bias NaN", QuantizationError, "bias", {"bias": np.array([0, NAN, 0], np.float32)}),
    ("bias inf", QuantizationError, "bias", {"bias": np.array([0, INF, 0], np.float32)}),
    ("bias beyond f32", QuantizationError, "bias", {"bias": np.array([0, 1e300, 0])}),
    ("bias strings", DTypeError, "bias", {"bias": np.array(["a", "b", "c"])}),
    ("bias f32 with s32 output", QuantizationError, "bias",
     {"bias": np.zeros(3, np.float32), "out_dtype": np.int32, "y_scale": None}),
    ("bias overflows s32", QuantizationError, "K too large|s32", {"bias": np.full(3, 2**31 - 1, np.int32)}),
    # post-ops
    ("post_ops None", DTypeError, "post_ops", {"post_ops": None}),
    ("post_ops a string", DTypeError, "post_ops", {"post_ops": "relu"}),
    ("post_ops a class", DTypeError, "post_ops", {"post_ops": (v.ReLU,)}),
    ("post_ops a number", DTypeError, "post_ops", {"post_ops": 3}),
    ("post_ops of s32", QuantizationError, "post_ops", {"post_ops": v.ReLU(), "out_dtype": np.int32, "y_scale": None}),
    ("post_ops: five sums", ShapeError, "Sum", {"post_ops": [v.Sum(dtype=np.uint8)] * 5}),
    ("post_ops: sum without a tensor", ShapeError, "Sum", {"post_ops": v.Sum()}),
    ("post_ops: sum of another shape", ShapeError, "Sum", {"post_ops": v.Sum(tensor=out((2, 3, 4, 4)))}),
    ("post_ops: sum that broadcasts", ShapeError, "Sum", {"post_ops": v.Sum(tensor=out((3,)))}),
    ("post_ops: sum and out differ", DTypeError, "Sum", {"post_ops": v.Sum(dtype=np.int8), "out": out()}),
    ("post_ops: overflowing constant", QuantizationError, "linear", {"post_ops": v.Linear(1e39, 0)}),
    # tiers
    ("isa unknown", ISAError, "sse2", {"isa": "sse2"}),
    ("isa a number", ISAError, "isa|tier", {"isa": 3}),
    ("isa without kernels", ISAError, "amx_bf16|implemented", {"isa": "amx_bf16"}),
    # out
    ("out a list", DTypeError, "out must", {"out": [1]}),
    ("out s8", DTypeError, "out must be uint8", {"out": out(dtype=np.int8)}),
    ("out shape", ShapeError, "out must have shape", {"out": out((2, 3, 4, 4))}),
    ("out flat", ShapeError, "out must have shape", {"out": out((72,))}),
    ("out not contiguous", ShapeError, "out must be C-contiguous", {"out": out((2, 3, 4, 6))[..., ::2]}),
    ("out read-only", ShapeError, "out is read-only", {"out": read_only(out())}),
    ("out with NCHW", ShapeError, "out=", {"out": out(), "layout": "NCHW", "x": X.transpose(0, 3, 1, 2)}),
]  # fmt: skip


@pytest.mark.parametrize("isa", [None, "reference"])
@pytest.mark.parametrize(("error", "message", "changes"), [r[1:] for r in CONV], ids=[r[0] for r in CONV])
def test_conv(isa: str | None, error: type[VnnigenError], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        conv(**({"isa": isa} | changes))


GEMM: list[Row] = [
    ("a a list", DTypeError, "a must be a NumPy array", {"a": [[1]]}),
    ("a f32", DTypeError, "a has type", {"a": A.astype(np.float32)}),
    ("a rank 3", ShapeError, "a and b", {"a": A[None]}),
    ("a rank 1", ShapeError, "a and b", {"a": A[0]}),
    ("a columns", ShapeError, "a has 6 columns", {"a": A[:, :6]}),
    ("a empty", ShapeError, "empty", {"a": A[:0]}),
    ("b s16", DTypeError, "b must be int8", {"b": B.astype(np.int16)}),
    ("b rank 1", ShapeError, "b must have shape", {"b": B[0]}),
    ("b empty", ShapeError, "b must have shape", {"b": B[:, :0]}),
    ("b a list", DTypeError, "b must", {"b": [[1]]}),
    *[(f"{name} {bad}", QuantizationError, name, {name: bad})
      for name in ("a_scale", "b_scale", "y_scale") for bad in (NAN, 0.0, -1.0, INF)],
    ("b_scale of 2", VnnigenError, "b_scale", {"b_scale": [1, 1]}),
    ("a_zero_point 256", QuantizationError, "a_zero_point", {"a_zero_point": 256}),
    ("a_zero_point -1 of u8", QuantizationError, "a_zero_point", {"a_zero_point": -1}),
    ("b_zero_point 200", QuantizationError, "b_zero_point", {"b_zero_point": 200}),
    ("y_scale missing", QuantizationError, "y_scale", {"y_scale": None}),
    ("bias of 7", ShapeError, "bias", {"bias": np.zeros(7, np.int32)}),
    ("out shape", ShapeError, "out must have shape", {"out": out((3, 5))}),
    ("isa unknown", ISAError, "mmx", {"isa": "mmx"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), [r[1:] for r in GEMM], ids=[r[0] for r in GEMM])
def test_gemm(error: type[VnnigenError], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        gemm(**changes)


F32: list[tuple[str, type[VnnigenError], str, Callable[[], Any]]] = [
    ("x u8", DTypeError, "x has type", lambda: v.conv_f32(X, W.astype(np.float32))),
    ("x f64", DTypeError, "x has type", lambda: v.conv_f32(X.astype(np.float64), W.astype(np.float32))),
    ("w s8", DTypeError, "w must", lambda: v.conv_f32(X.astype(np.float32), W)),
    ("w f64", DTypeError, "w must", lambda: v.conv_f32(X.astype(np.float32), W.astype(np.float64))),
    ("w big-endian", DTypeError, "w must", lambda: v.conv_f32(X.astype(np.float32), W.astype(">f4"))),
    ("bias s32", DTypeError, "bias", lambda: v.conv_f32(X.astype("f4"), W.astype("f4"), np.zeros(3, np.int32))),
    ("a u8", DTypeError, "a has type", lambda: v.gemm_f32(A, B.astype(np.float32))),
    ("b s8", DTypeError, "b must", lambda: v.gemm_f32(A.astype(np.float32), B)),
    ("b a list", DTypeError, "b must", lambda: v.gemm_f32(A.astype(np.float32), [[1.0]])),  # type: ignore[arg-type]
    ("b rank 1", ShapeError, "b must have shape", lambda: v.gemm_f32(A.astype("f4"), B[:, 0].astype("f4"))),
    ("b rank 0", ShapeError, "b must have shape", lambda: v.gemm_f32(A.astype("f4"), np.array(1, "f4"))),
]


@pytest.mark.parametrize(("error", "message", "call"), [r[1:] for r in F32], ids=[r[0] for r in F32])
def test_f32(error: type[VnnigenError], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()


# --- what a handle is given at a call -----------------------------------------------------------------------


def summed(*sums: v.PostOp, isa: str | None = None) -> v.GemmInt8:
    return v.GemmInt8(B, y_scale=100.0, post_ops=sums, isa=isa)


C = out((5, 3))
TENSORS: list[tuple[str, type[VnnigenError], str, Callable[[str | None], Any]]] = [
    ("none taken", ShapeError, "0 Sum", lambda isa: summed(isa=isa)(A, tensors=(C,))),
    ("too few", ShapeError, "1 tensors.* 2 Sum", lambda isa: summed(v.Sum(), v.Sum(), isa=isa)(A, tensors=(C,))),
    ("too many", ShapeError, "2 tensors.* 1 Sum", lambda isa: summed(v.Sum(), isa=isa)(A, tensors=(C, C))),
    ("for a Sum that has one", ShapeError, "0 Sum", lambda isa: summed(v.Sum(tensor=C), isa=isa)(A, tensors=(C,))),
    ("missing", ShapeError, "out=", lambda isa: summed(v.Sum(), isa=isa)(A)),
    ("dtype", DTypeError, "Sum", lambda isa: summed(v.Sum(), isa=isa)(A, tensors=(C.astype(np.int8),))),
    ("a list", DTypeError, "Sum", lambda isa: summed(v.Sum(), isa=isa)(A, tensors=(C.tolist(),))),
    ("not a sequence", DTypeError, "tensors", lambda isa: summed(v.Sum(), isa=isa)(A, tensors=5)),  # type: ignore[arg-type]
    ("shape", ShapeError, "Sum", lambda isa: summed(v.Sum(), isa=isa)(A, tensors=(C.T,))),
    ("out's dtype", DTypeError, "out", lambda isa: summed(v.Sum(), isa=isa)(A, out=C.astype(np.int8))),
]


@pytest.mark.parametrize("isa", [None, "reference"])
@pytest.mark.parametrize(("error", "message", "call"), [r[1:] for r in TENSORS], ids=[r[0] for r in TENSORS])
def test_tensors(isa: str | None, error: type[VnnigenError], message: str, call: Callable[[str | None], Any]) -> None:
    with pytest.raises(error, match=message):
        call(isa)


@pytest.mark.parametrize("isa", v.tiers()[-2:])
def test_out_must_not_overlap_what_is_read(isa: str) -> None:
    memory = np.zeros(200, np.uint8)
    a = memory[:35].reshape(5, 7)
    op = v.GemmInt8(B, y_scale=100.0, isa=isa)
    for start in (0, 10, 34):
        with pytest.raises(ShapeError, match="out overlaps"):
            op(a, out=memory[start : start + 15].reshape(5, 3))
    op(a, out=memory[35:50].reshape(5, 3))  # neighbours
    tensor = memory[60:75].reshape(5, 3)
    with pytest.raises(ShapeError, match="overlaps"):
        summed(v.Sum(), isa=isa)(A, out=memory[61:76].reshape(5, 3), tensors=(tensor,))
    # The same array is legal: Sum in place.
    expected = summed(v.Sum(), isa=isa)(A, tensors=(tensor.copy(),))
    assert np.array_equal(summed(v.Sum(), isa=isa)(A, out=tensor, tensors=(tensor,)), expected)


def test_the_square_case_of_aliasing() -> None:
    """x and out of one shape, one array: a GEMM cannot run in place."""
    a = np.ones((4, 4), np.uint8)
    with pytest.raises(ShapeError, match="out overlaps"):
        v.gemm_int8(a, np.ones((4, 4), np.int8), y_scale=1.0, out=a)


@pytest.mark.parametrize("isa", v.tiers()[-2:])
def test_k_too_large(isa: str) -> None:
    """255 * 127 * k fits s32 up to k = 66311; more may overflow, whatever x holds at the call."""
    x = np.full((1, 66312), 255, np.uint8)
    w = np.full((66312, 1), 127, np.int8)
    with pytest.raises(QuantizationError, match="K too large"):
        v.gemm_int8(x, w, out_dtype=np.int32, isa=isa)
    assert v.gemm_int8(x[:, 1:], w[1:], out_dtype=np.int32, isa=isa).item() == 255 * 127 * 66311


@pytest.mark.parametrize("shape", [(2**20, 2**20, 2**20, 4), (1, 2**31, 1, 4), (2**31, 1, 1, 4), (1, 2**20, 2**20, 4)])
def test_overflowing_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"beyond what can be addressed|must be in"):
        v.conv_int8(np.broadcast_to(np.uint8(0), shape), W, y_scale=1.0, padding=1)


def test_overflowing_products() -> None:
    a = np.broadcast_to(np.uint8(0), (2**31, 7))
    with pytest.raises(ShapeError, match=r"must be in|beyond"):
        v.gemm_int8(a, B, y_scale=1.0)


# --- documented correct results -------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", v.tiers()[-2:])
def test_any_memory_order_of_the_source(isa: str) -> None:
    big = np.arange(4 * 10 * 12 * 8, dtype=np.uint32).astype(np.uint8).reshape(4, 10, 12, 8)
    for x in (
        big[::2, ::2, ::2, ::2], big[:2, 9:4:-1, :6, :4], np.asfortranarray(big[:2, :5, :6, :4]),
        np.broadcast_to(big[0, 0, 0, :4], (2, 5, 6, 4)), read_only(big[:2, :5, :6, :4].copy()),
    ):  # fmt: skip
        want = conv(x=np.array(x, order="C"), isa=isa)
        assert np.array_equal(conv(x=x, isa=isa), want)


@pytest.mark.parametrize("isa", v.tiers()[-2:])
def test_any_memory_order_of_everything_else(isa: str) -> None:
    want = conv(isa=isa, bias=np.arange(3, dtype=np.int32), w_scale=np.array([1.0, 2.0, 3.0]))
    got = conv(
        w=np.asfortranarray(W), bias=np.arange(6, dtype=np.int32)[::2] // 2, w_scale=np.array([3.0, 2.0, 1.0])[::-1],
        isa=isa,
    )  # fmt: skip
    assert np.array_equal(got, want)
    tensor = np.asfortranarray(np.arange(15, dtype=np.uint8).reshape(5, 3))
    want = summed(v.Sum(), isa=isa)(A, tensors=(np.ascontiguousarray(tensor),))
    assert np.array_equal(summed(v.Sum(), isa=isa)(A, tensors=(tensor,)), want)
    assert np.array_equal(summed(v.Sum(tensor=tensor), isa=isa)(A), want)


@pytest.mark.parametrize("isa", v.tiers()[-2:])
def test_big_endian_is_converted_or_refused(isa: str) -> None:
    x = X.astype(np.float32)
    w = W.astype(np.float32)
    try:
        got = v.conv_f32(x.astype(">f4"), w, isa=isa)
    except DTypeError:
        return
    assert np.array_equal(got, v.conv_f32(x, w, isa=isa))


@pytest.mark.parametrize("bias_type", [np.int32, np.float32])
@pytest.mark.parametrize("isa", v.tiers()[-2:])
def test_a_handle_keeps_what_it_was_given(isa: str, bias_type: Any) -> None:
    """Weights, bias, scales and zero points are copied: what the caller does with his arrays changes nothing."""
    given = {
        "w": W.copy(), "bias": np.array([5000, -9000, 700], bias_type), "w_scale": np.array([1.0, 2.0, 3.0]),
        "w_zero_point": np.array([1, 2, 3]),
    }  # fmt: skip
    same = {name: array.copy() for name, array in given.items()}
    op = v.Conv2dInt8(**given, out_dtype=np.float32, isa=isa)
    for array in given.values():
        array[...] = 1
    for x in (X, X.view(np.int8)):
        assert np.array_equal(op(x), v.conv_int8(x, **same, out_dtype=np.float32, isa=isa))


def test_a_failed_call_leaves_a_handle_usable() -> None:
    op = v.Conv2dInt8(W, y_scale=100.0)
    for bad in (X[..., :3], X[0], X.astype(np.int16)):
        with pytest.raises(VnnigenError):
            op(bad)
    assert np.array_equal(op(X), conv())


@pytest.mark.parametrize("isa", v.tiers()[-2:])
def test_unaligned_arrays(isa: str) -> None:
    """Arrays of f32 at odd addresses, as np.frombuffer makes them."""
    raw, result = np.zeros(4 * 35 + 1, np.uint8), np.zeros(4 * 15 + 1, np.uint8)
    a, y = raw[1:].view(np.float32).reshape(5, 7), result[1:].view(np.float32).reshape(5, 3)
    a[...] = A
    v.gemm_f32(a, B.astype(np.float32), isa=isa, out=y)
    assert np.array_equal(y, A.astype(np.int32) @ B)
