"""Tiles without code: pixels and K are covered once, blocks fit the registers, the cost model orders as it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vnnigen.kernels import amx_tiling
from vnnigen.kernels.amx import mergeable
from vnnigen.kernels.amx_tiling import (
    LATENCY,
    ROWS,
    TILE_REGISTERS,
    CostModel,
    Shape,
    Variant,
    aliased,
    cut_run,
    even_rows,
    k_parts,
    k_steps,
    plan_tiles,
    rank_tiles,
    row_tiles,
    run_elements,
)
from vnnigen.kernels.epilogue import EpilogueSpec
from vnnigen.kernels.geometry import Geometry, conv_geometry, gemm_geometry
from vnnigen.kernels.mac import AMX
from vnnigen.kernels.problem import ConvProblem, GemmProblem

U8 = EpilogueSpec("s32", (), False, "u8", False, False, True, True)


def model_of(g: Geometry, spec: EpilogueSpec = U8) -> CostModel:
    steps = cut_run(run_elements(g)[0], exact=False)
    assert steps is not None
    return CostModel(g, spec, 1, -(-g.n // 16), k_steps(g, steps), steps.size)


def conv(size: int, ic: int, oc: int, kernel: int, stride: int = 1) -> Geometry:
    pad = kernel // 2
    return conv_geometry(
        ConvProblem(1, size, size, ic, oc, kernel, kernel, stride=(stride, stride), pad=((pad, pad), (pad, pad)))
    )


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    if draw(st.booleans()):
        return gemm_geometry(
            GemmProblem(draw(st.integers(1, 400)), draw(st.integers(1, 200)), draw(st.integers(1, 3000)))
        )
    size, kernel, stride = st.integers(3, 70), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    pads = st.tuples(st.integers(0, 2), st.integers(0, 2))
    return conv_geometry(
        ConvProblem(
            draw(st.integers(1, 2)), draw(size), draw(size), draw(st.integers(1, 200)), draw(st.integers(1, 100)),
            kernel, kernel, stride=(stride, stride), pad=(draw(pads), draw(pads)),
        )
    )  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(g=geometries())
def test_ranked_blocks_fit_the_problem_and_the_registers(g: Geometry) -> None:
    model = model_of(g)
    ranked = rank_tiles(model, mergeable(g, AMX["u8"]) if g.padded else 0)
    assert [r.cost for r in ranked] == sorted(r.cost for r in ranked)
    assert len({(r.shape, r.variant) for r in ranked}) == len(ranked)
    for r in ranked:
        shape = r.shape
        assert 1 <= shape.th <= g.oh
        assert 1 <= shape.tw <= g.ow
        assert 1 <= shape.nr <= min(4, model.panels)
        assert 1 <= r.rows <= min(ROWS, shape.length(g))
        plan = plan_tiles(shape.down(g, r.rows), shape.nr)
        assert plan.accumulators + len(plan.source) + len(plan.weights) <= TILE_REGISTERS
        assert (Variant.MERGED_ROWS in r.variant) == (shape.pitch > 0)
        assert Variant.SPLIT_K not in r.variant or model.one_run
        # No estimate beats the multiplier: a product of 16 rows, 64 bytes and 16 columns takes 16 cycles.
        assert r.cost >= g.macs / (ROWS * 64)


@settings(deadline=None, max_examples=200)
@given(g=geometries(), data=st.data())
def test_tiles_cover_every_pixel_once(g: Geometry, data: st.DataObject) -> None:
    """Full blocks and tails; a tile that moves back stays in its line, one of merged rows reads on."""
    pitch = data.draw(st.sampled_from((0, g.padded_w))) if mergeable(g, AMX["u8"]) else 0
    th, tw = data.draw(st.integers(1, min(g.oh, 70))), g.ow if pitch else data.draw(st.integers(1, g.ow))
    full = Shape(th, tw, 1, pitch)
    rows = even_rows(full.length(g))
    for part in {full, replace(full, th=g.oh % th or th), replace(full, tw=g.ow % tw or tw)}:
        tiles = row_tiles(g, part, rows)
        assert len(tiles) <= part.down(g, rows)
        kept = [(y, x) for tile in tiles for _, y, x in tile.rows]
        assert sorted(kept) == [(y, x) for y in range(part.th) for x in range(part.tw)]
        for tile in tiles:
            assert len({row for row, _, _ in tile.rows}) == len(tile.rows)
            for row, y, x in tile.rows:
                assert 0 <= row < rows
                at = tile.pixel + row
                line, along = (0, y) if g.ow == 1 else (0, y * pitch + x) if pitch else (y, x)
                assert (tile.line, at) == (line, along)
            assert tile.pixel + rows <= part.length(g) + (rows if pitch else 0)
            assert tile.pixel >= (0 if pitch else part.length(g) - rows if part.length(g) < rows else 0)


@given(steps=st.integers(1, 500), size=st.integers(1, 9000))
def test_parts_of_k_follow_each_other(steps: int, size: int) -> None:
    parts = k_parts(steps, min(size, amx_tiling.L1_ROOM))
    assert parts[0][0] == 0
    assert [first + count for first, count in parts] == [*(first for first, _ in parts[1:]), steps]
    assert all(count >= 1 for _, count in parts)
    assert max(count for _, count in parts) - min(count for _, count in parts) <= 1
    assert len(parts) == 1 or steps * size > amx_tiling.L1_ROOM


@pytest.mark.parametrize(
    ("length", "rows"), [(1, 1), (7, 7), (16, 16), (17, 9), (28, 14), (49, 13), (56, 14), (64, 16)]
)
def test_tiles_of_even_height(length: int, rows: int) -> None:
    assert even_rows(length) == rows


def test_narrow_images_are_merged_where_that_is_cheaper() -> None:
    """49 outputs in 7 tiles of 7 rows wait for their sums; in merged rows of 9 pixels they are 4 tiles of 16."""
    small = rank_tiles(model_of(conv(7, 512, 512, 3)), pitch=9)[0]
    assert small.variant == Variant.MERGED_ROWS
    assert small.shape == Shape(7, 7, 1, 9)
    wide = rank_tiles(model_of(conv(14, 256, 256, 3)), pitch=16)[0]
    assert Variant.MERGED_ROWS not in wide.variant
    assert wide.rows == 14


def test_k_may_be_split_where_a_block_does_not_stay_in_the_cache() -> None:
    """A candidate for the tuner; not the first, as sums that wait cost more than operands from the L2 cache."""
    for g in (gemm_geometry(GemmProblem(*size)) for size in ((1024, 1024, 1024), (128, 768, 768))):
        ranked = rank_tiles(model_of(g))
        assert any(Variant.SPLIT_K in tiles.variant for tiles in ranked)
        assert Variant.SPLIT_K not in ranked[0].variant
    for g in (gemm_geometry(GemmProblem(64, 64, 64)), conv(56, 64, 64, 3), conv(56, 64, 256, 1)):
        assert all(Variant.SPLIT_K not in tiles.variant for tiles in rank_tiles(model_of(g)))


def test_taps_that_do_not_stay_in_the_cache_cost_more() -> None:
    """A filter row's taps read much the same source; with many channels it is gone before the next tap."""
    model = model_of(conv(28, 512, 512, 3))
    words = replace(model, element_bytes=2)
    square, tall = Shape(2, 14, 2), Shape(4, 14, 1)
    assert model.block(tall, 14, Variant(0)) == pytest.approx(model.block(square, 14, Variant(0)), rel=0.1)
    assert words.block(tall, 14, Variant(0)) > 1.1 * words.block(square, 14, Variant(0))


def test_block_costs_follow_their_bottlenecks() -> None:
    """Deep K waits for the multiplier, one step of K for the epilogue, few accumulators for the products' latency."""
    deep = model_of(conv(14, 256, 256, 3))
    block, rows = Shape(1, 28, 2), 14
    assert deep.block(block, rows, Variant(0)) < 1.2 * deep.steps * 4 * rows
    shallow = model_of(gemm_geometry(GemmProblem(3136, 256, 64)))
    costly = replace(shallow, spec=replace(U8, clamp_hi=True, add_zp=True))
    block = Shape(32, 1, 2)
    assert shallow.block(block, 16, Variant(0)) > 1.5 * 4 * 16
    assert costly.block(block, 16, Variant(0)) > shallow.block(block, 16, Variant(0))
    one = Shape(16, 1, 1)
    assert deep.block(one, 16, Variant(0)) >= deep.steps * (16 + LATENCY)


def test_rows_that_alias_are_copied() -> None:
    assert aliased(gemm_geometry(GemmProblem(64, 512, 4096)), 1, 16)
    assert not aliased(gemm_geometry(GemmProblem(64, 512, 1024)), 1, 16)
    assert not aliased(gemm_geometry(GemmProblem(64, 512, 4096)), 1, 12)  # one set holds these
    assert not aliased(gemm_geometry(GemmProblem(64, 16, 4096)), 1, 16)  # read once: nothing to gain
