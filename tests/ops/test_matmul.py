"""Products of two activations: every tier on the emulator, this machine's tiers, shapes, views, bad arguments."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vnnigen as v
from tests.kernels.cases import assert_same_bits
from tests.kernels.emulation import fine_grid
from vnnigen.errors import DTypeError, ISAError, QuantizationError, ShapeError, VnnigenError
from vnnigen.isa.emulator import Emulator
from vnnigen.isa.memory import Memory
from vnnigen.kernels import matmul
from vnnigen.kernels.batched import ARG_TABLE
from vnnigen.kernels.families import FAMILIES
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ARG_SLOTS, ARG_SRC, ARG_TENSORS, ARG_WEIGHTS
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.kernels.matmul import Lowered, a_in_place, b_in_place, look, lower
from vnnigen.kernels.pack_kernel import ARG_B, ARG_B_TABLE, ARG_PACK
from vnnigen.kernels.thin import MAX_COLUMNS
from vnnigen.ops.bf16 import bfloat16
from vnnigen.ops.matmul import MatMulBf16, MatMulF32, MatMulInt8, matmul_bf16, matmul_f32, matmul_int8
from vnnigen.runtime.compiled import generate

Array = np.ndarray[Any, Any]
INT8_TIERS = ("amx_int8", "avx512_vnni", "avx512", "avx_vnni", "avx2")
HERE = [pytest.param(t, marks=pytest.mark.skipif(t not in v.tiers(), reason=f"no {t} here")) for t in INT8_TIERS]
TYPES = [("u8", "s8"), ("s8", "s8"), ("u8", "u8"), ("s8", "u8")]
NUMPY = {"u8": np.uint8, "s8": np.int8}


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = v.num_threads()
    yield
    v.set_num_threads(before)


def integers(seed: int, shape: Sequence[int], dtype: str) -> Array:
    low = -128 if dtype == "s8" else 0
    return np.random.default_rng(seed).integers(low, low + 256, tuple(shape)).astype(NUMPY[dtype])


def floats(seed: int, shape: Sequence[int], dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32).astype(dtype)


# --- on the emulator ------------------------------------------------------------------------------------------


def owner(x: Array) -> tuple[Array, int]:
    """The array that a view is of, and the view's distance in bytes from its start."""
    base = x
    while isinstance(base.base, np.ndarray):
        base = base.base
    return base, x.ctypes.data - base.ctypes.data


def lowered(op: Any, a: Array, b: Array, tier: str) -> tuple[Lowered, Any]:
    """Lower a product for a tier that this machine need not have; `op` is of the reference tier."""
    plan = op._plan_of(a, b)
    view, code = look(a, b), TIER_CODE[tier]
    b_zp = plan.numbers.b_zp - 128 * (plan.numbers.b == "u8")
    weights = op._weights_like(view.k, view.n, b_zp)
    family = next(f.name for f in FAMILIES if f.why_not(weights, code) is None)
    return lower(view, code, family, plan.numbers, plan.prepared.epilogue), plan


@contextmanager
def fused_from(batches: int) -> Iterator[None]:
    """Fuse packing and multiplication from this many products on."""
    old, matmul.FUSED_BATCHES = matmul.FUSED_BATCHES, batches
    try:
        yield
    finally:
        matmul.FUSED_BATCHES = old


def emulate_both(op: Any, a: Array, b: Array, tier: str, tensors: Sequence[Array] = ()) -> Array:
    """The result of both ways, which must be the same."""
    with fused_from(99):
        two, _ = emulate(op, a, b, tier, tensors)
    with fused_from(1):
        one, low = emulate(op, a, b, tier, tensors)
    assert low.fused == (len(low.views.b_at) == low.views.batches)
    assert_same_bits(one, two, low.gemm.name)
    return one


def emulate(op: Any, a: Array, b: Array, tier: str, tensors: Sequence[Array] = ()) -> tuple[Array, Lowered]:
    """Run all launches; only `out` and the run-time buffers may be written, and all operands are of exact size."""
    if op._transpose_b:
        b = b.swapaxes(-1, -2)
    assert a_in_place(a)
    assert b_in_place(b)
    low, plan = lowered(op, a, b, tier)
    mem = Memory()
    args = np.zeros(ARG_SLOTS, np.int64)
    (a_base, a_off), (b_base, b_off) = owner(a), owner(b)
    args[ARG_SRC] = mem.map("a", a_base, skew=a.itemsize) + a_off
    args[ARG_B] = mem.map("b", b_base, skew=3 * b.itemsize) + b_off
    out = np.full(plan.y_shape, 0x5A, np.uint8).astype(plan.y_dtype)
    args[ARG_DST] = mem.map("out", out, writable=True, skew=out.itemsize)
    for i, t in enumerate(tensors):
        args[ARG_TENSORS + i] = mem.map(f"tensor {i}", t, skew=t.itemsize)
    packed, consts = low.buffers()
    packed[:] = 0xFF
    args[ARG_WEIGHTS], args[ARG_CONSTS] = mem.map("packed", packed, True), mem.map("consts", consts, True)
    args[ARG_PACK] = mem.map("pack consts", low.pack_consts)
    types = [s.tensor for s in plan.prepared.epilogue.spec.steps if s.tensor is not None]
    args[ARG_B_TABLE], args[ARG_TABLE] = mem.map("b table", low.views.b_at), mem.map("table", low.table(types))
    address = mem.map("args", args)
    for i, key in enumerate(low.keys):
        scratch = mem.map(f"scratch {i}", np.full(key.scratch, 0xFF, np.uint8), writable=True)
        emulator = Emulator(generate(key), mem, poison=True, tile_config=key.tile_config)
        for index in reversed(range(key.steps)):
            emulator.call(address, index, scratch)
    return mem.array("out"), low


def arguments(a_type: str, b_type: str, out: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    dtype = {"u8": np.uint8, "s8": np.int8, "s32": np.int32, "f32": np.float32}[out]
    low = {"u8": 0, "s8": -128}
    found = {
        "a_scale": 0.02, "b_scale": 0.015, "out_dtype": dtype,
        "a_zero_point": int(rng.choice([0, low[a_type], low[a_type] + 255, 7])),
        "b_zero_point": int(rng.choice([low[b_type] + 128, low[b_type], low[b_type] + 255, 9])),
    }  # fmt: skip
    if out in ("u8", "s8"):
        found |= {"y_scale": 0.9, "y_zero_point": int(rng.choice([0, low[out], low[out] + 255]))}
    return found


SHAPES = [
    # a's batch, b's batch, m, k, n
    ((), (), 5, 7, 3),
    ((2,), (2,), 3, 64, 17),
    ((2,), (2,), 17, 20, 33),
    ((3, 1), (2,), 4, 9, 16),
    ((2, 2), (1, 2), 1, 33, 40),
    ((2,), (), 18, 16, 65),
    ((), (3,), 6, 4, 8),
    ((1,), (1, 1), 2, 1, 1),
]


@pytest.mark.parametrize("types", TYPES, ids="".join)
@pytest.mark.parametrize("tier", INT8_TIERS)
def test_int8_on_the_emulator(tier: str, types: tuple[str, str]) -> None:
    for seed, (a_batch, b_batch, m, k, n) in enumerate(SHAPES):
        for transpose in (False, True):
            out = ("u8", "s32", "s8", "f32")[(seed + transpose) % 4]
            op = MatMulInt8(**arguments(*types, out, 2 * seed + transpose), transpose_b=transpose, isa="reference")
            a = integers(seed, (*a_batch, m, k), types[0])
            b = integers(seed + 1, (*b_batch, n, k) if transpose else (*b_batch, k, n), types[1])
            with fused_from(1 if (seed + transpose + TYPES.index(types)) % 2 else 99):
                got, low = emulate(op, a, b, tier)
            assert_same_bits(got, op(a, b), (tier, types, seed, transpose, low.gemm.name))


@pytest.mark.parametrize("tier", INT8_TIERS)
def test_many_steps_on_the_emulator(tier: str) -> None:
    """Strips, chunks and batches in one index."""
    for seed, (a_batch, b_batch, m, k, n) in enumerate([((3,), (3,), 40, 12, 70), ((2, 1), (3,), 21, 7, 150)]):
        for types in TYPES:
            op = MatMulInt8(**arguments(*types, "u8", seed), isa="reference")
            a, b = integers(seed, (*a_batch, m, k), types[0]), integers(seed, (*b_batch, k, n), types[1])
            with fine_grid(500):
                got, low = emulate(op, a, b, tier)
            assert low.gemm.steps > low.views.batches
            assert_same_bits(got, op(a, b), (tier, types))


@pytest.mark.parametrize("tier", INT8_TIERS)
def test_tiles_are_used_where_they_can_be(tier: str) -> None:
    a, b = integers(0, (2, 16, 64), "u8"), integers(1, (2, 64, 32), "s8")
    for b_zp, tiles in ((0, tier == "amx_int8"), (1, False)):
        op = MatMulInt8(b_zero_point=b_zp, out_dtype=np.int32, isa="reference")
        low, _ = lowered(op, a, b, tier)
        assert (low.gemm.tile_config is not None) == tiles


def heads(seed: int, batch: int, rows: int, count: int, size: int, dtype: str) -> Array:
    """[batch, heads, rows, size] as a view of [batch, rows, heads * size], as projections leave it."""
    found: Array = integers(seed, (batch, rows, count, size), dtype).transpose(0, 2, 1, 3)
    return found


@pytest.mark.parametrize("tier", INT8_TIERS)
def test_views_are_read_in_place_on_the_emulator(tier: str) -> None:
    """Q.K^T and P.V on the heads of one array, without a copy."""
    q, k, x = (heads(s, 2, 9, 3, 8, t) for s, t in enumerate(("u8", "s8", "s8")))
    op = MatMulInt8(a_zero_point=3, y_scale=50.0, transpose_b=True, isa="reference")
    got = emulate_both(op, q, k, tier)
    assert_same_bits(got, op(q.copy(), k.copy()), tier)
    p = integers(5, (2, 3, 9, 9), "u8")
    op = MatMulInt8(y_scale=50.0, out_dtype=np.int8, isa="reference")
    got = emulate_both(op, p, x, tier)
    assert_same_bits(got, op(p, x.copy()), tier)
    # Any distance between matrices, also backwards; rows of the transpose by their strides.
    got = emulate_both(op, q[::-1, ::2], k[::-1, ::2].swapaxes(-1, -2), tier)
    assert_same_bits(got, op(q[::-1, ::2].copy(), k[::-1, ::2].swapaxes(-1, -2).copy()), tier)


@pytest.mark.parametrize("tier", INT8_TIERS)
def test_post_ops_with_tensors_on_the_emulator(tier: str) -> None:
    a, b = integers(0, (3, 1, 5, 12), "u8"), integers(1, (3, 2, 12, 19), "s8")
    t, u = integers(2, (3, 2, 5, 19), "s8"), floats(3, (3, 2, 5, 19))
    post_ops = (v.Sum(0.4, 3, dtype=np.int8), v.ReLU(), v.Sum(0.5, dtype=np.float32))
    op = MatMulInt8(a_scale=0.02, b_scale=0.02, y_scale=0.7, post_ops=post_ops, isa="reference")
    got = emulate_both(op, a, b, tier, (t, u))
    assert_same_bits(got, op(a, b, tensors=(t, u)), tier)


@pytest.mark.parametrize("tier", INT8_TIERS)
def test_an_attention_mask_and_a_bias_on_the_emulator(tier: str) -> None:
    """softmax's argument: scores, plus a mask of the scores' shape, plus a vector along the keys."""
    q, k = integers(0, (2, 3, 6, 16), "s8"), integers(1, (2, 3, 21, 16), "s8")
    mask, bias = floats(2, (2, 3, 6, 21)) * np.float32(100), floats(3, (21,))
    post_ops = (v.Linear(0.25, 0), v.Binary("add", bias), v.Binary("add", mask))
    op = MatMulInt8(
        a_scale=0.02, a_zero_point=-3, b_scale=0.03, transpose_b=True, out_dtype=np.float32, post_ops=post_ops,
        isa="reference",
    )  # fmt: skip
    got = emulate_both(op, q, k, tier, (mask,))
    assert_same_bits(got, op(q, k), tier)


@pytest.mark.parametrize("out", [np.float32, bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("tier", ["amx_bf16", "avx512_bf16", "avx512", "avx2"])
def test_bf16_on_the_emulator(tier: str, out: Any) -> None:
    """Small integers: every way of adding gives the exact sum."""
    for seed, (a_batch, b_batch, m, k, n) in enumerate([*SHAPES, ((2,), (2,), 5, 40, 18), ((2,), (2,), 3, 96, 20)]):
        for transpose in (False, True):
            op = MatMulBf16(transpose_b=transpose, out_dtype=out, isa="reference")
            a = (integers(seed, (*a_batch, m, k), "s8") // 16).astype(bfloat16)
            shape = (*b_batch, n, k) if transpose else (*b_batch, k, n)
            b = (integers(seed + 1, shape, "s8") // 16).astype(bfloat16)
            with fused_from(1 if (seed + (out is bfloat16)) % 2 else 99):
                got, low = emulate(op, a, b, tier)
            want = op(a, b)
            assert np.array_equal(got.astype(np.float32), want.astype(np.float32)), (tier, seed, low.gemm.name)


@pytest.mark.parametrize("tier", ["avx512", "avx2"])
def test_f32_on_the_emulator(tier: str) -> None:
    for seed, (a_batch, b_batch, m, k, n) in enumerate(SHAPES):
        for transpose in (False, True):
            op = MatMulF32(transpose_b=transpose, isa="reference")
            a = (integers(seed, (*a_batch, m, k), "s8") // 16).astype(np.float32)
            shape = (*b_batch, n, k) if transpose else (*b_batch, k, n)
            b = (integers(seed + 1, shape, "s8") // 16).astype(np.float32)
            assert np.array_equal(emulate_both(op, a, b, tier), op(a, b)), (tier, seed)


# --- on this machine ------------------------------------------------------------------------------------------


@st.composite
def products(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int, int, int]:
    """Batch dimensions that broadcast, and m, k, n."""
    full = draw(st.lists(st.integers(1, 3), max_size=3))
    batches = []
    for _ in range(2):
        dims = [draw(st.sampled_from((d, d, 1))) for d in full]
        batches.append(tuple(dims[draw(st.integers(0, len(dims))) :]))
    size = st.one_of(st.integers(1, 20), st.integers(1, 140))
    return batches[0], batches[1], draw(size), draw(size), draw(size)


@pytest.mark.parametrize("tier", HERE)
@settings(deadline=None, max_examples=120)
@given(
    shapes=products(), types=st.sampled_from(TYPES), out=st.sampled_from(("u8", "s8", "s32", "f32")),
    transpose=st.booleans(), threads=st.sampled_from((1, 2)), seed=st.integers(0, 99), fine=st.booleans(),
    fuse=st.sampled_from((1, 99)),
)  # fmt: skip
def test_random_products(
    tier: str,
    shapes: Any,
    types: tuple[str, str],
    out: str,
    transpose: bool,
    threads: int,
    seed: int,
    fine: bool,
    fuse: int,
) -> None:
    a_batch, b_batch, m, k, n = shapes
    v.set_num_threads(threads)
    options = arguments(*types, out, seed) | {"transpose_b": transpose}
    a = integers(seed, (*a_batch, m, k), types[0])
    b = integers(seed + 1, (*b_batch, n, k) if transpose else (*b_batch, k, n), types[1])
    with fused_from(fuse), fine_grid(2000, 4096) if fine else fine_grid(1 << 19, 256 << 10):
        got = matmul_int8(a, b, **options, isa=tier)
    assert_same_bits(got, matmul_int8(a, b, **options, isa="reference"), (tier, shapes))
    if out == "s32":
        centred = a.astype(np.int64) - options["a_zero_point"], b.astype(np.int64) - options["b_zero_point"]
        exact = centred[0] @ (centred[1].swapaxes(-1, -2) if transpose else centred[1])
        assert np.array_equal(got, exact)


@pytest.mark.parametrize("types", TYPES, ids="".join)
@pytest.mark.parametrize("tier", HERE)
def test_extreme_operands(tier: str, types: tuple[str, str]) -> None:
    """All operands at their ends: what saturates VPMADDUBSW's pair sums."""
    for k in (1, 2, 3, 4, 5, 64, 127, 130):
        ends = [(-128, 127) if t == "s8" else (0, 255) for t in types]
        a = np.array([[x] * k for x in ends[0]] + [[ends[0][i % 2] for i in range(k)]], NUMPY[types[0]])
        b = np.array([[x] * k for x in ends[1]] + [[ends[1][i % 2] for i in range(k)]], NUMPY[types[1]]).T
        for zps in ((0, 0), (ends[0][0], ends[1][0]), (ends[0][1], ends[1][1])):
            got = matmul_int8(a, b, a_zero_point=zps[0], b_zero_point=zps[1], out_dtype=np.int32, isa=tier)
            assert np.array_equal(got, (a.astype(np.int64) - zps[0]) @ (b.astype(np.int64) - zps[1])), (k, zps)


FLOAT_HERE = [t for t in ("amx_bf16", "avx512_bf16", "avx512", "avx2") if t in v.tiers()]


@pytest.mark.parametrize("tier", FLOAT_HERE)
@settings(deadline=None, max_examples=60)
@given(shapes=products(), transpose=st.booleans(), seed=st.integers(0, 99), real=st.sampled_from(("bf16", "f32")))
def test_real_products_have_the_bits_of_gemm(tier: str, shapes: Any, transpose: bool, seed: int, real: str) -> None:
    """Packed at the call or before, by a kernel or by NumPy: the same multiplication.

    GEMMs with few columns have an order of their own, so there the columns are repeated.
    """
    a_batch, b_batch, m, k, n = shapes
    dtype: Any = bfloat16 if real == "bf16" else np.float32
    isa = tier if real == "bf16" or tier in ("avx512", "avx2") else "avx512"
    a, b = floats(seed, (*a_batch, m, k), dtype), floats(seed + 1, (*b_batch, k, n), dtype)
    given_b = np.ascontiguousarray(b.swapaxes(-1, -2)) if transpose else b
    got = (matmul_bf16 if real == "bf16" else matmul_f32)(a, given_b, transpose_b=transpose, isa=isa)
    batch = np.broadcast_shapes(a_batch, b_batch)
    a, b = np.broadcast_to(a, (*batch, m, k)), np.broadcast_to(b, (*batch, k, n))
    assert got.shape == (*batch, m, n)
    for i in np.ndindex(batch):
        one = np.ascontiguousarray(a[i]), np.ascontiguousarray(b[i])
        if real == "bf16":
            want = v.gemm_bf16(*one, isa=isa)
        else:
            want = v.gemm_f32(one[0], np.tile(one[1], (1, MAX_COLUMNS + 1)), isa=isa)[:, :n].copy()
        assert np.array_equal(got[i].view(np.uint8), want.view(np.uint8)), (tier, shapes, i)


@pytest.mark.parametrize("tier", FLOAT_HERE)
def test_what_is_not_finite_stays_where_it_is(tier: str) -> None:
    """NaN and infinity next to padding: 0 * NaN is NaN, so that padding must not meet them."""
    for k in (1, 2, 3, 31, 32, 33):
        a, b = np.ones((2, 3, k), np.float32), np.ones((2, k, 5), np.float32)
        a[0, 1, -1], b[1, -1, 2] = np.nan, np.inf
        want = a @ b
        for got in (matmul_bf16(a, b, out_dtype=np.float32, isa=tier), matmul_f32(a, b)):
            assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize("isa", [t for t in INT8_TIERS if t in v.tiers()] + ["reference"])
def test_views_give_what_copies_give(isa: str) -> None:
    q, k = heads(0, 2, 20, 3, 8, "u8"), heads(1, 2, 30, 3, 8, "s8")
    op = MatMulInt8(y_scale=100.0, transpose_b=True, isa=isa)
    want = op(q.copy(), k.copy())
    assert_same_bits(op(q, k), want, "views")
    # Views that no kernel can read are copied.
    wide_q, wide_k = np.repeat(q, 2, axis=-1)[..., ::2], np.repeat(k, 2, axis=-1)[..., ::2]
    assert_same_bits(op(wide_q, wide_k), want, "copies")
    assert_same_bits(op(np.asfortranarray(q), np.asfortranarray(k)), want, "Fortran order")
    plain = MatMulInt8(y_scale=100.0, isa=isa)
    assert_same_bits(plain(q, k.swapaxes(-1, -2)), want, "a transposed view")
    one = op(q[:, :, :1], k)
    assert_same_bits(op(np.broadcast_to(q[:, :, :1], q.shape), k), np.broadcast_to(one, want.shape).copy(), "rows")


@pytest.mark.parametrize("tier", HERE)
def test_operands_change_between_calls(tier: str) -> None:
    """Nothing of an earlier call is left in the handle's buffers."""
    op, reference = (MatMulInt8(a_zero_point=9, y_scale=90.0, isa=i) for i in (tier, "reference"))
    for seed in range(6):
        a, b = integers(seed, (2, 9, 21), "u8"), integers(seed + 9, (2, 21, 17), "u8" if seed % 2 else "s8")
        assert_same_bits(op(a, b), reference(a, b), seed)


@pytest.mark.parametrize("tier", HERE)
def test_concurrent_calls_of_one_handle(tier: str) -> None:
    op = MatMulInt8(a_zero_point=9, out_dtype=np.int32, isa=tier)
    sizes = [(4, 40, 64, 70), (9, 20, 33, 70), (1, 40, 64, 70), (9, 20, 33, 70)]
    problems = [
        (integers(i, (b, m, k), "u8"), integers(i + 50, (b, k, n), "s8")) for i, (b, m, k, n) in enumerate(sizes)
    ]
    want = [(a.astype(np.int64) - 9) @ b.astype(np.int64) for a, b in problems]
    wrong: list[int] = []

    def work(i: int) -> None:
        a, b = problems[i]
        wrong.extend(n for n in range(60) if not np.array_equal(op(a, b), want[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("tier", HERE)
def test_threads_change_nothing(tier: str) -> None:
    q, k = heads(0, 1, 128, 12, 64, "u8"), heads(1, 1, 128, 12, 64, "s8")
    op = MatMulInt8(a_zero_point=100, y_scale=1000.0, transpose_b=True, isa=tier)
    v.set_num_threads(1)
    one = op(q, k)
    assert_same_bits(one, MatMulInt8(a_zero_point=100, y_scale=1000.0, transpose_b=True, isa="reference")(q, k), tier)
    for threads in (2, 3) * 10:
        v.set_num_threads(threads)
        assert_same_bits(op(q, k), one, threads)


@pytest.mark.parametrize("isa", ["reference", *[t for t in INT8_TIERS if t in v.tiers()]])
def test_sum_in_place_and_out(isa: str) -> None:
    a, b = integers(0, (2, 6, 8), "u8"), integers(1, (8, 10), "s8")
    op = MatMulInt8(y_scale=30.0, post_ops=(v.Sum(0.5, 3), v.ReLU()), isa=isa)
    y = integers(2, (2, 6, 10), "u8")
    want = MatMulInt8(y_scale=30.0, post_ops=(v.Sum(0.5, 3), v.ReLU()), isa="reference")(a, b, tensors=(y,))
    assert op(a, b, out=y) is y
    assert_same_bits(y, want, isa)


def test_explain() -> None:
    op = MatMulInt8(y_scale=30.0)
    with pytest.raises(ShapeError, match="nothing was computed"):
        op.explain()
    with pytest.raises(ShapeError, match="no shape"):
        op.explain((2, 2))
    op(integers(0, (2, 6, 8), "u8"), integers(1, (2, 8, 10), "s8"))
    assert op.isa in str(op.explain())
    if op.isa != "reference":
        assert op.explain().kernel.startswith("matmul-u8s8u8-")


# --- bad arguments --------------------------------------------------------------------------------------------

A, B = np.ones((2, 3, 4), np.uint8), np.ones((2, 4, 5), np.int8)
BAD: list[tuple[str, type[VnnigenError], str, dict[str, Any]]] = [
    ("a a list", DTypeError, "a must be a NumPy array", {"a": [[1]]}),
    ("b a list", DTypeError, "b must be a NumPy array", {"b": [[1]]}),
    ("a f32", DTypeError, "a has type", {"a": A.astype(np.float32)}),
    ("b f32", DTypeError, "b has type", {"b": B.astype(np.float32)}),
    ("b s16", DTypeError, "b has type", {"b": B.astype(np.int16)}),
    ("a rank 1", ShapeError, "at least 2", {"a": A[0, 0]}),
    ("b rank 1", ShapeError, "at least 2", {"b": B[0, 0]}),
    ("a rank 0", ShapeError, "at least 2", {"a": np.array(1, np.uint8)}),
    ("b rank 1 transposed", ShapeError, "at least 2", {"b": B[0, 0], "transpose_b": True}),
    ("a without rows", ShapeError, "empty", {"a": A[:, :0]}),
    ("a without columns", ShapeError, "empty", {"a": A[:, :, :0], "b": B[:, :0]}),
    ("no batch", ShapeError, "empty", {"a": A[:0]}),
    ("b empty", ShapeError, "empty", {"b": B[..., :0]}),
    ("k differs", ShapeError, "a has 3 columns but b has 4 rows", {"a": A[..., :3]}),
    ("k differs transposed", ShapeError, "b has 5 rows", {"transpose_b": True}),
    ("batches differ", ShapeError, "do not broadcast", {"a": np.ones((3, 3, 4), np.uint8)}),
    ("transpose_b", ShapeError, "transpose_b", {"transpose_b": "yes"}),
    *[(f"{name} {bad}", QuantizationError, name, {name: bad})
      for name in ("a_scale", "b_scale", "y_scale") for bad in (float("nan"), 0.0, -1.0)],
    ("b_scale per channel", VnnigenError, "b_scale", {"b_scale": np.ones(5)}),
    ("a_zero_point -1", QuantizationError, "a_zero_point", {"a_zero_point": -1}),
    ("b_zero_point 128", QuantizationError, "b_zero_point", {"b_zero_point": 128}),
    ("b_zero_point -1 of u8", QuantizationError, "b_zero_point", {"b_zero_point": -1, "b": B.view(np.uint8)}),
    ("b_zero_point 256", QuantizationError, "b_zero_point", {"b_zero_point": 256}),
    ("b_zero_point of two", QuantizationError, "b_zero_point", {"b_zero_point": [1, 2]}),
    ("b_zero_point a float", QuantizationError, "b_zero_point", {"b_zero_point": 1.5}),
    ("y_scale missing", QuantizationError, "y_scale", {"y_scale": None}),
    ("post_ops of s32", QuantizationError, "post_ops", {"post_ops": v.ReLU(), "out_dtype": np.int32, "y_scale": None}),
    ("out_dtype", DTypeError, "out_dtype", {"out_dtype": np.float64}),
    ("isa", ISAError, "sse2", {"isa": "sse2"}),
    ("sum without a tensor", ShapeError, "out", {"post_ops": v.Sum()}),
    ("out dtype", DTypeError, "out must be uint8", {"out": np.zeros((2, 3, 5), np.int8)}),
    ("out shape", ShapeError, "out must have shape", {"out": np.zeros((1, 3, 5), np.uint8)}),
    ("out gaps", ShapeError, "contiguous", {"out": np.zeros((2, 3, 10), np.uint8)[..., ::2]}),
]  # fmt: skip


@pytest.mark.parametrize("isa", [None, "reference"])
@pytest.mark.parametrize(("error", "message", "changes"), [r[1:] for r in BAD], ids=[r[0] for r in BAD])
def test_bad_arguments(isa: str | None, error: type[VnnigenError], message: str, changes: dict[str, Any]) -> None:
    given_arguments: dict[str, Any] = {"a": A, "b": B, "y_scale": 9.0, "isa": isa}
    with pytest.raises(error, match=message):
        matmul_int8(**(given_arguments | changes))


@pytest.mark.parametrize("isa", v.tiers()[-2:])
def test_out_must_not_overlap(isa: str) -> None:
    memory = np.zeros(300, np.uint8)
    a, b, out = memory[:24].reshape(2, 3, 4), memory[100:140].reshape(2, 4, 5), memory[200:230].reshape(2, 3, 5)
    op = MatMulInt8(y_scale=1.0, isa=isa)
    op(a, b, out)
    for at in (10, 75, 110, 139):
        with pytest.raises(ShapeError, match="overlaps"):
            op(a, b, memory[at : at + 30].reshape(2, 3, 5))


@pytest.mark.parametrize("isa", v.tiers()[-2:])
def test_k_too_large(isa: str) -> None:
    """255 * 128 * k fits s32 up to k = 65793, whatever a and b hold at the call."""
    a, b = np.full((1, 65794), 255, np.uint8), np.full((65794, 1), -128, np.int8)
    with pytest.raises(QuantizationError, match="K too large"):
        matmul_int8(a, b, out_dtype=np.int32, isa=isa)
    assert matmul_int8(a[:, 1:], b[1:], out_dtype=np.int32, isa=isa).item() == -255 * 128 * 65793


def test_real_operands_must_be_real() -> None:
    real = np.ones((3, 3), np.float32)
    with pytest.raises(DTypeError, match="a has type"):
        matmul_f32(A[0, :, :3], real)
    with pytest.raises(DTypeError, match="b has type"):
        matmul_bf16(real, real.astype(np.float64))
    with pytest.raises(DTypeError, match="out_dtype"):
        matmul_bf16(real, real, out_dtype=np.uint8)
    with pytest.raises(ISAError, match="strategy"):
        matmul_bf16(real, real, strategy="magic")
