"""AMX kernels of all variants on the emulator: woven epilogues, split K, merged rows, skipped filter rows.

Every candidate of every case gives the same bits as the reference, with K written out and in loops of all kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import vnnigen as v
from tests.kernels.cases import Case, assert_same_bits, expected, out_shape
from tests.kernels.emulation import Emulated, emulate, fine_grid, lower
from vnnigen.errors import AssemblerError
from vnnigen.isa.assembler import Assembler
from vnnigen.kernels import amx, amx_block, amx_tiling
from vnnigen.kernels.amx_block import weave
from vnnigen.kernels.amx_key import AmxKey
from vnnigen.kernels.amx_tiling import Variant
from vnnigen.runtime.compiled import generate

TIERS = {"u8": "amx_int8", "s8": "amx_int8", "bf16": "amx_bf16"}


@pytest.fixture
def all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show every ranked block, not only the best."""
    monkeypatch.setattr(amx, "TILES", 1000)


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split K as if the L1 cache held little."""
    monkeypatch.setattr(amx_tiling, "L1_ROOM", 4096)


def candidates(case: Case) -> list[AmxKey]:
    op = case.operator("reference")
    low = lower(op, case.x, case.src, TIERS[case.src])
    found: list[AmxKey] = []

    def pick(keys: Any, _run: Any) -> int:
        found.extend(keys)
        return 0

    low.packed.keys_for(op._geometry(op._problem(case.x, case.src)), pick)  # type: ignore[arg-type]
    return found


def run(case: Case, keys: Sequence[AmxKey], *, in_place: bool = False) -> list[Emulated]:
    """Run candidates and compare each with what must come out."""
    op = case.operator("reference")
    x = case.source()
    want = expected(case, op, x, case.tensors(out_shape(op, case)))
    low = lower(op, case.x, case.src, TIERS[case.src])
    results = []
    for key in keys:
        one = replace(low, keys=(key,), codes=(generate(key),))
        tensors = case.tensors(out_shape(op, case))
        got = emulate(one, x, want.dtype, tensors, skew=case.seed % 5, in_place=in_place)
        assert_same_bits(got.y, want, (case, key.blocking))
        results.append(got)
    return results


def run_all(case: Case, variant: Variant | None = None, *, in_place: bool = False) -> int:
    """Run every candidate (of a variant); how many there were."""
    keys = [key for key in candidates(case) if variant is None or variant in key.variant]
    return len(run(case, keys, in_place=in_place))


PLAIN: dict[str, Any] = {}
SUM: dict[str, Any] = {"post_ops": lambda: (v.Sum(0.7), v.ReLU()), "sums": ("u8",)}


# --- the mixture of two streams ---------------------------------------------------------------------------


def test_weaving_keeps_both_orders_and_spreads_evenly() -> None:
    main, side = list(range(10)), [f"s{i}" for i in range(25)]
    mixed: list[Any] = weave(main, side)  # type: ignore[arg-type]
    assert [m for m in mixed if isinstance(m, int)] == main
    assert [m for m in mixed if isinstance(m, str)] == side
    gaps = [sum(isinstance(m, str) for m in mixed[mixed.index(i) : mixed.index(i + 1)]) for i in range(9)]
    assert set(gaps) == {2, 3}
    assert weave(main, []) == main  # type: ignore[arg-type, comparison-overlap]


def test_instructions_set_aside_come_back_where_they_are_put() -> None:
    a = Assembler("aside")
    r = a.gpr("r")
    with a.aside() as taken:
        a.mov(r, 1)
        a.add(r, 2)
    a.mov(r, 3)
    a.put(taken)
    a.ret()
    listing = a.finalize().encode().listing
    assert listing.index("rax, 3") < listing.index("rax, 1") < listing.index("add rax")
    with pytest.raises(AssemblerError, match="cannot hold a label"), a.aside():
        a.bind(a.label("here"))


def test_the_epilogue_runs_between_the_products_of_the_next_block() -> None:
    case = Case((64, 1024), (64, 1024), bias="f32", post_ops=lambda: (v.ReLU(),))
    key = candidates(case)[0]
    assert not key.stores_late
    text = generate(key).listing
    steady = text[text.index(", finish the last") : text.index("finish the last block")]
    mnemonics = [word for line in steady.splitlines() for word in line.split() if word in ("tdpbusd", "vfmadd213ps")]
    products = [i for i, word in enumerate(mnemonics) if word == "tdpbusd"]
    between = mnemonics[products[0] : products[-1]]
    assert between.count("vfmadd213ps") > 0.6 * mnemonics.count("vfmadd213ps") > 0


def test_sums_of_few_steps_are_stored_between_products() -> None:
    case = Case((64, 320), (64, 320), bias="f32", post_ops=lambda: (v.ReLU(),))
    key = candidates(case)[0]
    assert key.stores_late
    text = generate(key).listing
    steady = text[text.index(", store, finish") : text.index("finish the last block but one")]
    words = ("tilestored", "tdpbusd", "vfmadd213ps")
    mnemonics = [word for line in steady.splitlines() for word in line.split() if word in words]
    tiles = [word for word in mnemonics if word != "vfmadd213ps"]
    accumulators = mnemonics.count("tilestored")
    assert tiles[: 2 * accumulators] == ["tilestored", "tdpbusd"] * accumulators
    assert mnemonics.count("vfmadd213ps") > 0


# --- blocks -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_candidates")
@pytest.mark.parametrize("rows", [3, 16, 32, 33, 49, 80, 97])
def test_one_two_and_odd_numbers_of_blocks(rows: int) -> None:
    for out, more in (("u8", PLAIN), ("f32", PLAIN), ("u8", SUM)):
        case = Case((rows, 70), (33, 70), src="s8", out=out, bias="f32", seed=rows, **more)
        assert run_all(case, in_place=more is SUM) > 4


@pytest.mark.usefixtures("all_candidates")
def test_candidates_of_convolutions() -> None:
    for case in (
        Case((1, 4, 35, 16), (70, 16, 3, 3), padding=1, x_zp=7, bias="s32"),
        Case((2, 5, 18, 64), (20, 64, 1, 1), stride=2, src="s8", out="s8"),
        Case((1, 7, 7, 32), (40, 16, 3, 3), padding=1, groups=2, x_zp=3),
        Case((1, 5, 5, 64), (33, 64, 3, 3), padding=1, x_zp=1, **SUM),
    ):  # fmt: skip
        assert run_all(case) > 4
    with fine_grid(1000, 1024):
        run_all(Case((2, 9, 18, 16), (40, 16, 3, 3), padding=1, x_zp=7))


# --- K in parts and loops ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_candidates", "small_cache")
@pytest.mark.parametrize("src", ["u8", "s8", "bf16"])
def test_split_k(src: str) -> None:
    more: dict[str, Any] = {"src": src, "bias": "f32"}
    more |= {"out": "f32", "weights": "small"} if src == "bf16" else {}
    for shape in ((16, 16, 512), (49, 70, 256), (7, 130, 192)):
        m, n, k = shape
        assert run_all(Case((m, k), (n, k), **more), Variant.SPLIT_K) > 0, shape
    with fine_grid(1000, 8192):
        assert run_all(Case((70, 192), (100, 192), **more), Variant.SPLIT_K) > 0


@pytest.fixture(params=[(1, 1), (2, 3), (5, 2)])
def short_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write out few steps of K only."""
    woven, looped = request.param
    monkeypatch.setattr(amx_block, "WOVEN_STEPS", woven)
    monkeypatch.setattr(amx_block, "LOOP_STEPS", looped)


@pytest.mark.usefixtures("short_loops")
@pytest.mark.parametrize("src", ["u8", "s8", "bf16"])
def test_k_in_loops(src: str) -> None:
    more: dict[str, Any] = {"src": src, "bias": "f32"}
    more |= {"out": "f32", "weights": "small"} if src == "bf16" else {"x_zp": 3}
    for case in (
        Case((40, 512), (40, 512), **more),
        Case((1, 5, 20, 64), (20, 64, 3, 3), padding=1, **more),
        Case((1, 8, 20, 64), (20, 64, 3, 3), padding=2, dilation=2, **more),
        Case((1, 6, 18, 256), (18, 128, 2, 2), groups=2, **more),
        Case((1, 9, 7, 128), (20, 128, 4, 1), padding=((1, 2), (0, 0)), **more),
    ):  # fmt: skip
        run(case, candidates(case)[:3])


# --- images -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_candidates")
@pytest.mark.parametrize("src", ["u8", "s8", "bf16"])
def test_merged_rows(src: str) -> None:
    more: dict[str, Any] = {"src": src}
    more |= {"out": "f32", "weights": "small"} if src == "bf16" else {"x_zp": 5}
    for case in (
        Case((1, 7, 7, 64), (20, 64, 3, 3), padding=1, **more),
        Case((2, 5, 6, 32), (33, 32, 3, 3), padding=1, bias="f32", **more),
        Case((1, 9, 14, 32), (16, 32, 1, 3), padding=((0, 0), (1, 1)), **more),
        Case((1, 11, 3, 16), (16, 16, 3, 3), padding=((2, 0), (0, 2)), **more),
    ):  # fmt: skip
        assert run_all(case, Variant.MERGED_ROWS) > 0
    with fine_grid(1000, 1024):
        assert run_all(case, Variant.MERGED_ROWS) > 0


@pytest.mark.usefixtures("all_candidates")
def test_merged_rows_in_place() -> None:
    case = Case((1, 7, 7, 64), (20, 64, 3, 3), padding=1, **SUM)
    assert run_all(case, Variant.MERGED_ROWS, in_place=True) > 0


def test_filter_rows_on_padding_are_not_multiplied() -> None:
    """Blocks of one row of outputs: the first and the last see two of three filter rows."""
    case = Case((1, 4, 32, 64), (16, 64, 3, 3), padding=1, x_zp=9)
    key = next(key for key in candidates(case) if key.blocking.th == 1)
    (got,) = run(case, [key])
    steps = key.steps_of_run.count * sum((2, 3, 3, 2))
    assert got.stats[0].counts["tdpbusd"] == steps * -(-32 // key.rows)


@pytest.mark.usefixtures("all_candidates")
def test_windows_that_see_only_padding() -> None:
    run_all(Case((1, 2, 20, 8), (16, 8, 2, 2), padding=((4, 3), (1, 1)), x_zp=200))


@pytest.mark.usefixtures("all_candidates", "small_cache")
def test_bf16_has_the_same_bits_whatever_the_blocking() -> None:
    """Sums that round: one order of K in all candidates, and NaN and infinity stay in their windows."""
    for case in (
        Case((35, 256), (40, 256), src="bf16", out="f32", weights="bf16"),
        Case((1, 6, 7, 32), (20, 32, 3, 3), src="bf16", out="bf16", weights="bf16", padding=1),
    ):
        op, x = case.operator("reference"), case.source()
        x.reshape(-1)[[5, 1000]] = np.nan, np.inf
        low = lower(op, case.x, case.src, TIERS["bf16"])
        results = set()
        for key in candidates(case):
            one = replace(low, keys=(key,), codes=(generate(key),))
            results.add(emulate(one, x, np.float32 if case.out == "f32" else x.dtype).y.tobytes())
        assert len(results) == 1


def test_rows_that_alias_go_through_scratch() -> None:
    """Rows 4096 bytes apart share one set of the L1 cache."""
    case = Case((32, 4096), (128, 4096), out="s32")
    key = candidates(case)[0]
    assert key.blocking.copy
    run(case, [key])
