"""The plan of a depthwise tile: every tap of every output once, with weights that are packed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vnnigen as v
from tests.kernels.cases import TIERS, Case, random_numbers, seeded
from tests.kernels.emulation import check_emulated, emulate, fine_grid, lower
from vnnigen.kernels.depthwise import (
    FLOAT_TEMPS,
    CacheUse,
    Window,
    block_vectors,
    cache_use,
    channel_order,
    plan_groups,
    plan_registers,
    rank_tiles,
    weight_vectors,
)
from vnnigen.kernels.emit_epilogue import EPILOGUE_TEMPS
from vnnigen.kernels.geometry import Geometry, conv_geometry
from vnnigen.kernels.mac import CHAIN_EXACT, CHAIN_FAST, FMA, TIER_CODE, VNNI, Mac
from vnnigen.kernels.problem import ConvProblem
from vnnigen.runtime.compiled import generate

WINDOWS = st.builds(Window, *[st.integers(1, 5)] * 2, *[st.integers(1, 3)] * 4)  # kh, kw, strides, dilations


@settings(deadline=None, max_examples=150)
@given(win=WINDOWS, th=st.integers(1, 4), tw=st.integers(1, 4), size=st.sampled_from((1, 2, 4)))
def test_every_tap_is_taken_once_from_its_place(win: Window, th: int, tw: int, size: int) -> None:
    taken: Counter[tuple[int, int, int]] = Counter()
    vectors = weight_vectors(win, size, th, tw)
    for group in plan_groups(win, th, tw, size):
        assert 1 <= len(group.columns) <= size
        for pixel, kr, taps in group.users:
            assert (kr, taps) in vectors
            i, j = divmod(pixel, tw)
            assert group.row == i * win.sh + kr * win.dh
            for column, tap in zip(group.columns, taps, strict=False):
                if tap is not None:
                    assert column == j * win.sw + tap * win.dw
                    taken[pixel, kr, tap] += 1
            assert all(tap is None for tap in taps[len(group.columns) :])
    want = {(p, r, t) for p in range(th * tw) for r in range(win.kh) for t in range(win.kw)}
    assert set(taken) == want
    assert max(taken.values()) == 1


@settings(deadline=None, max_examples=100)
@given(win=WINDOWS, th=st.integers(1, 4), tw=st.integers(1, 4), size=st.sampled_from((1, 2, 4)))
def test_packed_weights_serve_every_smaller_tile(win: Window, th: int, tw: int, size: int) -> None:
    packed = weight_vectors(win, size, th, tw)
    for h in range(1, th + 1):
        for w in range(1, tw + 1):
            assert set(weight_vectors(win, size, h, w)) <= set(packed)
    assert sorted(packed.values()) == list(range(len(packed)))


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_channel_order(size: int, lanes: int) -> None:
    order = channel_order(size, lanes)
    assert sorted(order) == list(range(size * lanes))
    # 128 bits of a vector interleave within themselves: a lane of accumulators holds neighbouring channels.
    assert all((np.diff(order.reshape(-1, 4)) == 1).ravel())


@pytest.mark.parametrize("mac", [VNNI, CHAIN_FAST, CHAIN_EXACT, FMA], ids=lambda m: m.name)
@pytest.mark.parametrize("tier", TIERS)
@settings(deadline=None, max_examples=25)
@given(
    win=WINDOWS,
    oh=st.integers(1, 9),
    ow=st.integers(1, 9),
    interleaved=st.booleans(),
    channels=st.sampled_from((64, 1024)),
    cache=st.builds(CacheUse, st.sampled_from((8, 32, 512)), st.booleans()),
)
def test_tiles_fit(
    tier: str, mac: Mac, win: Window, oh: int, ow: int, interleaved: bool, channels: int, cache: CacheUse
) -> None:  # fmt: skip
    code = TIER_CODE[tier]
    vectors = block_vectors(mac, code, interleaved, channels)
    size = mac.k_per_dword
    work = {4: 7, 2: 5, 1: FLOAT_TEMPS}[size]
    tiles = rank_tiles(win, code, mac, vectors, oh, ow, EPILOGUE_TEMPS, cache)
    assert len(set(tiles)) == len(tiles)
    for th, tw in tiles:
        assert 1 <= th <= oh
        assert 1 <= tw <= ow
        accumulators = th * tw * vectors
        assert accumulators + mac.temps(code.bits) + work <= code.registers
        assert accumulators + EPILOGUE_TEMPS <= code.registers


@settings(deadline=None, max_examples=200)
@given(uses=st.lists(st.integers(0, 12), max_size=60), slots=st.integers(0, 10))
def test_registers_hold_what_is_used(uses: list[int], slots: int) -> None:
    held: dict[int, int] = {}
    loads = 0
    for value, (slot, load) in zip(uses, plan_registers(uses, slots), strict=True):
        loads += load or slot is None
        if slot is None:
            assert not load
            continue
        assert slot < slots
        if load:
            held[slot] = value
        assert held[slot] == value
    assert loads >= len(set(uses))
    if slots >= len(set(uses)):
        assert loads == len(set(uses))


def test_registers_keep_what_is_used_next() -> None:
    # One register: 1 is used again sooner than 2 and 3, which stay in memory.
    assert plan_registers((1, 2, 1, 3, 1, 2), 1) == (
        (0, True), (None, False), (0, False), (None, False), (0, False), (None, False),
    )  # fmt: skip
    # A cyclic sweep through more than fits hits all but one register's worth, where the least recently used hits none.
    sweep = plan_registers((0, 1, 2) * 8, 2)
    assert sum(slot is not None and not load for slot, load in sweep) >= 8


@pytest.mark.parametrize(("tier", "vectors"), [("avx512", 4), ("avx2", 1)])
def test_neighbouring_lines_where_pixels_alias(tier: str, vectors: int) -> None:
    code = TIER_CODE[tier]
    assert [block_vectors(FMA, code, False, c) for c in (32, 256, 512, 1000, 1024)] == [1, 1, vectors, 1, vectors]
    for stride in (1, 2):
        x, w = (1, 5, 6, 512), (512, 1, 3, 3)
        case = Case(x, w, src="f32", out="f32", groups=512, padding=1, stride=stride, bias="f32")
        check_emulated(case, tier)


def flat(h: int, channels: int, stride: int) -> Geometry:
    """A 3x3 depthwise problem's geometry."""
    p = ConvProblem.from_arguments((1, h, h, channels), (channels, 1, 3, 3), groups=channels, stride=stride, padding=1)
    return conv_geometry(replace(p, src="f32", dst="f32"))


def test_cache_use() -> None:
    assert cache_use(flat(10, 144, 1)) == CacheUse(512, False)
    assert cache_use(flat(10, 1024, 1)) == CacheUse(8, False)  # pixels 4096 bytes apart
    assert cache_use(flat(150, 64, 2)) == CacheUse(128, True)


def test_runs_of_channels() -> None:
    win = Window(3, 3, 2, 2, 1, 1)
    near, far = CacheUse(512, False), CacheUse(512, True)
    assert near.blocks(win, 4, 4, 64) == 4
    assert near.blocks(win, 2, 2, 64) > near.blocks(win, 4, 2, 64) > 4
    assert far.blocks(win, 4, 2, 64) > near.blocks(win, 4, 2, 64)
    assert near.blocks(Window(31, 31, 1, 1, 1, 1), 4, 4, 64) == 4


@pytest.mark.parametrize("tier", TIERS)
def test_channels_at_block_boundaries(tier: str) -> None:
    lanes = TIER_CODE[tier].lanes
    number = 0
    for size in (1, 2, 4):
        for c in (size * lanes - 1, size * lanes, size * lanes + 1, 2 * size * lanes + lanes // 2):
            for src in ("u8", "s8", "f32"):
                number += 1
                case = Case((1, 4, 5, c), (c, 1, 3, 3), groups=c, padding=((1, 0), (0, 1)))
                case = random_numbers(case, seeded(number), src)
                with fine_grid(64 if number % 2 else 1 << 19):
                    check_emulated(case, tier)


@pytest.mark.parametrize("tier", TIERS)
def test_images_around_the_tile(tier: str) -> None:
    number = 0
    for h in range(1, 7):
        for w in range(1, 7):
            number += 1
            case = Case((1, h, w, 9), (9, 1, 3, 3), groups=9, padding=1)
            check_emulated(random_numbers(case, seeded(number)), tier)


@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 5), (5, 1), (2, 2), (5, 4)])
@pytest.mark.parametrize("tier", TIERS)
def test_filters(tier: str, kernel: tuple[int, int], stride: object) -> None:
    case = Case((1, 6, 7, 9), (9, 1, *kernel), groups=9, padding=(kernel[0] // 2, kernel[1] // 2), stride=stride)
    for src in ("u8", "s8", "f32"):
        check_emulated(random_numbers(case, seeded(len(src) + kernel[0] + kernel[1]), src), tier)


@pytest.mark.parametrize("tier", ["avx512_bf16", "avx512", "avx2"])
@pytest.mark.parametrize("channels", [31, 32, 96, 100])
@pytest.mark.parametrize("src", ["bf16", "f32"])
def test_floats_do_not_depend_on_tile_or_grid(src: str, channels: int, tier: str) -> None:
    """Bits of all candidates, with channels in one chunk and in several, tiles of all sizes, and padding everywhere."""
    case = Case((1, 5, 9, channels), (channels, 1, 3, 3), groups=channels, padding=((2, 1), (1, 2)), src=src, out=src)
    case = replace(case, stride=(1, 2))
    op, x = case.operator("reference"), case.source()
    low = lower(op, case.x, case.src, tier)
    want = emulate(low, x, x.dtype).y
    key = low.keys[0]
    assert key.interleaved == (src == "bf16" and channels % 32 == 0 and TIER_CODE[tier].bf16)
    for th, tw in ((1, 1), (2, 3), (3, 2), (4, 1)):
        for strip, chunk in ((th, 1), (2 * th, 3)):
            other = replace(key, blocking=replace(key.blocking, th=th, tw=tw, strip=strip, chunk=chunk))
            got = emulate(replace(low, keys=(other,), codes=(generate(other),)), x, x.dtype).y
            np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(
        want.astype(np.float32), op(x).astype(np.float32), rtol=1e-5 if src == "f32" else 1e-2, atol=1e-4
    )


@pytest.mark.parametrize("tier", ["avx2", "avx512"])
def test_weights_that_are_not_finite_meet_the_padding(tier: str) -> None:
    """0 * inf is NaN: taps on the padding are left out only where all weights are finite."""
    case = Case((1, 3, 3, 16), (16, 1, 3, 3), groups=16, padding=1, src="f32", out="f32")
    w = np.ones((16, 1, 3, 3), np.float32)
    x = case.source()
    for special in (np.inf, np.nan):
        w[3, 0, 0, 0] = special
        op = v.Conv2dF32(w, groups=16, padding=1, isa="reference")
        low = lower(op, case.x, case.src, tier)
        assert not low.keys[0].skip_padding
        got = emulate(low, x, x.dtype).y
        np.testing.assert_array_equal(np.isnan(got), np.isnan(op(x)))
        assert np.isnan(got[0, 0, 0, 3])


@pytest.mark.parametrize("post_ops", [(v.GELU(),), (v.Clip(-1, 2), v.Linear(2.0, 0.5)), (v.Sum(0.5),)], ids=str)
@pytest.mark.parametrize("tier", ["avx512_bf16", "amx_bf16", "avx512"])
def test_interleaved_bf16_and_post_ops(tier: str, post_ops: tuple[v.PostOp, ...]) -> None:
    channels = 64
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, 4, 5, channels)).astype(ml_dtypes.bfloat16)
    w = rng.standard_normal((channels, 1, 3, 3)).astype(np.float32)
    op = v.Conv2dBf16(w, rng.standard_normal(channels), groups=channels, padding=1, post_ops=post_ops, isa="reference")
    low = lower(op, x.shape, "bf16", tier)
    with_tensor = isinstance(post_ops[0], v.Sum)
    assert low.keys[0].interleaved == (tier != "avx512" and not with_tensor)
    residual = rng.standard_normal(x.shape).astype(x.dtype)
    got = emulate(low, x, x.dtype, (residual.copy(),) if with_tensor else (), in_place=with_tensor).y
    want = op(x, residual.copy() if with_tensor else None)
    np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=1e-2, atol=1e-2)
