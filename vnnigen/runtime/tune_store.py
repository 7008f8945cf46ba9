"""Where tuning results are kept: one small JSON file for each machine and problem.

`<cache>/tune-v1/<machine>/<problem>.json` in the user's cache (see `user_cache`), both names being hashes.
What is read is data to be checked, never trusted: a file that is damaged, or of another format or problem, is ignored
with a warning, and of what it says only the place in the caller's own list of candidates is used.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from vnnigen.isa.features import caches, cpu_name, features
from vnnigen.kernels.blocking import Blocking
from vnnigen.runtime import native, user_cache
from vnnigen.runtime.user_cache import short_hash

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
    root = user_cache.root()
    return None if root is None else root / f"tune-v{FORMAT}"


@cache
def machine(threads: int) -> str:
    """Everything but the problem that a measurement depends on: processor, caches, generated code, threads."""
    _, ebx, ecx, edx = native.cpuid(0)
    vendor = b"".join(word.to_bytes(4, "little") for word in (ebx, edx, ecx)).decode("latin-1")
    parts = {
        "vendor": vendor, "signature": native.cpuid(1)[0], "features": sorted(features()),
        "caches": [asdict(c) for c in caches()], "generator": user_cache.generator(), "threads": threads,
    }  # fmt: skip
    return json.dumps(parts, sort_keys=True)


def path_of(machine_text: str, problem: str) -> Path | None:
    """The file of a problem on a machine."""
    root = folder()
    return None if root is None else root / short_hash(machine_text) / f"{short_hash(problem)}.json"


def load(path: Path, problem: str, candidates: Sequence[Blocking]) -> Entry | None:
    """Read an entry; None, with a warning, for a file that cannot be one of this problem and these candidates."""
    try:
        return _decode(user_cache.read(path, MAX_BYTES), problem, candidates)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"tuning result {path} is ignored: {error}", TuneWarning, stacklevel=2)
        return None


def _decode(data: bytes, problem: str, candidates: Sequence[Blocking]) -> Entry:
    """Check everything; ValueError says what is wrong."""
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
    try:
        user_cache.write(path, text.encode())
    except OSError as error:
        warnings.warn(f"the tuning result cannot be kept: {error}", TuneWarning, stacklevel=2)
