"""Where tuning results are kept: one small JSON file for each machine and problem.

`<cache>/tune-v1/<machine>/<problem>.json`, both names being hashes.  A file is written under another name and renamed,
so readers see a whole file or none, and of two writers of one problem the later wins; other problems are other files.
What is read is data to be checked, never trusted: a file that is damaged, or of another format or problem, is ignored
with a warning, and of what it says only the place in the caller's own list of candidates is used.

The cache is `VNNIGEN_CACHE_DIR`, else `vnnigen` in `XDG_CACHE_HOME`, else `~/.cache/vnnigen`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vnnigen.isa.features import caches, cpu_name, features
from vnnigen.kernels.blocking import Blocking
from vnnigen.runtime import native

#: Version of the files; another one has another folder.
FORMAT = 1
#: No entry comes near this many bytes; whatever is longer was not written here.
MAX_BYTES = 1 << 16
_TYPES = {f.name: bool if f.name == "copy" else int for f in fields(Blocking)}


class TuneWarning(RuntimeWarning):
    """A tuning result could not be read or written; the analytic choice is used instead."""


@dataclass(frozen=True)
class Entry:
    """The winner for a problem, and what was measured: candidates with their seconds."""

    blocking: Blocking
    measured: tuple[tuple[Blocking, float], ...]


def folder() -> Path | None:
    """The folder of this format, or None where there is no home to keep it in."""
    if own := os.environ.get("VNNIGEN_CACHE_DIR"):
        return Path(own) / f"tune-v{FORMAT}"
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG base directory specification: a relative path is to be ignored.
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "vnnigen" / f"tune-v{FORMAT}"


@cache
def machine(threads: int) -> str:
    """Everything but the problem that a measurement depends on: processor, caches, generated code, threads."""
    _, ebx, ecx, edx = native.cpuid(0)
    vendor = b"".join(word.to_bytes(4, "little") for word in (ebx, edx, ecx)).decode("latin-1")
    parts = {
        "vendor": vendor, "signature": native.cpuid(1)[0], "features": sorted(features()),
        "caches": [asdict(c) for c in caches()], "version": _version(), "generator": _generator(), "threads": threads,
    }  # fmt: skip
    return json.dumps(parts, sort_keys=True)


def _version() -> str:
    try:
        return version("vnnigen")
    except PackageNotFoundError:  # run from a source tree
        return "source"


def _generator() -> str:
    """A hash of the modules that generate code: another generator's times say nothing about this one's."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(p for part in ("isa", "kernels") for p in (package / part).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def path_of(machine_text: str, problem: str) -> Path | None:
    """The file of a problem on a machine."""
    root = folder()
    return None if root is None else root / _hash(machine_text) / f"{_hash(problem)}.json"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load(path: Path, problem: str, candidates: Sequence[Blocking]) -> Entry | None:
    """Read an entry; None, with a warning, for a file that cannot be one of this problem and these candidates."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("not a file")
            data = file.read(MAX_BYTES + 1)
        return _decode(data, problem, candidates)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"tuning result {path} is ignored: {error}", TuneWarning, stacklevel=2)
        return None


def _decode(data: bytes, problem: str, candidates: Sequence[Blocking]) -> Entry:
    """Check everything; ValueError says what is wrong."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    entry = json.loads(data)
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise ValueError(f"not a tuning result of format {FORMAT}")
    if entry.get("problem") != problem:
        raise ValueError("it is of another problem")
    blocking = _blocking(entry.get("blocking"))
    if blocking not in candidates:
        raise ValueError("its blocking is none of the candidates")
    rows = entry.get("measured")
    if not isinstance(rows, list):
        raise ValueError("it lacks the measurements")
    return Entry(blocking, tuple(_row(row) for row in rows))


def _blocking(value: Any) -> Blocking:
    if not isinstance(value, dict) or {k: type(v) for k, v in value.items()} != _TYPES:
        raise ValueError("it has no blocking")
    return Blocking(**value)


def _row(value: Any) -> tuple[Blocking, float]:
    if not isinstance(value, dict) or type(value.get("seconds")) is not float or not 0 < value["seconds"] < 1e6:
        raise ValueError("a measurement has no seconds")
    return _blocking(value.get("blocking")), value["seconds"]


def save(path: Path, problem: str, entry: Entry) -> None:
    """Write an entry as a whole; a cache that cannot be written is a warning."""
    text = json.dumps(
        {
            "format": FORMAT, "cpu": cpu_name(), "problem": problem, "blocking": asdict(entry.blocking),
            "measured": [{"seconds": s, "blocking": asdict(b)} for b, s in entry.measured],
        },
        indent=1,
    )  # fmt: skip
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(f"the tuning result cannot be kept: {error}", TuneWarning, stacklevel=2)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
