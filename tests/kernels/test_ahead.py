"""What kernels fetch ahead: all of it, once, and before it is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vnnigen.kernels.ahead import FIRST_LEAST, FIRST_MOST, first_bytes, lines_per_turn, share_out
from vnnigen.kernels.blocking import choose_blocking
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.geometry import Geometry
from vnnigen.kernels.mac import TIER_CODE, VNNI
from vnnigen.kernels.nest import NestKey, register_need
from vnnigen.runtime.compiled import generate

TIER = TIER_CODE["avx512_vnni"]
SPEC = EpilogueSpec("s32", (), False, "u8", False, False, True, True)


def key_of(pixels: int, n: int, k: int) -> NestKey:
    g = Geometry(
        images=1, groups=1, oh=pixels, ow=1, n=n, h=pixels, w=1, ic=k, kh=1, kw=1, sh=1, sw=1, dh=1, dw=1,
        top=0, left=0, padded=False, src="u8",
    )  # fmt: skip
    blocking = choose_blocking(g, TIER, VNNI, register_need(VNNI, TIER, False, SPEC))
    key = NestKey("gemm", g, TIER, VNNI, SPEC, blocking, False, 0, n, 0)
    return replace(key, ahead=lines_per_turn(key))


@given(
    st.integers(1, 400), st.integers(1, 40).map(lambda x: 64 * x), st.integers(1, 40).map(lambda x: 64 * x),
    st.integers(0, 1 << 20),
)  # fmt: skip
def test_every_byte_has_its_step(pixels: int, n: int, k: int, wanted: int) -> None:
    key = key_of(pixels, n, k)
    nbytes = n * k
    shares = share_out(key, nbytes, wanted)
    assert shares.start + shares.steps * shares.own >= nbytes
    assert shares.own % 64 == shares.following % 64 == 0
    chunk = key.blocking.chunk * key.block_columns * k
    if chunk > FIRST_MOST:
        return
    assert (key.steps - shares.steps) * shares.following >= wanted
    for step in range(key.steps if key.columns_first else 0):
        # What a step reads was fetched before it, or before the kernel.
        chunks = step // (key.steps // key.chunks) + 1
        fetched = shares.start + min(step, shares.steps) * shares.own
        assert fetched >= min(nbytes, chunks * chunk)


def test_what_is_fetched_before_a_kernel_begins() -> None:
    wide, narrow = key_of(49, 2048, 2048), key_of(784, 512, 128)
    assert wide.columns_first
    assert not narrow.columns_first
    assert first_bytes(narrow, 512 * 128) == 512 * 128  # all: every strip reads it
    assert FIRST_LEAST <= first_bytes(wide, 2048 * 2048) <= FIRST_MOST
    assert first_bytes(narrow, 1 << 30) == FIRST_MOST


@pytest.mark.parametrize(("pixels", "lines"), [(1, 0), (49, 4), (3136, 1)])
def test_lines_of_a_turn(pixels: int, lines: int) -> None:
    key = key_of(pixels, 512, 512)
    assert lines_per_turn(key) == lines
    assert generate(key).listing.count("prefetcht1") % max(lines, 1) == 0
    assert ("prefetcht1" in generate(key).listing) == bool(lines)
