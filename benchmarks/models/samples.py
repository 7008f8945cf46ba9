"""Inputs for the models: photos and rendered text for trained ones, noise with the spectrum of images for others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.models.net import Array
from benchmarks.models.others import BUCKETS, CATEGORIES, NUMERIC, TOKENS, VOCABULARY
from vnnigen.demo.photos import MEAN, STD, photos

#: Draws `count` samples: input name -> [count, ...].
Sampler = Callable[[int, int], dict[str, Array]]
#: What open-nsfw was trained to see subtracted from blue, green and red.
_BGR_MEANS = (104, 117, 123)


def clouds(size: int) -> Sampler:
    """Normalised RGB images [count, 3, size, size] of noise on all scales, each of another brightness and contrast."""

    def draw(count: int, seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        x = np.zeros((count, 3, size, size), np.float32)
        cells = 4
        while cells < size:
            coarse = rng.standard_normal((count, 3, cells, cells), dtype=np.float32)
            index = np.arange(size) * cells // size
            x += coarse[:, :, index][:, :, :, index] * np.float32(cells**-0.25)
            cells *= 2
        x *= rng.uniform(0.3, 1.2, (count, 1, 1, 1)).astype(np.float32)
        x += 0.5 * rng.standard_normal((count, 3, 1, 1), dtype=np.float32)
        return {"image": x}

    return draw


def _crops(count: int, seed: int) -> Array:
    """Normalised photos [count, 224, 224, 3]: seed 0 draws from every fourth photo, others from the rest."""
    rng = np.random.default_rng(seed)
    every = photos()
    pool = every[::4] if seed == 0 else [photo for i, photo in enumerate(every) if i % 4]
    return np.stack([_augmented(pool[i % len(pool)].pixels[0], i >= len(pool), rng) for i in range(count)])


def _augmented(pixels: Array, change: bool, rng: np.random.Generator) -> Array:
    """Return a photo, or a shifted, mirrored and re-exposed copy of it."""
    if not change:
        return pixels
    top, left = rng.integers(0, 33, 2)
    cut = np.pad(pixels, ((16, 16), (16, 16), (0, 0)), "reflect")[top : top + 224, left : left + 224]
    return np.asarray(cut[:, :: rng.choice((1, -1))] * np.float32(rng.uniform(0.8, 1.2)))


def photo_images(count: int, seed: int) -> dict[str, Array]:
    """Photos as torchvision's networks want them: [count, 3, 224, 224]."""
    return {"image": np.ascontiguousarray(_crops(count, seed).transpose(0, 3, 1, 2))}


def photo_bytes(count: int, seed: int) -> dict[str, Array]:
    """Photos as open-nsfw wants them: [count, 224, 224, 3], BGR less its means."""
    rgb = np.clip((_crops(count, seed) * STD + MEAN) * 255, 0, 255)
    return {"input:0": np.ascontiguousarray((rgb[..., ::-1] - _BGR_MEANS).astype(np.float32))}


def text_lines(count: int, seed: int) -> dict[str, Array]:
    """Rendered words, upright and upside down by turns: [count, 3, 48, 192] from -1 to 1."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(seed)
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    lines = []
    for i in range(count):
        image = Image.new("RGB", (192, 48), tuple(int(v) for v in rng.integers(180, 256, 3)))
        font = ImageFont.load_default(int(rng.integers(20, 34)))
        word = "".join(rng.choice(letters, int(rng.integers(6, 14))))
        ImageDraw.Draw(image).text((4, 5), word, font=font, fill=tuple(int(v) for v in rng.integers(0, 90, 3)))
        pixels = np.asarray(image, np.float32) / 127.5 - 1
        lines.append((pixels[::-1, ::-1] if i % 2 else pixels).transpose(2, 0, 1))
    return {"x": np.ascontiguousarray(np.stack(lines), np.float32)}


def columns(count: int, seed: int) -> dict[str, Array]:
    """Criteo-like rows; small buckets are more frequent, as real categories are."""
    rng = np.random.default_rng(seed)
    buckets = np.minimum(rng.zipf(1.3, (count, CATEGORIES)) - 1, BUCKETS - 1)
    numeric = rng.standard_normal((count, NUMERIC), dtype=np.float32)
    return {"numeric": numeric, "categories": (buckets + BUCKETS * np.arange(CATEGORIES)).astype(np.int64)}


def tokens(count: int, seed: int) -> dict[str, Array]:
    """Random words."""
    return {"tokens": np.random.default_rng(seed).integers(0, VOCABULARY, (count, TOKENS), dtype=np.int64)}
