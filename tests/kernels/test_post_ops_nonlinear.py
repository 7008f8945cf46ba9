"""Sigmoid, tanh, SiLU, GELU, HardSwish and Binary: accuracy, limits, and the same bits on every tier."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vnnigen as v
from tests.kernels.cases import Case, expected, out_shape
from tests.kernels.emulation import check_emulated
from tests.kernels.epilogue_harness import Shape, assert_same, run
from vnnigen.isa import tiers
from vnnigen.isa.assembler import Arg, Assembler, Mem
from vnnigen.isa.emulator import Emulator
from vnnigen.isa.memory import Memory
from vnnigen.isa.tiers import why_not
from vnnigen.kernels.approx import (
    MEANINGS,
    PROGRAMS,
    Bits,
    Program,
    Scalar,
    Var,
    const,
    evaluate,
    exp_end,
    exp_minus,
)
from vnnigen.kernels.bf16 import round_to_bf16
from vnnigen.kernels.emit_approx import emit, lower, lowered
from vnnigen.kernels.emit_epilogue import EPILOGUE_TEMPS, STEP_EMIT, epilogue_registers
from vnnigen.kernels.emit_store import splat
from vnnigen.kernels.epilogue import EpilogueSpec, StepSpec, fold, reference_epilogue
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.kernels.steps import CHANNEL_KINDS, STEP_SCALARS, TENSOR_KINDS

TIERS = ("avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2")
HERE = tuple(t for t in TIERS if why_not(t) is None)
PLACES = [(t, False) for t in TIERS] + [(t, True) for t in HERE]
TINY = 2.0**-120
ONE = np.ones(1, np.float32)
ALPHA = np.float32(1.702)  # of the sigmoid that approximates GELU
FUNCTIONS = {
    "hardswish": v.HardSwish(), "sigmoid": v.Sigmoid(), "tanh": v.Tanh(), "silu": v.SiLU(), "silu 1.702": v.SiLU(1.702),
    "gelu": v.GELU(), "gelu_tanh": v.GELU("tanh"),
}  # fmt: skip

# --- accuracy -----------------------------------------------------------------------------------------------

_erfc = np.frompyfunc(math.erfc, 1, 1)


def _u(x: np.ndarray) -> np.ndarray:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def _over(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """X / (1 + exp(-t)), with its limit where exp overflows."""
    return np.where(t < -700, 0.0, x / (1 + np.exp(-np.maximum(t, -700))))


#: kind -> (alpha, the function in float64, ulp that it may be off)
EXACT: dict[str, tuple[float, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "hardswish": (1, lambda x: np.where(x <= -3, 0.0, x) * np.clip(x + 3, 0, 6) / 6, lambda x: 3),
    "sigmoid": (1, lambda x: _over(np.ones_like(x), x), lambda x: 3),
    "tanh": (1, np.tanh, lambda x: 3),
    "silu": (1, lambda x: _over(x, x), lambda x: 3),
    "silu 1.702": (float(ALPHA), lambda x: _over(x, float(ALPHA) * x), lambda x: 3 + abs(float(ALPHA) * x)),
    "gelu": (1, lambda x: 0.5 * x * _erfc(-x / math.sqrt(2)).astype(np.float64), lambda x: 8),
    "gelu_tanh": (1, lambda x: _over(x, 2 * _u(x)), lambda x: 3 + 5 * abs(_u(x))),
}


def sweep(n: int = 1 << 20) -> np.ndarray:
    """Random bit patterns, and dense samples of where the functions are interesting; finite."""
    rng = np.random.default_rng(5)
    sign = np.sign(rng.standard_normal(n // 4))
    x = np.concatenate([
        rng.integers(0, 1 << 32, n // 4, dtype=np.uint32).view(np.float32),
        (rng.standard_normal(n // 4) * 4).astype(np.float32),
        rng.uniform(-110, 110, n // 4).astype(np.float32),
        (sign * 2.0 ** rng.uniform(-30, 8, n // 4)).astype(np.float32),
    ])  # fmt: skip
    return x[np.isfinite(x)]


@pytest.mark.parametrize("name", EXACT)
def test_accuracy(name: str) -> None:
    alpha, exact, ulps = EXACT[name]
    x = sweep()
    with np.errstate(all="ignore"):
        want = exact(x.astype(np.float64))
        want = np.where(np.abs(want) > np.finfo(np.float32).max, np.copysign(np.inf, want), want)
        ulp = np.maximum(np.spacing(np.abs(want).astype(np.float32)).astype(np.float64), 2.0**-149)
        got = evaluate(PROGRAMS[name.split(maxsplit=1)[0]], x, np.array([alpha], np.float32)).astype(np.float64)
        error = np.where(got == want, 0, np.abs(got - want))
        over = error - (ulps(x.astype(np.float64)) * ulp + TINY)
    over = np.where(np.isinf(want), 0, over)  # (an infinity itself is checked by `error`, which is NaN or 0)
    worst = np.nanargmax(over)
    assert not np.isnan(got).any()
    assert over[worst] <= 0, f"{name}({x[worst]}) is {got[worst]}, {error[worst] / ulp[worst]:.1f} ulp off"
    # The bound means something: the errors come near it.
    assert (error > 0.2 * ulps(x.astype(np.float64)) * ulp).any()


@pytest.mark.parametrize("less", [0, 7, 30])
def test_accuracy_of_the_exponential(less: int) -> None:
    """Within (3 + v/16) * 2**-24, and never a denormal number, up to the end."""
    rng = np.random.default_rng(less)
    end = exp_end(less)
    x = np.concatenate([rng.uniform(0, end, 1 << 20), 2.0 ** rng.uniform(-40, 6, 1 << 16), [0, -0.0, end]])
    x = x.astype(np.float32)
    x = x[x <= end]
    got = evaluate(exp_minus(less), x, ONE)
    error = np.abs(got * np.exp(x.astype(np.float64) + less * math.log(2)) - 1) * 2**24
    assert (error < 3 + x / 16).all()
    assert (error > 1.5 + x / 32).any()
    assert got.min() >= np.finfo(np.float32).tiny
    assert (got[x == 0] == 2.0**-less).all()


def test_gelu_tanh_is_absolutely_accurate_below_zero() -> None:
    x = -np.abs(sweep())
    with np.errstate(all="ignore"):
        want = EXACT["gelu_tanh"][1](x.astype(np.float64))
    assert np.nanmax(np.abs(evaluate(PROGRAMS["gelu_tanh"], x, ONE) - want)) <= 2.0**-24


LIMITS = {
    "hardswish": (0.0, math.inf), "sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "silu": (0.0, math.inf),
    "gelu": (0.0, math.inf), "gelu_tanh": (0.0, math.inf),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIMITS)
def test_limits_and_nans(kind: str) -> None:
    low, high = LIMITS[kind]
    big = np.array([-np.inf, -3.4e38, -1e30, -1e3, 1e3, 1e30, 3.4e38, np.inf, np.nan, 0.0, -0.0], np.float32)
    got = evaluate(PROGRAMS[kind], big, ONE)
    assert (got[:4] == low).all()
    if math.isinf(high):
        assert (got[4:8] == big[4:8]).all()  # the identity, not a rounding off it
    else:
        assert (got[4:8] == high).all()
    assert np.isnan(got[8])
    assert (got[9:] == (0.5 if kind == "sigmoid" else 0.0)).all()


@pytest.mark.parametrize("kind", ["sigmoid", "tanh"])
def test_monotone_and_bounded(kind: str) -> None:
    x = np.sort(sweep(1 << 18))
    y = evaluate(PROGRAMS[kind], x, ONE)
    low, high = LIMITS[kind]
    assert y.min() == low
    assert y.max() == high
    fall = (np.maximum.accumulate(y) - y) / np.spacing(np.abs(y))
    assert fall.max() <= 3


def test_tanh_is_odd_and_keeps_denormals() -> None:
    x = np.abs(sweep(1 << 16))
    np.testing.assert_array_equal(evaluate(PROGRAMS["tanh"], -x, ONE), -evaluate(PROGRAMS["tanh"], x, ONE))
    tiny = np.array([1, 2, 3, 0x7FFFFF, 0x800000, 0x1000001], np.uint32).view(np.float32)
    np.testing.assert_array_equal(evaluate(PROGRAMS["tanh"], tiny, ONE), tiny)


# --- the same bits everywhere -------------------------------------------------------------------------------

SPECIAL = np.array(
    [0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 1.1754944e-38, -1e-38, 3.4028235e38, -3.4028235e38, 1,
     -1, 3, -3, 88, -88, 88.72284, -88.37627, -88.37626, -89, 40, 9.01, 13.25, -13.25, -13.3, 20, 0.34657359,
     -0.34657359],
    np.float32,
)  # fmt: skip


def values(shape: Shape, lanes: int, seed: int) -> np.ndarray:
    """Specials, then anything."""
    n = shape.rows * shape.columns(lanes)
    rng = np.random.default_rng(seed)
    rest = [
        (rng.standard_normal(n) * 5).astype(np.float32), rng.integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32)
    ]  # fmt: skip
    x = np.concatenate([SPECIAL, np.stack(rest, 1).ravel()])
    return x[(seed * 7 + np.arange(n)) % len(x)].reshape(shape.rows, -1)


@pytest.mark.parametrize(("tier", "hardware"), PLACES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_on_every_tier(name: str, tier: str, hardware: bool) -> None:
    lanes = TIER_CODE[tier].lanes
    for out in ("f32", "bf16"):
        shape = Shape(2, 3, 5)
        e = fold(n=shape.columns(lanes), post_ops=(FUNCTIONS[name],), out=out, acc="f32")
        for seed in range(40 if hardware else 2):
            acc = values(shape, lanes, seed)
            assert_same(run(tier, e, shape, acc, hardware=hardware), reference_epilogue(acc, e), (name, tier, out))


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_on_hardware_over_all_of_f32(name: str, tier: str) -> None:
    lanes = TIER_CODE[tier].lanes
    shape = Shape(3, 3, lanes)
    x = sweep(1 << 15)
    x = x[: len(x) // (9 * lanes) * 9 * lanes].reshape(-1, 3, 3 * lanes)
    e = fold(n=3 * lanes, post_ops=(FUNCTIONS[name],), out="f32", acc="f32")
    got = np.stack([run(tier, e, shape, part, hardware=True) for part in x])
    assert_same(got.reshape(-1), reference_epilogue(x, e).reshape(-1), (name, tier))


def vector(n: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * 2).astype(np.float32)


#: A chain made for n channels, and the types of its tensors.
CHAINS: dict[str, tuple[Callable[[int], tuple[v.PostOp, ...]], tuple[str, ...]]] = {
    "relu-sigmoid": (lambda n: (v.ReLU(), v.Sigmoid()), ()),
    "silu-linear": (lambda n: (v.SiLU(0.5), v.Linear(-2, 1)), ()),
    "linear-gelu-clip": (lambda n: (v.Linear(0.5, 0.1), v.GELU(), v.Clip(-0.1, 3)), ()),
    "sum-hardswish-sum": (lambda n: (v.Sum(0.1, 3, dtype="u8"), v.HardSwish(), v.Sum(0.2, dtype="s32")), ("u8", "s32")),
    "tanh-mul-f32": (lambda n: (v.Tanh(), v.Binary("mul", dtype="f32")), ("f32",)),
    "mul-u8-gelu-tanh": (lambda n: (v.Binary("mul", None, 0.02, 7, "u8"), v.GELU("tanh")), ("u8",)),
    "add-s8": (lambda n: (v.Binary("add", None, 0.02, -7, "s8"),), ("s8",)),
    "sub-bf16-relu": (lambda n: (v.Binary("sub", None, 0.5, dtype="bf16"), v.ReLU()), ("bf16",)),
    "mul-bf16": (lambda n: (v.Binary("mul", dtype="bf16"),), ("bf16",)),
    "max-s32": (lambda n: (v.Binary("max", None, 0.01, dtype="s32"),), ("s32",)),
    "min-f32": (lambda n: (v.Binary("min", dtype="f32"),), ("f32",)),
    "channels": (
        lambda n: (
            v.Binary("mul", vector(n)), v.Binary("add", vector(n, 1)), v.LeakyReLU(0.1),
            v.Binary("max", -abs(vector(n, 2))),
        ),
        (),
    ),
    "channels-and-tensors": (
        lambda n: (
            v.Binary("min", vector(n)), v.Binary("mul", dtype="s8"), v.SiLU(), v.Binary("sub", vector(n, 3)),
            v.Sum(0.5, dtype="f32"),
        ),
        ("s8", "f32"),
    ),
}  # fmt: skip


def tensor(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if dtype in ("f32", "bf16"):
        x = rng.standard_normal(shape).astype(np.float32)
        return x if dtype == "f32" else round_to_bf16(x)
    low, high, kind = {"u8": (0, 256, np.uint8), "s8": (-128, 128, np.int8), "s32": (-300, 300, np.int32)}[dtype]
    return rng.integers(low, high, shape).astype(kind)


@pytest.mark.parametrize(("tier", "hardware"), PLACES)
@pytest.mark.parametrize("chain", CHAINS)
def test_chains(chain: str, tier: str, hardware: bool) -> None:
    """Mixed with linear ones, in any order, to every output type; all tails on hardware."""
    make, types = CHAINS[chain]
    lanes = TIER_CODE[tier].lanes
    rng = np.random.default_rng(1)
    for valid in range(1, lanes + 1) if hardware else (3, lanes):
        shape = Shape(2, 2, valid)
        n = shape.columns(lanes)
        for out in ("u8", "s8", "f32", "bf16"):
            scales = {"y_scale": 0.03, "y_zero_point": 11} if out in ("u8", "s8") else {}
            e = fold(n=n, x_scale=0.01, w_scale=rng.random(n) + 0.1, post_ops=make(n), out=out, **scales)
            acc = rng.integers(-2000, 2000, (2, n), dtype=np.int32)
            tensors = tuple(tensor(t, (2, n), rng) for t in types)
            got = run(tier, e, shape, acc, tensors, hardware=hardware)
            assert_same(got, reference_epilogue(acc, e, tensors), (chain, tier, valid, out))


def _cases() -> list[Case]:
    dense = {"x": (1, 5, 5, 8), "w": (37, 8, 3, 3), "padding": 1}
    depthwise = {"x": (1, 5, 6, 37), "w": (37, 1, 3, 3), "groups": 37, "padding": 1}
    cases = []
    for i, (name, (make, types)) in enumerate(CHAINS.items()):
        if "bf16" in types:  # NumPy's names for the others' tensors are in `cases`
            continue
        for j, shape in enumerate((dense, depthwise)):
            out = ("u8", "s8", "f32")[(i + j) % 3]
            cases.append(
                Case(**shape, out=out, post_ops=lambda make=make: make(37), sums=types, seed=i + 100 * j, note=name)
            )
    cases.append(Case((7, 33), (45, 33), "f32", "f32", post_ops=lambda: (v.GELU(), v.Binary("mul", vector(45)))))
    return cases


@pytest.mark.parametrize("tier", ["avx512_vnni", "avx512", "avx_vnni", "avx2"])
@pytest.mark.parametrize("case", _cases(), ids=str)
def test_convolutions_on_the_emulator(case: Case, tier: str) -> None:
    """Whole kernels: registers fit, vectors follow the channels through blocks and interleaving."""
    check_emulated(case, tier)


@pytest.mark.parametrize("tier", [t for t in HERE if t != "avx512_bf16"])
@pytest.mark.parametrize("case", _cases(), ids=str)
def test_convolutions_on_hardware(case: Case, tier: str) -> None:
    op = case.operator("reference")
    x = case.source()
    tensors = case.tensors(out_shape(op, case))
    want = expected(case, op, x, tensors)
    assert_same(case.operator(tier)(x, tensors=tensors), want, (case, tier))


@pytest.mark.parametrize("isa", [None, "reference"])
def test_groups_and_mixed_chains_find_their_channels(isa: str | None) -> None:
    """A vector is cut as the columns are: by group, and by launch where chains are mixed."""
    n = 192
    rng = np.random.default_rng(3)
    w = rng.integers(-60, 61, (n, 4, 1, 1)).astype(np.int8)
    w[64:128] = rng.integers(-128, 128, (64, 4, 1, 1))
    x = rng.integers(0, 256, (1, 2, 2, 8)).astype(np.uint8)
    scale = np.arange(1, n + 1, dtype=np.float32)
    plain = v.conv_int8(x, w, groups=2, out_dtype=np.float32, isa=isa)
    for tier in (isa,) if isa else HERE[1:]:
        got = v.conv_int8(x, w, groups=2, out_dtype=np.float32, post_ops=v.Binary("mul", scale), isa=tier)
        np.testing.assert_array_equal(got, plain * scale)
        dense = rng.integers(0, 256, (3, 4)).astype(np.uint8)
        b = np.ascontiguousarray(w.reshape(n, 4).T)
        got = v.gemm_int8(dense, b, out_dtype=np.float32, post_ops=v.Binary("mul", scale), isa=tier)
        np.testing.assert_array_equal(got, v.gemm_int8(dense, b, out_dtype=np.float32, isa="reference") * scale)


# --- structure ----------------------------------------------------------------------------------------------


def test_every_kind_has_an_emitter() -> None:
    assert set(STEP_SCALARS) <= set(STEP_EMIT)
    assert LIMITS.keys() <= PROGRAMS.keys() & STEP_SCALARS.keys()
    assert TENSOR_KINDS.isdisjoint(CHANNEL_KINDS)


@pytest.mark.parametrize("evex", [True, False])
@pytest.mark.parametrize("kind", LIMITS)
def test_lowering(kind: str, evex: bool) -> None:
    """Few registers, one memory operand at most and in the last place, no estimates."""
    code = lowered(kind, evex)
    assert code.registers <= 5
    for ins in code.instructions:
        assert "rcp" not in ins.mnemonic
        assert "rsqrt" not in ins.mnemonic
        assert all(isinstance(p, int) and 0 <= p <= code.registers for p in ins.operands[:-1])


def random_program(rng: random.Random) -> Program:
    """Any operations on values, constants and scalars in any place; the last value is the previous one's."""
    p = Program()
    for k in range(rng.randint(3, 14)):
        name = rng.choice([n for n in MEANINGS if n not in ("exponent", "eighths", "plus", "pick", "sqrt")])
        sources: list[Any] = [Var(k)]
        for _ in range(2 if name in ("fma", "fms", "fnma") else 1):
            other = Var(rng.randint(max(0, k - 4), k))
            sources.append(rng.choice([other, other, const(rng.uniform(-3, 3)), Scalar(0)]))
        rng.shuffle(sources)
        getattr(p, name)(*sources)
    return p


@pytest.mark.parametrize("tier", ["avx512", "avx2"])
def test_lowering_of_random_programs(tier: str) -> None:
    """Registers are reused, operands come in all places and kinds; the result is the reference's."""
    code = TIER_CODE[tier]
    rng = random.Random(tier)
    x = (np.random.default_rng(0).standard_normal(code.lanes) * 2).astype(np.float32)
    scalar = np.array([0.75], np.float32)
    forms: set[str] = set()
    for _ in range(150):
        program = random_program(rng)
        low = lower(program, code.masks)
        forms |= {i.mnemonic for i in low.instructions}
        names = ("src", "dst", "scalar")
        a = Assembler("program", [Arg(n, "ptr") for n in names], tiers.tier(tier).features)
        src, dst, at = map(a.load_argument, names)
        v0, *temps = (a.vec(code.bits) for _ in range(low.registers + 1))

        def memory(place: Bits | Scalar, four_bytes: bool, a: Assembler = a, at: Any = at) -> Mem:
            if isinstance(place, Scalar):
                return Mem(at) if four_bytes else Mem(at).broadcast()
            return a.const(np.uint32(place.bits), align=4) if four_bytes else splat(a, code, place.value)

        a.vmovups(v0, Mem(src))
        emit(a, low, v0, temps, memory)
        a.vmovups(Mem(dst), v0)
        a.ret()
        mem = Memory()
        out = mem.map("out", np.zeros_like(x), writable=True)
        Emulator(a.finalize().encode(), mem, poison=True).call(mem.map("x", x), out, mem.map("scalar", scalar))
        assert_same(mem.array("out").copy(), evaluate(program, x, scalar), (tier, program))
    assert {f"v{m}{form}ps" for m in ("fmadd", "fmsub", "fnmadd") for form in ("132", "213", "231")} <= forms


def test_registers() -> None:
    def need(*kinds: str) -> int:
        spec = EpilogueSpec("s32", tuple(map(StepSpec, kinds)), False, "f32", False, False, True, False)
        return epilogue_registers(spec, TIER_CODE["avx2"])

    assert need() == need("max", "linear") == EPILOGUE_TEMPS
    assert need("max", "gelu") == need("gelu", "sigmoid") == lowered("gelu", False).registers > EPILOGUE_TEMPS


def test_scale_folding() -> None:
    """Binary keeps the output scale folded, a function takes it out."""
    ops = {
        "fold": (v.Binary("mul", vector(4)), v.Binary("add", vector(4)), v.Binary("max", dtype="f32")),
        "after": (v.Binary("mul", vector(4)), v.Sigmoid()),
    }
    e = fold(n=4, post_ops=ops["fold"], out="u8", y_scale=0.25)
    assert not e.spec.post_scale
    assert e.m is not None
    assert (e.m == 4).all()
    np.testing.assert_array_equal(e.vectors[0], vector(4))
    np.testing.assert_array_equal(e.vectors[1], vector(4) * 4)
    assert e.scalars[0] == 4
    e = fold(n=4, post_ops=ops["after"], out="u8", y_scale=0.25)
    assert e.spec.post_scale
    assert e.scalars.tolist() == [4.0]
    assert not e.spec.clamp_hi  # a sigmoid is never above 1


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: v.GELU("erf"), v.QuantizationError, "approximate"),  # type: ignore[arg-type]
        (lambda: v.SiLU(0.0), v.QuantizationError, "above 0"),
        (lambda: v.SiLU(-1.0), v.QuantizationError, "above 0"),
        (lambda: v.SiLU(math.nan), v.QuantizationError, "finite"),
        (lambda: v.SiLU("1"), v.DTypeError, "must be a number"),  # type: ignore[arg-type]
        (lambda: v.Binary("div", vector(3)), v.QuantizationError, "Binary op"),  # type: ignore[arg-type]
        (lambda: v.Binary("mul", vector(3).astype(np.int8)), v.DTypeError, "float32"),
        (lambda: v.Binary("mul", np.array([1, np.inf], np.float32)), v.QuantizationError, "finite"),
        (lambda: v.Binary("mul", [1.0]), v.DTypeError, "NumPy array"),  # type: ignore[arg-type]
        (lambda: v.Binary("mul", np.zeros((2, 2), np.float64)), v.DTypeError, "Binary tensor"),
        (lambda: v.Binary("mul", np.zeros((2, 2), np.uint8), 1.0, 300), v.QuantizationError, "zero_point 300"),
        (lambda: v.Binary("mul", vector(3), math.inf), v.QuantizationError, "Binary scale"),
        (lambda: v.Binary("mul", vector(3), dtype="f32"), v.DTypeError, "its own tensor"),
        (lambda: fold(n=4, post_ops=(v.Binary("mul", vector(3)),), out="f32"), v.ShapeError, "4 output channels"),
        (lambda: fold(n=1, post_ops=(v.Binary("add", vector(1) + 3e38),), out="u8", y_scale=1e-3), v.QuantizationError,
         "not finite"),
    ],
)  # fmt: skip
def test_refusals(make: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_a_vector_is_copied() -> None:
    x = vector(3)
    op = v.Binary("mul", x)
    x[:] = 0
    assert op.tensor is not None
    np.testing.assert_array_equal(op.tensor, vector(3))


def test_binary_tensors_of_an_operator() -> None:
    """Its own, one given at the call, or the old `out`."""
    a, b = np.full((2, 3), 2, np.uint8), np.ones((3, 4), np.int8)
    t = np.arange(8, dtype=np.float32).reshape(2, 4)
    make: dict[str, Any] = {"out_dtype": np.float32}
    np.testing.assert_array_equal(v.gemm_int8(a, b, post_ops=v.Binary("mul", t), **make), 6 * t)
    handle = v.GemmInt8(b, post_ops=(v.Binary("mul"), v.Binary("add", dtype=np.uint8)), **make)
    u = np.full((2, 4), 5, np.uint8)
    np.testing.assert_array_equal(handle(a, tensors=(t, u)), 6 * t + 5)
    out = t.copy()
    v.GemmInt8(b, post_ops=v.Binary("max"), **make)(a, out)
    np.testing.assert_array_equal(out, np.maximum(6, t))
    with pytest.raises(v.ShapeError, match="a Binary tensor has shape"):
        v.gemm_int8(a, b, post_ops=v.Binary("mul", t[:1]), **make)
    with pytest.raises(v.ShapeError, match="reads `out`"):
        v.gemm_int8(a, b, post_ops=v.Binary("mul"), **make)
