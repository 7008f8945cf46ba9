"""Products with one to four columns: lanes along K, added up at the end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vnnigen as v
from tests.kernels.cases import TIERS, Case, random_numbers, seeded
from tests.kernels.emulation import check_emulated, fine_grid, lower
from vnnigen.isa import tiers
from vnnigen.isa.assembler import Arg, Assembler, Mem
from vnnigen.isa.emulator import Emulator
from vnnigen.isa.memory import Memory
from vnnigen.kernels.mac import CHAIN_EXACT, FMA, TIER_CODE, VNNI
from vnnigen.kernels.thin import MAX_COLUMNS, TURN, WHOLE, Thin, ThinKey, accumulators, add_lanes, pieces

FLOAT_HERE = [t for t in ("avx512", "avx2") if t in v.tiers()]


def thin_key(case: Case, tier: str) -> ThinKey:
    (key,) = lower(case.operator("reference"), case.x, case.src, tier).keys
    assert isinstance(key, ThinKey)
    return key


def around(*sizes: int) -> list[int]:
    return sorted({n + d for n in sizes for d in (-1, 0, 1) if n + d > 0})


@pytest.mark.parametrize("src", ["u8", "s8", "f32"])
@pytest.mark.parametrize("columns", range(1, MAX_COLUMNS + 1))
@pytest.mark.parametrize("tier", TIERS)
def test_rows_and_k_at_their_boundaries(tier: str, columns: int, src: str) -> None:
    out = "f32" if src == "f32" else "u8"
    key = thin_key(Case((100, 64), (columns, 64), src=src, out=out), tier)
    vector, rows = key.tier.vector_bytes // key.mac.element_bytes, key.blocking.th
    sums = key.per_pass * columns
    # Shorter than a vector, around one and two, where the loop over K begins, and with turns left over.
    loop = WHOLE // sums * vector
    depths = [vector // 2, *around(vector), 2 * vector + 1, *around(loop), (2 * TURN + 3) * vector - 1]
    for number, (m, k) in enumerate((m, k) for m in (1, rows, rows + 1, 2 * rows - 1) for k in depths):
        case = random_numbers(Case((m, k), (columns, k)), seeded(number), src)
        check_emulated(replace(case, w_zp=number % 3 == 0 and src != "f32"), tier, family="thin")


@pytest.mark.parametrize("src", ["u8", "f32"])
@pytest.mark.parametrize("tier", TIERS)
def test_steps_of_a_grid(tier: str, src: str) -> None:
    out = "f32" if src == "f32" else "s8"
    for m, n in ((70, 1), (33, 3), (200, 4)):
        with fine_grid(300):
            case = Case((m, 40), (n, 40), src=src, out=out, bias="f32", seed=m)
            assert thin_key(case, tier).steps > 1
            check_emulated(case, tier)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    tier=st.sampled_from(TIERS), src=st.sampled_from(("u8", "s8", "f32")), m=st.integers(1, 40),
    n=st.integers(1, MAX_COLUMNS), k=st.integers(1, 200), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_numbers_and_post_ops(tier: str, src: str, m: int, n: int, k: int, seed: int) -> None:
    check_emulated(random_numbers(Case((m, k), (n, k), seed=seed), seeded(seed), src), tier, family="thin")


@pytest.mark.parametrize("count", range(1, 17))
@pytest.mark.parametrize("tier", ["avx512", "avx2"])
def test_each_lane_is_the_sum_of_one_register(tier: str, count: int) -> None:
    code = TIER_CODE[tier]
    if count > code.lanes:
        pytest.skip("more sums than lanes")
    a = Assembler("add", args=[Arg("x", "ptr"), Arg("y", "ptr")], features=tiers.tier(tier).features)
    x, y = a.load_argument("x"), a.load_argument("y")
    vectors = [a.vec(code.bits, f"v{i}") for i in range(count)]
    for i, register in enumerate(vectors):
        a.vmovups(register, Mem(x, i * code.vector_bytes))
    add_lanes(a, code, vectors, f32=False)
    a.vmovups(Mem(y), vectors[0])
    a.ret()
    values = np.random.default_rng(count).integers(-1000, 1000, (count, code.lanes), dtype=np.int32)
    memory, out = Memory(), np.zeros(code.lanes, np.int32)
    Emulator(a.finalize().encode(), memory).call(memory.map("x", values), memory.map("y", out, writable=True))
    assert np.array_equal(memory.array("y")[:count], values.sum(axis=1))


@given(k=st.integers(1, 500), tier=st.sampled_from(sorted(TIER_CODE)), mac=st.sampled_from((FMA, VNNI, CHAIN_EXACT)))
def test_pieces_cover_k_once(k: int, tier: str, mac: object) -> None:
    cut = pieces(k, mac, TIER_CODE[tier])  # type: ignore[arg-type]
    assert [i for p in cut for i in range(p.first, p.first + p.count)] == list(range(k))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("columns", range(1, MAX_COLUMNS + 1))
def test_no_tile_needs_more_registers_than_there_are(tier: str, columns: int) -> None:
    for src, w_zp in (("u8", False), ("u8", True), ("f32", False)):
        case = Case((64, 99), (columns, 99), src=src, out="f32", w_zp=w_zp)
        key = thin_key(case, tier)
        assert key.blocking.th * columns <= key.tier.lanes
        assert 1 <= key.per_pass <= key.blocking.th
        assert accumulators(key.mac, key.tier) * key.tier.lanes >= 16 or src != "f32"
        Thin(key, tiers.tier(tier).features).build()  # AssemblerError where registers run out


@pytest.mark.parametrize("tier", TIERS)
def test_only_thin_products_of_matrices(tier: str) -> None:
    def kind(case: Case) -> type:
        return type(lower(case.operator("reference"), case.x, case.src, tier).keys[0])

    assert kind(Case((30, 20), (MAX_COLUMNS, 20))) is ThinKey
    assert kind(Case((30, 20), (MAX_COLUMNS + 1, 20))) is not ThinKey
    assert kind(Case((1, 6, 5, 20), (1, 20, 1, 1))) is not ThinKey


@pytest.mark.parametrize("tier", FLOAT_HERE)
def test_neither_threads_nor_rows_change_a_sum(tier: str) -> None:
    """A row has one sum, whatever the tile and the step it is computed in."""
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((3000, 411)).astype(np.float32), rng.standard_normal((411, 3)).astype(np.float32)
    op = v.GemmF32(b, isa=tier)
    before = v.num_threads()
    try:
        v.set_num_threads(1)
        want = op(a)
        v.set_num_threads(4)
        assert np.array_equal(op(a).view(np.int32), want.view(np.int32))
    finally:
        v.set_num_threads(before)
    for m in (1, 2, 7, 17):
        assert np.array_equal(op(a[:m]).view(np.int32), want[:m].view(np.int32))


@pytest.mark.parametrize("tier", FLOAT_HERE)
def test_what_is_not_finite_stays_in_its_row(tier: str) -> None:
    for k in (1, 7, 15, 17, 33):
        a, b = np.ones((20, k), np.float32), np.ones((k, 2), np.float32)
        a[3, -1], a[9, 0], b[-1, 1] = np.nan, np.inf, np.inf
        got = v.gemm_f32(a, b, isa=tier)
        finite = np.ones(20, bool)
        finite[[3, 9]] = False
        assert np.array_equal(got[finite, 0], np.full(18, k, np.float32))
        assert np.isnan(got[3, 0])
        assert np.isposinf(got[9, 0])
        assert np.isposinf(got[finite, 1]).all()
