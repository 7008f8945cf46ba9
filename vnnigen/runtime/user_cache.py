"""The user's cache folder: where it is, and how its files are read and written.

The cache is `VNNIGEN_CACHE_DIR`, else `vnnigen` in `XDG_CACHE_HOME`, else `~/.cache/vnnigen`. A file is written under
another name and renamed, so that readers see a whole file or none, and of two writers the later wins.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def root() -> Path | None:
    """The cache folder, or None where there is no home to keep it in."""
    if own := os.environ.get("VNNIGEN_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG base directory specification: a relative path is to be ignored.
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "vnnigen"
    except RuntimeError:
        return None


@cache
def generator() -> str:
    """A hash of what generates code: the modules, the package's version and the encoder's."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(p for part in ("isa", "kernels") for p in (package / part).rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{_version('vnnigen')} {_version('iced-x86')} {digest.hexdigest()}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree
        return "source"


def short_hash(text: str) -> str:
    """A name for a text, to be a file's."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read(path: Path, limit: int, *, own: bool = False) -> bytes:
    """The bytes of a regular file, at most `limit`; nothing else is opened, or waited for.

    `own` demands a file that nobody but this user could have written.

    Raises:
        OSError: when there is no such file.
        ValueError: when it is no regular file, too long, or not this user's own.

    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if own else 0)
    fd = os.open(path, flags)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a file")
        if own and found.st_uid != os.geteuid():
            raise ValueError(f"it belongs to user {found.st_uid}, not to {os.geteuid()}")
        if own and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(f"others may write to it (mode {stat.S_IMODE(found.st_mode):o})")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(fd)
    if len(data) > limit:
        raise ValueError(f"more than {limit} bytes")
    return data


def write(path: Path, data: bytes) -> None:
    """Write a file as a whole, for this user alone. Raises OSError where that cannot be done."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:  # of mode 0600
            temporary = file.name
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise
