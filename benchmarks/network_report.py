"""Tables of `benchmarks.networks`: speed, agreement, start, the published ratios and the project's targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.models import MODELS
from benchmarks.peers.networks import OURS

#: An engine and a precision.
Key = tuple[str, str]
#: Throughput of int8 with VNNI over f32 as Intel published it, for one framework or several. Theirs compared two
#: generations of processors, so that there is more in it than the instructions.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "resnet101": (4.0, 3.8),
    "resnet50": (3.9, 3.9, 3.7, 3.0),
    "retinanet": (2.6,),
    "ssd_vgg16": (2.5,),
    "ssd_mobilenet": (2.2,),
    "wide_deep": (2.1, 2.1),
}
_SHORT = {OURS: "ours", "openvino": "OpenVINO", "onnxruntime": "ORT"}


def label(key: Key) -> str:
    """Return an engine and a precision as one word for people and files."""
    return f"{_SHORT[key[0]]} {key[1]}"


@dataclass(frozen=True)
class Target:
    """What is to be reached on some networks: at least so much faster than a peer."""

    text: str
    models: tuple[str, ...]
    against: str
    least: float


_CNNS = ("squeezenet", "vgg19", "mobilenet_v2", "open_nsfw")
TARGETS = (
    Target("int8 against OpenVINO int8", ("resnet50",), "OpenVINO int8", 1.3),
    Target("int8 against ONNX Runtime int8", ("resnet50",), "ORT int8", 5.0),
    Target("int8 against OpenVINO int8", _CNNS, "OpenVINO int8", 1.2),
    Target("int8, none slower than OpenVINO", tuple(MODELS), "OpenVINO int8", 1.0),
    Target("int8, none slower than ONNX Runtime", tuple(MODELS), "ORT int8", 1.0),
    Target("bf16 against OpenVINO bf16", tuple(MODELS), "OpenVINO bf16", 1.2),
)


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in names:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _cell(value: Any, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _figure(row: Mapping[str, Any], who: str, what: str) -> Any:
    return row["figures"].get(who, {}).get(what)


def speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out rows of one batch and number of threads; `x` columns are ratios, their geometric mean below."""
    first = rows[0]
    isa = f", at most {first['isa']}" if first["isa"] else ""
    title = f"{first['threads']} thread(s), {first['clock']} clock{isa}; x: the other's time by ours"
    peers = {p: [f"{peer} {p}" for peer in ("OpenVINO", "ORT") if (peer, p) != ("ORT", "bf16")] for p in _PRECISIONS}
    numbers = ["batch", "int8 GOP/s", "% peak", "x our f32"]
    for precision in _PRECISIONS:
        numbers += [f"{precision} ms", *(f"x {peer}" for peer in peers[precision])]
    table = _table(title, ["network"], numbers)
    for row in rows:
        cells = [str(row["batch"]), _cell(_figure(row, "ours int8", "gops"), ".0f")]
        cells += [_cell(_figure(row, "ours int8", "pct_peak"), ".0f"), _cell(row["int8_over_f32"])]
        for precision in _PRECISIONS:
            cells.append(_cell(_figure(row, f"ours {precision}", "ms_median")))
            for peer in peers[precision]:
                ratio, ms = (_figure(row, peer, what) for what in ("ratio", "ms_median"))
                # Without a time of ours, the peer's own is of use.
                cells.append(_cell(ratio) if ratio is not None else f"({_cell(ms)} ms)" if ms is not None else "-")
        table.add_row(MODELS[row["model"]].title, *cells)
    means = ["", "", "", _mean(row["int8_over_f32"] for row in rows)]
    for precision in _PRECISIONS:
        means += ["", *(_mean(_figure(row, peer, "ratio") for row in rows) for peer in peers[precision])]
    table.add_section()
    table.add_row("geometric mean", *means)
    return table


_PRECISIONS = ("int8", "bf16", "f32")


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _cell(statistics.geometric_mean(known) if known else None)


def agreement_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out how far answers are from ONNX Runtime's in f32."""
    numbers = ["cosine", "SQNR dB", "dB of differences", "same class"]
    table = _table("answers compared with ONNX Runtime's f32", ["network", "engine"], numbers)
    table.caption = "dB of differences: the signal is only what differs between inputs"
    for row in rows:
        cells = [_cell(row["cosine"], ".5f"), _cell(row["sqnr_db"], ".1f"), _cell(row["sqnr_between_db"], ".1f")]
        table.add_row(
            MODELS[row["model"]].title, label((row["engine"], row["precision"])), *cells, _cell(row["top1"], ".1%")
        )
    return table


def headline_table(rows: Sequence[Mapping[str, Any]], tiers: Sequence[str]) -> Table:
    """Lay out Intel's published ratios beside ours; a tier that this machine lacks has none."""
    table = _table("throughput of int8 over f32", ["network"], ["batch", "published by Intel", *tiers])
    table.caption = "theirs compares two generations of processors, ours one with itself"
    for row in rows:
        model = MODELS[row["model"]]
        published = " / ".join(f"{ratio:.1f}x" for ratio in row["published"])
        ours = [row["ours"][tier] for tier in tiers]
        cells = ["-" if ratio is None else f"{ratio:.2f}x" for ratio in ours]
        table.add_row(model.title, str(model.throughput_batch), published, *cells)
    return table


def start_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out times to the first result."""
    numbers = ["first result s", "with cache s", "import s", "peak MB"]
    table = _table("from the file to the first result, batch 1", ["network", "engine"], numbers)
    table.caption = "int8 from each engine's own quantized file; the import of the engine is not in the other columns"
    for row in rows:
        cells = [_cell(row[name]) for name in ("cold_s", "cached_s", "import_s")]
        cells.append(_cell(row["peak_bytes"] / 2**20, ".0f"))
        table.add_row(MODELS[row["model"]].title, label((row["engine"], row["precision"])), *cells)
    return table


def verdicts(result: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """Return (what, network, at least, measured) of all targets with figures: speeds of batch 1 on one thread."""
    rows = {row["model"]: row for row in result["speed"] if row["batch"] == 1 and row["threads"] == 1}
    found = []
    for target in TARGETS:
        for name in target.models:
            if name in rows and (ratio := _figure(rows[name], target.against, "ratio")) is not None:
                found.append((target.text, name, target.least, ratio))
    for row in result["headline"]:
        ratio = row["ours"].get("AVX512-VNNI")
        if row["model"] in ("resnet50", "resnet101") and ratio is not None:
            found.append(("int8 over f32 on AVX512-VNNI", row["model"], 3.5, ratio))
        if (ratio := row["ours"].get("AMX")) is not None:
            found.append(("int8 over f32 on AMX", row["model"], max(row["published"]), ratio))
    starts = {(row["engine"], row["precision"]): row for row in result["start"]}
    for (engine, precision), row in starts.items():
        if engine != OURS:
            continue
        # As speeds, so that more is better everywhere.
        found.append((f"starts/3 s, {precision}", row["model"], 1.0, 3 / row["cold_s"]))
        if row["cached_s"]:
            found.append((f"cached starts/1 s, {precision}", row["model"], 1.0, 1 / row["cached_s"]))
        if other := starts.get(("openvino", precision)):
            allowed = 1.5 * other["peak_bytes"] / row["peak_bytes"]
            found.append((f"memory allowed (1.5x OpenVINO's) by used, {precision}", row["model"], 1.0, allowed))
    return found


def targets_table(result: Mapping[str, Any]) -> Table:
    """Say which targets are reached."""
    table = _table("targets", ["what", "network"], ["at least", "measured", ""])
    for what, name, least, measured in verdicts(result):
        reached = measured >= least
        table.add_row(what, MODELS[name].title, _cell(least), _cell(measured), "reached" if reached else "[red]missed")
    return table
