"""Which way up a line of text is: PaddleOCR's classifier, from a PyPI wheel, on rendered lines made hard to read.

The lines are drawn here, at 0 and at 180 degrees, in the font that comes with Pillow: words of random letters and
numbers of several sizes and shades, slightly turned, then blurred, of low contrast and noisy, such that the network
in f32 is no longer always right and its scores are not all near 0 and 1. Input as PaddleOCR prepares it: 48 pixels
high, at most 192 wide, from -1 to 1, the rest to the right 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vnnigen.compiler import compile as compile_model
from vnnigen.demo.comparison import Comparison, batches, compare
from vnnigen.demo.wheels import wheel_file
from vnnigen.errors import MissingExtraError
from vnnigen.graph.network import Network
from vnnigen.quant import QuantConfig

F32 = NDArray[np.float32]

WHEEL, FILE = "rapidocr-onnxruntime", "ch_ppocr_mobile_v2.0_cls_infer.onnx"
HEIGHT, WIDTH = 48, 192
IMAGES, CALIBRATION, BATCH = 1000, 200, 50
#: A few outliers would take most of the steps of 8 bits: cutting them off gains 2.5 dB of SQNR.
INT8 = QuantConfig(method="percentile", percentile=99.99)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DIGITS = "0123456789"


def lines(count: int, seed: int) -> tuple[F32, NDArray[np.int64]]:
    """Draw `count` lines [count, 3, 48, 192]; the label of every other one is 1: it is upside down.

    Raises MissingExtraError without Pillow.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % 2
    return np.stack([_line(rng, bool(label)) for label in labels]), labels


def _line(rng: np.random.Generator, upside_down: bool) -> F32:
    """One line, as the network reads it."""
    try:
        from PIL import Image, ImageDraw, ImageFilter, ImageFont
    except ImportError as error:
        raise MissingExtraError("demo", "pillow") from error
    font = ImageFont.load_default(float(rng.integers(18, 40)))
    text = _text(rng)
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=font)
    margin = rng.integers(2, 9, 4)
    size = int(right - left + margin[0] + margin[1]), int(bottom - top + margin[2] + margin[3])
    paper = int(rng.integers(130, 256))
    ink = int(np.clip(paper - rng.integers(60, 200), 0, 255))
    if rng.random() < 0.2:
        paper, ink = ink, paper
    image = Image.new("L", size, paper)
    ImageDraw.Draw(image).text((int(margin[0] - left), int(margin[2] - top)), text, font=font, fill=ink)
    image = image.rotate(float(rng.uniform(-4, 4)), Image.Resampling.BILINEAR, fillcolor=paper)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 1.6))))
    if upside_down:
        image = image.rotate(180)
    width = min(-(-HEIGHT * size[0] // size[1]), WIDTH)
    pixels = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float64)
    pixels += rng.normal(0, rng.uniform(2, 12), pixels.shape)
    made = np.zeros((3, HEIGHT, WIDTH), np.float32)
    made[:, :, :width] = np.clip(np.rint(pixels), 0, 255) / 127.5 - 1
    return made


def _text(rng: np.random.Generator) -> str:
    """One or two words, or a number."""
    if rng.random() < 0.2:
        return "".join(rng.choice(list(_DIGITS + ".,"), int(rng.integers(5, 11))))
    return " ".join("".join(rng.choice(list(_LETTERS), int(rng.integers(3, 9)))) for _ in range(rng.integers(1, 3)))


def run(*, images: int = IMAGES, rounds: int = 31) -> tuple[Comparison, Network]:
    """Compare the network in f32 and in int8 on `images` lines; int8, calibrated on others, is returned, too.

    Raises MissingExtraError when the wheel, Pillow or the onnx package is missing, ModelError for a damaged model.
    """
    model = wheel_file(WHEEL, FILE)
    seen, _ = lines(CALIBRATION, seed=0)
    x, labels = lines(images, seed=1)
    f32 = compile_model(model)
    int8 = compile_model(model, "int8", calibration=seen[:, None], config=INT8)
    return compare("text direction", f32, int8, batches(x, BATCH), labels, rounds=rounds), int8
