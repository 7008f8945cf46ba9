"""The memory's side of a roofline: bytes of a problem, measured read bandwidth, and the chart.

Bandwidth depends on how much is read, since the caches' levels differ; so a row is compared with the bandwidth of
reading as many bytes as it touches, again and again, as the benchmark itself does. A row is memory bound where
its arithmetic intensity (operations a byte) is below the machine's balance at that size, peak by bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vnnigen.bench.problem_string import ConvShape, GemmShape
from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.isa.features import features
from vnnigen.isa.tiers import tier
from vnnigen.runtime.peak import seconds_per_turn

_SIZEOF = {"u8": 1, "s8": 1, "bf16": 2, "f32": 4, "s32": 4}
_LOADS = 8
_LARGEST = 1 << 28
#: Bytes read by the chart's diagonals, well inside each level of ordinary machines.
LEVELS = {"L1": 24 << 10, "L2": 384 << 10, "L3": 8 << 20, "memory": _LARGEST}


def bytes_touched(shape: ConvShape | GemmShape, dtype: str, out: str) -> int:
    """Bytes of source, weights and result, each counted once."""
    src, wei = (1, 1) if dtype in ("u8s8", "s8s8") else (_SIZEOF[dtype], _SIZEOF[dtype])
    if isinstance(shape, GemmShape):
        sizes = shape.m * shape.k, shape.k * shape.n, shape.m * shape.n
    else:
        sizes = (_product(shape.x_shape), _product(shape.w_shape), _product(shape.y_shape))
    return sizes[0] * src + sizes[1] * wei + sizes[2] * _SIZEOF[out]


def _product(values: Sequence[int]) -> int:
    return int(np.prod(values, dtype=np.int64))


def is_memory_bound(intensity: float, peak: float | None, bandwidth: float) -> bool:
    """Whether a problem of `intensity` operations a byte is below the balance of `peak` GOP/s and GB/s."""
    return peak is not None and intensity < peak / bandwidth


def _build(bits: int) -> Code:
    """Generate a loop of loads: `args` are the address, the bytes of a unit and how often to read them."""
    name = "avx512" if bits == 512 else "avx2"
    args = (Arg("params", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr"))
    a = Assembler(f"read-bandwidth-{bits}", args=args, features=tier(name).features)
    params, offset = a.load_argument("params"), a.load_argument("index")
    base, cursor, left, passes = a.gpr("base"), a.gpr("cursor"), a.gpr("left"), a.gpr("passes")
    a.mov(left, Mem(params, 8))
    a.imul(offset, left)
    a.mov(base, Mem(params))
    a.add(base, offset)
    a.mov(passes, Mem(params, 16))
    target = a.vec(bits, "target")
    step = bits // 8
    with a.loop(passes):
        a.mov(cursor, base)
        a.mov(left, Mem(params, 8))
        with a.loop(left, step=_LOADS * step):
            for i in range(_LOADS):
                a.vmovups(target, Mem(cursor, i * step))
            a.add(cursor, _LOADS * step)
    a.ret()
    return a.finalize().encode()


@cache
def read_bandwidth(size: int, threads: int = 1) -> float:
    """Measure GB/s (1e9 bytes) of reading `size` bytes repeatedly, each thread its own part of them."""
    bits = 512 if "avx512f" in features() else 256
    turn = _LOADS * bits // 8
    part = max(min(size, _LARGEST) // threads // turn, 1) * turn
    # Touched, so that its pages are its own and not all the zero page.
    buffer = np.ones(part * threads + 64, np.uint8)
    aligned = buffer.ctypes.data + -buffer.ctypes.data % 64
    return part * threads / seconds_per_turn(_build(bits), (aligned, part), threads, threads) * 1e-9


@dataclass(frozen=True)
class Chart:
    """What one chart shows: rows of one dtype and number of threads, with their ceilings."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    peaks: Mapping[str, float]
    bandwidths: Mapping[str, float]


def draw(chart: Chart, stem: Path, peer: str = "oneDNN") -> list[Path]:
    """Draw a chart as `stem`.png and `stem`.svg: speed over intensity, ours filled, the peer's hollow."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 7), layout="constrained")
    intensities = [row["intensity"] for row in chart.rows]
    speeds = [row["ours"]["gops"] for row in chart.rows] + [p["gops"] for row in chart.rows for p in _peer_of(row)]
    left, right = min(intensities) / 1.6, max(intensities) * 2.6
    bottom, top = min(speeds) / 1.6, max([*speeds, *chart.peaks.values()]) * 1.5
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top), title=chart.title)
    _ceilings(axes, chart, left, right, bottom)
    tiers = list(dict.fromkeys(_series(row) for row in chart.rows))
    for number, name in enumerate(tiers):
        rows = [row for row in chart.rows if _series(row) == name]
        colour = f"C{number}"
        for row in rows:
            for p in _peer_of(row):
                x = row["intensity"]
                axes.plot([x, x], [p["gops"], row["ours"]["gops"]], color=colour, lw=0.7, alpha=0.5, zorder=2)
                axes.plot(x, p["gops"], "o", mfc="white", mec=colour, ms=4.5, zorder=3)
        xs, ys = [r["intensity"] for r in rows], [r["ours"]["gops"] for r in rows]
        axes.plot(xs, ys, "o", color=colour, ms=5, zorder=4, label=f"{name}, vnnigen")
    if any(list(_peer_of(row)) for row in chart.rows):
        axes.plot([], [], "o", mfc="white", mec="grey", ms=4.5, label=f"{peer}, same tier and problem")
    axes.set_xlabel("arithmetic intensity, operations a byte of source, weights and result")
    axes.set_ylabel("GOP/s (taps on the padding not counted)")
    axes.grid(which="major", color="0.9", lw=0.6)
    axes.legend(loc="lower right", framealpha=1)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return paths


def _series(row: Mapping[str, Any]) -> str:
    """Name the points that share a colour."""
    chains = row["dtype"] in ("int8", "s8s8") and row["tier"] in ("avx2", "avx512")
    return row["tier"] + (f", {row['weights']} weights" if chains else "")


def _peer_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = row["peers"].get("onednn")
    return [found] if found and "gops" in found else []


def _ceilings(axes: Any, chart: Chart, left: float, right: float, bottom: float) -> None:
    """Draw the measured peaks as horizontals and the bandwidths as diagonals, each up to where they meet."""
    highest, fastest = max(chart.peaks.values()), max(chart.bandwidths.values())
    axes.figure.draw_without_rendering()  # settles the layout, and so the slope that diagonals have
    (x0, y0), (x1, y1) = axes.transData.transform([(1, 1), (10, 10)])
    slope = math.degrees(math.atan2(y1 - y0, x1 - x0))
    small = {"textcoords": "offset points", "fontsize": 8, "color": "0.3", "zorder": 5}
    for name, gops in chart.peaks.items():
        axes.plot([max(left, gops / fastest), right], [gops, gops], color="0.35", lw=1, zorder=1)
        # Below its line where another one is close above.
        crowded = any(1 < other / gops < 1.25 for other in chart.peaks.values())
        axes.annotate(f"{name}  {gops:.0f}", (right, gops), (-4, -10 if crowded else 3), ha="right", **small)
    for name, speed in chart.bandwidths.items():
        end = min(right, highest / speed)
        axes.plot([left, end], [left * speed, end * speed], color="0.6", lw=1, ls="--", zorder=1)
        # Above its line and along it, just inside the frame.
        x = max(left, bottom / speed) * 1.1
        axes.annotate(
            f"{name}, {speed:.0f} GB/s", (x, x * speed), (-3, 3), rotation=slope, rotation_mode="anchor", **small
        )  # fmt: skip
