"""Whole networks, timed beside other engines in one run."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vnnigen.bench.engines import ENGINES, Engine, Run
from vnnigen.bench.timing import Comparison, Samples, compare
from vnnigen.errors import VnnigenError
from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Array, TensorType
from vnnigen.graph.network import Network

Feeds = Mapping[str, Array]


def fill_shapes(
    inputs: Mapping[str, TensorType], batch: int | None = None, dims: Mapping[str, int] = {}
) -> dict[str, tuple[int, ...]]:
    """The shapes of inputs: lengths that have names from `dims`, the first one of an input otherwise `batch` (or 1).

    Raises VnnigenError for a name without a length, a name that no input has, and a batch that is fixed otherwise.
    """
    known = {d for kind in inputs.values() for d in kind.shape or () if isinstance(d, str)}
    if unknown := sorted(set(dims) - known):
        raise VnnigenError(
            f"no input has a length named {unknown[0]!r}; known are: {', '.join(sorted(known)) or 'none'}"
        )
    shapes = {}
    for name, kind in inputs.items():
        if kind.shape is None:
            raise VnnigenError(f"the rank of input {name!r} is not known: give its values, no shape")
        shape = []
        for axis, d in enumerate(kind.shape):
            if axis == 0 and isinstance(d, int) and batch not in (None, d):
                raise VnnigenError(f"input {name!r} has a fixed batch of {d}, so not one of {batch}")
            length = d if isinstance(d, int) else dims.get(d, (batch or 1) if axis == 0 else None)
            if length is None:
                raise VnnigenError(f"input {name!r} is {list(kind.shape)}: say how long {d!r} is, as in --dim {d}=128")
            shape.append(length)
        shapes[name] = tuple(shape)
    return shapes


def random_feeds(
    inputs: Mapping[str, TensorType], shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> dict[str, Array]:
    """Inputs to time a network on: normally distributed numbers, bytes, and of other integers zeros and ones.

    (Indices that are larger might not exist.)
    """
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for name, kind in inputs.items():
        dtype, shape = numpy_dtype(kind.dtype), shapes[name]
        if dtype.kind in "fV":
            made[name] = rng.standard_normal(shape).astype(dtype)
        else:
            made[name] = rng.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)
    return made


def random_samples(
    inputs: Mapping[str, TensorType], shapes: Mapping[str, tuple[int, ...]], count: int = 8
) -> Iterator[dict[str, Array]]:
    """Samples to calibrate on where only speed is asked for; the seeds differ from that of `random_feeds`."""
    return (random_feeds(inputs, shapes, seed) for seed in range(1, count + 1))


@dataclass(frozen=True)
class Candidate:
    """What is timed beside a network; `figures` is what is known of it already."""

    run: Callable[[], object]
    figures: dict[str, Any]


def peers(
    model: Path,
    precision: str,
    names: Sequence[str],
    feeds: Feeds,
    samples: Sequence[Feeds],
    threads: int,
    stack: ExitStack,
) -> dict[str, Candidate]:
    """The model on other engines, by name. An engine that lacks `precision` or its quantizer runs f32, and says so.

    Raises VnnigenError for an engine that is not known, not installed, or cannot load the model.
    """
    found = {}
    for name in names:
        kind = ENGINES.get(name)
        if kind is None:
            raise VnnigenError(f"--vs {name}: known are f32, {', '.join(ENGINES)}")
        if importlib.util.find_spec(kind.module) is None:
            raise VnnigenError(f"--vs {name} needs {kind.module!r}: pip install {kind.module}")
        chosen, note = precision, ""
        if precision not in kind.precisions:
            chosen, note = "f32", f"it has no {precision}"
        elif precision == "int8" and importlib.util.find_spec(kind.quantizer) is None:
            chosen, note = "f32", f"its int8 needs {kind.quantizer!r}: pip install {kind.quantizer}"
        try:
            engine = kind(threads)
            run = _load(engine, kind.suffix, model, chosen, feeds, samples, stack)
        except Exception as error:  # whatever the engine throws
            raise VnnigenError(f"--vs {name}: {type(error).__name__}: {error}") from None
        figures = {"version": engine.version, "precision": chosen} | ({"note": note} if note else {})
        found[name] = Candidate(lambda run=run: run(feeds), figures)  # type: ignore[misc]
    return found


def _load(
    engine: Engine, suffix: str, model: Path, precision: str, feeds: Feeds, samples: Sequence[Feeds], stack: ExitStack
) -> Run:
    path = str(model)
    if precision == "int8":
        path = f"{stack.enter_context(tempfile.TemporaryDirectory())}/model{suffix}"
        with redirect_stdout(sys.stderr):  # NNCF has progress bars
            engine.quantize(str(model), samples, path)
    return engine.load(path, precision, feeds)


def measure_network(
    network: Network, feeds: Feeds, others: Mapping[str, Candidate], *, precision: str, threads: int, rounds: int = 11
) -> dict[str, Any]:
    """Time a network on `feeds`, alternately with `others`.

    Returns what `vnnigen bench model --json` prints, with the keys of the kernel bench: `ms_median`, `ms_min`, `gops`
    (from the median), `pct_peak` (the time that its multiplications take at the measured peaks of their instructions,
    by the whole time; None where a peak is unknown), `isa` and `kernel` (those of most multiplications), `threads`; and
    `vs`: for each other its version, precision, times, and `ratio`, its time by ours (the median over rounds).
    """
    network(feeds)
    profile = network.profile(feeds, runs=3)
    times = compare({"ours": lambda: network(feeds), **{k: c.run for k, c in others.items()}}, rounds=rounds)
    ops = sum(layer.gops * layer.ms * 1e6 for layer in profile.layers if layer.gops)
    ours = times["ours"]
    at_peak = [
        layer.ms * layer.percent_of_peak / 100 if layer.percent_of_peak else None
        for layer in profile.layers
        if layer.gops
    ]
    known = sum(t for t in at_peak if t is not None) if None not in at_peak else None
    main = max(network.explain().steps, key=lambda s: s.macs)
    return {
        "problem": network.graph.name,
        "shapes": {name: list(x.shape) for name, x in feeds.items()},
        "dtype": precision,
        "isa": main.tier,
        "kernel": main.kernel,
        "threads": threads,
        **_times(ours),
        "gops": ops / ours.median * 1e-9,
        "pct_peak": None if known is None else 100 * known / (ours.median * 1e3),
        "steps": len(profile.layers),
        "numpy_steps": [f"{s.node} ({s.op}): {s.reason}" for s in network.explain().numpy_steps],
        "vs": {name: _beside(times, name, candidate) for name, candidate in others.items()},
    }


def _times(samples: Samples) -> dict[str, float]:
    return {"ms_median": samples.median * 1e3, "ms_min": samples.best * 1e3}


def _beside(times: Comparison, name: str, candidate: Candidate) -> dict[str, Any]:
    return candidate.figures | _times(times[name]) | {"ratio": times.speedup("ours", name)}
