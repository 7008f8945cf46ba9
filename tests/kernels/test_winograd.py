"""3x3 convolutions by Winograd's algorithm: the same bits as the usual kernels, wherever the transform is allowed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vnnigen as v
from tests.kernels.cases import NUMPY, POST_OPS, TIERS, Case, assert_same_bits, random_numbers, seeded
from tests.kernels.emulation import always_winograd, check_emulated, emulate, lower
from vnnigen.kernels import winograd
from vnnigen.kernels.geometry import Geometry, conv_geometry
from vnnigen.kernels.mac import TIER_CODE, VNNI
from vnnigen.kernels.problem import ConvProblem
from vnnigen.kernels.winograd import BLOCK, LIMIT, PackedEither, WinogradKey, transformed_weights
from vnnigen.runtime.compiled import generate

SHAPES = [
    Case((1, 8, 8, 32), (32, 32, 3, 3), padding=1, note="whole tiles"),
    Case((1, 7, 9, 16), (40, 16, 3, 3), padding=1, note="part of a tile, tail of columns"),
    Case((2, 5, 6, 3), (7, 3, 3, 3), padding=1, note="few channels"),
    Case((1, 14, 3, 17), (16, 17, 3, 3), padding=1, note="odd channels, strips"),
    Case((1, 13, 13, 8), (48, 8, 3, 3), padding=1, note="the last strip lower"),
    Case((2, 4, 4, 33), (33, 33, 3, 3), note="no padding"),
    Case((1, 6, 7, 9), (20, 9, 3, 3), padding=((0, 2), (1, 3)), note="asymmetric"),
    Case((1, 2, 2, 5), (9, 5, 3, 3), padding=3, note="mostly padding"),
    Case((1, 3, 30, 4), (100, 4, 3, 3), padding=((0, 0), (1, 1)), note="a row of tiles, parts of columns"),
    Case((1, 3, 3, 1), (1, 1, 3, 3), note="one"),
]
EMULATED = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def check(case: Case, tier: str, **more: Any) -> WinogradKey:
    with always_winograd():
        low = check_emulated(replace(case, w_zp=False), tier, **more)
    (key,) = low.keys
    assert isinstance(key, WinogradKey)
    return key


@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: c.note)
@pytest.mark.parametrize("tier", TIERS)
def test_shapes(tier: str, shape: Case) -> None:
    for seed, src in enumerate(("u8", "s8", "u8")):
        check(random_numbers(shape, seeded(seed), src), tier)


@pytest.mark.parametrize("name", POST_OPS)
@pytest.mark.parametrize("tier", TIERS)
def test_post_ops(tier: str, name: str) -> None:
    chain, sums = POST_OPS[name]
    shape = Case((1, 6, 5, 6), (21, 6, 3, 3), padding=1, x_zp=9, bias="s32", post_ops=chain)
    for out in ("u8", "s8", "f32"):
        types = tuple(out if s == "out" else s for s in sums)
        check(replace(shape, out=out, sums=types), tier, in_place=types[:1] == (out,))
    if name == "none":
        check(replace(shape, out="s32"), tier)


@pytest.mark.parametrize(("src", "tier"), list(product(("u8", "s8"), TIERS)))
def test_extremes(tier: str, src: str) -> None:
    """Pixels and weights at both ends of their types, in the patterns that the transforms add up."""
    low, high = (0, 255) if src == "u8" else (-128, 127)
    signs = np.sign(winograd.WEIGHT_TRANSFORM).astype(int)
    for number in range(6):
        weights = np.zeros((36, 17, 3, 3), np.int8)
        for p in range(36):
            weights[p] = np.where(np.outer(signs[p // 6], signs[p % 6]) * (-1) ** number >= 0, 127, -128)
        x = np.full((1, 8, 8, 17), low, np.int64)
        x[:, number % 2 :: 2, :, :] = high
        x[:, :, number // 2 :: 3, :] = low + high - x[:, :, number // 2 :: 3, :]
        pixels = x.astype(np.uint8 if src == "u8" else np.int8)
        op = v.Conv2dInt8(
            weights, padding=1, x_zero_point=low if number % 2 else high, out_dtype=np.int32, isa="reference"
        )  # fmt: skip
        with always_winograd():
            lowered = lower(op, pixels.shape, src, tier)
            assert isinstance(lowered.keys[0], WinogradKey)
            got = emulate(lowered, pixels, np.int32).y
        assert_same_bits(got, op(pixels), (src, tier, number))


@EMULATED
@given(st.data())
@pytest.mark.parametrize("tier", TIERS)
def test_any_shape(tier: str, data: Any) -> None:
    pick = st.integers
    h, w, c, oc, n = (data.draw(pick(1, most)) for most in (13, 13, 40, 70, 2))
    pad = tuple(tuple(data.draw(pick(0, 3)) for _ in range(2)) for _ in range(2))
    case = Case((n, max(h, 3 - sum(pad[0])), max(w, 3 - sum(pad[1])), c), (oc, c, 3, 3), padding=pad)
    case = random_numbers(
        case, lambda options: data.draw(st.sampled_from(list(options))), data.draw(st.sampled_from(["u8", "s8"]))
    )
    check(case, tier)


@pytest.mark.parametrize("tier", TIERS)
def test_gaps_between_pixels_are_not_touched(tier: str) -> None:
    """As slices of a concatenation have them."""
    case = Case((1, 5, 6, 8), (21, 8, 3, 3), padding=1, x_zp=3)
    op, x = case.operator("reference"), case.source()
    want = op(x)
    with always_winograd():
        low = lower(op, x.shape, "u8", tier)
        g = replace(op._geometry(op._problem(x.shape, "u8")), pitch=28)
        keys = low.packed.keys_for(g)
    wide = replace(low, keys=keys, codes=tuple(map(generate, keys)), y_shape=(1, 5, 6, 28))
    got = emulate(wide, x, np.uint8).y
    np.testing.assert_array_equal(got[..., :21], want)
    assert (got.reshape(-1, 28)[:-1, 21:] == 0x5A).all()


# --- the range ----------------------------------------------------------------------------------------------


def of_sum(total: int, columns: int = 3) -> Any:
    """Weights one of whose columns adds up to `total`."""
    ic = -(-total // (127 * 9))
    flat = np.zeros((columns, ic * 9), np.int64)
    flat[1] = total // (ic * 9)
    flat[1, : total - int(flat[1].sum())] += 1
    assert flat.max() <= 127
    return flat.reshape(columns, ic, 3, 3).astype(np.int8)


MOST = (LIMIT - 1) // 255


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("src", ["u8", "s8"])
def test_sums_at_the_end_of_the_range(src: str, sign: int) -> None:
    """The largest sum there may be is right; one more and the usual kernels compute."""
    for total, transformed in ((MOST, True), (MOST + 1, False)):
        op = v.Conv2dInt8(sign * of_sum(total), padding=1, out_dtype=np.int32, isa="reference")
        high, dtype = (255, np.uint8) if src == "u8" else (127, np.int8)
        x = np.full((1, 4, 4, op._weights.values.shape[1]), high, dtype)
        with always_winograd():
            low = lower(op, x.shape, src, "avx512_vnni")
            assert isinstance(low.keys[0], WinogradKey) == transformed
            assert_same_bits(emulate(low, x, np.int32).y, op(x), total)


def test_transformed_weights() -> None:
    rng = np.random.default_rng(0)
    w = rng.integers(-128, 128, (5, 7, 3, 3))
    w[0, 0], w[1, 0] = 127, -128
    g = winograd.WEIGHT_TRANSFORM.astype(int)
    want = np.einsum("ia,ocab,jb->ijco", g, w, g).reshape(36, 7, 5)
    assert np.abs(want).max() == 144 * 128
    np.testing.assert_array_equal(transformed_weights(w.astype(np.int8)), want)


def test_the_transforms_are_a_convolution() -> None:
    """Y = A' ((G g G') * (B' d B)) A, all of it integers: 576 times the outputs."""
    rng = np.random.default_rng(1)
    d, w = rng.integers(0, 256, (6, 6)), rng.integers(-128, 128, (3, 3))
    b = np.array(
        [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
         [0, 4, 0, -5, 0, 1]]
    )  # fmt: skip
    a = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 3]])
    g = winograd.WEIGHT_TRANSFORM.astype(int)
    pixels = b @ d @ b.T
    y = a @ ((g @ w @ g.T) * pixels) @ a.T
    want = [[(d[i : i + 3, j : j + 3] * w).sum() for j in range(4)] for i in range(4)]
    np.testing.assert_array_equal(y, 576 * np.array(want))
    # A row of B' adds up at most 5 of either sign; twice, 25 of like and 25 of unlike signs.
    both = np.kron(b, b)
    assert max(both.clip(min=0).sum(1).max(), -both.clip(max=0).sum(1).min()) * 255 <= 32767
    assert winograd.INVERSE * 9 % (1 << 32) == 1


# --- the choice ---------------------------------------------------------------------------------------------


def geometry(n: int, size: int, ic: int, oc: int, **more: Any) -> Geometry:
    return conv_geometry(ConvProblem.from_arguments((n, size, size, ic), (oc, ic, 3, 3), padding=1, **more))


def test_where_it_pays() -> None:
    tier = TIER_CODE["avx512_vnni"]

    def pays(*shape: int, **more: Any) -> bool:
        return winograd.pays(geometry(*shape, **more), tier, VNNI)

    assert pays(1, 56, 64, 64)
    assert pays(16, 28, 128, 128)
    assert pays(1, 28, 512, 512)
    assert not pays(1, 7, 512, 512)  # eight times the weights, for four tiles
    assert not pays(1, 56, 3, 64)
    assert not pays(1, 56, 64, 64, stride=2)
    assert not pays(1, 56, 64, 64, dilation=2)


@pytest.mark.parametrize("tier", TIERS)
def test_blocking_covers_the_image_and_makes_two_steps(tier: str) -> None:
    for size, ic, oc, n in product((1, 4, 7, 14, 56, 112), (16, 256, 512), (16, 64, 512), (1, 2)):
        g = geometry(n, size, ic, oc)
        b = winograd.choose_blocking(g, TIER_CODE[tier])
        strips, blocks = -(-size // b.strip), -(-oc // (TIER_CODE[tier].lanes * BLOCK))
        assert b.strip % 4 == 0
        assert (strips - 1) * b.strip < size <= strips * b.strip
        assert n * strips * -(-blocks // b.chunk) >= 2 or blocks == 1


def test_weights_with_zero_points_are_not_transformed() -> None:
    case = Case((1, 8, 8, 16), (16, 16, 3, 3), padding=1, w_zp=True)
    with always_winograd():
        low = check_emulated(case, "avx512_vnni")
    assert not isinstance(low.packed, PackedEither)
    assert not isinstance(low.keys[0], WinogradKey)


def test_tiers_with_tiles_keep_them() -> None:
    case = Case((1, 8, 8, 64), (64, 64, 3, 3), padding=1)
    with always_winograd():
        low = lower(case.operator("reference"), case.x, "u8", "amx_int8")
    assert low.keys[0].mac.name == "amx"


HERE = [pytest.param(t, marks=pytest.mark.skipif(t not in v.tiers(), reason=f"no {t} here")) for t in TIERS]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tier", HERE)
def test_on_this_machine(tier: str, threads: int) -> None:
    """Shapes that choose the algorithm by themselves; `explain` names it."""
    before = v.num_threads()
    v.set_num_threads(threads)
    try:
        for case in (
            Case((1, 28, 28, 128), (128, 128, 3, 3), padding=1, weights="safe", x_zp=5, bias="s32"),
            Case((2, 17, 30, 64), (80, 64, 3, 3), padding=1, weights="safe", src="s8", out="s8"),
        ):
            op, x = case.operator(tier), case.source()
            text = str(op.explain(case.x, NUMPY[case.src]))
            assert "Winograd F(4x4, 3x3) on 16-bit words, exact" in text
            assert "-winograd" in text
            assert_same_bits(op(x), case.operator("reference")(x), text)
    finally:
        v.set_num_threads(before)
