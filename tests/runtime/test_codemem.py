from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.helpers import STORE_INDEX, Kernel, Launch, RawCode, address, x86_only
from vnnigen.isa.assembler import Arg, Assembler, Mem
from vnnigen.runtime import codemem
from vnnigen.runtime.codemem import load, load_batch

PAGE = os.sysconf("SC_PAGESIZE")


def permissions(where: int) -> str | None:
    """Return the permissions of the mapping that holds an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, perms, *_ = line.split()
        low, high = (int(x, 16) for x in span.split("-"))
        if low <= where < high:
            return perms
    return None


def test_never_writable_and_executable() -> None:
    kernels = load_batch([RawCode(f"k{i}", bytes([0xC3]) * (1 + 700 * i)) for i in range(20)])
    for k in kernels:
        assert permissions(k.address) == "r-xp"
        assert permissions(k.address + k.size - 1) == "r-xp"


def test_a_batch_has_pages_of_its_own() -> None:
    first = load(RawCode("a", b"\xc3"))
    second = load(RawCode("b", b"\xc3"))
    assert first.address // PAGE != second.address // PAGE
    assert first.mapping.address % PAGE == 0


def test_batch_is_placed_in_order_and_aligned() -> None:
    codes = [RawCode("a", b"\x01" * 65, entry=64), RawCode("b", b"\x02" * 5), RawCode("c", b"\x03" * 64)]
    kernels = load_batch(codes)
    assert [k.name for k in kernels] == ["a", "b", "c"]
    assert [k.address - kernels[0].mapping.address for k in kernels] == [64, 128, 192]
    assert [k.size for k in kernels] == [1, 5, 64]


def test_empty_batch() -> None:
    assert load_batch([]) == []


@x86_only
def test_freed_only_when_no_kernel_of_the_batch_lives() -> None:
    first, second = load_batch([RawCode("a", STORE_INDEX), RawCode("b", STORE_INDEX)])
    start = first.mapping.address
    del first
    gc.collect()
    out = np.full(4, -1, np.int64)
    assert Kernel([Launch(second.address, 4)]).call([address(out)]) == 0
    assert out.tolist() == [0, 1, 2, 3]
    del second
    gc.collect()
    assert permissions(start) != "r-xp"


def test_perf_map(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(f"/tmp/perf-{os.getpid()}.map")
    monkeypatch.setenv("VNNIGEN_PERF", "1")
    try:
        k = load(RawCode("gemm-test", b"\x00" * 64 + b"\xc3" * 3, entry=64))
        assert f"{k.address:x} 3 gemm-test" in path.read_text().splitlines()
    finally:
        path.unlink(missing_ok=True)


def test_no_perf_map_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VNNIGEN_PERF", "0")
    load(RawCode("quiet", b"\xc3"))
    assert not Path(f"/tmp/perf-{os.getpid()}.map").exists()


def test_dump(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dump"
    monkeypatch.setenv("VNNIGEN_DUMP_DIR", str(folder))
    load(RawCode("conv/3x3", b"\xc3", listing="ret"))
    load(RawCode("conv/3x3", b"\xc3", listing="ret"))  # the same again: no second file
    load(RawCode("conv/3x3", b"\x90\xc3", listing="nop\nret"))
    assert sorted(p.name for p in folder.iterdir()) == [
        "conv_3x3-2.bin", "conv_3x3-2.lst", "conv_3x3.bin", "conv_3x3.lst",
    ]  # fmt: skip
    assert (folder / "conv_3x3.bin").read_bytes() == b"\xc3"
    assert (folder / "conv_3x3-2.lst").read_text() == "nop\nret"


@x86_only
def test_assembled_code_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VNNIGEN_DUMP_DIR", str(tmp_path))
    a = Assembler("add-constant", args=(Arg("args", "ptr"), Arg("index", "i64")))
    destination, value = a.gpr("destination"), a.gpr("value")
    a.mov(destination, Mem(a.load_argument("args"), 0))
    a.mov(value, a.const(np.array([40], np.int64)))
    index = a.load_argument("index")
    a.add(value, index)
    a.mov(Mem(destination, 0, index=index, scale=8), value)
    a.ret()
    code = a.finalize().encode()
    kernel = load(code)
    assert kernel.address % codemem.ALIGNMENT == 0
    out = np.zeros(3, np.int64)
    assert Kernel([Launch(kernel.address, 3)]).call([address(out)]) == 0
    assert out.tolist() == [40, 41, 42]
    assert (tmp_path / "add-constant.lst").read_text() == code.listing


def test_large_image_is_copied_whole() -> None:
    data = np.random.default_rng(1).integers(0, 256, 3 * PAGE + 17, np.uint8).tobytes()
    k = codemem.load(RawCode("big", data))
    assert bytes(codemem.native.ffi.buffer(codemem.native.ffi.cast("char *", k.address), len(data))) == data
