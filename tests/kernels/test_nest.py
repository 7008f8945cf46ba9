"""The loop nest's parts: names, index arithmetic, partial loads and stores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import TIERS, Case
from tests.kernels.emulation import fine_grid, lower
from vnnigen.errors import EmulatorError, ShapeError
from vnnigen.isa import tiers
from vnnigen.isa.assembler import Arg, Assembler, Mem
from vnnigen.isa.emulator import Emulator
from vnnigen.isa.memory import Memory
from vnnigen.kernels.emit_common import add_const, counted, div_const, load_bytes, set_mask, store_bytes

AVX2 = tiers.tier("avx2").features


@pytest.mark.parametrize(
    ("tier", "case", "name"),
    [
        ("avx512_vnni", Case((1000, 64), (512, 64)), r"gemm-u8s8u8-\d+x\d+-avx512_vnni"),
        ("avx512", Case((1000, 64), (512, 64), src="s8", out="f32"), r"gemm-s8s8f32-\d+x\d+-avx512-exact"),
        ("avx512", Case((1000, 64), (512, 64), weights="safe"), r"gemm-u8s8u8-\d+x\d+-avx512-fast"),
        ("avx_vnni", Case((1, 9, 9, 3), (8, 3, 3, 3), out="s32"), r"conv-u8s8s32-\d+x8-avx_vnni"),
        ("avx2", Case((9, 3), (8, 3), src="f32", out="f32"), r"gemm-f32-\d+x8-avx2"),
    ],
)
def test_a_name_says_what_the_kernel_is(tier: str, case: Case, name: str) -> None:
    import re

    key = lower(case.operator("reference"), case.x, case.src, tier).keys[0]
    assert re.fullmatch(name, key.name), key.name
    tile = f"-{key.blocking.mr}x{key.blocking.nr * key.tier.lanes}-"
    assert tile in key.name


@pytest.mark.parametrize("tier", TIERS)
def test_keys_do_not_depend_on_values(tier: str) -> None:
    """Layers of one shape share a kernel: scales, biases and weights are data."""

    def keys(seed: int) -> Any:
        case = Case((7, 9), (20, 9), bias="f32", x_zp=seed, y_zp=seed, weights="safe", seed=seed)
        return lower(case.operator("reference"), case.x, "u8", tier).keys

    assert keys(1) == keys(2) == keys(3)
    assert hash(keys(1)) == hash(keys(2))


def run(build: Any, *args: int, memory: Memory | None = None, features: frozenset[str] = AVX2) -> None:
    a = Assembler("test", args=[Arg(n, "i64") for n in ("p", "q", "r")], features=features)
    build(a, *(a.load_argument(n) for n in ("p", "q", "r")))
    a.ret()
    Emulator(a.finalize().encode(), memory or Memory()).call(*args)


@settings(deadline=None, max_examples=60)
@given(divisor=st.integers(1, 2**16), limit=st.integers(1, 2**16), data=st.data())
def test_division_by_a_constant(divisor: int, limit: int, data: st.DataObject) -> None:
    if divisor * limit >= 1 << 32:
        with pytest.raises(ShapeError, match="too many"):
            run(lambda a, p, q, r: div_const(a, q, p, divisor, limit), 0, 0, 0)
        return
    edge = [v for v in (0, limit - 1, divisor - 1, divisor, (limit - 1) // divisor * divisor) if v < limit]
    for value in (*edge, data.draw(st.integers(0, limit - 1))):
        memory = Memory()
        out = memory.map("out", np.zeros(1, np.int64), writable=True)

        def build(a: Assembler, p: Any, q: Any, r: Any) -> None:
            div_const(a, q, p, divisor, limit)
            a.mov(Mem(r), q)

        run(build, value, 0, out, memory=memory)
        assert memory.array("out")[0] == value // divisor


@pytest.mark.parametrize("count", range(1, 17))
def test_partial_loads_and_stores_touch_nothing_else(count: int) -> None:
    for move in (load_bytes, store_bytes):
        memory = Memory()
        exact = np.arange(1, count + 1, dtype=np.uint8)
        whole = np.full(16, 0xEE, np.uint8)
        loads = move is load_bytes
        source = memory.map("source", exact if loads else np.arange(1, 17, dtype=np.uint8))
        target = memory.map("target", whole if loads else exact * 0, writable=True)

        def build(a: Assembler, p: Any, q: Any, _: Any, loads: bool = loads) -> None:
            v = a.xmm("v")
            if loads:
                load_bytes(a, v, Mem(p), count)
                a.vmovdqu(Mem(q), v)
            else:
                a.vmovdqu(v, Mem(p))
                store_bytes(a, Mem(q), v, count)

        run(build, source, target, memory=memory)
        got = memory.array("target")
        assert np.array_equal(got[:count], exact)
        assert not got[count:].any()


def test_the_check_above_can_fail() -> None:
    """A store one byte too long is an error of the emulator."""
    memory = Memory()
    target = memory.map("target", np.zeros(4, np.uint8), writable=True)
    with pytest.raises(EmulatorError, match="target"):
        run(lambda a, p, q, r: store_bytes(a, Mem(p), a.xmm(), 5), target, memory=memory)


@pytest.mark.parametrize("count", [1, 15, 16, 31, 32, 63])
def test_masks(count: int) -> None:
    memory = Memory()
    out = memory.map("out", np.zeros(1, np.uint64), writable=True)

    def build(a: Assembler, p: Any, q: Any, _: Any) -> None:
        k = a.kreg()
        set_mask(a, k, count, q)
        a.kmovq(q, k)
        a.mov(Mem(p), q)

    run(build, out, memory=memory, features=tiers.tier("avx512").features)
    assert int(memory.array("out")[0]) == (1 << count) - 1


@pytest.mark.parametrize("count", [1, 2, 7])
def test_counted_runs_its_body_as_often_as_told(count: int) -> None:
    memory = Memory()
    out = memory.map("out", np.zeros(1, np.int64), writable=True)

    def build(a: Assembler, p: Any, q: Any, r: Any) -> None:
        a.mov(r, 100)
        with counted(a, q, count):
            add_const(a, r, -3)
            add_const(a, r, 5)
            add_const(a, r, 0)
        a.mov(Mem(p), r)

    run(build, out, memory=memory)
    assert memory.array("out")[0] == 100 + 2 * count


def test_too_many_steps_are_an_error_of_ours() -> None:
    """A grid beyond the index arithmetic is refused with a message, not miscomputed."""
    with fine_grid(1):
        key = lower(Case((1, 1), (1, 1)).operator("reference"), (1, 1), "u8", "avx512_vnni").keys[0]
    # As many images as fit an index, of as many strips: more than the division of the index can tell apart.
    g = replace(key.g, images=2**20, oh=2**14 * key.blocking.strip)
    with pytest.raises(ShapeError, match="too many"):
        replace(key, g=g).build(None)


@pytest.mark.parametrize("tier", TIERS)
def test_scratch_is_only_asked_for_where_rows_are_copied(tier: str) -> None:
    plain = lower(Case((5, 64), (9, 64), weights="safe").operator("reference"), (5, 64), "u8", tier).keys[0]
    assert (plain.scratch, plain.blocking.copy) == (0, False)
    tail = lower(Case((5, 63), (9, 63), weights="safe").operator("reference"), (5, 63), "u8", tier).keys[0]
    assert tail.scratch > 5 * 63
