"""Run int8 and bf16 kernels of the AMX tiers on this machine and compare them with the reference.

    python tools/amx_check.py [--repeats N]

For a processor with AMX, or Bochs (tools/amx_in_bochs.py); needs the tests' packages. Three things that an emulator
inside the process cannot show are looked at too: that the kernel grants tiles, that threads and forked children may use
them, and that no thread keeps tiles when a call has returned (XGETBV with ECX = 1, which reports the state components
in use: Intel SDM vol. 1, 13.2).
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vnnigen as v
from tests.kernels.cases import POST_OPS, Case, assert_same_bits, expected, out_shape
from tests.kernels.emulation import fine_grid
from tests.kernels.test_bf16 import assert_within_bound
from vnnigen.runtime import native

TILE_STATE = 0x60000  # XTILECFG and XTILEDATA

SHAPES = [
    Case((1, 64), (1, 64)),
    Case((16, 64), (16, 64)),
    Case((17, 128), (33, 128)),
    Case((31, 60), (15, 60)),
    Case((81, 320), (65, 320)),
    Case((200, 96), (160, 96)),
    Case((1, 5, 6, 4), (7, 4, 3, 3), padding=1),
    Case((1, 20, 21, 4), (18, 4, 7, 7), stride=2, padding=3),
    Case((2, 7, 7, 64), (40, 64, 3, 3), padding=((0, 2), (1, 0))),
    Case((1, 9, 37, 16), (20, 16, 3, 2), stride=(2, 3), dilation=(1, 2), padding=1),
    Case((2, 4, 18, 12), (36, 4, 2, 3), groups=3, padding=((0, 1), (1, 1))),
    Case((1, 3, 17, 128), (40, 64, 1, 3), groups=2),
    Case((1, 14, 14, 64), (48, 64, 1, 1)),
    Case((2, 37, 1, 64), (17, 64, 3, 1), stride=(2, 1)),
]
ODD = [Case((5, 3), (20, 3)), Case((33, 65), (49, 65)), Case((1, 9, 17, 3), (17, 3, 3, 3), padding=1, stride=2)]
CHAINS = ["none", "relu", "clip", "eltwise(gamma).acc(beta)", "sum-s8-relu", "four-sums"]


def int8_cases() -> list[Case]:
    """Every shape with u8 and s8 sources; types of output, zero points, biases and post-ops take turns."""
    cases = []
    for i, shape in enumerate(SHAPES + ODD):
        for j, src in enumerate(("u8", "s8")):
            at = 2 * i + j
            out = ("u8", "s8", "f32", "s32")[at % 4]
            chain, sums = POST_OPS["none" if out == "s32" else CHAINS[at % len(CHAINS)]]
            case = replace(
                shape, src=src, out=out, x_zp=(0, 77, 3)[at % 3], y_zp=10 if out in ("u8", "s8") else 0, seed=at,
                bias="s32" if at % 2 else None, post_ops=chain, sums=tuple(out if s == "out" else s for s in sums),
            )  # fmt: skip
            cases.append(case)
    return cases


def bf16_cases() -> list[Case]:
    """Every shape, with integers, whose sums are exact, and with numbers that round."""
    cases = []
    for i, shape in enumerate(SHAPES):
        out = ("f32", "bf16")[i % 2]
        chain, sums = POST_OPS[CHAINS[i % len(CHAINS)]]
        sums = tuple(out if s == "out" else s for s in sums)
        case = replace(shape, src="bf16", out=out, seed=i)
        cases.append(replace(case, weights="small", bias="f32", post_ops=chain, sums=sums))
        cases.append(case)
    return cases


def tiles_in_use() -> bool:
    """Tell whether this thread's tile registers hold anything."""
    return native.xgetbv(1) & TILE_STATE != 0


def check(case: Case, tier: str, repeats: int) -> None:
    """Compare `repeats` calls, alternately on one and two threads: int8 and exact sums bit for bit, others by bound."""
    reference, x = case.operator("reference"), case.source()
    tensors = case.tensors(out_shape(reference, case))
    strategy: dict[str, Any] = {"strategy": "tiles"} if case.src == "bf16" else {}
    op = case.operator(tier, **strategy)
    rounded = case.src == "bf16" and case.weights != "small"
    want = op(x) if rounded else expected(case, reference, x, tensors)
    if rounded:
        assert_within_bound(case, want, x, "tiles")
    for turn in range(repeats):
        v.set_num_threads(1 + turn // 2 % 2)
        assert_same_bits(op(x, tensors=tensors), want, (case, turn))
        assert not tiles_in_use(), (case, turn)
    kernels = op.explain().to_dict()["kernels"]
    assert {k["chain"] for k in kernels} == {"amx"}, kernels


def check_table(cases: list[Case], tier: str, repeats: int) -> int:
    """Check all cases, cut small every other time so that two threads have steps to share; return the failures."""
    failed = 0
    for i, case in enumerate(cases):
        try:
            if i % 4 < 2:
                with fine_grid(1000, 1024):
                    check(case, tier, repeats)
            else:
                check(case, tier, repeats)
        except Exception as e:
            failed += 1
            print(f"FAILED {tier} {case}: {type(e).__name__}: {e}", flush=True)
    print(f"{tier}: {len(cases) - failed} of {len(cases)} problems right, {repeats} calls each", flush=True)
    return failed


def states_within(nthreads: int) -> list[bool]:
    """What `tiles_in_use` says in sixteen units of a launch that has a tile configuration."""
    ffi, seen = native.ffi, []
    config = ffi.new("char[]", bytes([1, *[0] * 15, 64, *[0] * 31, 16, *[0] * 15]))  # tmm0: 16 rows of 64 bytes

    def unit(*_: Any) -> None:
        time.sleep(0.001)  # lets other threads take the next unit, and the kernel switch tiles
        seen.append(tiles_in_use())

    k, function = ffi.new("vg_kernel *"), ffi.callback("vg_fn", unit)
    k.n_launch, k.launch[0].fn, k.launch[0].count, k.launch[0].tile_config = 1, function, 16, config
    native.check(native.lib.vg_call(k, 0, ffi.NULL, nthreads))
    return seen


def check_release() -> None:
    """Every unit finds tiles loaded, on any thread; none are left behind."""
    for nthreads in (1, 2, 4):
        assert states_within(nthreads) == [True] * 16, nthreads
        assert not tiles_in_use()


def in_threads(body: Callable[[], None]) -> None:
    """Run `body` in four threads at once; raise what the first to fail raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            body()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


def check_threads(tier: str, src: str) -> None:
    """Four threads call at once, each switched out by the kernel with its tiles live."""
    case = Case((130, 256), (96, 256), src=src, out="f32", weights="small" if src == "bf16" else "full")
    reference, x = case.operator("reference"), case.source()
    want, op = expected(case, reference, x, ()), case.operator(tier)
    v.set_num_threads(2)

    def body() -> None:
        for _ in range(30):
            assert_same_bits(op(x), want, case)
            assert not tiles_in_use()

    in_threads(body)


def check_fork(tier: str, src: str) -> None:
    """A forked child has the permission and a pool of its own."""
    case = Case((40, 64), (40, 64), src=src, out="f32", weights="small" if src == "bf16" else "full")
    x, op = case.source(), case.operator(tier)
    v.set_num_threads(2)
    want, child = op(x), os.fork()
    if child == 0:
        os._exit(0 if all(np.array_equal(op(x), want) for _ in range(5)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def attempt(name: str, body: Callable[[], None]) -> int:
    """Run one check and say how it went; return 1 if it failed."""
    try:
        body()
    except Exception as e:
        print(f"FAILED {name}: {type(e).__name__}: {e}", flush=True)
        return 1
    print(f"{name}: right", flush=True)
    return 0


def main() -> int:
    """Run all checks; 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    missing = {"amx_int8", "amx_bf16"} - set(v.tiers())
    if missing:
        print(f"cannot check {', '.join(sorted(missing))}: this machine's tiers are {', '.join(v.tiers())}")
        return 2
    failed = attempt("tiles loaded and released", check_release)
    for tier, src, cases in (("amx_int8", "u8", int8_cases()), ("amx_bf16", "bf16", bf16_cases())):
        start = time.monotonic()
        failed += check_table(cases, tier, repeats)
        failed += attempt(f"{tier}: threads at once", lambda t=tier, s=src: check_threads(t, s))
        failed += attempt(f"{tier}: forked child", lambda t=tier, s=src: check_fork(t, s))
        print(f"{tier}: {time.monotonic() - start:.1f} s", flush=True)
    print("all right" if not failed else f"{failed} checks FAILED")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
