"""bf16 GEMM and convolution, by tiles, by pairs (VDPBF16PS) and widened to f32, on the emulator and on this machine.

Sums of small integers are exact in any order, so they show every other fault bit for bit; sums of other numbers are
held to the error bound that `vnnigen.ops.bf16` states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import vnnigen as v
from tests.kernels.cases import (
    Case,
    PostOps,
    assert_same_bits,
    expected,
    f32_in_order,
    float64_sums,
    out_shape,
    random_array,
)
from tests.kernels.emulation import check_emulated, emulate, fine_grid, lower
from vnnigen.errors import ISAError, ShapeError
from vnnigen.isa import tiers
from vnnigen.kernels.families import FAMILIES
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.runtime import dispatch

bfloat16 = ml_dtypes.bfloat16
Array = np.ndarray[Any, Any]

FMA_TIERS = ("avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2")
#: (tier, strategy) of all ways to compute bf16.
WAYS = [("amx_bf16", "tiles"), ("amx_bf16", "dot"), ("avx512_bf16", "dot"), *((t, "fma") for t in FMA_TIERS)]
HERE = [
    pytest.param(t, s, marks=pytest.mark.skipif(t not in v.tiers(), reason=f"no {t} here"), id=f"{t}-{s}")
    for t, s in WAYS
]
#: For the emulator, which is slow, one tier for each of what tiers have in common.
DISTINCT = [("amx_bf16", "tiles"), ("avx512_bf16", "dot"), ("avx512", "fma"), ("avx2", "fma")]
ALL_WAYS = pytest.mark.parametrize(("tier", "strategy"), DISTINCT, ids=[f"{t}-{s}" for t, s in DISTINCT])
ON_HARDWARE = pytest.mark.parametrize(("tier", "strategy"), HERE)
RANDOM = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])


def small(x: tuple[int, ...], w: tuple[int, ...], **more: Any) -> Case:
    """A bf16 case of small integers."""
    return Case(x, w, **({"src": "bf16", "out": "f32", "weights": "small"} | more))


def family_of(case: Case, tier: str, strategy: str) -> str | None:
    """The kernel family of a strategy; None where it cannot compute the case. Depthwise has only one."""
    weights, code = case.operator("reference")._weights, TIER_CODE[tier]
    fit = {f.name for f in FAMILIES if f.why_not(weights, code) is None}
    if "depthwise" in fit:
        return "depthwise"
    name = dispatch.STRATEGIES[strategy]
    return name if name in fit else None


def check(case: Case, tier: str, strategy: str, *, in_place: bool = False) -> None:
    """Compare with the exact result, bit for bit."""
    family = family_of(case, tier, strategy)
    assert family is not None
    check_emulated(case, tier, in_place=in_place, family=family)


def emulated(case: Case, tier: str, strategy: str, x: Array, op: v.Operator | None = None) -> Array:
    """What the kernels of a way give for x."""
    op = op or case.operator("reference")
    low = lower(op, case.x, "bf16", tier, family_of(case, tier, strategy))
    return emulate(low, x, bfloat16 if case.out == "bf16" else np.float32).y


def assert_within_bound(case: Case, got: Array, x: Array, strategy: str, bias: Array | None = None) -> None:
    """|error| <= 2*K*2^-24 * sum |a*b|, the output's rounding, and what denormals lose."""
    w = case.weight_values()
    k = int(np.prod(case.w[1:]))
    exact = float64_sums(case, x, w)
    bound = 2 * k * 2.0**-24 * float64_sums(case, np.abs(x), np.abs(w))
    bound += k * (2.0**-150 if strategy == "fma" else 2.0**-126)
    if bias is not None:
        exact = exact + bias
        bound = bound + (np.abs(exact) + bound) * 2.0**-24
    if case.out == "bf16":
        bound = bound + (np.abs(exact) + bound) * 2.0**-8 + 2.0**-126
    error = np.abs(got.astype(np.float64) - exact)
    assert (error <= bound * (1 + 2.0**-20)).all(), (case, float((error / np.maximum(bound, 1e-300)).max()))


# --- exact sums, bit for bit ------------------------------------------------------------------------------

SHAPES = [
    small((1, 16), (1, 16), note="one"),
    small((17, 32), (33, 32), note="gemm"),
    small((33, 96), (16, 96), note="gemm, two steps"),
    small((15, 120), (50, 120), note="gemm, four steps"),
    small((40, 4), (20, 4), note="short K"),
    small((1, 5, 6, 4), (7, 4, 3, 3), padding=1, note="3x3"),
    small((1, 3, 19, 16), (20, 16, 3, 3), padding=((0, 2), (1, 0)), note="asymmetric"),
    small((1, 9, 37, 4), (9, 4, 3, 2), stride=(2, 3), padding=((1, 0), (0, 1)), note="stride"),
    small((1, 7, 20, 8), (6, 8, 3, 3), dilation=(2, 3), padding=(2, 3), note="dilation"),
    small((2, 4, 18, 12), (36, 4, 2, 3), groups=3, padding=((0, 1), (1, 1)), note="groups"),
    small((2, 3, 3, 10), (35, 10, 1, 1), note="1x1"),
    small((1, 5, 35, 64), (35, 64, 1, 1), stride=2, note="1x1-stride"),
    small((2, 37, 1, 2), (3, 2, 7, 1), padding=(3, 0), note="column"),
    small((1, 6, 5, 66), (66, 1, 3, 3), groups=66, padding=1, note="depthwise"),
    small((1, 7, 7, 35), (35, 1, 3, 3), groups=35, stride=2, padding=((1, 0), (0, 1)), note="depthwise-stride"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ALL_WAYS
def test_exact_sums(tier: str, strategy: str, shape: Case) -> None:
    out, bias = (("f32", "f32"), ("bf16", None))[len(shape.note) % 2]
    if family_of(shape, tier, strategy) is None:
        assert strategy == "tiles"
        assert shape.note == "column"
        return
    check(replace(shape, out=out, bias=bias), tier, strategy)


@pytest.mark.parametrize(("tier", "strategy"), DISTINCT[1:])
def test_odd_depths(tier: str, strategy: str) -> None:
    """K that ends inside a pair, and inside a vector of the copy."""
    for k in (1, 2, 3, 7, 9, 17, 33):
        check(small((5, k), (19, k), out="bf16", seed=k), tier, strategy)
        check(small((1, 2, 4, k), (9, k, 2, 3), padding=1, dilation=(1, 1 + k % 2), seed=k), tier, strategy)


@ALL_WAYS
def test_boundaries_of_tiles(tier: str, strategy: str) -> None:
    for number, (m, n) in enumerate((m, n) for m in (1, 15, 17, 32) for n in (1, 16, 17, 33, 49)):
        k = (2, 4, 30, 32, 64, 96)[number % 6]
        if strategy == "tiles" and k == 2:
            k = 8
        check(small((m, k), (n, k), out=("f32", "bf16")[number % 2], seed=number), tier, strategy)


CHANNELS = np.linspace(-2, 2, 37, dtype=np.float32)
POST_OPS: dict[str, tuple[PostOps, tuple[str, ...]]] = {
    "sum": (lambda: (v.Sum(0.3),), ("out",)),
    "sum-u8": (lambda: (v.Sum(0.02, 131, dtype=np.uint8),), ("u8",)),
    "sum-bf16-relu": (lambda: (v.Sum(0.5, dtype=bfloat16), v.ReLU()), ("bf16",)),
    "linear": (lambda: (v.Linear(-1.5, 0.3),), ()),
    "relu": (lambda: (v.ReLU(),), ()),
    "clip": (lambda: (v.Clip(-3.5, 2.25),), ()),
    "leaky": (lambda: (v.LeakyReLU(0.1),), ()),
    "hard-swish": (lambda: (v.HardSwish(),), ()),
    "sigmoid": (lambda: (v.Linear(0.05, 0), v.Sigmoid()), ()),
    "tanh": (lambda: (v.Linear(0.05, 0), v.Tanh()), ()),
    "silu": (lambda: (v.Linear(0.05, 0), v.SiLU()), ()),
    "gelu": (lambda: (v.Linear(0.05, 0), v.GELU()), ()),
    "gelu-tanh": (lambda: (v.Linear(0.05, 0), v.GELU("tanh")), ()),
    "mul-channels": (lambda: (v.Binary("mul", CHANNELS), v.ReLU()), ()),
    "add-f32": (lambda: (v.ReLU(), v.Binary("add", dtype=np.float32)), ("f32",)),
    "max-bf16": (lambda: (v.Binary("max", dtype=bfloat16),), ("bf16",)),
}


@pytest.mark.parametrize("chain", POST_OPS)
@ALL_WAYS
def test_post_ops(tier: str, strategy: str, chain: str) -> None:
    post_ops, sums = POST_OPS[chain]
    for out in ("f32", "bf16") if sums else ("bf16",):
        types = tuple(out if s == "out" else s for s in sums)
        case = small((17, 8), (37, 8), out=out, bias="f32", post_ops=post_ops, sums=types)
        check(case, tier, strategy)
        if types[:1] == (out,):
            check(case, tier, strategy, in_place=True)


@ALL_WAYS
def test_grids_of_many_steps(tier: str, strategy: str) -> None:
    with fine_grid(1000, 1024):
        for shape in (
            small((2, 5, 17, 8), (20, 4, 3, 3), groups=2, padding=((2, 1), (0, 1)), stride=(2, 1)),
            small((1, 9, 18, 8), (33, 8, 3, 1), padding=((1, 0), (0, 0)), out="bf16"),
            small((70, 32), (70, 32), out="bf16"),
            small((1, 50, 1, 8), (20, 8, 3, 1), padding=((2, 0), (0, 0))),
        ):
            check(shape, tier, strategy)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    if draw(st.integers(0, 2)) == 0:
        k = draw(st.integers(1, 60))
        shape = small((draw(st.integers(1, 40)), k), (draw(st.integers(1, 70)), k))
    else:
        size = st.integers(1, 9) | st.integers(15, 20)
        kh, kw = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        groups = draw(st.sampled_from((1, 1, 2, 0)))
        icg, ocg = draw(st.integers(1, 20)), draw(st.integers(1, 40))
        if groups == 0:
            groups, icg, ocg = draw(st.integers(2, 40)), 1, 1
        pads = st.tuples(st.integers(0, 2), st.integers(0, 2))
        shape = small(
            (draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(size), groups * icg), (groups * ocg, icg, kh, kw),
            stride=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
            dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
            padding=draw(st.tuples(pads, pads)), groups=groups,
        )  # fmt: skip
    out = draw(st.sampled_from(("f32", "bf16")))
    post_ops, sums = POST_OPS[draw(st.sampled_from([c for c in sorted(POST_OPS) if c != "mul-channels"]))]
    return replace(
        shape, out=out, bias=draw(st.sampled_from((None, "f32"))), post_ops=post_ops,
        sums=tuple(out if s == "out" else s for s in sums), seed=draw(st.integers(0, 1 << 16)),
    )  # fmt: skip


@ALL_WAYS
@RANDOM
@given(case=cases(), fine=st.booleans())
def test_random_problems(tier: str, strategy: str, case: Case, fine: bool) -> None:
    try:
        out_shape(case.operator("reference"), case)
    except ShapeError:
        assume(False)
    assume(family_of(case, tier, strategy) is not None)
    if fine:
        with fine_grid(1000, 1024):
            check(case, tier, strategy)
    else:
        check(case, tier, strategy)


# --- rounded sums -----------------------------------------------------------------------------------------

ROUNDED = [
    Case((9, 160), (20, 160), src="bf16", out="f32", bias="f32", note="gemm"),
    Case((17, 64), (33, 64), src="bf16", out="bf16", note="gemm"),
    Case((1, 4, 5, 16), (20, 16, 3, 3), src="bf16", out="f32", padding=1, note="conv"),
    Case((1, 4, 17, 32), (20, 16, 2, 2), src="bf16", out="bf16", groups=2, bias="f32", note="groups"),
    Case((1, 6, 6, 20), (20, 1, 3, 3), src="bf16", out="f32", groups=20, padding=1, note="depthwise"),
]


@pytest.mark.parametrize("case", ROUNDED, ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**60, 2.0**-128])
@ALL_WAYS
def test_error_bound(tier: str, strategy: str, scale: float, case: Case) -> None:
    """Numbers of very different sizes, down to products that are denormal or vanish."""
    rng = np.random.default_rng(case.seed + 1)
    x = (rng.standard_normal(case.x) ** 5 * scale).astype(bfloat16)
    op = case.operator("reference")
    how = "fma" if case.note == "depthwise" else strategy
    assert_within_bound(case, emulated(case, tier, strategy, x, op), x, how, op._q.bias_f32)


@pytest.mark.parametrize("case", ROUNDED, ids=str)
@pytest.mark.parametrize("tier", FMA_TIERS)
def test_widened_sums_in_the_documented_order(tier: str, case: Case) -> None:
    """One FMA a product, in the order kh, kw, ic: the same bits on every tier, as for f32."""
    case = replace(case, out="f32", bias=None)
    x = case.source()
    want = f32_in_order(case, x.astype(np.float32), case.weight_values().astype(np.float32))
    assert_same_bits(emulated(case, tier, "fma", x), want, (case, tier))
    if tier in v.tiers():
        assert_same_bits(case.operator(tier, strategy="fma")(x), want, (case, tier, "hardware"))


# --- NaN and infinity -------------------------------------------------------------------------------------

LEAKS = [
    small((17, 16), (20, 16), note="gemm"),
    small((1, 3, 17, 8), (17, 8, 3, 3), padding=1, note="3x3"),
    small((2, 5, 6, 4), (9, 4, 3, 3), padding=((2, 1), (0, 2)), stride=2, note="stride"),
    small((1, 3, 18, 16), (20, 8, 2, 3), groups=2, dilation=(1, 2), note="groups"),
    small((1, 5, 7, 20), (20, 1, 3, 3), groups=20, padding=1, note="depthwise"),
    small((1, 4, 5, 3), (9, 3, 3, 3), padding=1, note="odd"),
    small((7, 5), (20, 5), note="odd gemm"),
]


@pytest.mark.parametrize("shape", LEAKS, ids=lambda c: c.note)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@ALL_WAYS
def test_a_pixel_reaches_only_outputs_whose_window_holds_it(
    tier: str, strategy: str, value: float, shape: Case
) -> None:
    """Scratch begins as NaN and padding lanes of weights are zeros: 0 * NaN must not get anywhere."""
    if family_of(shape, tier, strategy) is None:
        assert strategy == "tiles"
        return
    case = replace(shape, out="f32" if np.isnan(value) else "bf16")
    op, clean = case.operator("reference"), case.source()
    without = emulated(case, tier, strategy, clean, op)
    rng = np.random.default_rng(3)
    for at in [tuple(s - 1 for s in case.x), tuple(rng.integers(0, case.x))]:
        x, mark = clean.copy(), np.zeros(case.x)
        x[at], mark[at] = value, 1
        touched = float64_sums(case, mark, np.ones(case.w)) > 0
        got = emulated(case, tier, strategy, x, op)
        nonfinite = ~np.isfinite(got.astype(np.float32))
        # An infinity that meets a weight of zero is NaN; what it meets twice stays one or the other.
        assert nonfinite[touched].all()
        assert np.array_equal(got[~touched], without[~touched])


@ALL_WAYS
@pytest.mark.parametrize("shape", [LEAKS[1], LEAKS[3], LEAKS[4]], ids=lambda c: c.note)
def test_a_weight_that_is_nan_reaches_its_channel_only(tier: str, strategy: str, shape: Case) -> None:
    """All of its channel: the weight meets padding too, and 0 * NaN is NaN."""
    x, w = shape.source(), shape.weight_values()
    make = {"padding": shape.padding, "groups": shape.groups, "dilation": shape.dilation}
    without = emulated(shape, tier, strategy, x)
    for tap in (0, -1):
        bad = w.copy()
        bad[7, 0, tap, tap] = np.nan
        op = v.Conv2dBf16(bad, **make, out_dtype=np.float32, isa="reference")
        got = emulated(shape, tier, strategy, x, op)
        assert np.isnan(got[..., 7]).all()
        others = np.arange(len(w)) != 7
        assert np.array_equal(got[..., others], without[..., others])


# --- which way is taken -----------------------------------------------------------------------------------


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch as on a machine with all tiers and a VDPBF16PS faster than FMA."""
    monkeypatch.setattr(tiers, "why_not", lambda name: None)
    measured(monkeypatch, 400.0, 200.0)


def measured(monkeypatch: pytest.MonkeyPatch, dot: float, fma: float) -> None:
    monkeypatch.setattr(dispatch, "peak_for", lambda tier, _shares: dot if tier == "avx512_bf16" else fma)


def chosen(case: Case, isa: str | None = None, strategy: str = "auto") -> tuple[str, dict[str, str | None]]:
    """The candidate that is taken, and all of them."""
    choice = dispatch.choose(case.operator("reference")._weights, isa, strategy)
    assert choice.family is not None
    name = f"{choice.tier}/{choice.family.name}"
    considered = dict(choice.considered)
    assert considered[name] is None
    assert [n for n, why in considered.items() if why is None] == [name]
    return name, considered


GEMM = small((5, 64), (20, 64))


@pytest.mark.usefixtures("everywhere")
def test_auto_takes_tiles_then_pairs_then_widens() -> None:
    assert chosen(GEMM)[0] == "amx_bf16/tiles"
    assert chosen(GEMM, "avx512_bf16")[0] == "avx512_bf16/dot"
    assert chosen(GEMM, "avx512")[0] == "avx512/implicit-gemm"
    name, considered = chosen(small((5, 2), (20, 2)))
    assert name == "amx_bf16/tiles"
    name, considered = chosen(small((5, 134), (20, 134)))
    assert name == "amx_bf16/dot"
    assert "cannot be cut" in str(considered["amx_bf16/tiles"])
    name, considered = chosen(small((5, 33), (20, 33)))
    assert name == "amx_bf16/dot"
    assert "cannot be cut" in str(considered["amx_bf16/tiles"])
    assert chosen(small((1, 5, 5, 8), (8, 1, 3, 3), groups=8))[0] == "amx_bf16/depthwise"


@pytest.mark.usefixtures("everywhere")
def test_auto_widens_where_pairs_were_measured_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 123.0, 247.0)
    name, considered = chosen(GEMM, "avx512_bf16")
    assert name == "avx512_bf16/implicit-gemm"
    assert "123 GOP/s" in str(considered["avx512_bf16/dot"])
    assert chosen(GEMM, "avx512_bf16", "dot")[0] == "avx512_bf16/dot"


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("isa", "strategy", "name"),
    [
        (None, "tiles", "amx_bf16/tiles"), (None, "dot", "amx_bf16/dot"), (None, "fma", "amx_bf16/implicit-gemm"),
        ("avx512_bf16", "dot", "avx512_bf16/dot"), ("avx512_bf16", "fma", "avx512_bf16/implicit-gemm"),
        ("avx2", "fma", "avx2/implicit-gemm"),
    ],
)  # fmt: skip
def test_pinned(isa: str | None, strategy: str, name: str) -> None:
    taken, considered = chosen(GEMM, isa, strategy)
    assert taken == name
    if isa is None and strategy == "fma":
        assert considered["amx_bf16/tiles"] == considered["amx_bf16/dot"] == "strategy=fma was asked for"


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("case", "isa", "strategy", "message"),
    [
        (GEMM, None, "pairs", "strategy must be auto, tiles, dot, fma, not 'pairs'"),
        (GEMM, "avx2", "dot", "avx2 has no VDPBF16PS"),
        (GEMM, "avx512_bf16", "tiles", "avx512_bf16 has no bf16 tiles"),
        (small((5, 33), (20, 33)), None, "tiles", "runs of 33 bf16 values cannot be cut"),
        (small((1, 4, 4, 5), (9, 5, 3, 3), dilation=2), None, "tiles", "runs of 5 bf16 values cannot be cut"),
        (GEMM, "reference", "fma", "strategy=fma cannot be used"),
        (GEMM, "amx_int8", "tiles", "amx_int8 is not implemented here"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_pins_that_cannot_be(case: Case, isa: str | None, strategy: str, message: str) -> None:
    w = case.operator("reference")._weights
    with pytest.raises(ISAError) as error:
        dispatch.choose(w, isa, strategy)
    assert message in str(error.value)
    if isa != "reference" and strategy != "pairs":
        with pytest.raises(ISAError):
            case.operator(isa, strategy=strategy)


@pytest.mark.skipif("amx_bf16" in v.tiers(), reason="this machine has tiles")
def test_tiles_need_a_machine_that_has_them() -> None:
    with pytest.raises(ISAError, match=r"strategy=tiles cannot be used: .*amx_bf16/tiles: this "):
        GEMM.operator(None, strategy="tiles")


@ON_HARDWARE
def test_explain_names_the_strategy(tier: str, strategy: str) -> None:
    op = GEMM.operator(tier, strategy=strategy)
    op(GEMM.source())
    shown = op.explain().to_dict()
    assert [k["chain"] for k in shown["kernels"]] == [{"tiles": "amx", "dot": "bf16", "fma": "fma"}[strategy]]
    assert dict(shown["candidates"])[f"{tier}/{dispatch.STRATEGIES[strategy]}"] is None
    assert shown["kernel"].endswith("-fma") == (strategy == "fma")
    listing = op.explain().listing().lower()
    instruction = {"tiles": "tdpbf16ps", "dot": "vdpbf16ps", "fma": "vfmadd231ps"}
    assert {s for s, name in instruction.items() if name in listing} == {strategy}


@ON_HARDWARE
def test_explain_in_words(tier: str, strategy: str) -> None:
    text = str(GEMM.operator(tier, strategy=strategy).explain(GEMM.x))
    assert {"tiles": "TDPBF16PS", "dot": "VDPBF16PS", "fma": "VFMADD231PS"}[strategy] in text


# --- on this machine --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = v.num_threads()
    yield
    v.set_num_threads(before)


@ON_HARDWARE
@RANDOM
@given(case=cases(), threads=st.sampled_from((1, 2)))
def test_random_problems_here(tier: str, strategy: str, case: Case, threads: int) -> None:
    op = case.operator("reference")
    try:
        y_shape = out_shape(op, case)
    except ShapeError:
        assume(False)
    family = family_of(case, tier, strategy)
    assume(family is not None)
    # Depthwise widens whatever the tier; only `fma` may be asked for.
    strategy = "auto" if family == "depthwise" else strategy
    v.set_num_threads(threads)
    x, tensors = case.source(), case.tensors(y_shape)
    got = case.operator(tier, strategy=strategy)(x, tensors=tensors)
    assert_same_bits(got, expected(case, op, x, tensors), (case, tier, strategy))


@ON_HARDWARE
@RANDOM
@given(m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 500), seed=st.integers(0, 99))
def test_error_bound_here(tier: str, strategy: str, m: int, n: int, k: int, seed: int) -> None:
    k = 4 * k if strategy != "fma" else k
    case = Case((m, k), (n, k), src="bf16", out=("f32", "bf16")[seed % 2], seed=seed)
    assume(family_of(case, tier, strategy) is not None)
    x = case.source() ** 3
    assert_within_bound(case, case.operator(tier, strategy=strategy)(x), x, strategy)


@pytest.mark.parametrize("case", ROUNDED, ids=str)
@ON_HARDWARE
def test_the_emulator_gives_this_machines_bits(tier: str, strategy: str, case: Case) -> None:
    x = (np.random.default_rng(5).standard_normal(case.x) ** 5).astype(bfloat16)
    pinned = "auto" if family_of(case, tier, strategy) == "depthwise" else strategy
    here = case.operator(tier, strategy=pinned)(x)
    assert_same_bits(emulated(case, tier, strategy, x), here, (case, tier, strategy))


@ON_HARDWARE
def test_threads_change_nothing(tier: str, strategy: str) -> None:
    for shape in (((200, 128), (160, 128)), ((2, 31, 29, 16), (72, 16, 3, 3))):
        case = Case(*shape, src="bf16", out="f32")
        op, x = case.operator(tier, strategy=strategy), case.source()
        v.set_num_threads(1)
        one = op(x)
        for threads in (2, 1, 2) * 5:
            v.set_num_threads(threads)
            assert_same_bits(op(x), one, (case, threads))


@pytest.mark.parametrize("tier", ["reference", *(t for t in FMA_TIERS if t in v.tiers())])
def test_f32_inputs_are_rounded_first(tier: str) -> None:
    rng = np.random.default_rng(0)
    a, b = random_array(rng, (9, 64), "f32"), random_array(rng, (64, 20), "f32")
    a[0, :4] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-9, 3.4e38  # ties to even, below a tie, to infinity
    want = v.gemm_bf16(a.astype(bfloat16), b.astype(bfloat16), isa=tier)
    assert want.dtype == bfloat16
    for left in (a, a.astype(bfloat16)):
        for right in (b, b.astype(bfloat16)):
            got = v.gemm_bf16(left, right, isa=tier)
            assert np.array_equal(got, want, equal_nan=True)
    x, w = random_array(rng, (1, 6, 7, 8), "f32"), random_array(rng, (12, 8, 3, 3), "f32")
    for out in (bfloat16, np.float32):
        want = v.conv_bf16(x.astype(bfloat16), w.astype(bfloat16), padding=1, out_dtype=out, isa=tier)
        assert want.dtype == out
        assert_same_bits(v.conv_bf16(x, w, padding=1, out_dtype=out, isa=tier), want, tier)
        assert_same_bits(v.Conv2dBf16(w, padding=1, out_dtype=out, isa=tier)(x), want, tier)
