"""One network in f32 and in int8: how often each is right, how often they agree, and how fast they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vnnigen.bench.timing import compare as timed
from vnnigen.errors import ShapeError
from vnnigen.graph.network import Network
from vnnigen.runtime.threads import num_threads

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Accuracy:
    """How many images a network is right about: its best class, and one of its five best."""

    top1: int
    top5: int

    @classmethod
    def of(cls, logits: F32, labels: NDArray[np.int64]) -> Accuracy:
        """Count rows of `logits` [n, classes] by their labels."""
        order = np.argsort(-logits, axis=1, kind="stable")
        return cls(int((order[:, 0] == labels).sum()), int((order[:, :5] == labels[:, None]).sum()))


@dataclass(frozen=True)
class Comparison:
    """What was found; times are of one image, in milliseconds."""

    name: str
    images: int
    classes: int
    f32: Accuracy
    int8: Accuracy
    same_top1: int  # images about which f32 and int8 say the same
    sqnr_db: float  # of the logits
    f32_ms: float
    int8_ms: float
    speedup: float  # the median over pairs of f32's time by int8's
    threads: int

    @property
    def agreement(self) -> float:
        """The share of images about which f32 and int8 say the same."""
        return self.same_top1 / self.images

    @property
    def lost(self) -> float:
        """By how much of all images int8 is right less often; negative if more."""
        return (self.f32.top1 - self.int8.top1) / self.images

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self) | {"agreement": self.agreement, "lost": self.lost}


def sqnr_db(signal: F32, other: F32) -> float:
    """Signal to noise ratio in dB, the noise being the difference of `other`; inf for no difference."""
    noise = np.square(signal - other, dtype=np.float64).sum()
    power = np.square(signal, dtype=np.float64).sum()
    return float(10 * np.log10(power / noise)) if noise else float("inf")


def batches(images: F32, size: int) -> Iterator[F32]:
    """Cut images into batches."""
    for start in range(0, len(images), size):
        yield images[start : start + size]


def compare(
    name: str, f32: Network, int8: Network, batches: Iterable[F32], labels: NDArray[np.int64], *, rounds: int = 31
) -> Comparison:
    """Compare two networks of one input, images, and one output, scores [n, classes]; time single images in pairs.

    Batches are read one after another. `rounds` is how often both are timed, alternately. Raises ShapeError for another
    number of labels than images.
    """
    logits: list[tuple[F32, F32]] = []
    one = np.zeros(0, np.float32)
    for batch in batches:
        if not logits:
            one = np.ascontiguousarray(batch[:1])
        logits.append((f32(batch), int8(batch)))
    a, b = (np.concatenate(found) for found in zip(*logits, strict=True))
    if len(a) != len(labels):
        raise ShapeError(f"{len(labels)} labels for {len(a)} images")
    times = timed({"int8": lambda: int8(one), "f32": lambda: f32(one)}, rounds=rounds)
    return Comparison(
        name=name,
        images=len(a),
        classes=a.shape[1],
        f32=Accuracy.of(a, labels),
        int8=Accuracy.of(b, labels),
        same_top1=int((a.argmax(axis=1) == b.argmax(axis=1)).sum()),
        sqnr_db=sqnr_db(a, b),
        f32_ms=times["f32"].median * 1e3,
        int8_ms=times["int8"].median * 1e3,
        speedup=times.speedup("int8", "f32"),
        threads=num_threads(),
    )
