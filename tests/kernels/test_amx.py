"""int8 on AMX tiles: the plan of tiles, and the kernels on the emulator, bit for bit; the fall-back where tiles cannot.

The last part holds all int8 tiers against each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import vnnigen as v
from tests.kernels.cases import POST_OPS, TIERS, Case, assert_same_bits, expected, out_shape, random_numbers, seeded
from tests.kernels.emulation import check_emulated, emulate, fine_grid, lower
from vnnigen.errors import ShapeError
from vnnigen.isa import tiers
from vnnigen.kernels.amx_key import AmxKey
from vnnigen.kernels.amx_tiling import ROW_BYTES, ROWS, SHORTEST_STEP, TILE_REGISTERS, cut_run, plan_tiles
from vnnigen.kernels.emit_copy import SLACK
from vnnigen.kernels.geometry import Geometry, conv_geometry, gemm_geometry
from vnnigen.kernels.problem import ConvProblem, GemmProblem
from vnnigen.runtime.compiled import generate
from vnnigen.runtime.dispatch import choose

AMX_TIER = "amx_int8"
EMULATED = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def check_tiles(case: Case, *, in_place: bool = False) -> AmxKey:
    """`check_emulated` on a kernel that must be one of tiles."""
    (key,) = check_emulated(case, AMX_TIER, in_place=in_place).keys
    assert isinstance(key, AmxKey)
    return key


# --- the plan of tiles ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=400)
@given(run=st.integers(1, 5000), exact=st.booleans())
def test_a_run_is_cut_into_equal_steps(run: int, exact: bool) -> None:
    steps = cut_run(run, exact=exact)
    fewest = -(-run // ROW_BYTES)
    if steps is None:
        assert exact
        counts = range(fewest, run // SHORTEST_STEP + 1)
        assert run % 4 or not any(run % (4 * n) == 0 for n in counts)
        return
    assert steps.count * steps.size == run + steps.pad
    assert steps.size % 4 == 0
    assert 4 <= steps.size <= ROW_BYTES
    # The last row of scratch is followed by SLACK bytes that may be read.
    assert 0 <= steps.pad < SLACK
    if exact:
        assert steps.pad == 0
        assert steps.size >= min(SHORTEST_STEP, run)
    else:
        assert fewest <= steps.count <= fewest + fewest // 4


def test_cuts_of_common_runs() -> None:
    def cut(run: int, exact: bool = False) -> tuple[int, int, int] | None:
        steps = cut_run(run, exact=exact)
        return None if steps is None else (steps.count, steps.size, steps.pad)

    assert cut(64) == (1, 64, 0)
    assert cut(576) == (9, 64, 0)
    assert cut(3 * 7) == (1, 24, 3)
    assert cut(1) == (1, 4, 3)
    assert cut(65) == (2, 36, 7)
    assert cut(96) == (2, 48, 0)
    assert cut(2, exact=True) is None
    assert cut(4, exact=True) == (1, 4, 0)
    assert cut(2 * 67, exact=True) is None
    assert cut(4 * 17, exact=True) is None  # 17 steps of a dword are not worth having
    assert cut(2 * 768, exact=True) == (24, 64, 0)


@pytest.mark.parametrize(("down", "across"), [(d, a) for d in range(1, 5) for a in range(1, 5) if d * a <= 4])
def test_tile_registers_are_used_once_and_operands_have_two(down: int, across: int) -> None:
    plan = plan_tiles(down, across)
    used = [*range(plan.accumulators), *plan.source, *plan.weights]
    assert plan.accumulators == down * across
    assert len(set(used)) == len(used) <= TILE_REGISTERS
    assert max(used) < TILE_REGISTERS
    assert 2 <= len(plan.source) <= 2 * down
    assert 2 <= len(plan.weights) <= 2 * across


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    if draw(st.booleans()):
        sizes = st.integers(1, 200)
        return gemm_geometry(GemmProblem(draw(sizes), draw(sizes), draw(sizes), "u8", "u8"))
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    size = st.integers(4, 70)
    images, ic, oc = draw(st.integers(1, 2)), draw(st.integers(1, 70)), draw(st.integers(1, 100))
    return conv_geometry(ConvProblem(images, draw(size), draw(size), ic, oc, kernel, kernel, stride=(stride, stride)))


def check_config(key: AmxKey) -> None:
    """LDTILECFG's and the products' rules (Intel SDM vol. 2, LDTILECFG and TDPBUSD: what raises #GP and #UD)."""
    config = key.tile_config
    assert len(config) == 64
    assert config[0] == 1  # palette
    assert not any(config[1:16])  # start row, reserved
    assert not any(config[32:48])
    assert not any(config[56:])
    rows = list(config[48:56])
    widths = [int.from_bytes(config[16 + 2 * i : 18 + 2 * i], "little") for i in range(TILE_REGISTERS)]
    plan = plan_tiles(*key.block_tiles)
    for i in (*range(plan.accumulators), *plan.source, *plan.weights):
        assert 1 <= rows[i] <= ROWS
        assert 1 <= widths[i] <= ROW_BYTES
        assert widths[i] % 4 == 0
    for c in range(plan.accumulators):
        for a in plan.source:
            for b in plan.weights:
                assert rows[a] == rows[c]
                assert widths[a] == 4 * rows[b]
                assert widths[b] == widths[c] == ROW_BYTES


@settings(deadline=None, max_examples=60)
@given(g=geometries(), src=st.sampled_from(("u8", "s8")), data=st.data())
def test_every_candidates_configuration_is_valid(g: Geometry, src: Any, data: st.DataObject) -> None:
    g = replace(g, src=src)
    case = Case((1, g.h, g.w, g.ic), (g.n, g.ic, g.kh, g.kw), src=src, stride=g.sh)
    packed = lower(case.operator("reference"), case.x, src, AMX_TIER).packed

    def pick(keys: Sequence[Any], _run: Any) -> int:
        for key in keys:
            assert key.scratch >= key.buffer_at + 2 * 64 * key.rows * int(np.prod(key.block_tiles))
            check_config(key)
        return data.draw(st.integers(0, len(keys) - 1))

    (key,) = packed.keys_for(g, pick)
    check_config(key)


# --- tile boundaries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("src", ["u8", "s8"])
def test_gemm_at_tile_boundaries(src: str) -> None:
    """Rows and columns around one, two and five tiles; K from one byte to three tiles, runs exact and padded."""
    rows, columns = (1, 2, 15, 16, 17, 31, 32, 33, 79, 81), (1, 15, 16, 17, 31, 32, 33, 49, 64, 65)
    depths = (1, 3, 4, 5, 63, 64, 65, 127, 128, 129, 60, 96, 192, 193, 320)
    number, padded = 0, set()
    for m in rows:
        for n in columns:
            k = depths[number % len(depths)]
            number += 1
            case = random_numbers(Case((m, k), (n, k)), seeded(number), src)
            padded.add(check_tiles(replace(case, w_zp=False)).steps_of_run.pad > 0)
    assert padded == {True, False}


@pytest.mark.parametrize("src", ["u8", "s8"])
@pytest.mark.parametrize("k", [1, 4, 63, 64, 65, 127, 128, 129, 191, 260, 1000, 1023])
def test_gemm_depths(k: int, src: str) -> None:
    for m, n in ((17, 33), (16, 16), (49, 7)):
        check_tiles(Case((m, k), (n, k), src=src, out="s32", bias="s32", x_zp=5, seed=k))


@pytest.mark.parametrize("src", ["u8", "s8"])
@pytest.mark.parametrize("ow", [1, 2, 7, 14, 15, 16, 17, 31, 32, 33, 35, 49])
def test_rows_of_pixels_at_tile_boundaries(ow: int, src: str) -> None:
    """One-pixel filters with padding and 3x3 filters over images as wide as tiles, almost."""
    for number, shape in enumerate((
        Case((1, 3, ow, 24), (20, 24, 3, 3), padding=1),
        Case((2, 5, ow, 5), (33, 5, 1, 2), padding=((0, 0), (1, 0))),
        Case((1, 4, 2 * ow, 16), (48, 16, 1, 1), stride=2),
    )):  # fmt: skip
        case = random_numbers(shape, seeded(ow + number), src)
        check_tiles(replace(case, w_zp=False))


# --- features ---------------------------------------------------------------------------------------------

SHAPES = [
    Case((1, 5, 6, 3), (7, 3, 3, 3), padding=1, note="3x3"),
    Case((1, 20, 21, 3), (18, 3, 7, 7), stride=2, padding=3, note="stem"),
    Case((1, 5, 19, 20), (40, 20, 3, 3), padding=((0, 2), (1, 0)), note="asymmetric"),
    Case((1, 9, 37, 4), (9, 4, 3, 2), stride=(2, 3), padding=((1, 0), (0, 1)), note="stride"),
    Case((1, 19, 22, 17), (6, 17, 3, 3), dilation=(2, 3), padding=(2, 3), note="dilation"),
    Case((1, 9, 20, 68), (6, 68, 3, 2), dilation=(1, 2), note="dilation, exact runs"),
    Case((2, 4, 18, 6), (9, 2, 2, 3), groups=3, padding=((0, 1), (1, 1)), note="groups"),
    Case((1, 3, 17, 128), (40, 64, 1, 3), groups=2, note="groups of whole tiles"),
    Case((1, 7, 6, 10), (20, 1, 3, 3), groups=10, padding=1, note="depth-multiplier"),
    Case((2, 3, 3, 9), (35, 9, 1, 1), note="1x1"),
    Case((1, 5, 35, 64), (35, 64, 1, 1), stride=2, note="1x1-stride"),
    Case((1, 3, 3, 4), (5, 4, 1, 1), padding=2, note="1x1-padding"),
    Case((1, 1, 1, 1), (1, 1, 1, 1), note="one"),
    Case((1, 2, 2, 3), (4, 3, 5, 5), padding=3, note="wider than the image"),
    Case((1, 1, 30, 2), (3, 2, 1, 7), padding=(0, 3), note="row"),
    Case((2, 37, 1, 2), (3, 2, 7, 1), padding=(3, 0), note="column"),
    Case((2, 41, 1, 64), (17, 64, 3, 1), stride=(2, 1), note="column in place"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: c.note)
def test_convolutions(shape: Case) -> None:
    for seed, src in enumerate(("u8", "s8", "u8", "s8")):
        check_tiles(replace(random_numbers(shape, seeded(seed), src), w_zp=False))


@pytest.mark.parametrize("out", ["u8", "s8", "s32", "f32"])
@pytest.mark.parametrize("src", ["u8", "s8"])
def test_types_and_zero_points(src: str, out: str) -> None:
    low, high = (0, 255) if src == "u8" else (-128, 127)
    y_low, y_high = {"u8": (0, 255), "s8": (-128, 127)}.get(out, (0, 0))
    for shape in (Case((1, 3, 18, 9), (33, 9, 2, 2), padding=((0, 1), (1, 0))), Case((33, 66), (20, 66))):
        for x_zp, y_zp, bias in ((low, y_high, "s32"), (high, y_low, None), (5, 0, "s32"), (0, 1, None)):
            case = replace(
                shape, src=src, out=out, x_zp=x_zp, y_zp=y_zp if out in ("u8", "s8") else 0,
                bias="f32" if out != "s32" and x_zp == 5 else bias,
            )  # fmt: skip
            check_tiles(case)


@pytest.mark.parametrize("chain", POST_OPS)
def test_post_ops(chain: str) -> None:
    """Every chain on full and tail vectors; where the first Sum reads `out`, in place too."""
    post_ops, sums = POST_OPS[chain]
    for out in ("u8", "s8", "f32"):
        types = tuple(out if s == "out" else s for s in sums)
        case = Case((19, 33), (37, 33), bias="f32", out=out, post_ops=post_ops, sums=types, seed=7)
        check_tiles(case)
        if types[:1] == (out,):
            check_tiles(case, in_place=True)


@pytest.mark.parametrize("out", ["u8", "s8", "f32"])
@pytest.mark.parametrize(
    "shape",
    [
        Case((17, 64), (16, 64), note="one row in the second tile"),
        Case((95, 20), (70, 20), note="many blocks"),
        Case((1, 3, 17, 64), (17, 64, 1, 1), note="flat"),
        Case((1, 5, 19, 8), (20, 8, 3, 3), padding=1, note="conv"),
        Case((1, 3, 50, 8), (20, 8, 1, 3), padding=(0, 1), note="wide"),
    ],
    ids=lambda c: c.note,
)
def test_sum_in_place_counts_once_where_tiles_move_back(shape: Case, out: str) -> None:
    """A tile of a tail covers rows already finished: were they finished again, Sum would add to its own result."""
    case = replace(shape, src="s8", out=out, post_ops=lambda: (v.Sum(0.7), v.ReLU(), v.Linear(0.5, 0.1)), sums=(out,))
    check_tiles(case, in_place=True)
    with fine_grid(64, 512):
        check_tiles(case, in_place=True)


@pytest.mark.parametrize("step_macs", [64, 4000])
def test_grids_of_many_steps(step_macs: int) -> None:
    steps = []
    for number, shape in enumerate((
        Case((3, 11, 17, 3), (20, 3, 3, 3), padding=((2, 1), (0, 1)), stride=(2, 1), note="images"),
        Case((1, 23, 20, 8), (33, 8, 3, 1), padding=((1, 0), (0, 0)), note="strips"),
        Case((1, 2, 17, 8), (150, 8, 1, 1), stride=2, note="chunks"),
        Case((1, 75, 1, 9), (20, 9, 3, 1), padding=((2, 0), (0, 0)), note="column strips"),
        Case((1, 12, 18, 6), (20, 3, 2, 2), groups=2, note="groups"),
        Case((290, 65), (140, 65), note="gemm, copied"),
        Case((290, 64), (140, 64), note="gemm in place"),
    )):  # fmt: skip
        for src in ("u8", "s8"):
            for bytes_of_strip in (256, 4096):
                with fine_grid(step_macs, bytes_of_strip):
                    case = replace(random_numbers(shape, seeded(number), src), w_zp=False)
                    steps.append(check_tiles(case).steps)
    assert max(steps) > 10


def test_partial_sums_may_wrap() -> None:
    """The zero point's compensation takes the start value beyond s32; tiles add modulo 2^32 as vectors do."""
    k = 130_000
    x = np.full((1, k), 127, np.int8)
    for value in (127, -128, 64):
        op = v.GemmInt8(np.full((k, 1), value, np.int8), out_dtype=np.int32, isa="reference")
        assert emulate(lower(op, x.shape, "s8", AMX_TIER), x, np.int32).y.item() == 127 * value * k


@pytest.mark.parametrize("src", ["u8", "s8"])
def test_extreme_operands(src: str) -> None:
    low, high = (0, 255) if src == "u8" else (-128, 127)
    for k in (1, 2, 3, 4, 5, 63, 64, 65, 260):
        x = np.full((3, k), high, np.uint8 if src == "u8" else np.int8)
        x[1, 1::2] = low
        x[2] = low
        w = np.full((k, 4), (127, -127, -128, 127), np.int8)
        w[1::2, 3] = -128
        op = v.GemmInt8(w, out_dtype=np.int32, isa="reference")
        got = emulate(lower(op, x.shape, src, AMX_TIER), x, np.int32).y
        assert np.array_equal(got, x.astype(np.int64) @ w.astype(np.int64)), k


@st.composite
def cases(draw: st.DrawFn) -> Case:
    if draw(st.integers(0, 2)) == 0:
        k = draw(st.integers(1, 200))
        shape = Case((draw(st.integers(1, 100)), k), (draw(st.integers(1, 100)), k))
    else:
        size = st.integers(1, 9) | st.integers(14, 36)
        kh, kw = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
        icg, ocg = draw(st.integers(1, 70 // groups)), draw(st.integers(2, 100 // groups))
        pads = st.tuples(st.integers(0, 3), st.integers(0, 3))
        shape = Case(
            (draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(size), groups * icg), (groups * ocg, icg, kh, kw),
            stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
            dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 3))),
            padding=draw(st.tuples(pads, pads)), groups=groups,
        )  # fmt: skip
        if draw(st.integers(0, 4)) == 0:  # an image of one column is a GEMM with a window
            b, h, w, c = shape.x
            shape = replace(shape, x=(b, w, h, c) if h == 1 else (b, w, 1, c), w=(*shape.w[:3], 1))
    case = random_numbers(shape, lambda options: draw(st.sampled_from(options)), draw(st.sampled_from(("u8", "s8"))))
    return replace(case, w_zp=False)


@EMULATED
@given(case=cases(), fine=st.booleans(), turn=st.integers(0, 11))
def test_random_problems(case: Case, fine: bool, turn: int) -> None:
    """Any problem, with any of its blockings."""
    op = case.operator("reference")
    try:
        y_shape = out_shape(op, case)
    except ShapeError:
        assume(False)
    x, tensors = case.source(), case.tensors(y_shape)

    def run() -> None:
        low = lower(op, case.x, case.src, AMX_TIER)
        g = op._geometry(op._problem(case.x, case.src))  # type: ignore[arg-type]
        keys = low.packed.keys_for(g, lambda found, _run: min(turn, len(found) - 1))
        low = replace(low, keys=keys, codes=tuple(map(generate, keys)))
        want = expected(case, op, x, tensors)
        assert_same_bits(emulate(low, x, want.dtype, tensors, skew=case.seed % 5).y, want, (case, keys[0].blocking))

    if fine:
        with fine_grid(1000, 2048):
            run()
    else:
        run()


# --- what tiles cannot do ---------------------------------------------------------------------------------


@pytest.fixture
def amx_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch as on a machine with AMX."""
    real = tiers.why_not
    monkeypatch.setattr(tiers, "why_not", lambda name: None if name == AMX_TIER else real(name))


@pytest.mark.usefixtures("amx_here")
def test_tiles_are_taken_first() -> None:
    for case in (Case((9, 70), (20, 70)), Case((1, 5, 6, 3), (8, 3, 3, 3)), Case((1, 5, 6, 6), (8, 3, 3, 3), groups=2)):
        choice = choose(case.operator("reference")._weights, None)
        assert choice.tier == AMX_TIER
        assert choice.family is not None
        assert choice.family.name == "tiles"
        assert dict(choice.considered)[f"{AMX_TIER}/tiles"] is None


@pytest.mark.usefixtures("amx_here")
@pytest.mark.skipif("avx512_vnni" not in v.tiers(), reason="the kernel it falls back to needs avx512_vnni")
@pytest.mark.parametrize(
    ("case", "family", "why"),
    [
        (Case((9, 70), (20, 70), w_zp=True), "implicit-gemm", "row sums"),
        (Case((1, 5, 6, 3), (8, 3, 3, 3), w_zp=True, src="s8"), "implicit-gemm", "row sums"),
        (Case((1, 5, 6, 20), (20, 1, 3, 3), groups=20), "depthwise", "earlier candidate"),
    ],
    ids=str,
)
def test_what_is_not_for_tiles_runs_on_the_tiers_vectors(case: Case, family: str, why: str) -> None:
    op, x = case.operator(None), case.source()
    assert_same_bits(op(x), case.operator("reference")(x), case)
    shown = op.explain().to_dict()
    assert shown["tier"] == AMX_TIER
    considered = dict(shown["candidates"])
    assert considered[f"{AMX_TIER}/{family}"] is None
    assert why in considered[f"{AMX_TIER}/tiles"]
    assert shown["chain"].endswith("vnni")
    assert not any(f.startswith("amx") for f in shown["features"])
    assert why in str(op.explain())


# --- one result on all tiers ------------------------------------------------------------------------------

SAME = [
    Case((33, 130), (70, 130), src="s8", out="s8", x_zp=-9, bias="s32", weights="mixed", note="gemm"),
    Case((1, 7, 18, 20), (40, 20, 3, 3), x_zp=7, padding=1, bias="f32", weights="mixed", note="3x3"),
    Case((1, 8, 35, 3), (20, 3, 5, 5), src="s8", padding=2, stride=2, out="f32", weights="full", note="stem"),
    Case((1, 3, 17, 64), (64, 64, 1, 1), out="s32", weights="safe", note="1x1"),
    Case((1, 5, 9, 24), (40, 12, 3, 1), src="s8", groups=2, weights="full", note="groups"),
    Case(
        (1, 5, 17, 16), (32, 16, 3, 3), padding=1, sums=("u8",), note="sum",
        post_ops=lambda: (v.Sum(0.4, 3), v.ReLU()),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", SAME, ids=lambda c: c.note)
def test_all_tiers_agree(case: Case) -> None:
    """AMX, VNNI, the chains and AVX2 on the emulator, the tiers of this machine, and the reference."""
    op, x = case.operator("reference"), case.source()
    tensors = case.tensors(out_shape(op, case))
    want = op(x, tensors=tensors)
    macs = set()
    for tier in (AMX_TIER, *TIERS):
        low = lower(op, case.x, case.src, tier)
        macs |= {key.mac.name for key in low.keys}
        assert_same_bits(emulate(low, x, want.dtype, tensors).y, want, (case, tier))
        if tier in v.tiers():
            assert_same_bits(case.operator(tier)(x, tensors=tensors), want, (case, tier, "hardware"))
    assert {"amx", "vnni"} < macs


@pytest.fixture
def threads() -> Iterator[None]:
    before = v.num_threads()
    yield
    v.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "tier",
    [pytest.param(t, marks=pytest.mark.skipif(t not in v.tiers(), reason=f"no {t} here")) for t in (AMX_TIER, *TIERS)],
)
@pytest.mark.parametrize(
    "case",
    [
        Case((600, 150), (320, 150), src="s8", x_zp=3, weights="mixed", bias="f32"),
        Case(
            (1, 28, 28, 32), (64, 32, 3, 3), padding=1, weights="mixed", sums=("u8",),
            post_ops=lambda: (v.Sum(0.4, 3), v.ReLU()),
        ),
    ],
    ids=["gemm", "conv-sum"],
)  # fmt: skip
def test_a_hundred_repeats_on_one_and_two_threads(case: Case, tier: str) -> None:
    reference, x = case.operator("reference"), case.source()
    tensors = case.tensors(out_shape(reference, case))
    want = reference(x, tensors=tensors)
    op = case.operator(tier)
    for turn in range(100):
        v.set_num_threads(1 + turn % 2)
        assert_same_bits(op(x, tensors=tensors), want, (case, tier, turn))
    assert max(k["grid_steps"] for k in op.explain().to_dict()["kernels"]) > 1
