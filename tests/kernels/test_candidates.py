"""Candidates of the blocking: all of them valid, different, and of the same result, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import vnnigen as v
from tests.kernels.cases import TIERS, Case, assert_same_bits, expected
from tests.kernels.emulation import Lowered, emulate, fine_grid, lower
from tests.kernels.test_blocking import problems, registers_in_use
from vnnigen.kernels.amx_key import AmxKey
from vnnigen.kernels.amx_tiling import TILE_REGISTERS, plan_tiles
from vnnigen.kernels.blocking import Registers, choose_blocking, rank_blockings
from vnnigen.kernels.emit_epilogue import EPILOGUE_TEMPS
from vnnigen.kernels.geometry import Geometry, conv_geometry, gemm_geometry
from vnnigen.kernels.mac import CHAIN_FAST, TIER_CODE, VNNI, Mac, TierCode
from vnnigen.kernels.problem import ConvProblem, GemmProblem
from vnnigen.runtime import native
from vnnigen.runtime.compiled import Bound, compile_new, generate


def candidates(packed: Any, g: Geometry) -> list[tuple[Any, ...]]:
    """The kernels of `g` with each launch's first candidate, then each one's second, and so on to the last."""
    seen: list[int] = []

    def pick(keys: Sequence[Any], _run: Any) -> int:
        seen.append(len(keys))
        return min(turn, len(keys) - 1)

    turn, found = 0, []
    while turn < max(seen, default=1):
        found.append(packed.keys_for(g, pick))
        turn += 1
    return found


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_every_candidate_fits_and_covers_the_problem(problem: tuple[Geometry, TierCode, Mac, Registers]) -> None:
    g, tier, mac, need = problem
    ranked = rank_blockings(*problem)
    assert ranked[0] == choose_blocking(*problem)
    assert len(set(ranked)) == len(ranked) <= 12
    panels = -(-g.n // tier.lanes)
    for b in ranked:
        assert max(registers_in_use(b, tier, mac, need)) <= tier.registers
        assert 1 <= b.th <= g.oh
        assert 1 <= b.tw <= g.ow
        assert 1 <= b.nr <= panels
        assert 0 <= b.resident <= b.nr
        assert b.unroll >= 1
        assert b.strip % b.th == 0
        assert 0 < b.strip <= -(-g.oh // b.th) * b.th
        assert 1 <= b.chunk <= -(-panels // b.nr)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "g", [gemm_geometry(GemmProblem(512, 512, 512)), conv_geometry(ConvProblem(1, 56, 56, 64, 64, 3, 3))]
)
def test_large_problems_have_a_choice_of_tiles_grids_and_unrolling(tier: str, g: Geometry) -> None:
    code = TIER_CODE[tier]
    mac = VNNI if code.vnni else CHAIN_FAST
    ranked = rank_blockings(g, code, mac, Registers(mac.temps(code.bits), False, EPILOGUE_TEMPS))
    assert len({(b.th, b.tw, b.nr) for b in ranked}) >= 5
    assert len({b.nr for b in ranked}) >= 2
    first = ranked[0]
    same_tile = [b for b in ranked if (b.mr, b.nr) == (first.mr, first.nr)]
    assert len({(b.strip, b.chunk) for b in same_tile}) >= 3
    assert len({b.unroll for b in same_tile}) == 2


def test_heavy_weights_are_cut_by_columns() -> None:
    """A strip that reads 2 MiB of weights reads them from beyond the L2 cache: there are few strips."""
    tier = TIER_CODE["avx512_vnni"]
    need = Registers(VNNI.temps(tier.bits), False, EPILOGUE_TEMPS)
    b = choose_blocking(gemm_geometry(GemmProblem(128, 768, 3072)), tier, VNNI, need)
    assert b.strip >= 64
    assert -(-768 // (16 * b.nr)) / b.chunk >= 8


# Results.

CASES = {
    "conv": Case((1, 5, 7, 6), (37, 6, 3, 3), padding=1, bias="s32", x_zp=3, out="s8"),
    "conv-zero-points": Case((1, 4, 6, 8), (20, 8, 1, 2), w_zp=True, src="s8", x_zp=-7),
    "groups": Case((1, 4, 5, 6), (20, 3, 3, 3), groups=2, stride=2, padding=1),
    "gemm": Case((21, 12), (70, 12), bias="f32", weights="mixed"),
    "depthwise": Case((1, 7, 9, 70), (70, 1, 3, 3), groups=70, padding=1, weights="safe"),
    "depthwise-s2": Case((1, 7, 9, 20), (20, 1, 3, 3), groups=20, padding=1, stride=2, src="s8"),
    "depthwise-f32": Case((1, 7, 9, 20), (20, 1, 3, 3), groups=20, padding=1, src="f32", out="f32"),
    "conv-f32": Case((1, 5, 7, 6), (37, 6, 3, 3), src="f32", out="f32", padding=1, bias="f32"),
}


@pytest.fixture
def many_steps() -> Iterator[None]:
    with fine_grid(4096, 512):
        yield


@pytest.mark.usefixtures("many_steps")
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", CASES)
def test_on_the_emulator(name: str, tier: str) -> None:
    case = CASES[name]
    op, x = case.operator("reference"), case.source()
    want = expected(case, op, x, ())
    low = lower(op, case.x, case.src, tier)
    for keys in candidates(low.packed, op._geometry(op._problem(case.x, case.src))):
        got = emulate(replace(low, keys=keys, codes=tuple(map(generate, keys))), x, want.dtype).y
        assert_same_bits(got, want, (case, tier, [key.blocking for key in keys]))


@pytest.mark.usefixtures("many_steps")
@pytest.mark.parametrize(
    "case",
    [
        Case((70, 140), (70, 140), src="s8", x_zp=3),
        Case((1, 5, 19, 20), (40, 20, 3, 3), padding=1),
        Case((1, 6, 35, 64), (33, 64, 1, 2), bias="s32"),
        Case((1, 7, 7, 64), (100, 64, 3, 3), padding=1, x_zp=9),
    ],
    ids=str,
)
def test_tiles_on_the_emulator(case: Case) -> None:
    op, x = case.operator("reference"), case.source()
    want = expected(case, op, x, ())
    low: Lowered = lower(op, case.x, case.src, "amx_int8")
    shapes = set()
    for keys in candidates(low.packed, op._geometry(op._problem(case.x, case.src))):
        (key,) = keys
        assert isinstance(key, AmxKey)
        plan = plan_tiles(*key.block_tiles)
        assert plan.source
        assert plan.weights
        assert plan.accumulators + len(plan.source) + len(plan.weights) <= TILE_REGISTERS
        shapes.add(key.block_tiles)
        got = emulate(replace(low, keys=keys, codes=(generate(key),)), x, want.dtype).y
        assert_same_bits(got, want, (case, key.blocking))
    assert len(shapes) >= 3


HERE = [pytest.param(t, marks=pytest.mark.skipif(t not in v.tiers(), reason=f"no {t} here")) for t in TIERS]


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("shape", [(96, 300, 500), (1, 14, 14, 96, 200, 3), (1, 30, 31, 24, 16, 5)], ids=str)
def test_f32_sums_in_one_order(shape: tuple[int, ...], tier: str) -> None:
    """Long sums of numbers of all sizes: another order would show in the last bits."""
    rng = np.random.default_rng(1)
    if len(shape) == 3:
        m, n, k = shape
        x = rng.standard_normal((m, k), dtype=np.float32) ** 5
        op: v.Operator = v.GemmF32(rng.standard_normal((k, n), dtype=np.float32), isa=tier)
    else:
        b, h, w, c, n, taps = shape
        x = rng.standard_normal((b, h, w, c), dtype=np.float32) ** 5
        weights = rng.standard_normal((n, c, taps, taps), dtype=np.float32)
        op = v.Conv2dF32(weights, isa=tier, padding=taps // 2)
    want = op(x)
    packed = op._prepare("f32").packed
    found = candidates(packed, op._geometry(op._problem(x.shape, "f32")))
    assert len(found) >= 6
    for keys in found:
        got = np.full_like(want, np.nan)
        bound = Bound(keys, packed.runs, compile_new)
        for threads in (1, 2):
            args = native.ffi.from_buffer(x), native.ffi.from_buffer(got)
            native.check(native.lib.vg_call2(bound.descriptor, *args, threads))
            assert_same_bits(got, want, (shape, tier, keys[0].blocking, threads))
