"""Packing: where every weight and constant lies, and what the start values make of zero points."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import Case, random_numbers, seeded
from tests.kernels.emulation import lower
from vnnigen.kernels.layout import ARG_SLOTS, MAX_LAUNCHES, ConstLayout
from vnnigen.kernels.packing import Columns, aligned, k_order, pack_panels, start_values


@pytest.mark.parametrize("nbytes", [1, 63, 64, 65, 4096])
def test_aligned(nbytes: int) -> None:
    array = aligned(nbytes)
    assert array.nbytes == nbytes
    assert array.ctypes.data % 64 == 0
    assert not array.any()


@settings(deadline=None, max_examples=40)
@given(
    groups=st.integers(1, 3), ocg=st.integers(1, 5), icg=st.integers(1, 5), kh=st.integers(1, 3), kw=st.integers(1, 3),
    merged=st.booleans(),
)  # fmt: skip
def test_k_order_is_the_order_of_the_source(groups: int, ocg: int, icg: int, kh: int, kw: int, merged: bool) -> None:
    w = np.arange(groups * ocg * icg * kh * kw).reshape(groups * ocg, icg, kh, kw)
    runs = k_order(w, groups, merged)
    assert runs.shape == (groups, ocg, kh if merged else kh * kw, kw * icg if merged else icg)
    flat = runs.reshape(groups, ocg, kh, kw, icg)
    for g, o, i, y, x in np.ndindex(groups, ocg, icg, kh, kw):
        assert flat[g, o, y, x, i] == w[g * ocg + o, i, y, x]


@settings(deadline=None, max_examples=40)
@given(
    groups=st.integers(1, 3), columns=st.integers(1, 40), dwords=st.integers(1, 5), per=st.sampled_from((1, 2, 4)),
    lanes=st.sampled_from((8, 16)),
)  # fmt: skip
def test_panels(groups: int, columns: int, dwords: int, per: int, lanes: int) -> None:
    """`panel[group][panel][dword of K][column][K elements of the dword]`, zero where there is no column."""
    dtype: Any = {4: np.int8, 2: np.int16, 1: np.float32}[per]
    k = np.random.default_rng(columns).integers(1, 100, (groups, columns, dwords * per)).astype(dtype)
    packed = pack_panels(k, per, lanes)
    assert packed.ctypes.data % 64 == 0
    panels = -(-columns // lanes)
    view = packed.view(dtype).reshape(groups, panels, dwords, lanes, per)
    for g, c, d, e in np.ndindex(groups, panels * lanes, dwords, per):
        got = view[g, c // lanes, d, c % lanes, e]
        assert got == (k[g, c, d * per + e] if c < columns else 0)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_start_values_settle_zero_points(data: st.DataObject) -> None:
    """start + sum x'(w - zp?) [- zp * sum x'] = sum (x - x_zp)(w - w_zp) + bias, modulo 2**32."""
    k = data.draw(st.integers(1, 50))
    signed = data.draw(st.booleans())
    low, high = (-128, 127) if signed else (0, 255)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    x = rng.integers(low, high + 1, k)
    w = rng.integers(-128, 128, (3, k))
    w_zp = rng.integers(-128, 128, 3)
    x_zp = data.draw(st.integers(low, high))
    shift = data.draw(st.sampled_from((0, 128))) if signed else 0
    bias = rng.integers(-(2**20), 2**20, 3)
    folded = data.draw(st.booleans())
    columns = Columns(w.sum(axis=1)[None], w_zp[None], bias[None])
    start = start_values(columns, k=k, x_zp=x_zp, shift=shift, folded_zp=folded)[0].astype(np.int64)
    shifted = x + shift
    summed = (w - w_zp[:, None]) @ shifted if folded else w @ shifted - w_zp * shifted.sum()
    want = (w - w_zp[:, None]) @ (x - x_zp) + bias
    assert np.array_equal((start + summed) & 0xFFFFFFFF, want & 0xFFFFFFFF)


@pytest.mark.parametrize("columns", [8, 16, 24, 400])
def test_constants_do_not_overlap(columns: int) -> None:
    lay = ConstLayout(columns)
    starts = [lay.pad, lay.zero_point, lay.scalars, lay.init, lay.m, lay.b, lay.w_zp, lay.size]
    sizes = [64, 64, 4 * 64, *[4 * columns] * 4]
    for start, size, following in zip(starts, sizes, starts[1:], strict=False):
        assert start + size <= following
    assert lay.size == lay.w_zp + 4 * columns + 64


def test_arguments_fit_the_native_descriptor() -> None:
    from vnnigen.runtime import native

    assert native.lib.VG_MAX_ARGS >= ARG_SLOTS
    assert native.lib.VG_MAX_LAUNCH >= MAX_LAUNCHES


@pytest.mark.parametrize("tier", ["avx512_vnni", "avx512", "avx_vnni", "avx2"])
def test_packing_does_not_depend_on_the_spatial_size(tier: str) -> None:
    """One set of panels serves every input shape of a handle."""
    dense = Case((1, 9, 9, 6), (20, 6, 3, 3), padding=1)
    for shape in (dense, replace(dense, x=(1, 9, 9, 20), w=(20, 1, 3, 3), groups=20)):
        case = random_numbers(shape, seeded(2), "u8")
        op = case.operator("reference")
        packed = lower(op, case.x, "u8", tier).packed
        for size in ((1, 3, 3), (2, 1, 40), (1, 30, 2), (1, 60, 60)):
            keys = packed.keys_for(op._geometry(op._problem((*size, case.x[3]), "u8")))
            again = lower(op, (*size, case.x[3]), "u8", tier)
            assert keys == again.keys
            for old, new in zip(packed.runs, again.packed.runs, strict=True):
                assert np.array_equal(old.weights, new.weights)
                assert np.array_equal(old.consts, new.consts)
