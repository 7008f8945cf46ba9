"""The fold and the reference epilogue, against exact arithmetic and against what the instructions do."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.exact import exact_fma, round_to_f32
from vnnigen.errors import DTypeError, QuantizationError
from vnnigen.kernels import steps as steps_module
from vnnigen.kernels.epilogue import Epilogue, EpilogueSpec, StepSpec, fold, reference_epilogue
from vnnigen.kernels.post_ops import Clip, LeakyReLU, Linear, PostOp, ReLU, Sum
from vnnigen.kernels.steps import Step

RANGES = {"u8": (0, 255), "s8": (-128, 127)}


def one(acc: int, epilogue: Epilogue, tensors: tuple = ()) -> float:
    """Apply an epilogue of one channel to one accumulator."""
    return reference_epilogue(np.array([[acc]], np.int32), epilogue, tensors)[0, 0].item()


# --- structure --------------------------------------------------------------------------------------------


def test_plain_requantization() -> None:
    e = fold(n=2, x_scale=0.5, w_scale=[1.0, 2.0], out="u8", y_scale=0.25, y_zero_point=3)
    assert e.m is not None
    assert e.m.tolist() == [2.0, 4.0]
    assert e.m.dtype == np.float32
    assert e.b is None
    assert e.zero_point == 3
    assert not e.spec.has_b
    assert e.spec.add_zp
    assert e.spec.clamp_hi  # nothing is known of the accumulator
    assert e.scalars.tolist() == [252.0]


def test_s32_is_the_accumulator() -> None:
    e = fold(n=3, x_scale=0.1, w_scale=0.3, out="s32")
    assert e.spec == EpilogueSpec("s32", (), False, "s32", False, False, False, False)
    assert e.m is e.b is None
    acc = np.array([[-(2**31), 0, 2**31 - 1]], np.int32)
    got = reference_epilogue(acc, e)
    assert got.dtype == np.int32
    assert (got == acc).all()


def test_f32_output_is_dequantized() -> None:
    e = fold(n=2, x_scale=0.1, w_scale=[0.5, 0.25], bias_f32=np.array([1.0, 2.0], np.float32), out="f32")
    got = reference_epilogue(np.array([[7, 9]], np.int32), e)
    m = [round_to_f32(0.1 * 0.5), round_to_f32(0.1 * 0.25)]
    assert got.dtype == np.float32
    assert got.tolist() == [[exact_fma(7, m[0], 1.0), exact_fma(9, m[1], 2.0)]]
    assert not e.spec.clamp_hi


def test_f32_accumulators_skip_a_multiplier_of_one() -> None:
    bias = np.array([0.5], np.float32)
    e = fold(n=1, bias_f32=bias, out="f32", acc="f32")
    assert (e.spec.has_m, e.spec.has_b) == (False, True)
    assert reference_epilogue(np.array([[1.25]], np.float32), e).tolist() == [[1.75]]
    assert fold(n=1, x_scale=2.0, out="f32", acc="f32").spec.has_m
    bare = fold(n=1, out="f32", acc="f32")
    assert np.signbit(reference_epilogue(np.array([[-0.0]], np.float32), bare)).all()


def test_specs_hash_by_structure_alone() -> None:
    a = fold(n=1, post_ops=[Sum(2.0, 1, np.zeros(1, np.uint8)), ReLU()], out="s8", y_scale=0.5)
    b = fold(n=9, post_ops=[Sum(3.0, 7, np.ones(5, np.uint8)), ReLU()], out="s8", y_scale=0.7)
    c = fold(n=1, post_ops=[Sum(2.0, 0, np.zeros(1, np.uint8)), ReLU()], out="s8", y_scale=0.5)
    assert a.spec == b.spec
    assert hash(a.spec) == hash(b.spec)
    assert a.spec != c.spec
    assert a.spec.steps[0] == StepSpec("sum", "u8", True)
    assert c.spec.steps[0] == StepSpec("sum", "u8", False)


def test_scalars_have_slots() -> None:
    ops = [
        Sum(2.0, 5, np.zeros(1, np.uint8)),
        Linear(3.0, 4.0),
        LeakyReLU(0.5),
        Sum(tensor=np.zeros(1, np.int32)),
    ]
    e = fold(n=1, post_ops=ops, out="u8", y_scale=0.5, y_zero_point=10)
    assert [(step.kind, first) for step, first in e.spec.slots()] == [
        ("sum", 0),
        ("linear", 2),
        ("leaky", 4),
        ("sum", 5),
    ]
    assert e.scalars.tolist() == [4.0, 5.0, 3.0, 8.0, 0.5, 2.0, 245.0]
    assert (e.spec.clamp_slot, e.spec.n_scalars) == (6, 7)
    assert len(e.tensors) == 2
    assert not e.scalars.flags.writeable


@pytest.mark.parametrize(
    ("ops", "out", "y_scale", "zp", "kinds"),
    [
        ([ReLU()], "u8", 0.5, 0, []),
        ([ReLU()], "u8", 0.5, 1, ["max"]),
        ([ReLU()], "s8", 0.5, -128, []),
        ([ReLU()], "s8", 0.5, 0, ["max"]),
        ([Clip(0, 6)], "u8", 6 / 255, 0, []),
        ([Clip(0, 6)], "u8", 7 / 255, 0, ["max", "min"]),
        ([Clip(-1e30, 1e30)], "s8", 1e-20, 0, []),
        ([Clip(-math.inf, math.inf)], "u8", 1.0, 9, []),
        ([ReLU(), Clip(0, 300)], "u8", 1.0, 0, []),
        ([Clip(1, 300)], "u8", 1.0, 0, ["max"]),
        ([Clip(0, 254)], "u8", 1.0, 0, ["max", "min"]),
        ([Clip(-5, 250)], "u8", 1.0, 5, []),
        ([Clip(-4, 249)], "u8", 1.0, 5, ["max", "min"]),
        ([ReLU(), Linear(2.0, 0.0)], "u8", 1.0, 0, ["max", "linear"]),
        ([ReLU(), Sum(), ReLU()], "u8", 1.0, 0, ["max", "sum"]),
        ([ReLU()], "f32", None, 0, ["max"]),
    ],
)
def test_clamps_that_the_output_makes_redundant(
    ops: list[PostOp], out: str, y_scale: float | None, zp: int, kinds: list[str]
) -> None:
    e = fold(n=1, post_ops=ops, out=out, y_scale=y_scale, y_zero_point=zp)
    assert [step.kind for step in e.spec.steps] == kinds


@pytest.mark.parametrize(
    ("m", "bound", "ops", "clamps"),
    [
        (1.0, 1e6, [], False),
        (1.0, 2.0**31, [], True),
        (2000.0, 1e6, [], False),
        (3000.0, 1e6, [], True),
        (1.0, 1e6, [Linear(1e4, 0.0)], True),
        (1.0, 1e6, [Linear(-1e4, 0.0)], True),
        (1.0, 1e6, [Linear(0.5, 2e9)], False),
        (1.0, 1e6, [Linear(1.0, 3e9)], True),
        (1.0, 1e6, [LeakyReLU(-3000.0)], True),
        (1.0, 1e6, [LeakyReLU(0.1)], False),
        (1.0, 1e6, [Sum(1e6, 0, np.zeros(1, np.uint8))], False),
        (1.0, 1e6, [Sum(1e7, 0, np.zeros(1, np.uint8))], True),
        (1.0, 1e6, [Sum(1.0, 0, np.zeros(1, np.int32))], True),
        (1.0, 1e6, [Sum(0.5, 0, np.zeros(1, np.int32))], False),
        (1.0, 1e6, [Sum(1.0, 0, np.zeros(1, np.float32))], True),
        (1.0, 1e6, [Sum(1.0, 0, np.zeros(1, np.float32)), Clip(0, 200)], False),
        (3000.0, 1e6, [Clip(0, 200)], False),
        (3000.0, 1e6, [Clip(0, 300)], True),  # the clip is dropped, and the clamp does its work
        (1.0, None, [], True),
        (0.5, None, [], False),  # s32 itself bounds the accumulator
    ],
)
def test_upper_clamp_only_where_needed(m: float, bound: float | None, ops: list[PostOp], clamps: bool) -> None:
    acc_bound = None if bound is None else np.array([bound])
    e = fold(n=1, x_scale=m, post_ops=ops, out="u8", y_scale=1.0, acc_bound=acc_bound)
    assert e.spec.clamp_hi is clamps
    assert (e.spec.n_scalars == e.scalars.size) is True


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("acc", "expected"),
    [
        (1, 0),
        (3, 2),
        (5, 2),
        (7, 4),
        (-1, 0),
        (509, 254),
        (510, 255),
        (511, 255),
        (10**9, 255),
        (-(10**9), 0),
    ],
)
def test_ties_go_to_even_and_ends_saturate(acc: int, expected: int) -> None:
    assert one(acc, fold(n=1, x_scale=0.5, out="u8", y_scale=1.0)) == expected


@pytest.mark.parametrize(
    ("acc", "zp", "expected"),
    [
        (1, 5, 5),
        (3, 5, 7),
        (-3, 5, 3),
        (-(10**9), 5, -128),
        (10**9, -100, 127),
        (-(10**9), -100, -128),
        (55, 100, 127),
    ],
)
def test_the_zero_point_is_added_after_rounding(acc: int, zp: int, expected: int) -> None:
    assert one(acc, fold(n=1, x_scale=0.5, out="s8", y_scale=1.0, y_zero_point=zp)) == expected


def test_any_order_of_sum_and_scale() -> None:
    """oneDNN's acc(beta).eltwise(gamma) and eltwise(gamma).acc(beta)."""
    t = np.array([[5]], np.uint8)
    beta, gamma = Sum(2.0, tensor=t), Linear(3.0, 0.0)
    for scale in (1.0, 0.5):
        assert one(4, fold(n=1, post_ops=(beta, gamma), out="u8", y_scale=scale)) == (4 + 10) * 3 / scale
        assert one(4, fold(n=1, post_ops=(gamma, beta), out="u8", y_scale=scale)) == (4 * 3 + 10) / scale
    assert one(-4, fold(n=1, post_ops=(ReLU(), beta), out="u8", y_scale=1.0)) == 10
    assert one(-14, fold(n=1, post_ops=(beta, ReLU(), Linear(1.0, 7.0)), out="u8", y_scale=1.0)) == 7


def test_sum_of_the_output() -> None:
    e = fold(n=1, post_ops=(Sum(0.5, 100),), out="s8", y_scale=0.25, y_zero_point=-10)
    assert e.spec.steps == (StepSpec("sum", "s8", True),)
    assert one(1, e, (np.array([[104]], np.int8),)) == (1 + 0.5 * 4) / 0.25 - 10


def test_sum_of_a_tensor_given_at_the_call() -> None:
    e = fold(n=1, post_ops=(Sum(0.5, dtype=np.float32),), out="u8", y_scale=1.0)
    assert e.spec.steps == (StepSpec("sum", "f32"),)
    assert e.tensors == (None,)
    assert one(1, e, (np.array([[6.0]], np.float32),)) == 4


@pytest.mark.parametrize("out", ["u8", "s8"])
def test_nan_and_infinities_of_a_residual(out: str) -> None:
    t = np.array([[math.nan, math.inf, -math.inf]], np.float32)
    zp = 3
    lo, hi = RANGES[out]
    acc = np.zeros((1, 3), np.int32)
    e = fold(n=3, post_ops=(Sum(tensor=t),), out=out, y_scale=1.0, y_zero_point=zp)
    assert reference_epilogue(acc, e).tolist() == [[lo, hi, lo]]
    e = fold(n=3, post_ops=(Sum(tensor=t), Clip(1, 20)), out=out, y_scale=1.0, y_zero_point=zp)
    assert reference_epilogue(acc, e).tolist() == [[1 + zp, 20 + zp, 1 + zp]]


def test_constants_are_rounded_once() -> None:
    """In f32 throughout, 0.1 * 0.1 / 0.1 is another number than the float64 product rounded at the end."""
    e = fold(n=1, x_scale=0.1, w_scale=0.1, out="u8", y_scale=0.1)
    assert e.m is not None
    assert float(e.m[0]) == round_to_f32(0.1 * 0.1 * (1 / 0.1))
    tenth = np.float32(0.1)
    assert e.m[0] != tenth * tenth * (np.float32(1) / tenth)


class Opaque(PostOp):
    """A post-op through which the output scale cannot be folded."""

    piecewise_linear = False

    def steps(self, s: float) -> tuple[Step, ...]:
        assert s == 1.0
        return (Step("cube", ()),)


def test_a_step_kind_added_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps_module.STEP_REFERENCE, "cube", lambda v, c, t: v * v * v)
    monkeypatch.setitem(steps_module.STEP_SCALARS, "cube", 0)
    ops = (Opaque(), Linear(1.0, 4.0), ReLU())
    e = fold(n=1, post_ops=ops, out="u8", y_scale=0.25, acc_bound=np.array([10.0]))
    assert e.spec.post_scale
    assert e.spec.clamp_hi  # no range is known of the new kind
    assert e.scalars.tolist() == [1.0, 4.0, 0.0, 4.0, 255.0]
    assert one(2, e) == (8 + 4) * 4
    assert one(-3, e) == 0
    assert not fold(n=1, post_ops=ops, out="f32").spec.post_scale


# --- against exact arithmetic -----------------------------------------------------------------------------


def exact_steps(v: float, ops: list[PostOp], s: float, t: float) -> float:
    """Apply post-ops to one f32 value from their definitions, with exact rationals."""
    for op in ops:
        if isinstance(op, Sum):
            v = exact_fma(t - op.zero_point, round_to_f32(op.scale * s), v)
        elif isinstance(op, Linear):
            v = exact_fma(v, round_to_f32(op.alpha), round_to_f32(op.beta * s))
        elif isinstance(op, ReLU):
            v = max(v, 0.0)
        elif isinstance(op, Clip):
            v = min(max(v, round_to_f32(op.lo * s)), round_to_f32(op.hi * s))
        elif isinstance(op, LeakyReLU):
            v = round_to_f32(Fraction(v) * Fraction(round_to_f32(op.alpha))) if v < 0 else v
    return v


reals = st.floats(-100, 100)
scales = st.floats(1e-3, 1e3)
post_op = st.one_of(
    st.builds(Sum, reals, st.integers(0, 127)),
    st.builds(Linear, reals, reals),
    st.just(ReLU()),
    st.tuples(reals, reals).map(lambda ends: Clip(min(ends), max(ends))),
    st.builds(LeakyReLU, st.floats(-2, 2)),
)
accumulators = st.one_of(st.integers(-300, 300), st.integers(-(2**31), 2**31 - 1))


@given(
    accumulators, scales, scales, st.none() | reals, st.lists(post_op, max_size=4),
    st.sampled_from(["u8", "s8"]), scales, st.integers(0, 127), st.integers(0, 127),
)  # fmt: skip
@settings(max_examples=1000, deadline=None)
def test_reference_is_exact(
    acc: int,
    xs: float,
    ws: float,
    bias: float | None,
    ops: list[PostOp],
    out: str,
    ys: float,
    zp: int,
    t: int,
) -> None:
    b = None if bias is None else np.array([bias], np.float64)
    e = fold(n=1, x_scale=xs, w_scale=ws, bias_f32=b, post_ops=ops, out=out, y_scale=ys, y_zero_point=zp)
    s = 1.0 / ys
    v = exact_fma(
        round_to_f32(Fraction(acc)),
        round_to_f32(xs * ws * s),
        0.0 if bias is None else round_to_f32(bias * s),
    )
    v = exact_steps(v, ops, s, t)
    lo, hi = RANGES[out]
    expected = round(min(max(Fraction(v), Fraction(lo - zp)), Fraction(hi - zp))) + zp
    tensor = np.array([[t]], np.uint8 if out == "u8" else np.int8)
    assert one(acc, e, (tensor,) * len(e.tensors)) == expected


@given(accumulators, scales, st.none() | reals, st.lists(post_op, max_size=4), reals)
@settings(max_examples=400, deadline=None)
def test_f32_output_is_exact(acc: int, xs: float, bias: float | None, ops: list[PostOp], t: float) -> None:
    ops = [Sum(op.scale) if isinstance(op, Sum) else op for op in ops]
    b = None if bias is None else np.array([bias], np.float64)
    tensor = np.array([[t]], np.float32)
    e = fold(n=1, x_scale=xs, bias_f32=b, post_ops=ops, out="f32")
    v = exact_fma(round_to_f32(Fraction(acc)), round_to_f32(xs), 0.0 if bias is None else round_to_f32(bias))
    expected = exact_steps(v, ops, 1.0, float(tensor[0, 0]))
    assert one(acc, e, (tensor,) * len(e.tensors)) == expected


# --- against what the instructions do ---------------------------------------------------------------------


def narrow_as_machine(v: np.ndarray, e: Epilogue) -> np.ndarray:
    """The kernels' way: VMINPS only with clamp_hi, VCVTPS2DQ, saturating packs around the zero point."""
    lo, hi = RANGES[e.spec.out]
    if e.spec.clamp_hi:
        bound = e.scalars[e.spec.clamp_slot]
        v = np.where(bound < v, bound, v)  # VMINPS v, bound, v: v where either is NaN
    with np.errstate(invalid="ignore"):
        fits = (v >= -(2.0**31)) & (v < 2.0**31)
        converted = np.where(fits, np.rint(np.where(fits, v, 0)), -(2.0**31)).astype(np.int64)
    words = np.clip(converted, -(2**15), 2**15 - 1)
    return np.clip(np.clip(words + e.zero_point, -(2**15), 2**15 - 1), lo, hi)


residuals = {
    "u8": np.array([0, 1, 128, 255], np.uint8),
    "s8": np.array([-128, -1, 0, 127], np.int8),
    "s32": np.array([-(2**31), -1, 2**20, 2**31 - 1], np.int32),
    "f32": np.array([math.nan, math.inf, -math.inf, 3.3e38], np.float32),
}


@given(
    st.sampled_from([1e-3, 0.7, 1.0, 30.0, 1e6, 1e20]), st.sampled_from([1.0, 1e3, 1e6, 2.0**31 - 1]),
    st.sampled_from(sorted(residuals)), st.sampled_from([1e-3, 1.0, -1.0, 1e7, 1e30]),
    st.lists(
        st.sampled_from([
            ReLU(), Clip(0, 6), Clip(-1e6, 1e12), LeakyReLU(-5.0), LeakyReLU(0.1), Linear(-100.0, 7.0),
            Linear(0.0, 3e9), Linear(1.0, 2147480000.0), Linear(1e30, 0.0), "sum",
        ]),
        max_size=4,
    ),
    st.sampled_from(["u8", "s8"]), st.sampled_from([-128, -3, 0, 3, 127, 255]), st.booleans(),
)  # fmt: skip
@settings(max_examples=1500, deadline=None)
def test_the_upper_clamp_is_never_missed(
    m: float, bound: float, dtype: str, factor: float, ops: list, out: str, zp: int, biased: bool
) -> None:
    low, high = RANGES[out]
    zp = min(max(zp, low), high)
    ops = [Sum(factor, tensor=residuals[dtype]) if op == "sum" else op for op in ops]
    acc = np.array([-bound, bound, 0, bound // 3]).astype(np.int32)
    bias = np.full(4, 1e9) if biased else None
    e = fold(
        n=4, x_scale=m, bias_f32=bias, post_ops=ops, out=out, y_scale=1.0, y_zero_point=zp,
        acc_bound=np.full(4, bound),
    )  # fmt: skip
    as_f32 = replace(e, spec=replace(e.spec, out="f32"))
    v = reference_epilogue(acc, as_f32)
    assert narrow_as_machine(v, e).tolist() == reference_epilogue(acc, e).tolist()


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, [1.0, 0.0]])
@pytest.mark.parametrize("name", ["x_scale", "w_scale", "y_scale"])
def test_bad_scales_are_named(name: str, bad: object) -> None:
    with pytest.raises(QuantizationError, match=name):
        fold(**{"n": 2, "out": "u8", "y_scale": 1.0, name: bad})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"out": "u8"}, "u8 output needs y_scale"),
        ({"out": "s8"}, "s8 output needs y_scale"),
        ({"out": "f32", "y_scale": 1.0}, "not for f32"),
        ({"out": "f32", "y_zero_point": 1}, "not for f32"),
        ({"out": "s32", "y_scale": 1.0}, "not for s32"),
        ({"out": "s32", "post_ops": [ReLU()]}, "no post_ops"),
        ({"out": "s32", "bias_f32": np.ones(2, np.float32)}, "s32 bias"),
        ({"out": "u8", "y_scale": 1.0, "y_zero_point": 256}, "y_zero_point"),
        ({"out": "s8", "y_scale": 1.0, "y_zero_point": 128}, "y_zero_point"),
        ({"out": "u8", "y_scale": 1.0, "w_scale": [1.0, 2.0, 3.0]}, "w_scale"),
        ({"out": "u8", "y_scale": [1.0, 2.0]}, "y_scale"),
        ({"out": "u8", "y_scale": 1e-30, "x_scale": 1e30}, "not finite in float32"),
        ({"out": "u8", "y_scale": 5e-324}, "not finite in float32"),
        ({"out": "u8", "y_scale": 1e30, "x_scale": 1e-30}, "underflows to zero"),
        ({"out": "f32", "bias_f32": np.array([1.0, math.nan])}, "bias"),
        ({"out": "u8", "y_scale": 1e-30, "bias_f32": np.array([1.0, 1e30])}, "bias"),
        ({"out": "f32", "post_ops": [Linear(1e39, 0.0)]}, "constant of linear"),
        ({"out": "u8", "y_scale": 1e-20, "post_ops": [Sum(1e20)]}, "constant of sum"),
        ({"out": "u8", "y_scale": 1.0, "post_ops": [Sum(1.0, -1)]}, "zero_point -1"),
        ({"out": "f32", "post_ops": [Sum(1.0, 1)]}, "zero_point 1"),
    ],
)
def test_bad_combinations(arguments: dict, match: str) -> None:
    with pytest.raises(QuantizationError, match=match):
        fold(n=2, **arguments)


@pytest.mark.parametrize("bad", ["relu", ReLU, None])
def test_post_ops_must_be_post_ops(bad: object) -> None:
    with pytest.raises(DTypeError, match="post_ops"):
        fold(n=1, out="f32", post_ops=[bad])
