"""What the operators promise beside numbers: tiers, caps, threads, layouts, explanations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vnnigen as v
from tests.kernels.cases import POST_OPS, TIERS, Case, assert_same_bits, out_shape, random_numbers, seeded
from vnnigen.runtime import compiled
from vnnigen.runtime.dispatch import candidates

ROOT = Path(__file__).parents[2]
GENERATED = [t for t in TIERS if t in v.tiers()]
USABLE = [t for t in candidates("int8") if t in v.tiers()]
SHAPES = [
    Case((2, 9, 8, 12), (40, 12, 3, 3), padding=1, note="conv"),
    Case((1, 9, 9, 66), (66, 1, 3, 3), groups=66, padding=1, stride=2, note="depthwise"),
    Case((1, 6, 6, 12), (30, 4, 2, 2), groups=3, note="groups"),
    Case((17, 50), (70, 50), note="gemm"),
]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    threads = v.num_threads()
    yield
    v.set_max_isa(None)
    v.set_num_threads(threads)


# --- tiers and caps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: c.note)
def test_every_usable_tier_gives_the_same_bits(shape: Case) -> None:
    for number, src in enumerate(("u8", "s8") * 8):
        case = random_numbers(shape, seeded(number), src)
        x = case.source()
        tensors = case.tensors(out_shape(case.operator("reference"), case))
        results = {t: case.operator(t)(x, tensors=tensors) for t in USABLE}
        for tier in USABLE:
            assert_same_bits(results[tier], results["reference"], (case, tier))


def test_the_best_usable_tier_is_taken() -> None:
    assert SHAPES[0].operator(None).isa == USABLE[0]
    for tier in USABLE:
        assert SHAPES[0].operator(tier).isa == tier


@pytest.mark.parametrize("cap", USABLE)
def test_a_cap_is_honoured(cap: str) -> None:
    v.set_max_isa(cap)
    assert SHAPES[0].operator(None).isa == cap
    allowed = v.tiers()
    for tier in TIERS:
        if tier not in allowed:
            with pytest.raises(v.ISAError, match=tier):
                SHAPES[0].operator(tier)
    v.set_max_isa(None)
    assert SHAPES[0].operator(None).isa == USABLE[0]


def test_the_environments_cap_is_honoured() -> None:
    program = (
        "import vnnigen as v, numpy as np\n"
        "op = v.GemmInt8(np.ones((3, 4), np.int8), out_dtype=np.int32)\n"
        "op(np.ones((2, 3), np.uint8))\n"
        "print(op.isa, op.explain().kernel)\n"
        "v.set_max_isa('reference'); print(v.GemmInt8(np.ones((3, 4), np.int8), out_dtype=np.int32).isa)\n"
    )

    def run(cap: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"VNNIGEN_MAX_ISA": cap}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    for cap in USABLE:
        lines = run(cap).stdout.splitlines()
        assert lines[0].split()[0] == cap
        assert lines[0].endswith("numpy-reference") == (cap == "reference")
        assert lines[1] == "reference"
    wrong = run("pentium")
    assert wrong.returncode != 0
    assert "VNNIGEN_MAX_ISA" in wrong.stderr
    assert "pentium" in wrong.stderr


@pytest.mark.parametrize("tier", GENERATED)
def test_code_keeps_to_its_tier(tier: str) -> None:
    """What the instructions need is what dispatch checks: it must lie within the tier's features."""
    from vnnigen.isa import tiers

    for shape in SHAPES:
        for src in ("u8", "s8", "f32"):
            case = random_numbers(shape, seeded(3), src)
            op = case.operator(tier)
            assert set(op.explain(case.x, case.source().dtype).features) <= tiers.tier(tier).features


# --- threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", USABLE)
def test_one_handle_from_many_threads(tier: str) -> None:
    """Shapes and source types that nobody has compiled yet, all at once."""
    case = Case((1, 9, 9, 8), (24, 8, 3, 3), padding=1, weights="mixed", x_zp=3, bias="s32", w_zp=True, seed=5)
    op, reference = case.operator(tier), case.operator("reference")
    sources = []
    for h in (4, 5, 6, 7):
        for kind in (np.uint8, np.int8):
            sources.append(np.random.default_rng(h).integers(0, 128, (1, h, 9, 8)).astype(kind))
    wanted = [reference(x) for x in sources]
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for i in range(40):
            which = (i * (number + 1) + number) % len(sources)
            assert_same_bits(op(sources[which]), wanted[which], (tier, number, i))

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, n) for n in range(8)]:
            future.result()


@pytest.mark.skipif(not GENERATED, reason="no generated tier here")
def test_a_kernel_is_generated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = compiled.generate
    monkeypatch.setattr(compiled, "generate", lambda key: (made.append(key), original(key))[1])
    w = np.ones((7, 9, 5, 3), np.int8)
    x = np.ones((1, 13, 11, 9), np.uint8)
    start = threading.Barrier(6)

    def work(_: int) -> Any:
        start.wait()
        return v.Conv2dInt8(w, out_dtype=np.int32)(x)

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(work, range(6)))
    assert len(made) == len(set(made))
    assert all(np.array_equal(r, results[0]) for r in results)
    v.Conv2dInt8(2 * w, out_dtype=np.int32)(x)  # other weights, the same kernel
    assert len(made) == len(set(made)) == 1


# --- layouts ------------------------------------------------------------------------------------------------


def nchw(array: Any) -> Any:
    return array.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("tier", USABLE)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda c: c.note)
def test_nchw_equals_nhwc(shape: Case, tier: str) -> None:
    w, x = shape.weight_values(), shape.source()
    y = np.zeros(out_shape(shape.operator("reference"), shape), np.uint8)
    t = np.random.default_rng(1).integers(0, 256, (2, *y.shape)).astype(np.uint8)
    arguments: Any = {
        "stride": shape.stride, "padding": shape.padding, "groups": shape.groups, "isa": tier, "y_scale": 900.0,
        "y_zero_point": 100,
    }  # fmt: skip
    sums = (v.Sum(30.0, 5), v.Sum(20.0, tensor=t[1]))
    want = v.Conv2dInt8(w, post_ops=sums, **arguments)(x, tensors=(t[0],))
    sums = (v.Sum(30.0, 5), v.Sum(20.0, tensor=np.ascontiguousarray(nchw(t[1]))))
    op = v.Conv2dInt8(w, post_ops=sums, layout="NCHW", **arguments)
    for source in (nchw(x), np.ascontiguousarray(nchw(x))):
        got = op(source, tensors=(np.ascontiguousarray(nchw(t[0])),))
        assert got.flags.c_contiguous
        assert_same_bits(got, np.ascontiguousarray(nchw(want)), shape)
    plain = v.conv_int8(x, w, **arguments)
    assert np.array_equal(v.conv_int8(nchw(x), w, layout="NCHW", **arguments), nchw(plain))
    f32 = {k: a for k, a in arguments.items() if not k.startswith("y_")}
    xf, wf = x.astype(np.float32), w.astype(np.float32)
    assert np.array_equal(v.conv_f32(nchw(xf), wf, layout="NCHW", **f32), nchw(v.conv_f32(xf, wf, **f32)))


# --- the public functions are the handles ---------------------------------------------------------------------


@pytest.mark.parametrize("tier", USABLE)
def test_functions_equal_handles_and_out_is_returned(tier: str) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 256, (1, 5, 6, 7)).astype(np.uint8), rng.integers(-128, 128, (9, 7, 3, 3)).astype(np.int8)
    a, b = x.reshape(30, 7), w[:, :, 0, 0].T.copy()
    out = np.empty((1, 3, 4, 9), np.int32)
    assert v.conv_int8(x, w, out_dtype=np.int32, out=out, isa=tier) is out
    assert np.array_equal(out, v.Conv2dInt8(w, out_dtype=np.int32, isa=tier)(x))
    flat = np.empty((30, 9), np.int32)
    assert v.gemm_int8(a, b, out_dtype=np.int32, out=flat, isa=tier) is flat
    assert np.array_equal(flat, a.astype(np.int32) @ b.astype(np.int32))
    # A 1x1 convolution is a GEMM.
    assert np.array_equal(v.conv_int8(x, w[:, :, :1, :1], out_dtype=np.int32, isa=tier).reshape(30, 9), flat)
    xf, wf = x.astype(np.float32), w.astype(np.float32)
    # Small integers: f32 is exact.
    assert np.array_equal(v.conv_f32(xf, wf, isa=tier), out)
    assert np.array_equal(v.gemm_f32(a.astype(np.float32), b.astype(np.float32), isa=tier), flat)


@pytest.mark.parametrize("tier", USABLE)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), src=st.sampled_from(["u8", "s8"]), out=st.sampled_from(["u8", "s8", "f32"]))
def test_quantized_layer_approximates_the_real_one(tier: str, seed: int, src: str, out: str) -> None:
    """quantize -> conv_int8 -> dequantize is near the real convolution, within what rounding explains."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((1, 6, 6, 5)), rng.standard_normal((8, 5, 3, 3))
    bias = rng.standard_normal(8)
    in_type, out_type = (np.uint8 if src == "u8" else np.int8), {"u8": np.uint8, "s8": np.int8, "f32": np.float32}[out]
    xq = v.choose_qparams(x, dtype=in_type)
    wq = v.choose_qparams(w, dtype=np.int8, symmetric=True, axis=0)
    qx, qw = v.quantize(x, *xq, dtype=in_type), v.quantize(w, *wq, dtype=np.int8, axis=0)
    rx, rw = v.dequantize(qx, *xq), v.dequantize(qw, *wq, axis=0)
    real = np.maximum(v.conv_f32(rx, rw, bias.astype(np.float32), isa="reference"), 0)
    yq = v.choose_qparams(real, dtype=np.uint8 if out == "f32" else out_type)
    y = v.conv_int8(
        qx, qw, bias.astype(np.float32), x_scale=xq.scale, x_zero_point=xq.zero_point, w_scale=wq.scale,
        y_scale=None if out == "f32" else yq.scale, y_zero_point=0 if out == "f32" else yq.zero_point,
        post_ops=v.ReLU(), out_dtype=out_type, isa=tier,
    )  # fmt: skip
    got = y if out == "f32" else v.dequantize(y, *yq)
    step = 1e-4 if out == "f32" else 0.51 * float(yq.scale) + 1e-4
    assert np.abs(got - real).max() <= step


# --- explain ------------------------------------------------------------------------------------------------


def test_explain_needs_a_shape_or_a_call() -> None:
    op = SHAPES[0].operator(None)
    with pytest.raises(v.ShapeError, match="shape"):
        v.explain(op)
    assert str(v.explain(op, SHAPES[0].x)) == str(op.explain(SHAPES[0].x))
    op(SHAPES[0].source())
    assert "2" in v.explain(op).problem


@pytest.mark.parametrize("tier", GENERATED)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: c.note)
def test_explain_says_everything(shape: Case, tier: str) -> None:
    case = random_numbers(shape, seeded(1), "u8")
    report = case.operator(tier).explain(shape.x)
    text, data = str(report), report.to_dict()
    assert data["tier"] == report.tier == tier
    assert data["op"] == ("gemm" if case.is_gemm else "conv")
    json.dumps(data)
    start = 0
    for kernel in data["kernels"]:
        assert kernel["name"].startswith(data["op"])
        assert f"-u8s8{case.out}-" in kernel["name"]
        assert tier in kernel["name"]
        assert kernel["columns"][0] == start
        start = kernel["columns"][1]
        blocking = kernel["blocking"]
        assert f"tile {blocking['th']}x{blocking['tw']} pixels" in text
        assert kernel["code_size"] > 0
        assert kernel["jit_ms"] > 0
        assert kernel["instructions"] > 0
        assert kernel["grid_steps"] >= 1
        assert {"vnni": "VPDPBUSD", "fast": "VPMADDUBSW", "exact": "VPMADDWD"}[kernel["chain"]] in text
        for word in (kernel["name"], *kernel["features"], f"{kernel['code_size']} bytes"):
            assert word in text
    assert start == (case.w[0] if case.groups == 1 or case.w[1] == 1 else case.w[0] // case.groups)
    assert data["code_size"] == sum(k["code_size"] for k in data["kernels"])
    assert set(report.features) == {f for k in data["kernels"] for f in k["features"]}
    candidates = dict(map(tuple, data["candidates"]))
    taken = [name for name, why in candidates.items() if why is None]
    assert len(taken) == 1
    assert taken[0].startswith(f"{tier}/")
    # Every candidate that was not taken says why.
    assert all(why for name, why in candidates.items() if name != taken[0])
    assert {name.split("/")[0] for name in candidates} >= {*TIERS, "reference"}
    assert all(name in text for name in candidates)
    listing = report.listing()
    for kernel in data["kernels"]:
        assert kernel["name"] in listing
    assert "ret" in listing
    assert "epilogue" in listing


@pytest.mark.skipif("avx512" not in GENERATED, reason="no avx512 here")
def test_explain_shows_the_chain_of_each_block() -> None:
    case = Case((5, 8), (192, 8), weights="mixed")
    assert case.operator("avx512").explain(case.x).chain == "0..63: fast, 64..127: exact, 128..191: fast"
    assert case.operator("avx512_vnni").explain(case.x).chain == "0..191: vnni" if "avx512_vnni" in GENERATED else True


def test_explain_of_the_reference() -> None:
    report = SHAPES[0].operator("reference").explain(SHAPES[0].x)
    assert report.kernel == "numpy-reference"
    assert report.kernels == ()
    assert "reference" in str(report)
    assert report.to_dict()["candidates"][-1] == ["reference", None]


def test_a_capped_tier_says_so() -> None:
    v.set_max_isa("avx2")
    if "avx2" not in v.tiers():
        pytest.skip("no avx2 here")
    reasons = dict(SHAPES[0].operator(None).explain(SHAPES[0].x).candidates)
    # A tier that the machine lacks gives that reason instead.
    assert all("capped at avx2" in (why or "") for name, why in reasons.items() if name.split("/")[0] in GENERATED[:-1])


# --- state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", USABLE)
def test_calls_do_not_leak_into_each_other(tier: str) -> None:
    """Scratch and stack of one call are what another finds: results must not depend on it."""
    cases = [random_numbers(shape, seeded(n), src) for n, shape in enumerate(SHAPES) for src in ("u8", "s8", "f32")]
    prepared = []
    for case in cases:
        op, x = case.operator(tier), case.source()
        tensors = case.tensors(out_shape(op, case))
        prepared.append((case, op, x, tensors, op(x, tensors=tensors)))
    rng = np.random.default_rng(0)
    for i in rng.permutation(len(prepared) * 3):
        case, op, x, tensors, want = prepared[i % len(prepared)]
        assert_same_bits(op(x, tensors=tensors), want, case)


def test_all_post_op_chains_are_used() -> None:
    """The seeds above must not all miss a chain: they are what the tests of this directory rely on."""
    seen = {random_numbers(SHAPES[0], seeded(n)).post_ops for n in range(300)}
    assert len(seen) >= len(POST_OPS) - 1
