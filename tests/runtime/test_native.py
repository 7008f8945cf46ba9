from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.helpers import (
    FILL_SCRATCH,
    INEXACT,
    STORE_INDEX,
    STORE_MXCSR,
    STORE_SCRATCH,
    Kernel,
    Launch,
    RawCode,
    address,
    ffi,
    lib,
    x86_only,
)
from vnnigen.errors import VnnigenError
from vnnigen.runtime import native
from vnnigen.runtime.codemem import load


@x86_only
def test_cpuid_agrees_with_the_kernel() -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    _, ebx, ecx, edx = native.cpuid(0)
    vendor = b"".join(r.to_bytes(4, "little") for r in (ebx, edx, ecx)).decode()
    assert vendor in cpuinfo
    flags = next(line for line in cpuinfo.splitlines() if line.startswith("flags")).split()
    assert (native.cpuid(1)[2] >> 28 & 1 and native.xgetbv(0) & 6 == 6) == ("avx" in flags)


def test_cpuid_of_a_leaf_that_does_not_exist() -> None:
    assert native.cpuid(0x7FFF_0000) == (0, 0, 0, 0)


def test_amx_permission_is_stable() -> None:
    assert native.amx_permission() == native.amx_permission()


@pytest.mark.parametrize(
    ("code", "words"),
    [(lib.VG_NO_SCRATCH, "scratch"), (lib.VG_BAD_CALL, "descriptor"), (-errno.EACCES, "refused")],
)
def test_check_says_what_failed(code: int, words: str) -> None:
    with pytest.raises(VnnigenError, match=words):
        native.check(code)


def test_check_passes_success() -> None:
    native.check(lib.VG_OK)


def test_arguments_template_and_dynamic_words() -> None:
    seen = []
    kernel = Kernel([Launch(lambda a, i, s: seen.append([a[j] for j in range(5)]), 1)], [1, 2, 3, 4, 5])
    assert kernel.call([10, 20, 30]) == 0
    assert kernel.call([]) == 0
    assert lib.vg_call2(kernel.k, ffi.cast("void *", 7), ffi.cast("void *", 8), 1) == 0
    assert seen == [[10, 20, 30, 4, 5], [1, 2, 3, 4, 5], [7, 8, 3, 4, 5]]
    assert [kernel.k.args[j] for j in range(5)] == [1, 2, 3, 4, 5]


def test_launches_run_in_order() -> None:
    seen = []
    launches = [Launch(lambda a, i, s, tag=tag: seen.append((tag, i)), 3) for tag in range(4)]
    assert Kernel(launches).call() == 0
    assert seen == [(tag, i) for tag in range(4) for i in range(3)]


def test_count_zero_runs_nothing() -> None:
    seen: list[int] = []
    for nthreads in (1, 4):
        assert Kernel([Launch(lambda a, i, s: seen.append(i), 0)]).call(nthreads=nthreads) == 0
    assert seen == []


@pytest.mark.parametrize(("field", "value"), [("n_launch", 5), ("n_launch", -1), ("n_args", 65), ("n_args", -1)])
def test_bad_counts_are_refused(field: str, value: int) -> None:
    kernel = Kernel([])
    setattr(kernel.k, field, value)
    assert kernel.call() == lib.VG_BAD_CALL
    assert lib.vg_call2(kernel.k, ffi.NULL, ffi.NULL, 1) == lib.VG_BAD_CALL


@pytest.mark.parametrize("n_dyn", [-1, 65])
def test_bad_dynamic_count_is_refused(n_dyn: int) -> None:
    assert lib.vg_call(Kernel([]).k, n_dyn, ffi.new("int64_t[80]"), 1) == lib.VG_BAD_CALL


@x86_only
@pytest.mark.parametrize("nthreads", [1, 3])
@pytest.mark.parametrize("callers", [0x1F80, 0x9FC0, 0x7F80])  # default; FTZ+DAZ; round toward zero
def test_mxcsr_is_set_for_kernels_and_restored(callers: int, nthreads: int) -> None:
    code = load(RawCode("mxcsr", STORE_MXCSR))
    out = np.zeros(300, np.uint32)
    kernel = Kernel([Launch(code.address, len(out))])
    dyn = ffi.new("int64_t[1]", [address(out)])
    lib.vg_set_mxcsr(callers)
    try:
        assert lib.vg_call(kernel.k, 1, dyn, nthreads) == 0
        after = lib.vg_get_mxcsr()
    finally:
        lib.vg_set_mxcsr(0x1F80)
    # The low six bits are flags that f32 kernels before this one may have raised in a thread of the pool.
    assert set((out & ~np.uint32(0x3F)).tolist()) == {0x1F80}
    assert after == callers


@x86_only
def test_sticky_flags_of_a_kernel_stay_inside() -> None:
    code = load(RawCode("inexact", INEXACT))
    kernel = Kernel([Launch(code.address, 1)])
    lib.vg_set_mxcsr(0x1F80)
    lib.vg_call2(kernel.k, ffi.NULL, ffi.NULL, 1)
    assert lib.vg_get_mxcsr() == 0x1F80


@x86_only
@pytest.mark.parametrize("nthreads", [1, 4])
def test_scratch_is_aligned_large_enough_and_grows(nthreads: int) -> None:
    code = load(RawCode("fill", FILL_SCRATCH))
    out = np.zeros(64, np.int64)
    for size in (1, 64, 5000, 1 << 20, 3 << 20, 100):
        out[:] = 0
        # The code writes all of it: too small a block would hit the heap or unmapped memory.
        assert Kernel([Launch(code.address, len(out), size)]).call([address(out), size], nthreads) == 0
        assert (out != 0).all()
        assert (out % 64 == 0).all()
        assert len(set(out.tolist())) <= nthreads


@x86_only
def test_scratch_is_kept_between_calls() -> None:
    code = load(RawCode("scratch", STORE_SCRATCH))
    out = np.zeros(2, np.int64)
    for i, size in enumerate((200_000, 100)):
        Kernel([Launch(code.address, 1, size)]).call([address(out) + 8 * i])
    assert out[0] == out[1]


@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 1, 1 << 46])
def test_impossible_scratch_is_an_error(size: int) -> None:
    seen: list[int] = []
    code = Kernel([Launch(lambda a, i, s: seen.append(i), 2, size)]).call(nthreads=2)
    assert code == lib.VG_NO_SCRATCH
    assert seen == []


def test_nested_call_gets_other_scratch() -> None:
    scratches = []

    def note(args: object, index: int, scratch: object) -> None:
        scratches.append(int(ffi.cast("uintptr_t", scratch)))

    inner = Kernel([Launch(note, 1, 64)])

    def outer(args: object, index: int, scratch: object) -> None:
        note(args, index, scratch)
        assert inner.call() == 0
        assert inner.call() == 0

    assert Kernel([Launch(outer, 1, 64)]).call() == 0
    assert scratches[0] not in scratches[1:]
    assert inner.call() == 0
    assert scratches[3] == scratches[0]  # the thread's own block is free again


@x86_only
def test_call2_stores_through_dst() -> None:
    code = load(RawCode("store", STORE_INDEX))
    src = np.full(3, -1, np.int64)
    dst = np.full(3, -1, np.int64)
    kernel = Kernel([Launch(code.address, 3)])
    assert lib.vg_call2(kernel.k, ffi.from_buffer(src), ffi.from_buffer(dst), 1) == 0
    assert src.tolist() == [0, 1, 2]  # the code follows args[0]
    assert dst.tolist() == [-1, -1, -1]
