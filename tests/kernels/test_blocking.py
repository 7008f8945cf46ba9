"""Properties of the blocking: it fits the registers, covers the problem, and does not depend on luck."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vnnigen.errors import ShapeError
from vnnigen.kernels import blocking
from vnnigen.kernels.blocking import STRIP_BYTES, TARGET_STEPS, Blocking, Registers, choose_blocking, grid
from vnnigen.kernels.emit_epilogue import EPILOGUE_TEMPS
from vnnigen.kernels.geometry import Geometry, conv_geometry, gemm_geometry, needs_copy
from vnnigen.kernels.mac import CHAIN_EXACT, CHAIN_FAST, FMA, TIER_CODE, VNNI, Mac, TierCode
from vnnigen.kernels.problem import ConvProblem, GemmProblem

TIERS = [TIER_CODE[name] for name in ("avx512_vnni", "avx512", "avx_vnni", "avx2")]


@st.composite
def geometries(draw: st.DrawFn, src: str) -> Geometry:
    size = st.integers(1, 60)
    dst = "f32" if src == "f32" else "u8"
    if draw(st.booleans()):
        m, n, k = draw(st.integers(1, 5000)), draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
        return gemm_geometry(GemmProblem(m, n, k, src, dst))  # type: ignore[arg-type]
    groups = draw(st.sampled_from((1, 1, 2, 5)))
    kh, kw = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    pad = draw(st.integers(0, 3))
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return conv_geometry(
        ConvProblem(
            draw(st.integers(1, 4)), draw(size) + kh, draw(size) + kw, groups * draw(st.integers(1, 200)),
            groups * draw(st.integers(1, 200)), kh, kw, stride, (1, 1), ((pad, pad), (pad, pad)), groups, src, dst,
        )  # type: ignore[arg-type]
    )  # fmt: skip


@st.composite
def problems(draw: st.DrawFn) -> tuple[Geometry, TierCode, Mac, Registers]:
    tier = draw(st.sampled_from(TIERS))
    mac = draw(st.sampled_from((FMA, VNNI) if tier.vnni else (FMA, CHAIN_FAST, CHAIN_EXACT)))
    g = draw(geometries("f32" if mac is FMA else draw(st.sampled_from(("u8", "s8")))))
    sums = mac.element == "u8" and draw(st.booleans())
    return g, tier, mac, Registers(mac.temps(tier.bits), sums, EPILOGUE_TEMPS)


def registers_in_use(b: Blocking, tier: TierCode, mac: Mac, need: Registers) -> tuple[int, int]:
    """Vector registers live in the K loop and in the epilogue, counted from what the emitters allocate."""
    accumulators = b.mr * b.nr
    loop = accumulators + b.resident + 1 + mac.temps(tier.bits)
    if need.row_sums:
        loop += b.mr + 1  # the sums, and the ones that they are multiplied with
    return loop, accumulators + need.epilogue


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_it_fits_the_registers_and_covers_the_problem(problem: tuple[Geometry, TierCode, Mac, Registers]) -> None:
    g, tier, mac, need = problem
    b = choose_blocking(g, tier, mac, need)
    assert max(registers_in_use(b, tier, mac, need)) <= tier.registers
    panels = -(-g.n // tier.lanes)
    # Tiles are not larger than the problem, and a tile of several rows takes whole rows.
    assert 1 <= b.th <= g.oh
    assert 1 <= b.tw <= g.ow
    assert b.th == 1 or b.tw == g.ow
    assert 1 <= b.nr <= panels
    assert 0 <= b.resident <= b.nr
    assert b.unroll >= 1
    assert b.copy == needs_copy(g, mac)
    # Strips are whole tiles, and as many as the kernel's own arithmetic says cover the image; none is empty.
    assert b.strip % b.th == 0
    strips = -(-g.oh // b.strip)
    assert (strips - 1) * b.strip < g.oh <= strips * b.strip
    blocks = -(-panels // b.nr)
    chunks = -(-blocks // b.chunk)
    assert 1 <= b.chunk <= blocks
    assert (chunks - 1) * b.chunk < blocks


@settings(deadline=None, max_examples=30)
@given(problem=problems())
def test_it_is_a_function_of_its_arguments(problem: tuple[Geometry, TierCode, Mac, Registers]) -> None:
    first = choose_blocking(*problem)
    choose_blocking.cache_clear()
    assert choose_blocking(*problem) == first


@pytest.mark.parametrize("tier", TIERS, ids=lambda t: t.name)
def test_what_cannot_fit_is_an_error(tier: TierCode) -> None:
    g = gemm_geometry(GemmProblem(64, 64, 64))
    mac = VNNI if tier.vnni else CHAIN_FAST
    # The smallest tile has one accumulator.
    for epilogue, fits in ((tier.registers - 1, True), (tier.registers, False)):
        need = Registers(mac.temps(tier.bits), False, epilogue)
        if fits:
            assert choose_blocking(g, tier, mac, need).mr == 1
        else:
            with pytest.raises(ShapeError, match="no register tile fits"):
                choose_blocking(g, tier, mac, need)


@settings(deadline=None, max_examples=150)
@given(problem=problems(), th=st.integers(1, 14), blocks=st.integers(1, 40), macs=st.integers(1, 2**36))
def test_grid(problem: tuple[Geometry, TierCode, Mac, Registers], th: int, blocks: int, macs: int) -> None:
    g, _, mac, _ = problem
    th = min(th, g.oh)
    copy = needs_copy(g, mac)
    rows, chunk = grid(g, mac, th, blocks, copy, macs=macs)
    assert rows % th == 0
    assert rows <= -(-g.oh // th) * th
    assert 1 <= chunk <= blocks
    # Small work is cut only where the source of a step would not fit the cache.
    if macs < blocking.MIN_STEP_MACS:
        assert chunk == blocks
        if g.strip_rows(g.oh) * g.padded_w * g.ic * mac.element_bytes <= STRIP_BYTES:
            assert rows >= g.oh
    if rows > th:
        assert g.strip_rows(rows - th + 1) * g.padded_w * g.ic * mac.element_bytes <= 2 * STRIP_BYTES


@pytest.mark.parametrize("tier", TIERS, ids=lambda t: t.name)
def test_large_work_is_cut_for_many_threads(tier: TierCode) -> None:
    mac = VNNI if tier.vnni else CHAIN_FAST
    need = Registers(mac.temps(tier.bits), False, EPILOGUE_TEMPS)
    for g in (
        gemm_geometry(GemmProblem(1024, 1024, 1024)), gemm_geometry(GemmProblem(16, 4096, 4096)),
        gemm_geometry(GemmProblem(4096, 16, 4096)), conv_geometry(ConvProblem(1, 56, 56, 64, 64, 3, 3)),
    ):  # fmt: skip
        b = choose_blocking(g, tier, mac, need)
        blocks = ceil(g.n / (tier.lanes * b.nr))
        steps = g.images * -(-g.oh // b.strip) * -(-blocks // b.chunk)
        assert steps >= TARGET_STEPS // 2


@pytest.mark.parametrize(
    ("tier", "mac", "least"),
    [
        ("avx512_vnni", VNNI, 24), ("avx512", FMA, 24), ("avx512", CHAIN_FAST, 20), ("avx_vnni", VNNI, 10),
        ("avx2", FMA, 10),
    ],
    ids=lambda p: getattr(p, "name", p),
)  # fmt: skip
def test_large_problems_use_the_register_file(tier: str, mac: Mac, least: int) -> None:
    """Enough accumulators to hide the multiplier's latency on two ports, and to halve the loads."""
    code = TIER_CODE[tier]
    src = "f32" if mac is FMA else "u8"
    g = gemm_geometry(GemmProblem(1024, 1024, 1024, src, "f32"))
    b = choose_blocking(g, code, mac, Registers(mac.temps(code.bits), False, EPILOGUE_TEMPS))
    assert b.mr * b.nr >= least


@pytest.mark.parametrize("k", [13, 24, 32])
def test_short_sums_take_small_tiles(k: int) -> None:
    """An epilogue hides behind the next tile's multiplications only while there are enough of them."""
    tier = TIER_CODE["avx512"]
    need = Registers(temps=0, row_sums=False, epilogue=3)
    short = choose_blocking(gemm_geometry(GemmProblem(3136, 512, k, "f32", "f32")), tier, FMA, need)
    long = choose_blocking(gemm_geometry(GemmProblem(3136, 512, 512, "f32", "f32")), tier, FMA, need)
    assert short.mr * short.nr < long.mr * long.nr, (short, long)
