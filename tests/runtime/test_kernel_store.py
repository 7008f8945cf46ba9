"""The kernel cache on disk: what it gives is what was generated, and nothing else is ever executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vnnigen as v
from vnnigen.errors import VnnigenError
from vnnigen.kernels.layout import ARG_SLOTS
from vnnigen.runtime import codemem, compiled, kernel_store, user_cache
from vnnigen.runtime.cache import KernelCache
from vnnigen.runtime.dispatch import candidates
from vnnigen.runtime.kernel_store import KernelCacheWarning

W = np.arange(3 * 5 * 2 * 2, dtype=np.int8).reshape(3, 5, 2, 2) % 7 - 3
X = np.arange(2 * 6 * 6 * 5, dtype=np.uint8).reshape(2, 6, 6, 5) % 11


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that has generated nothing yet."""
    monkeypatch.setenv("VNNIGEN_KERNEL_CACHE", "on")
    monkeypatch.setenv("VNNIGEN_CACHE_DIR", str(tmp_path))
    start_anew(monkeypatch)
    return tmp_path / "kernels-v1"


def start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has generated is forgotten."""
    monkeypatch.setattr(compiled, "_CACHE", KernelCache())


def convolve() -> Any:
    return v.Conv2dInt8(W, out_dtype=np.int32)


def result() -> Any:
    return convolve()(X)


needs_kernels = pytest.mark.skipif(not set(candidates("int8")) & set(v.tiers()), reason="no generated tier here")


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.exists() else []


@needs_kernels
def test_the_second_start_generates_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = result()
    (file,) = entries(folder)
    assert file.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    start_anew(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "generate", None)
        conv = convolve()
        np.testing.assert_array_equal(conv(X), first)
    found = conv.explain(X.shape)
    assert "loaded from the cache on disk in" in str(found)
    assert found.to_dict()["kernels"][0]["from_disk"]
    assert found.listing().count("v") > 1  # generated anew for whoever wants to read it
    np.testing.assert_array_equal(first, v.Conv2dInt8(W, out_dtype=np.int32, isa="reference")(X))


@needs_kernels
def test_what_is_stored_is_what_was_generated(folder: Path) -> None:
    plan = convolve()
    plan(X)
    (key,) = compiled._CACHE._futures
    place = kernel_store.path_of(key)
    assert place is not None
    found, code = kernel_store.load(*place), compiled.generate(key)
    assert found is not None
    assert (found.name, found.data, found.entry, found.features) == (code.name, code.data, code.entry, code.features)


@needs_kernels
def test_off_neither_reads_nor_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VNNIGEN_KERNEL_CACHE", "off")
    result()
    assert entries(folder) == []
    monkeypatch.setenv("VNNIGEN_KERNEL_CACHE", "sometimes")
    start_anew(monkeypatch)
    with pytest.raises(VnnigenError, match="VNNIGEN_KERNEL_CACHE='sometimes' is not one of off, on"):
        result()


@needs_kernels
def test_a_dump_is_of_generated_code(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result()
    start_anew(monkeypatch)
    monkeypatch.setenv("VNNIGEN_DUMP_DIR", str(tmp_path / "dump"))
    result()
    (listing,) = (tmp_path / "dump").glob("*.lst")
    assert len(listing.read_text()) > 1000


def damaged(data: bytes) -> dict[str, bytes]:
    """What may be found in place of an entry."""
    flipped = bytearray(data)
    flipped[-1] ^= 1
    head = len(kernel_store.MAGIC) + 32
    return {
        "empty": b"",
        "not ours": b"\x7fELF" + data,
        "cut": data[:-1],
        "only the magic": data[: len(kernel_store.MAGIC)],
        "a flipped bit": bytes(flipped),
        "longer": data + b"\x90",
        "too long": data.ljust(kernel_store.MAX_KERNEL + 1),
        "no head": sealed(b""),
        "a long head": sealed(b"\xff\xff\xff\xff{}"),
        "a head that is no object": sealed(b"\2\0\0\0[]"),
        "a deep head": sealed((100_000).to_bytes(4, "little") + b"[" * 100_000),
        "not JSON": sealed(data[head : head + 40]),
    }


def sealed(rest: bytes) -> bytes:
    """A file with a right checksum."""
    return kernel_store.MAGIC + kernel_store.hashlib.sha256(rest).digest() + rest


@needs_kernels
@pytest.mark.parametrize("how", list(damaged(b"x" * 200)))
def test_a_damaged_entry_is_replaced(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = result()
    (file,) = entries(folder)
    whole = file.read_bytes()
    file.write_bytes(damaged(whole)[how])
    start_anew(monkeypatch)
    with pytest.warns(KernelCacheWarning, match=r"stored kernel .* is ignored"):
        np.testing.assert_array_equal(result(), first)
    assert file.read_bytes() == whole


HEADS: dict[str, dict[str, Any]] = {
    "key": {"key": "another"}, "no key": {"key": None}, "entry": {"entry": 1 << 40}, "negative entry": {"entry": -1},
    "an entry that is no number": {"entry": True}, "features": {"features": "avx2"}, "a feature": {"features": [[]]},
    "name": {"name": 3},
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("how", HEADS)
def test_a_head_is_checked(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = result()
    (file,) = entries(folder)
    rest = file.read_bytes()[len(kernel_store.MAGIC) + 32 :]
    length = int.from_bytes(rest[:4], "little")
    head = json.dumps(json.loads(rest[4 : 4 + length]) | HEADS[how]).encode()
    file.write_bytes(sealed(len(head).to_bytes(4, "little") + head + rest[4 + length :]))
    start_anew(monkeypatch)
    with pytest.warns(KernelCacheWarning, match="another kernel|head is damaged"):
        np.testing.assert_array_equal(result(), first)


@needs_kernels
def test_another_generator_has_other_entries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result()
    start_anew(monkeypatch)
    monkeypatch.setattr(user_cache, "generator", lambda: "another")
    result()
    assert len(entries(folder)) == 2


@needs_kernels
@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "writable by others", "of another user"])
def test_a_file_that_others_could_have_written_is_not_executed(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = result()
    (file,) = entries(folder)
    if kind == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "writable by others":
        file.chmod(0o666)
    elif kind == "of another user":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        file.unlink()
        os.mkfifo(file) if kind == "fifo" else file.mkdir()
    start_anew(monkeypatch)
    with pytest.warns(KernelCacheWarning, match=r"symbolic|not a file|others may write|belongs to user"):
        np.testing.assert_array_equal(result(), first)


@needs_kernels
def test_features_are_asked_for_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result()
    start_anew(monkeypatch)
    find = kernel_store.load

    def found(path: Path, text: str) -> kernel_store.StoredCode:
        code = find(path, text)
        assert code is not None
        return replace(code, features=frozenset({"amx_complex_never"}))

    monkeypatch.setattr(kernel_store, "load", found)
    with pytest.raises(v.ISAError, match="amx_complex_never"):
        result()


@needs_kernels
def test_a_folder_that_cannot_be_written_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_text("in the way")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = result()
    np.testing.assert_array_equal(first, result())
    monkeypatch.delenv("VNNIGEN_CACHE_DIR")
    monkeypatch.setattr(user_cache, "root", lambda: None)
    start_anew(monkeypatch)
    np.testing.assert_array_equal(first, result())


def test_the_folder_stays_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_store, "MAX_FILES", 16)
    monkeypatch.setattr(kernel_store, "MAX_BYTES", 20_000)
    save = kernel_store._Writer().save
    code = RawCode("k", b"\xc3" * 800, 0)
    for i in range(60):
        save(folder / f"{i}.bin", f"key {i}", code)  # type: ignore[arg-type]
        os.utime(folder / f"{i}.bin", (i, i))
        if i % 5 == 0:
            os.utime(folder / "0.bin", (i, i))
        assert len(entries(folder)) <= 17
    names = {p.name for p in entries(folder)}
    assert "59.bin" in names
    assert "0.bin" in names  # it was used all the time
    assert "1.bin" not in names
    monkeypatch.setattr(kernel_store, "MAX_BYTES", 3000)
    kernel_store._Writer().save(folder / "new.bin", "new", code)  # type: ignore[arg-type]
    assert len(entries(folder)) == 2


def test_a_kernel_beyond_all_sizes_is_not_kept(folder: Path) -> None:
    kernel_store.save(folder / "a.bin", "a", RawCode("k", bytes(kernel_store.MAX_KERNEL), 0))  # type: ignore[arg-type]
    assert entries(folder) == []


@dataclass(frozen=True)
class RawCode:
    name: str
    data: bytes
    entry: int
    features: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Part:
    size: int
    how: Any = None


def test_equal_keys_have_equal_texts_in_every_process(folder: Path) -> None:
    def text(value: Any) -> str:
        return kernel_store._text(value)

    assert text(Part(1)) != text(Part(2))
    assert text(Part(1)) != text((1, None))
    assert text((1, (2,))) != text(((1, 2),))
    assert text(("a", "b")) != text(("a','b",))
    assert text(True) != text(1) != text("1")
    assert text(frozenset({"b", "a"})) == text(frozenset({"a", "b"}))
    assert text(Part(1, codemem.load)) == f"{__name__}.Part(size=1,how=vnnigen.runtime.codemem.load)"
    assert kernel_store.path_of(Part(1, object())) is None  # never kept
    assert ARG_SLOTS < 64


PROCESS = """
import numpy as np, sys, vnnigen as v
from vnnigen.runtime import compiled
for oc in range(1, 12):
    w = (np.arange(oc * 20) % 7 - 3).astype(np.int8).reshape(oc, 5, 2, 2)
    x = (np.arange(180) % 11).astype(np.uint8).reshape(1, 6, 6, 5)
    y = v.Conv2dInt8(w, out_dtype=np.int32)(x)
    assert np.array_equal(y, v.Conv2dInt8(w, out_dtype=np.int32, isa="reference")(x))
print(sum(f.result().stored for f in compiled._CACHE._futures.values()), len(compiled._CACHE))
"""


def run_process(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"VNNIGEN_CACHE_DIR": str(tmp_path), "VNNIGEN_KERNEL_CACHE": "on"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(PROCESS)],
        env=env, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip


@needs_kernels
def test_processes_share_the_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(run_process, tmp_path) for _ in range(3)]:
            done.result()
    stored, kernels = map(int, run_process(tmp_path).stdout.split())
    assert stored == kernels > 1
    assert not list((tmp_path / "kernels-v1").glob("*.tmp"))


@needs_kernels
def test_threads_share_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = result()
    start_anew(monkeypatch)
    start = threading.Barrier(4)

    def work(_: int) -> Any:
        start.wait()
        return result()

    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(r, first) for r in pool.map(work, range(4)))
