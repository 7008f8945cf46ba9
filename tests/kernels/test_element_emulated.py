"""Element kernels of every tier on the emulator: bit-identical to the reference, no access outside operands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import vnnigen as v
from tests.kernels.element_cases import TIERS, assert_same, emulate, random_array
from vnnigen.kernels.element.plan import code_tier, reorder_image
from vnnigen.kernels.element.transpose_tiles import BF16, VBMI
from vnnigen.kernels.types import NUMPY
from vnnigen.ops.element import Concat, Convert, Softmax, SumTensors
from vnnigen.ops.pool import AvgPool2d, MaxPool2d

KINDS = ("u8", "s8", "s32", "f32", "bf16")
EMULATED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def params(src: str, out: str, rng: np.random.Generator, channels: int | None = None) -> dict[str, Any]:
    """Scales and zero points that fit the types, per tensor or for `channels`."""
    shape = () if channels is None else (channels,)
    q: dict[str, Any] = {"x_scale": rng.uniform(0.1, 2, shape)}
    ranges = {"u8": (0, 256), "s8": (-128, 128)}
    if src in ranges:
        q["x_zero_point"] = rng.integers(*ranges[src], shape)
    if out in ("u8", "s8", "s32"):
        q["y_scale"] = float(rng.uniform(0.1, 2))
    if out in ranges:
        q["y_zero_point"] = int(rng.integers(*ranges[out]))
    return q


@pytest.mark.parametrize("out", KINDS)
@pytest.mark.parametrize("src", KINDS)
@pytest.mark.parametrize("name", TIERS)
def test_conversions(name: str, src: str, out: str) -> None:
    rng = np.random.default_rng(len(src) * 7 + len(out))
    for shape in ((1,), (3, 7), (2, 65), (70, 3), (5, 2051), (300,)):
        for channels in (None, shape[-1]):
            q = params(src, out, rng, channels)
            x = random_array(rng, shape, src)
            want = Convert(NUMPY[out], isa="reference", **q)(x)
            op = Convert(NUMPY[out], isa="reference", **q)
            got = emulate(op, name, (x,), skew=shape[0] % 4)
            assert_same(got, want, (name, src, out, shape, channels))


POST_OPS: list[tuple[v.PostOp, ...]] = [
    (v.ReLU(),), (v.Clip(0, 6), v.Linear(0.5, -1)), (v.LeakyReLU(0.1),), (v.Sigmoid(),), (v.GELU(), v.Linear(2, 0.25)),
    (v.HardSwish(),), (v.Sum(0.5, dtype=np.float32), v.ReLU()), (v.Sum(0.02, 3, dtype=np.uint8), v.Tanh()),
]  # fmt: skip


@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("ops", POST_OPS, ids=lambda ops: "+".join(type(op).__name__ for op in ops))
def test_post_ops(name: str, ops: tuple[v.PostOp, ...]) -> None:
    rng = np.random.default_rng(5)
    for src, out in (("u8", "u8"), ("f32", "s8"), ("s8", "f32"), ("f32", "s32"), ("f32", "bf16")):
        q = params(src, out, rng)
        q["x_scale"] = 0.05
        kinds = ["u8" if op.dtype is np.uint8 else "f32" for op in ops if isinstance(op, v.Sum)]
        tensors = [random_array(rng, (3, 77), kind) for kind in kinds]
        x = random_array(rng, (3, 77), src)
        op = Convert(NUMPY[out], post_ops=ops, isa="reference", **q)
        want = op(x, tensors=tensors)
        got = emulate(op, name, (x,), tensors=tensors)
        assert_same(got, want, (name, src, out))


@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("out", ["u8", "s8", "s32", "f32"])
def test_acc_adds_to_the_old_output(name: str, out: str) -> None:
    rng = np.random.default_rng(6)
    q = params("f32", out, rng)
    x, old = random_array(rng, (4, 35), "f32", 5), random_array(rng, (4, 35), out, 5)
    op = Convert(NUMPY[out], acc=0.75, post_ops=v.ReLU(), isa="reference", **q)
    want = op(x, out=old.copy())
    assert_same(emulate(op, name, (x,), old, [old]), want, (name, out))


def test_the_table_says_what_arithmetic_says() -> None:
    rng = np.random.default_rng(7)
    for src in ("u8", "s8"):
        for out in ("u8", "s8"):
            for shape in ((1,), (777,), (3, 100), (2000,)):
                q = params(src, out, rng)
                x = random_array(rng, shape, src)
                op = Convert(NUMPY[out], post_ops=v.SiLU(), isa="reference", **q)
                got = emulate(op, "avx512", (x,), vbmi=True)
                assert_same(got, op(x), (src, out, shape))


@pytest.mark.parametrize("name", TIERS)
def test_sums(name: str) -> None:
    rng = np.random.default_rng(8)
    for kinds in (("u8", "u8"), ("s8", "f32", "u8"), ("f32", "s32", "u8", "s8", "f32")):
        for out in ("u8", "s8", "f32"):
            x = [random_array(rng, (3, 5, 13), k) for k in kinds]
            zero_points = [{"u8": 7, "s8": -3}.get(k, 0) for k in kinds]
            op = SumTensors(
                len(kinds), NUMPY[out], scales=list(rng.uniform(0.1, 1, len(kinds))), zero_points=zero_points,
                y_scale=None if out == "f32" else 2.5, y_zero_point=0 if out == "f32" else 3, post_ops=v.ReLU(),
                isa="reference",
            )  # fmt: skip
            assert_same(emulate(op, name, x), op(x), (name, kinds, out))


@pytest.mark.parametrize("vbmi", [False, True])
@pytest.mark.parametrize("name", TIERS)
def test_concatenations(name: str, vbmi: bool) -> None:
    rng = np.random.default_rng(9)
    for widths in ((5,), (3, 64), (16, 16, 33, 1), (1, 2, 3, 100, 65, 7)):
        for kinds, out in ((("u8",), "u8"), (("u8", "s8"), "s8"), (("f32",), "f32"), (("f32", "u8"), "u8")):
            kind = [kinds[i % len(kinds)] for i in range(len(widths))]
            x = [random_array(rng, (2, 3, 3, n), k) for n, k in zip(widths, kind, strict=True)]
            # Every other source has the output's scale and is copied.
            scales = [1.5 if i % 2 else 0.7 for i in range(len(widths))]
            q = {} if out == "f32" else {"y_scale": 0.7, "y_zero_point": 0}
            op = Concat(len(widths), NUMPY[out], scales=scales, isa="reference", **q)  # type: ignore[arg-type]
            got = emulate(op, name, x, vbmi=vbmi and name == "avx512")
            assert_same(got, op(x), (name, widths, kinds, out))


TO_NHWC, TO_NCHW = ("NCHW", "NHWC"), ("NHWC", "NCHW")
LAYOUT_SHAPES = [(1, 16, 4, 16), (2, 5, 3, 7), (1, 35, 5, 14), (1, 64, 1, 17), (1, 1, 5, 5), (2, 130, 2, 3)]
NARROW_SHAPES = [(1, 2, 3, 5), (2, 3, 5, 7), (1, 4, 4, 16), (2, 3, 1, 1), (1, 3, 40, 60)]
#: Features beside the tier's that kernels use where they may.
EXTRAS = frozenset({VBMI, BF16})


def assert_layouts(name: str, src: str, shape: Any, layout: tuple[str, str], outs: Any, **options: Any) -> None:
    """Change the layout of a tensor of `shape` (NCHW) to all of `outs`, with and without scales."""
    rng = np.random.default_rng(sum(shape))
    n, c, h, w = shape
    x = random_array(rng, (n, c, h, w) if layout == TO_NHWC else (n, h, w, c), src)
    for out in outs:
        every = [params(src, out, rng), params(src, out, rng, c)] + [{}] * (src == out)
        if out in ("u8", "s8"):
            zero_points = rng.integers(0, 9, c)
            every += [{"x_scale": 0.7, "y_zero_point": zero_points}, {"y_zero_point": zero_points}]
        for q in every:
            op = Convert(NUMPY[out], layout=layout, isa="reference", **q)
            assert_same(emulate(op, name, (x,), skew=n, **options), op(x), (name, src, out, shape, layout, list(q)))


@pytest.mark.parametrize("layout", [TO_NHWC, TO_NCHW], ids="-".join)
@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("src", KINDS)
def test_layouts(name: str, src: str, layout: tuple[str, str]) -> None:
    for i, shape in enumerate(LAYOUT_SHAPES + NARROW_SHAPES):
        assert_layouts(name, src, shape, layout, KINDS if i < 2 else {src, KINDS[i % 5], KINDS[(i + 2) % 5]})


@pytest.mark.parametrize("layout", [TO_NHWC, TO_NCHW], ids="-".join)
@pytest.mark.parametrize(("src", "out"), [("u8", "f32"), ("s8", "f32"), ("f32", "bf16"), ("u8", "bf16")])
def test_layouts_with_more_than_the_tier_has(src: str, out: str, layout: tuple[str, str]) -> None:
    for shape in ((1, 5, 3, 23), (1, 16, 5, 13), (2, 70, 3, 5), (1, 79, 1, 70), (1, 130, 2, 3)):
        assert_layouts("avx512", src, shape, layout, [out], extras=EXTRAS)


@pytest.mark.parametrize("layout", [TO_NHWC, TO_NCHW], ids="-".join)
@pytest.mark.parametrize(("src", "out"), [("u8", "u8"), ("u8", "f32"), ("s8", "f32"), ("f32", "u8"), ("f32", "s8")])
def test_images_by_permutations_of_bytes(src: str, out: str, layout: tuple[str, str]) -> None:
    for shape in ((1, 3, 4, 16), (2, 3, 5, 19), (1, 2, 1, 7), (1, 4, 3, 50), (1, 3, 1, 85)):
        assert_layouts("avx512", src, shape, layout, [out], extras=EXTRAS)


@pytest.mark.parametrize("layout", [TO_NHWC, TO_NCHW], ids="-".join)
@pytest.mark.parametrize(("src", "out"), [("u8", "u8"), ("f32", "f32"), ("f32", "u8"), ("u8", "f32"), ("bf16", "bf16")])
@pytest.mark.parametrize("name", TIERS)
def test_planes_that_share_sets_of_the_cache_go_through_scratch(
    name: str, src: str, out: str, layout: tuple[str, str]
) -> None:
    planes = {"u8": 4096, "bf16": 2048, "f32": 1024}[src if layout == TO_NHWC else out]
    shape = (1, 19, 2, planes // 2)
    tier = code_tier(512 if name == "avx512" else 256)
    assert tier is not None
    op = Convert(NUMPY[out], layout=layout, isa="reference")
    f = op._affine(src, 19)  # type: ignore[arg-type]
    ((key, _),) = reorder_image(f, tier, (1, 19, planes), to_nhwc=layout == TO_NHWC)
    assert key.scratch
    assert_layouts(name, src, shape, layout, [out])


@EMULATED
@given(data=st.data())
def test_layouts_of_any_shape(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 16)))
    n, c = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 70))
    h, w = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 30))
    src, out = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(KINDS[:4]))
    to_nhwc = data.draw(st.booleans())
    q = params(src, out, rng, c if data.draw(st.booleans()) else None)
    x = random_array(rng, (n, c, h, w) if to_nhwc else (n, h, w, c), src)
    op = Convert(NUMPY[out], layout=("NCHW", "NHWC") if to_nhwc else ("NHWC", "NCHW"), isa="reference", **q)
    name = data.draw(st.sampled_from(TIERS))
    extras = EXTRAS if data.draw(st.booleans()) else frozenset[str]()
    assert_same(emulate(op, name, (x,), extras=extras), op(x), (name, src, out, x.shape))


POOLS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 6, 7, 3), {"kernel": 3, "stride": 2, "padding": 1}),
    ((2, 5, 5, 33), {"kernel": (3, 2), "stride": 1, "padding": ((0, 1), (1, 0))}),
    ((1, 9, 9, 70), {"kernel": 3, "stride": 1, "padding": 2, "dilation": 2}),
    ((1, 4, 20, 64), {"kernel": 2}),
    ((2, 7, 7, 100), {"kernel": 7}),
    ((1, 2, 3, 5), {"kernel": 2, "padding": 3, "stride": 1}),  # windows of nothing but padding
    ((1, 2, 263, 9), {"kernel": (2, 259), "stride": (1, 3), "padding": ((0, 0), (2, 2))}),  # sums leave 16 bits
    ((1, 17, 17, 9), {"kernel": 17}),
    ((1, 3, 40, 16), {"kernel": (3, 20), "stride": (1, 3), "padding": (1, 10)}),
]


@pytest.mark.parametrize("src", ["u8", "s8", "f32", "bf16"])
@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize(("shape", "window"), POOLS, ids=str)
def test_pools(name: str, src: str, shape: Any, window: Any) -> None:
    rng = np.random.default_rng(11)
    x = random_array(rng, shape, src)
    largest = MaxPool2d(isa="reference", **window)
    assert_same(emulate(largest, name, (x,)), largest(x), (name, "max"))
    for include in (False, True):
        for out in ("u8", "s8", "f32", "bf16"):
            q = params(src, out, rng)
            mean = AvgPool2d(include_padding=include, out_dtype=NUMPY[out], isa="reference", **window, **q)
            if include and out != "u8":
                continue
            assert_same(emulate(mean, name, (x,), skew=1), mean(x), (name, out, include))


@EMULATED
@given(data=st.data())
def test_pools_of_any_shape(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    rng = np.random.default_rng(draw(0, 1 << 16))
    shape = (draw(1, 2), draw(1, 9), draw(1, 12), draw(1, 90))
    window = {
        "kernel": (draw(1, 4), draw(1, 4)), "stride": (draw(1, 3), draw(1, 3)), "dilation": draw(1, 2),
        "padding": ((draw(0, 4), draw(3, 6)), (draw(0, 4), draw(3, 6))),
    }  # fmt: skip
    reach = [window["dilation"] * (k - 1) + 1 for k in window["kernel"]]  # type: ignore[index, operator]
    assume(all(size + 3 >= k for size, k in zip(shape[1:3], reach, strict=True)))
    src, name = data.draw(st.sampled_from(("u8", "s8", "f32"))), data.draw(st.sampled_from(TIERS))
    x = random_array(rng, shape, src)
    out = data.draw(st.sampled_from(("u8", "s8", "f32")))
    op: Any = MaxPool2d(isa="reference", **window)  # type: ignore[arg-type]
    if data.draw(st.booleans()):
        include = data.draw(st.booleans())
        q = params(src, out, rng)
        op = AvgPool2d(include_padding=include, out_dtype=NUMPY[out], isa="reference", **window, **q)
    assert_same(emulate(op, name, (x,)), op(x), (name, src, out, shape, window))


@pytest.mark.parametrize("name", TIERS)
def test_softmax(name: str) -> None:
    rng = np.random.default_rng(12)
    op = Softmax("reference")
    # Rows together and alone, one to many to a pass, parts of vectors; the last one is too long for groups.
    for shape in (
        (1, 1),
        (3, 7),
        (2, 16),
        (2, 3, 50),
        (1, 130),
        (9, 10),
        (6, 17),
        (5, 40),
        (4, 49),
        (7, 100),
        (5, 1300),
    ):
        x = (rng.standard_normal(shape) * 10).astype(np.float32)
        x[..., : shape[-1] // 3] -= 90
        assert_same(emulate(op, name, (x,), skew=1), op(x), (name, shape))
    x = random_array(rng, (40, 20), "f32")
    assert_same(emulate(op, name, (x,)), op(x), name)


def test_softmax_has_no_denormal_numbers() -> None:
    """Arithmetic is slow with them: results that would come near them are zero, masked elements always are."""
    for n in (1, 2, 100, 1000):
        x = np.zeros((2, n), np.float32)
        x[0, 1:] = -np.linspace(60, 100, max(n - 1, 1))[: n - 1]
        x[1, n // 2 :] = -np.inf if n > 1 else 0
        y = Softmax("reference")(x)
        assert ((y == 0) | (y >= np.finfo(np.float32).tiny)).all()
        exact = np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(axis=1, keepdims=True)
        assert (np.abs(y - exact) <= 2.0**-17 * exact + (y == 0) * n * 2.0**-124).all()
        if n > 1:
            assert (y[1, n // 2 :] == 0).all()
