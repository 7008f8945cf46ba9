"""Code memory: from encoded kernels to callable addresses.

A batch of kernels shares one mapping of whole pages. The mapping is written once while it is not
executable, then becomes readable and executable for good; it is unmapped when no kernel in it lives.

Two environment variables help to look inside: `VNNIGEN_PERF=1` writes `/tmp/perf-<pid>.map`, so that
`perf report` shows kernels by name; `VNNIGEN_DUMP_DIR=dir` writes `<name>.bin` and `<name>.lst` for each.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vnnigen.runtime import native

ALIGNMENT = 64  # of each kernel in its batch: a cache line, as the assembler assumes for its constants
_diagnostics = threading.Lock()


class MachineCode(Protocol):
    """What is needed of an encoded kernel (`vnnigen.isa.encode.Code`)."""

    @property
    def name(self) -> str:
        """The kernel's name."""

    @property
    def data(self) -> bytes:
        """Constants and instructions, position independent."""

    @property
    def entry(self) -> int:
        """Offset of the first instruction in `data`."""

    @property
    def listing(self) -> str:
        """Annotated assembly."""


class Mapping:
    """One executable mapping; unmapped when the last kernel that refers to it is gone."""

    def __init__(self, image: bytes) -> None:
        out = native.ffi.new("void **")
        native.check(native.lib.vg_code_new(image, len(image), out))
        self.address = int(native.ffi.cast("uintptr_t", out[0]))
        self.size = len(image)
        release = weakref.finalize(self, native.lib.vg_code_free, out[0], len(image))
        release.atexit = False  # other threads may still run kernels while the interpreter ends


@dataclass(frozen=True, eq=False)
class LoadedCode:
    """A kernel in executable memory. Keep this object for as long as `address` may be called."""

    name: str
    address: int
    size: int
    mapping: Mapping


def dump_folder() -> Path | None:
    """Where every kernel is to be dumped, if anywhere."""
    directory = os.environ.get("VNNIGEN_DUMP_DIR")
    return Path(directory) if directory else None


def load(code: MachineCode) -> LoadedCode:
    """Place one kernel in pages of its own; see `load_batch`."""
    return load_batch([code])[0]


def load_batch(codes: Sequence[MachineCode]) -> list[LoadedCode]:
    """Place several kernels in one mapping and return them in the same order.

    Raises VnnigenError if the operating system refuses executable memory.
    """
    if not codes:
        return []
    image = bytearray()
    starts = []
    for code in codes:
        image += b"\xcc" * (-len(image) % ALIGNMENT)
        starts.append(len(image))
        image += code.data
    mapping = Mapping(bytes(image))
    loaded = [
        LoadedCode(code.name, mapping.address + start + code.entry, len(code.data) - code.entry, mapping)
        for code, start in zip(codes, starts, strict=True)
    ]
    if os.environ.get("VNNIGEN_PERF", "0") not in ("", "0"):
        _write_perf_map(loaded)
    if (directory := dump_folder()) is not None:
        for code in codes:
            _dump(code, directory)
    return loaded


def _write_perf_map(loaded: Sequence[LoadedCode]) -> None:
    """Append to the map that perf looks for (tools/perf/Documentation/jit-interface.txt in Linux)."""
    lines = "".join(f"{k.address:x} {k.size:x} {k.name}\n" for k in loaded)
    # Anybody may write to /tmp: do not follow a link that waits there under the expected name.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with _diagnostics, open(os.open(f"/tmp/perf-{os.getpid()}.map", flags, 0o644), "a") as file:
        file.write(lines)


def _dump(code: MachineCode, directory: Path) -> None:
    """Write the bytes and the listing; kernels of the same name but other bytes get a number."""
    base = re.sub(r"[^\w.+-]", "_", code.name)
    with _diagnostics:
        directory.mkdir(parents=True, exist_ok=True)
        stem, number = base, 1
        while (path := directory / f"{stem}.bin").exists() and path.read_bytes() != code.data:
            number += 1
            stem = f"{base}-{number}"
        path.write_bytes(code.data)
        (directory / f"{stem}.lst").write_text(code.listing)
