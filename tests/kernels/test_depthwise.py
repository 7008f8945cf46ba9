"""The plan of a depthwise tile: every tap of every output once, with weights that are packed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import TIERS, Case, random_numbers, seeded
from tests.kernels.emulation import check_emulated, fine_grid
from vnnigen.kernels.depthwise import Window, block_vectors, channel_order, plan_groups, rank_tiles, weight_vectors
from vnnigen.kernels.emit_epilogue import EPILOGUE_TEMPS
from vnnigen.kernels.mac import CHAIN_EXACT, CHAIN_FAST, FMA, TIER_CODE, VNNI

WINDOWS = st.builds(
    Window, *[st.integers(1, 5)] * 2, *[st.integers(1, 3)] * 4
)  # kh, kw, strides, dilations


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
@given(win=WINDOWS, oh=st.integers(1, 9), ow=st.integers(1, 9))
def test_tiles_fit(tier: str, mac: object, win: Window, oh: int, ow: int) -> None:
    code = TIER_CODE[tier]
    vectors = block_vectors(mac, code, 64, 1)
    th, tw = rank_tiles(win, code, mac, vectors, oh, ow, EPILOGUE_TEMPS)[0]
    size = mac.k_per_dword  # type: ignore[attr-defined]
    columns = {4: 5, 2: 3, 1: 1}[size]
    accumulators = th * tw * size
    assert 1 <= th <= oh
    assert 1 <= tw <= ow
    assert accumulators + mac.temps(code.bits) + columns <= code.registers  # type: ignore[attr-defined]
    assert accumulators + EPILOGUE_TEMPS <= code.registers


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


@pytest.mark.parametrize("tier", ["avx512", "avx2"])
def test_more_lines_of_a_pixel_where_pixels_alias(tier: str) -> None:
    """Powers of two between pixels take wider blocks of channels."""
    code = TIER_CODE[tier]
    lines = {c: block_vectors(FMA, code, c, 1) * code.vector_bytes // 64 for c in (32, 96, 128, 512, 1000, 1024)}
    wide = {"avx512": (2, 4), "avx2": (1, 2)}[tier]
    assert lines == {32: 1, 96: 1, 128: wide[0], 512: wide[1], 1000: 1, 1024: wide[1]}
    assert block_vectors(FMA, code, 256, 2) * code.vector_bytes == 128
    for channels in (128, 256, 512, 1040):
        for stride in (1, 2):
            check_emulated(
                Case((1, 5, 6, channels), (channels, 1, 3, 3), src="f32", out="f32", groups=channels, padding=1,
                     stride=stride, bias="f32"), tier,
            )  # fmt: skip
