"""The commands of whole networks: `compile`, `run`, `bench model`, `explain model`."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vnnigen.bench.network import Candidate, fill_shapes, measure_network, peers, random_feeds, random_samples
from vnnigen.cli.app import bench, explain, print_json
from vnnigen.cli.options import Json, Threads, grouped
from vnnigen.compiler import compile as compile_model
from vnnigen.compiler import load
from vnnigen.errors import VnnigenError
from vnnigen.graph.importer import import_model
from vnnigen.graph.ir import Array, Graph
from vnnigen.graph.network import Network
from vnnigen.quant import QuantConfig, SampleFiles
from vnnigen.runtime.threads import set_num_threads

Model = Annotated[Path, typer.Argument(help="An ONNX file, or a compiled .vnni file.", show_default=False)]
Isa = Annotated[str | None, typer.Option(help="Highest tier, as `vnnigen probe` names them.", show_default="the best")]
Dims = Annotated[
    list[str], typer.Option("--dim", help="NAME=LENGTH of an input's length that varies; may be repeated.")
]
Batch = Annotated[int | None, typer.Option(min=1, help="Length of first dimensions that vary.", show_default="1")]


@dataclass(frozen=True)
class PrecisionOptions:
    """In which numbers to compute, and how to quantize."""

    precision: Annotated[str, typer.Option(help="f32, bf16 or int8. Quantized models stay as they are.")] = "f32"
    calib: Annotated[
        Path | None, typer.Option(help="Samples for int8: a .npy or .npz file, or a folder of such.", metavar="PATH")
    ] = None
    method: Annotated[str, typer.Option(help="Ranges of activations: minmax, kl or percentile.")] = "minmax"
    percentile: Annotated[float, typer.Option(help="Of --method percentile.")] = 99.99
    activations: Annotated[str, typer.Option(help="asymmetric (u8) or symmetric (s8).")] = "asymmetric"
    weights: Annotated[str, typer.Option(help="One scale per channel or per tensor.")] = "channel"
    keep: Annotated[
        list[str] | None, typer.Option(help="PATTERN=PRECISION of nodes or operators; may be repeated.")
    ] = None

    def config(self) -> QuantConfig:
        """Return the choices; VnnigenError for one that is not known."""
        overrides: Any = dict(_pair(text, "--keep") for text in self.keep or ())
        choices: dict[str, Any] = {
            "method": "kl" if self.method == "entropy" else self.method, "percentile": self.percentile,
            "activations": self.activations, "weights": self.weights, "overrides": overrides,
        }  # fmt: skip
        return QuantConfig(**choices)


@grouped
def compile_(
    model: Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)],
    options: PrecisionOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .vnni file to write.", show_default=False)],
) -> None:
    """Compile an ONNX model, quantize it if asked to, and write it to a file that needs no onnx package."""
    start = time.perf_counter()
    console = Console(stderr=True)
    if output.parent != Path() and not output.parent.is_dir():
        raise VnnigenError(f"the folder {output.parent} does not exist")
    with _progress() as progress:
        network = _compiled(model, options, progress)
        _saved(network, output, progress)
    counts = Counter(node.precision for node in network.graph if node.op in ("Conv", "Linear", "MatMul"))
    layers = ", ".join(f"{n} in {p}" for p, n in counts.most_common()) or "none"
    console.print(
        f"{output}: {output.stat().st_size / 2**20:.2f} MiB, {len(network.graph.nodes)} nodes; convolutions and "
        f"products: {layers}; {time.perf_counter() - start:.1f} s",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


@grouped
def run(
    model: Model,
    options: PrecisionOptions,
    given: Annotated[
        list[str], typer.Option("--input", "-i", help="FILE.npy, NAME=FILE.npy (repeated) or FILE.npz by name.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .npy file, or .npz for several.")] = None,
    threads: Threads = 1,
    isa: Isa = None,
) -> None:
    """Run a network on arrays from files; print what comes out, or write it to a file."""
    set_num_threads(threads)
    network = _opened(model, options, isa)
    feeds = _feeds(network, given)
    results = network(feeds)
    named = dict(zip(network.outputs, results if isinstance(results, tuple) else (results,), strict=True))
    if output is not None:
        _write(output, named)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for name, value in named.items():
        console.print(_summary(name, value), highlight=False, markup=False, soft_wrap=True)


@bench.command("model")
@grouped
def bench_model(
    model: Model,
    options: PrecisionOptions,
    threads: Threads = 1,
    isa: Isa = None,
    batch: Batch = None,
    dim: Dims = [],  # noqa: B006  (Typer copies it)
    vs: Annotated[
        str | None, typer.Option(help="Timed alternately: f32 (ours), onnxruntime, openvino; comma-separated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each engine; the median is quoted.")] = 11,
    as_json: Json = False,
) -> None:
    """Time a whole network, beside other engines in the same run. int8 without --calib calibrates on noise."""
    set_num_threads(threads)
    # Before the engines are imported: their libraries read it once.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    names = [name for name in (vs or "").split(",") if name]
    sizes = batch, _lengths(dim)
    network = _opened(model, options, isa, *sizes)
    inputs = network.inputs
    feeds = random_feeds(inputs, fill_shapes(inputs, *sizes))
    with ExitStack() as stack:
        others: dict[str, Candidate] = {}
        if "f32" in names:
            plain = compile_model(_onnx_only(model, "--vs f32"), isa=isa)
            others["f32"] = Candidate(lambda: plain(feeds), {"version": "vnnigen f32", "precision": "f32"})
        engines = [name for name in names if name != "f32"]
        if engines:
            source = _onnx_only(model, f"--vs {engines[0]}")
            samples = list(_samples(options, import_model(source), sizes))
            with _working(f"preparing {', '.join(engines)}"):
                others |= peers(source, options.precision, engines, feeds, samples, threads, stack)
        result = measure_network(network, feeds, others, precision=_precision(network), threads=threads, rounds=rounds)
    if as_json:
        print_json(result)
    else:
        Console().print(_bench_table(model, result))


@explain.command("model")
@grouped
def explain_model(
    model: Model,
    options: PrecisionOptions,
    isa: Isa = None,
    batch: Batch = None,
    dim: Dims = [],  # noqa: B006  (Typer copies it)
    profile: Annotated[bool, typer.Option("--profile", help="Run it and add the time of each step.")] = False,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Show the steps of a network: kernels, types, what is fused, what falls back and why."""
    set_num_threads(threads)
    sizes = batch, _lengths(dim)
    network = _opened(model, options, isa, *sizes)
    feeds = random_feeds(network.inputs, fill_shapes(network.inputs, *sizes))
    network(feeds)
    explanation = network.explain()
    times = network.profile(feeds) if profile else None
    if as_json:
        print_json(explanation.to_dict() | ({} if times is None else {"profile": times.to_dict()}))
        return
    # Not through Rich, which would take shapes for markup and wrap long lines.
    print(explanation)
    if times is not None:
        print(times)


# --- opening models -----------------------------------------------------------------------------------------------


def _opened(
    model: Path,
    options: PrecisionOptions,
    isa: str | None,
    batch: int | None = None,
    dims: dict[str, int] | None = None,
) -> Network:
    """A network from a .vnni or ONNX file. int8 without samples is calibrated on noise, where sizes are given."""
    if model.suffix == ".vnni":
        return load(model, isa=isa)
    with _progress() as progress:
        return _compiled(model, options, progress, isa, None if dims is None else (batch, dims))


def _compiled(
    model: Path, options: PrecisionOptions, progress: Progress, isa: str | None = None,
    sizes: tuple[int | None, dict[str, int]] | None = None,
) -> Network:  # fmt: skip
    """Import and compile a model, showing how far it is."""
    config = options.config()
    task = progress.add_task("importing", total=None)
    graph = import_model(model)
    progress.update(task, total=1, completed=1)
    if options.precision != "int8":
        return _precise(graph, options, isa)
    if options.calib is None and sizes is None:
        raise VnnigenError("--precision int8 needs --calib: a .npy or .npz file of samples, or a folder of such")
    samples = _samples(options, graph, sizes or (None, {}))
    total = len(samples) if isinstance(samples, SampleFiles) else None
    task = progress.add_task("calibrating", total=total)
    return compile_model(
        graph, "int8", calibration=samples, config=config, isa=isa,
        progress=lambda count: progress.update(task, completed=count),
    )  # fmt: skip


def _precise(graph: Graph, options: PrecisionOptions, isa: str | None) -> Network:
    """A network in the precision asked for, which `compile` checks."""
    if options.calib is not None:
        raise VnnigenError(f"--calib is for --precision int8, not {options.precision}")
    precision: Any = options.precision
    return compile_model(graph, precision, isa=isa)


def _samples(
    options: PrecisionOptions, graph: Graph, sizes: tuple[int | None, dict[str, int]]
) -> SampleFiles | Iterator[dict[str, Array]]:
    """What to calibrate on: files, or noise."""
    if options.calib is not None:
        return SampleFiles(options.calib, graph.inputs)
    return random_samples(graph.inputs, fill_shapes(graph.inputs, *sizes))


def _saved(network: Network, output: Path, progress: Progress) -> None:
    task = progress.add_task("writing", total=None)
    try:
        network.save(output)
    except OSError as error:
        raise VnnigenError(f"{output} cannot be written: {error.strerror}") from None
    progress.update(task, total=1, completed=1)


def _onnx_only(model: Path, what: str) -> Path:
    if model.suffix == ".vnni":
        raise VnnigenError(f"{what} needs the ONNX file: {model} holds what vnnigen made of it")
    return model


def _precision(network: Network) -> str:
    """The precision of most layers."""
    counts = Counter(node.precision for node in network.graph if node.op in ("Conv", "Linear", "MatMul"))
    return counts.most_common(1)[0][0] if counts else "f32"


def _pair(text: str, option: str) -> tuple[str, str]:
    name, separator, value = text.rpartition("=")
    if not separator or not name or not value:
        raise VnnigenError(f"{option} {text}: expected NAME=VALUE")
    return name, value


def _lengths(given: list[str]) -> dict[str, int]:
    lengths = {}
    for text in given:
        name, value = _pair(text, "--dim")
        if not value.isdigit() or not int(value):
            raise VnnigenError(f"--dim {text}: the length must be a number from 1")
        lengths[name] = int(value)
    return lengths


# --- arrays -------------------------------------------------------------------------------------------------------


def _feeds(network: Network, given: list[str]) -> dict[str, Array]:
    """The inputs, as files name them. f64, f16 and smaller integers are converted by the network or here."""
    names = list(network.inputs)
    feeds: dict[str, Array] = {}
    for text in given:
        name, _, file = text.rpartition("=")
        found = _read(Path(file))
        if isinstance(found, dict):
            feeds.update(found)
        elif name or len(names) == 1:
            feeds[name or names[0]] = found
        else:
            raise VnnigenError(f"--input {text}: say which, as NAME={file}; the inputs are {', '.join(names)}")
    return feeds


def _read(path: Path) -> Array | dict[str, Array]:
    """The array of a .npy file, or those of a .npz file."""
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            array: Array = found
            return array
        with found:
            return {name: found[name] for name in found.files}
    except OSError as error:
        raise VnnigenError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # of NumPy and zipfile, for whatever the file is
        raise VnnigenError(f"{path} cannot be read: {error}") from None


def _write(path: Path, named: dict[str, Array]) -> None:
    if path.suffix not in (".npy", ".npz") or (path.suffix == ".npy" and len(named) > 1):
        raise VnnigenError(f"{path}: {len(named)} outputs go to a .npz file" + (" or .npy" if len(named) == 1 else ""))
    try:
        if path.suffix == ".npy":
            np.save(path, next(iter(named.values())))
        else:
            arrays: dict[str, Any] = named
            np.savez(path, **arrays)
    except OSError as error:
        raise VnnigenError(f"{path} cannot be written: {error.strerror}") from None


def _summary(name: str, value: Array) -> str:
    """One line on an output: type, shape, range, and the first classes of what may be scores."""
    line = f"{name}  {value.dtype}{list(value.shape)}"
    if not value.size or value.dtype.kind not in "fiu":
        return line
    line += f"  min {value.min():.5g}  mean {value.mean():.5g}  max {value.max():.5g}"
    if value.ndim == 2 and value.shape[1] >= 2:
        for i, row in enumerate(value[:8]):
            best = np.argsort(-row, kind="stable")[:5]
            line += f"\n  row {i}: " + ", ".join(f"{c} ({row[c]:.4g})" for c in best)
    return line


# --- what is shown ------------------------------------------------------------------------------------------------


def _progress() -> Progress:
    """Progress on standard error, gone when done; nothing where that is no terminal."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def _working(text: str) -> Iterator[None]:
    with _progress() as progress:
        progress.add_task(text, total=None)
        yield


def _bench_table(model: Path, result: dict[str, Any]) -> Table:
    shapes = ", ".join(f"{name} {shape}" for name, shape in result["shapes"].items())
    notes = [f"{len(result['numpy_steps'])} of {result['steps']} steps in NumPy: {', '.join(result['numpy_steps'])}"]
    notes = notes if result["numpy_steps"] else []
    notes += [f"{name}: {row['note']}, so f32 was timed" for name, row in result["vs"].items() if "note" in row]
    if result["vs"]:
        versions = ", ".join(dict.fromkeys(row["version"] for row in result["vs"].values()))
        notes = [f"ratio: the other's time by ours; {versions}", *notes]
    title = f"{model.name}, {shapes}, {result['threads']} thread(s)"
    table = Table(title=title, title_justify="left", caption="\n".join(notes), caption_justify="left")
    for name in ("engine", "dtype", "tier"):
        table.add_column(name, no_wrap=True)
    for name in ("ms median", "ms min", "GOP/s", "% of peak", "ratio"):
        table.add_column(name, justify="right")
    peak = "-" if result["pct_peak"] is None else f"{result['pct_peak']:.1f}"
    table.add_row("vnnigen", result["dtype"], result["isa"], *_ms(result), f"{result['gops']:.1f}", peak, "-")
    for name, row in result["vs"].items():
        engine = "vnnigen" if name == "f32" else name
        table.add_row(engine, row["precision"], "", *_ms(row), "", "", f"{row['ratio']:.2f}")
    return table


def _ms(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['ms_median']:.4f}", f"{row['ms_min']:.4f}"
