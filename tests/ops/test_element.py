"""Element operators on this machine: every tier that it has against the reference, guard pages, threads, errors."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import vnnigen as v
from tests.kernels.element_cases import assert_same, random_array
from vnnigen.errors import DTypeError, ISAError, QuantizationError, ShapeError, VnnigenError
from vnnigen.kernels.types import NUMPY
from vnnigen.ops.element import Convert, add, concat, convert, eltwise, softmax, sum_tensors
from vnnigen.ops.pool import MaxPool2d, avg_pool2d, global_avg_pool2d, max_pool2d

Array = np.ndarray[Any, Any]
ISAS = [None, *(t for t in ("avx512", "avx2") if t in v.tiers())]
CASES: dict[str, tuple[Callable[..., Array], str, tuple[int, ...]]] = {
    "quantize": (lambda x, **k: convert(x, np.uint8, y_scale=0.7, y_zero_point=9, **k), "f32", (5, 6, 7, 33)),
    "dequantize": (lambda x, **k: convert(x, np.float32, x_scale=0.7, x_zero_point=9, **k), "u8", (5, 6, 7, 33)),
    "requantize": (lambda x, **k: convert(x, np.int8, x_scale=0.3, y_scale=0.4, y_zero_point=-9, **k), "u8", (999,)),
    "per channel": (
        lambda x, **k: convert(x, np.int8, y_scale=np.arange(1, 34) / 9, **k), "f32", (4, 300, 33),
    ),
    "to s32": (lambda x, **k: convert(x, np.int32, x_scale=3.7, **k), "f32", (3, 1000)),
    "to bf16": (lambda x, **k: convert(x, NUMPY["bf16"], **k), "f32", (3, 1000)),
    "copy": (lambda x, **k: convert(x, np.uint8, **k), "u8", (3, 1001)),
    "gelu": (lambda x, **k: eltwise(x, v.GELU(), scale=0.05, zero_point=100, **k), "u8", (3, 1001)),
    "swish": (lambda x, **k: eltwise(x, [v.SiLU()], **k), "f32", (3, 1001)),
    "to NHWC": (
        lambda x, **k: convert(x, np.uint8, y_scale=0.7, layout=("NCHW", "NHWC"), **k), "f32", (2, 70, 9, 31),
    ),
    "to NCHW": (
        lambda x, **k: convert(x, np.float32, x_scale=0.7, layout=("NHWC", "NCHW"), **k), "u8", (2, 9, 31, 70),
    ),
    "image": (
        lambda x, **k: convert(x, np.float32, x_scale=[0.1, 0.2, 0.3], x_zero_point=[1, 2, 3],
                               layout=("NHWC", "NCHW"), **k), "u8", (2, 37, 41, 3),
    ),
    "image to NHWC": (
        lambda x, **k: convert(x, np.int8, y_scale=0.7, y_zero_point=[1, 2, 3], layout=("NCHW", "NHWC"), **k), "f32",
        (2, 3, 37, 41),
    ),
    "image as it is": (lambda x, **k: convert(x, np.uint8, layout=("NHWC", "NCHW"), **k), "u8", (2, 37, 41, 3)),
    "to NHWC bf16": (
        lambda x, **k: convert(x, NUMPY["bf16"], layout=("NCHW", "NHWC"), **k), "f32", (2, 70, 9, 31),
    ),
    "aliasing planes": (lambda x, **k: convert(x, np.float32, layout=("NCHW", "NHWC"), **k), "f32", (2, 19, 32, 32)),
    "bytes": (lambda x, **k: convert(x, np.uint8, layout=("NCHW", "NHWC"), **k), "u8", (2, 70, 9, 31)),
    "max": (lambda x, **k: max_pool2d(x, 3, stride=2, padding=1, **k), "s8", (2, 15, 17, 70)),
    "max f32": (lambda x, **k: max_pool2d(x, 3, stride=2, padding=1, **k), "f32", (2, 15, 17, 35)),
    "average": (lambda x, **k: avg_pool2d(x, 3, stride=1, padding=1, **k), "u8", (2, 15, 17, 70)),
    "global": (
        lambda x, **k: global_avg_pool2d(x, x_scale=0.3, x_zero_point=9, y_scale=0.1, out_dtype=np.int8, **k),
        "u8", (3, 20, 20, 100),
    ),
    "sum": (lambda x, **k: add(x, x[::-1].copy(), np.uint8, scales=[0.3, 0.4], y_scale=0.5, **k), "u8", (6, 1001)),
    "concat": (
        lambda x, **k: concat([x] * 6, np.uint8, scales=[1, 2, 1, 1, 3, 1], y_scale=1.0, **k), "u8", (50, 77),
    ),
    "softmax": (softmax, "f32", (30, 333)),
}  # fmt: skip


@pytest.fixture
def threads() -> Iterator[None]:
    """Two threads, whatever the machine has."""
    before = v.num_threads()
    v.set_num_threads(2)
    yield
    v.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_tier_gives_the_same_bits(case: str, isa: str | None) -> None:
    run, kind, shape = CASES[case]
    x = random_array(np.random.default_rng(3), shape, kind)
    want = run(x, isa="reference")
    assert_same(run(x, isa=isa), want, (case, isa))
    out = np.empty_like(want)
    assert run(x, isa=isa, out=out) is out
    assert_same(out, want, (case, isa, "out"))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", CASES)
def test_threads_change_nothing(case: str) -> None:
    run, kind, shape = CASES[case]
    shape = (shape[0] * 20, *shape[1:])
    x = random_array(np.random.default_rng(4), shape, kind)
    many = run(x)
    v.set_num_threads(1)
    assert_same(many, run(x), case)


# --- guard pages: an access outside an operand ends the process ---------------------------------------------

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Arrays between pages that must not be touched, at either end of their own pages."""

    def __init__(self) -> None:
        self._keep: list[mmap.mmap] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], *, at_end: bool) -> Array:
        nbytes = int(np.prod(shape)) * dtype.itemsize
        size = -(-nbytes // _PAGE) * _PAGE
        pages = mmap.mmap(-1, size + 2 * _PAGE)
        self._keep.append(pages)
        base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        for address in (base, base + _PAGE + size):
            assert _libc.mprotect(ctypes.c_void_p(address), _PAGE, 0) == 0
        start = _PAGE + (size - nbytes if at_end else 0)
        result: Array = np.frombuffer(pages, np.uint8)[start : start + nbytes].view(dtype).reshape(shape)
        return result


@pytest.mark.parametrize("isa", [i for i in ISAS if i], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("sum", "concat")])
def test_nothing_outside_operands_is_touched(case: str, isa: str) -> None:
    run, kind, shape = CASES[case]
    rng, guarded = np.random.default_rng(5), Guarded()
    for channels in (shape[-1],) if case in ("image", "per channel") else (shape[-1], 1, 64):
        for at_end in (False, True):
            data = random_array(rng, (*shape[:-1], channels), kind)
            x = guarded.empty(data.shape, data.dtype, at_end=at_end)
            x[...] = data
            want = run(data, isa="reference")
            out = guarded.empty(want.shape, want.dtype, at_end=at_end)
            run(x, isa=isa, out=out)
            assert_same(out, want, (case, isa, channels))


# --- what the functions promise ---------------------------------------------------------------------------


def test_quantizing_agrees_with_the_numpy_functions() -> None:
    x = np.linspace(-20, 20, 1000, dtype=np.float32)
    # Powers of two: multiplying by the reciprocal is dividing.
    assert_same(convert(x, np.int8, y_scale=0.25, y_zero_point=3), v.quantize(x, 0.25, 3, dtype=np.int8), "quantize")
    q = np.arange(256, dtype=np.uint8)
    assert_same(convert(q, np.float32, x_scale=0.25, x_zero_point=7), v.dequantize(q, 0.25, 7), "dequantize")


def test_the_zero_point_is_exactly_zero() -> None:
    for zero_point in (0, 1, 77, 255):
        x = np.full(100, zero_point, np.uint8)
        y = convert(x, np.float32, x_scale=0.1234567, x_zero_point=zero_point)
        assert not y.any()
        assert not np.signbit(y).any()


def test_acc_reads_the_output() -> None:
    out = np.full((2, 50), 100, np.uint8)
    result = convert(np.ones((2, 50), np.float32), np.uint8, y_scale=0.5, y_zero_point=10, acc=2, out=out)
    assert result is out
    assert (out == 10 + (1 / 0.5) + 2 * 90).all()


def test_in_place() -> None:
    x = np.linspace(-5, 5, 1003, dtype=np.float32)
    want = eltwise(x.copy(), v.Tanh())
    assert_same(eltwise(x, v.Tanh(), out=x), want, "eltwise")
    y = np.arange(200, dtype=np.uint8)
    want = add(y.copy(), y.copy(), np.uint8, y_scale=2.0)
    assert_same(add(y, y.copy(), np.uint8, y_scale=2.0, out=y), want, "add")


def test_sum_of_many() -> None:
    x = [np.full(70, i, np.int32) for i in range(1, 6)]
    assert (sum_tensors(x, np.float32, scales=[1, 10, 100, 1000, 10000]) == 54321).all()


def test_average_counts() -> None:
    x = np.full((1, 3, 3, 40), 90, np.uint8)
    inside = avg_pool2d(x, 3, stride=1, padding=1)
    assert (inside == 90).all()
    all_taps = avg_pool2d(x, 3, stride=1, padding=1, include_padding=True)
    assert (all_taps[0, :, :, 0] == [[40, 60, 40], [60, 90, 60], [40, 60, 40]]).all()
    # Padding means 0, which is the zero point.
    shifted = avg_pool2d(x, 3, stride=1, padding=1, include_padding=True, x_zero_point=90)
    assert (shifted == 90).all()


def test_max_ignores_nan_and_padding() -> None:
    x = np.full((1, 4, 4, 5), -3, np.float32)
    x[0, 0, 0] = np.nan
    assert (max_pool2d(x, 3, stride=1, padding=1) == -3).all()
    assert (max_pool2d(np.full((1, 4, 4, 5), -100, np.int8), 3, stride=1, padding=1) == -100).all()


def test_softmax_sums_to_one() -> None:
    x = np.random.default_rng(1).standard_normal((7, 1000)).astype(np.float32) * 20
    exact = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    got = softmax(x)
    large = exact > 1e-30
    # Rounding max - x is an error of the exponent: relative to the result it counts |max - x| times.
    bound = (x.max(axis=1, keepdims=True) - x + 8) * 2.0**-24
    assert (np.abs(got - exact) <= bound * exact)[large].all()
    assert np.abs(got.sum(axis=1) - 1).max() < 1e-6


def test_sources_need_not_be_contiguous() -> None:
    x = np.arange(3 * 40, dtype=np.float32).reshape(3, 40)
    assert_same(convert(x.T, np.uint8), convert(x.T.copy(), np.uint8), "transposed")


def test_a_handle_serves_many_shapes() -> None:
    pool = MaxPool2d(2)
    for size in (4, 6, 4):
        assert pool(np.ones((1, size, size, 3), np.uint8)).shape == (1, size // 2, size // 2, 3)
    assert len(pool.kernels()) == (0 if pool.isa == "reference" else 2)


BYTES, REALS = np.zeros((2, 4, 4, 8), np.uint8), np.zeros((2, 4, 4, 8), np.float32)
Wrong = tuple[Callable[[], object], type[VnnigenError], str]
WRONG: list[Wrong] = [
    (lambda: convert([1], np.uint8), DTypeError, "NumPy array"),  # type: ignore[arg-type]
    (lambda: convert(np.zeros(3), np.uint8), DTypeError, "x has type"),
    (lambda: convert(REALS, np.int64), DTypeError, "out_dtype"),
    (lambda: convert(REALS[:0], np.uint8), ShapeError, "empty"),
    (lambda: convert(REALS, np.uint8, y_scale=-1), QuantizationError, "y_scale"),
    (lambda: convert(REALS, np.uint8, x_zero_point=1), QuantizationError, "x_zero_point"),
    (lambda: convert(REALS, np.float32, y_scale=2), QuantizationError, "y_scale"),
    (lambda: convert(REALS, np.uint8, y_scale=[1, 2]), QuantizationError, "y_scale"),
    (lambda: convert(REALS, np.uint8, y_scale=np.ones(8), post_ops=v.ReLU()), QuantizationError, "per channel"),
    (lambda: convert(REALS, np.uint8, y_zero_point=256), QuantizationError, "y_zero_point"),
    (lambda: convert(REALS, np.uint8, acc=1), ShapeError, "out"),
    (lambda: convert(REALS, np.uint8, layout="NHWC"), ShapeError, "layout"),  # type: ignore[arg-type]
    (lambda: convert(REALS[0], np.uint8, layout=("NCHW", "NHWC")), ShapeError, "4 dimensions"),
    (lambda: convert(REALS, np.uint8, layout=("NCHW", "NHWC"), post_ops=v.ReLU()), QuantizationError, "layout"),
    (lambda: convert(REALS, np.uint8, out=np.empty((1,), np.uint8)), ShapeError, "out must have shape"),
    (lambda: convert(REALS, np.uint8, out=REALS), DTypeError, "out must be uint8"),
    (lambda: convert(REALS, np.float32, x_scale=2, out=np.broadcast_to(REALS, REALS.shape)), ShapeError, "writeable"),
    (lambda: softmax(REALS[:1], out=REALS.reshape(-1)[1:129].reshape(1, 4, 4, 8)), ShapeError, "overlaps"),
    (lambda: convert(BYTES, np.uint8, isa="avx9"), ISAError, "avx9"),
    (lambda: eltwise(REALS, v.ReLU(), y_scale=2.0), QuantizationError, "integers"),
    (lambda: eltwise(REALS, [3]), DTypeError, "post_ops"),  # type: ignore[list-item]
    (lambda: add(BYTES, BYTES[:1], np.uint8), ShapeError, "one shape"),
    (lambda: sum_tensors([BYTES] * 6, np.uint8), ShapeError, "1 to 5"),
    (lambda: sum_tensors([BYTES] * 2, np.uint8, scales=[1.0]), ShapeError, "scales"),
    (lambda: concat([], np.uint8), ShapeError, "at least one"),
    (lambda: concat([BYTES, BYTES[:1]], np.uint8), ShapeError, "last axis"),
    (lambda: max_pool2d(BYTES[0], 2), ShapeError, "batch, height"),
    (lambda: max_pool2d(BYTES, 5), ShapeError, "window"),
    (lambda: max_pool2d(BYTES, 0), ShapeError, "kernel"),
    (lambda: max_pool2d(BYTES.astype(np.int32), 2), DTypeError, "x has type"),
    (lambda: avg_pool2d(BYTES, 2, x_zero_point=-1), QuantizationError, "x_zero_point"),
    (lambda: avg_pool2d(REALS, 2, y_scale=1.0), QuantizationError, "y_scale"),
    (lambda: softmax(BYTES), DTypeError, "x has type"),
]


@pytest.mark.parametrize(("call", "error", "text"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_errors_say_what_is_wrong(call: Callable[[], object], error: type[VnnigenError], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_rejected_shapes_leave_the_handle_usable() -> None:
    op = Convert(np.uint8, y_scale=2.0)
    with pytest.raises(DTypeError):
        op(np.zeros(3, np.int64))
    assert op(np.full(3, 8, np.float32)).tolist() == [4, 4, 4]
