"""Generated kernels on disk, so that the second start of a program need not generate them again.

`<cache>/kernels-v1/<hash>.bin`, one file for each kernel; the name is a hash of its key and of the generator. Code
depends on the key alone (see `kernels.layout`), so the files serve every machine; whether this one has the features
that the code uses is asked whenever it is loaded, as for new code.

What is read is executed, so a file counts only if it is this user's own, writable by nobody else, whole (a checksum),
and of exactly the key and the generator asked for. Anything else is ignored with a warning, and the kernel is
generated. The folder is kept below MAX_FILES files and MAX_BYTES bytes; those unused for longest go first.

`VNNIGEN_KERNEL_CACHE=off` neither reads nor writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from vnnigen.errors import VnnigenError
from vnnigen.isa.encode import Code
from vnnigen.runtime import user_cache

FORMAT = 1
MAGIC = b"vnnigen kernel 1\n"
#: No kernel comes near this many bytes.
MAX_KERNEL = 4 << 20
MAX_FILES, MAX_BYTES = 4096, 64 << 20
_DIGEST = hashlib.sha256().digest_size


class KernelCacheWarning(RuntimeWarning):
    """A stored kernel cannot be trusted; the kernel is generated instead."""


@dataclass(frozen=True)
class StoredCode:
    """A kernel as it was stored: what is needed to load it. Its listing is not stored."""

    name: str
    data: bytes
    entry: int
    features: frozenset[str]
    listing: str = ""


def enabled() -> bool:
    """Whether kernels are kept on disk. Raises VnnigenError if VNNIGEN_KERNEL_CACHE is neither on nor off."""
    value = os.environ.get("VNNIGEN_KERNEL_CACHE", "").strip().lower() or "on"
    if value not in ("on", "off"):
        raise VnnigenError(f"VNNIGEN_KERNEL_CACHE={value!r} is not one of off, on")
    return value == "on"


def path_of(key: Any) -> tuple[Path, str] | None:
    """Where a key's kernel is kept, and the text that identifies it; None if it cannot be kept."""
    root = user_cache.root() if enabled() else None
    if root is None:
        return None
    try:
        text = f"{user_cache.generator()}\n{_text(key)}"
    except TypeError:  # of something that has no lasting name
        return None
    return root / f"kernels-v{FORMAT}" / f"{user_cache.short_hash(text)}.bin", text


def _text(value: Any) -> str:
    """A text that is the same in every process for equal keys, and for equal keys only."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    if isinstance(value, tuple):
        return f"({','.join(map(_text, value))},)"
    if isinstance(value, frozenset):
        return f"{{{','.join(sorted(map(_text, value)))}}}"
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if is_dataclass(value) and not isinstance(value, type):
        inside = ",".join(f"{f.name}={_text(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__module__}.{type(value).__qualname__}({inside})"
    raise TypeError(f"{type(value)} has no lasting name")


def load(path: Path, text: str) -> StoredCode | None:
    """The kernel of a file; None if there is none, with a warning if there is one that cannot be trusted."""
    try:
        code = _decode(user_cache.read(path, MAX_KERNEL, own=True), text)
        os.utime(path)  # it was used
        return code
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"stored kernel {path} is ignored: {error}", KernelCacheWarning, stacklevel=2)
        return None


def _encode(code: Code, text: str) -> bytes:
    """Magic, checksum of the rest, length of the head, the head (JSON), code."""
    head = json.dumps(
        {"key": text, "name": code.name, "entry": code.entry, "features": sorted(code.features)}, sort_keys=True
    ).encode()
    rest = len(head).to_bytes(4, "little") + head + code.data
    return MAGIC + hashlib.sha256(rest).digest() + rest


def _decode(data: bytes, text: str) -> StoredCode:
    """Check everything; ValueError says what is wrong."""
    start = len(MAGIC) + _DIGEST
    if not data.startswith(MAGIC) or len(data) < start + 4:
        raise ValueError(f"not a stored kernel of format {FORMAT}")
    rest = data[start:]
    if hashlib.sha256(rest).digest() != data[len(MAGIC) : start]:
        raise ValueError("its checksum is wrong")
    length = int.from_bytes(rest[:4], "little")
    head = json.loads(rest[4 : 4 + length])
    if not isinstance(head, dict) or head.get("key") != text:
        raise ValueError("it is another kernel")
    code, entry, name, features = rest[4 + length :], head.get("entry"), head.get("name"), head.get("features")
    if type(entry) is not int or not 0 <= entry < len(code) or not isinstance(name, str):
        raise ValueError("its head is damaged")
    if not isinstance(features, list) or not all(isinstance(f, str) for f in features):
        raise ValueError("its head is damaged")
    return StoredCode(name, code, entry, frozenset(features))


class _Writer:
    """Writes until the folder turns out not to be writable, and keeps it small."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._room: dict[Path, tuple[int, int]] = {}
        self._closed: set[Path] = set()

    def save(self, path: Path, text: str, code: Code) -> None:
        """Keep a kernel. A folder that cannot be written to is left alone: the cache is no one's duty."""
        data, folder = _encode(code, text), path.parent
        if len(data) > MAX_KERNEL:
            return
        with self._lock:
            if folder in self._closed:
                return
            try:
                user_cache.write(path, data)
                files, size = self._room.get(folder, (0, 0))
                if files <= 0 or size < len(data):
                    files, size = _trim(folder)
                self._room[folder] = files - 1, size - len(data)
            except OSError:
                self._closed.add(folder)


_WRITER = _Writer()
save = _WRITER.save


def _trim(folder: Path) -> tuple[int, int]:
    """Delete what was unused for longest until an eighth of the room is free; return what is free: files, bytes."""
    found = []
    for entry in os.scandir(folder):
        try:
            state = entry.stat(follow_symlinks=False)
        except OSError:  # another process was faster
            continue
        found.append((state.st_mtime, state.st_size, entry.path))
    files, size = len(found), sum(s for _, s, _ in found)
    for _, length, name in sorted(found):
        if files <= MAX_FILES * 7 // 8 and size <= MAX_BYTES * 7 // 8:
            break
        with suppress(FileNotFoundError):
            os.unlink(name)
        files, size = files - 1, size - length
    return MAX_FILES - files, MAX_BYTES - size
