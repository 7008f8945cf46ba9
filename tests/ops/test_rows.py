"""Broadcasts, normalization, gathering, reductions and copies on this machine: every tier, threads, bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import vnnigen as v
from tests.kernels.element_cases import assert_same, random_array
from tests.ops.test_element import ISAS, Guarded
from vnnigen.errors import DTypeError, QuantizationError, ShapeError, VnnigenError
from vnnigen.ops.broadcast import binary
from vnnigen.ops.cast import CastWide
from vnnigen.ops.gather import gather
from vnnigen.ops.layernorm import layer_norm
from vnnigen.ops.permute import ConcatAxis, Expand, Pad, Slice, Transpose, Upsample
from vnnigen.ops.reduce import reduce

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(1)
SCALE, BIAS = (RNG.standard_normal(333).astype(np.float32) for _ in range(2))
GATE, MASK = (RNG.standard_normal(s).astype(np.float32) for s in ((3, 1, 1, 70), (1, 20, 1)))
IDS = RNG.integers(-50, 50, (7, 9))


def _op(make: Callable[..., Any]) -> Callable[..., Array]:
    def run(x: Array, *, isa: str | None = None, out: Array | None = None) -> Array:
        result: Array = make(isa)(x, out=out)
        return result

    return run


CASES: dict[str, tuple[Callable[..., Array], str, tuple[int, ...]]] = {
    "gate": (lambda x, **k: binary("mul", x, GATE, np.float32, **k), "f32", (3, 9, 11, 70)),
    "mask": (lambda x, **k: binary("add", x, MASK, np.float32, **k), "f32", (30, 20, 333)),
    "requantized": (
        lambda x, **k: binary("add", x, x[:1].copy(), np.int8, a_scale=0.3, b_scale=0.2, y_scale=0.4, **k), "u8",
        (40, 9, 77),
    ),
    "layer norm": (lambda x, **k: layer_norm(x, SCALE, BIAS, **k), "f32", (60, 333)),
    "gather": (lambda x, **k: gather(x, IDS, **k), "f32", (50, 333)),
    "mean": (lambda x, **k: reduce(x, "mean", [-1], **k), "f32", (60, 333)),
    "sum of rows": (lambda x, **k: reduce(x, "sum", [1], **k), "f32", (6, 30, 33)),
    "transpose": (_op(lambda isa: Transpose((0, 2, 3, 1), isa=isa)), "f32", (2, 33, 5, 70)),
    "bytes": (_op(lambda isa: Transpose((2, 0, 1), isa=isa)), "u8", (9, 70, 45)),
    "slice": (_op(lambda isa: Slice((slice(1, 9), slice(None, None, -2)), isa=isa)), "bf16", (10, 333)),
    "pad": (_op(lambda isa: Pad(((0, 0), (1, 2), (3, 4), (0, 0)), 5, isa=isa)), "u8", (2, 9, 9, 45)),
    "upsample": (_op(lambda isa: Upsample((1, 2, 2, 1), isa=isa)), "u8", (2, 9, 9, 45)),
    "expand": (_op(lambda isa: Expand((5, 9, 45), isa=isa)), "f32", (9, 1)),
}  # fmt: skip


@pytest.fixture
def threads() -> Iterator[None]:
    before = v.num_threads()
    v.set_num_threads(2)
    yield
    v.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("isa", ISAS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_tier_gives_the_same_bits_and_touches_nothing_else(case: str, isa: str | None) -> None:
    run, kind, shape = CASES[case]
    data, guarded = random_array(np.random.default_rng(3), shape, kind), Guarded()
    want = run(data, isa="reference")
    for at_end in (False, True):
        x = guarded.empty(data.shape, data.dtype, at_end=at_end)
        x[...] = data
        out = guarded.empty(want.shape, want.dtype, at_end=at_end)
        assert run(x, isa=isa, out=out) is out
        assert_same(out, want, (case, isa))


@pytest.mark.parametrize("isa", ISAS, ids=str)
def test_casts_and_concatenations(isa: str | None) -> None:
    x = RNG.integers(-(1 << 40), 1 << 40, (3, 77))
    assert_same(CastWide(isa)(x), CastWide("reference")(x), isa)
    parts = [np.arange(n * 5, dtype=np.float32).reshape(n, 5) for n in (1, 7, 30)]
    assert_same(ConcatAxis(0, isa=isa)(parts), np.concatenate(parts), isa)


X = np.zeros((3, 4), np.float32)
BAD: list[tuple[Callable[[], Any], type[VnnigenError], str]] = [
    (lambda: binary("add", X, X[:, :3].copy(), np.float32), ShapeError, "broadcast"),
    (lambda: binary("pow", X, X, np.float32), QuantizationError, "add, sub"),  # type: ignore[arg-type]
    (lambda: binary("add", X, X, np.float32, a_scale=2.0), QuantizationError, "scale must be 1"),
    (lambda: binary("add", X, X, np.uint8), QuantizationError, "y_scale"),
    (lambda: binary("add", X[:1], X[:0], np.float32), ShapeError, "empty"),
    (lambda: binary("add", X, X, np.float32, post_ops=v.Sum()), QuantizationError, "no tensors"),
    (lambda: layer_norm(X, np.ones(3, np.float32)), ShapeError, "scale has shape"),
    (lambda: layer_norm(X, np.full(4, np.nan, np.float32)), QuantizationError, "finite"),
    (lambda: layer_norm(X, epsilon=-1), QuantizationError, "epsilon"),
    (lambda: layer_norm(X.astype(np.int32)), DTypeError, "f32"),
    (lambda: gather(X, np.array([3])), ShapeError, "index 3"),
    (lambda: gather(X, np.array([0, -4])), ShapeError, "position 1"),
    (lambda: gather(X, np.array([0.5])), DTypeError, "int32 or int64"),
    (lambda: gather(X, np.array([0]), axis=2), ShapeError, "axis 2"),
    (lambda: gather(X, np.zeros(0, np.int64)), ShapeError, "empty"),
    (lambda: Transpose((0, 0)), ShapeError, "permutation"),
    (lambda: Transpose((0, 1, 2))(X), ShapeError, "3 axes"),
    (lambda: Slice((slice(3, 3),))(X), ShapeError, "empty"),
    (lambda: ConcatAxis(1)([X, X[:2].copy()]), ShapeError, "equal but"),
    (lambda: ConcatAxis(1)([X, X.astype(np.int32)]), DTypeError, "one type"),
    (lambda: Pad(((0, -3), (0, 0)))(X), ShapeError, "leave nothing"),
    (lambda: Upsample((0, 1)), ShapeError, "1 or more"),
    (lambda: Expand((5, 4))(X), ShapeError, "broadcast"),
    (lambda: reduce(X, "mean", [2]), ShapeError, "neighbours"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD, ids=[words for _, _, words in BAD])
def test_bad_input(call: Callable[[], Any], error: type[VnnigenError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
