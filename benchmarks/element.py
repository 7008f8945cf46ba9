"""Element kernels against a copy of as many bytes: conversions, layouts, pooling, sums, concatenation, softmax.

    python -m benchmarks.element [--json FILE] [--threads 1] [--rounds 11] [--tier avx512] [--only NAME]

A kernel that reads r and writes w bytes is paired with `np.copyto` of (r + w) / 2 bytes, which moves as many; both run
alternately, buffers are aligned to 64 bytes. `L2` sizes move at most 640 KB, `large` ones about 8 MB. The ratio is
kernel bandwidth over copy bandwidth, of the best and of the median samples. Kernels are called as a compiled plan
calls them, so Python's share is not in the figures. A copy of L2-resident data writes whole lines without reading
them first, and reads as much as it writes: kernels that mostly read (pooling) cannot reach twice the copy's reads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import vnnigen as v
from benchmarks.common import context, warn_if_busy, write_json
from vnnigen.bench.timing import compare
from vnnigen.ops.element import Concat, Convert, Softmax, SumTensors
from vnnigen.ops.element_base import ElementOperator, aligned_empty
from vnnigen.ops.pool import AvgPool2d, MaxPool2d
from vnnigen.runtime import native
from vnnigen.runtime.threads import num_threads

U8, S8, F32 = np.dtype(np.uint8), np.dtype(np.int8), np.dtype(np.float32)
TO_NHWC, TO_NCHW = ("NCHW", "NHWC"), ("NHWC", "NCHW")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Bench:
    """A kernel: its operator for a tier, its sources' type, and their shapes for the L2 cache and beyond it."""

    name: str
    operator: Callable[[str | None], ElementOperator]
    source: np.dtype[Any]
    l2: Shape
    large: Shape
    count: int = 1


def _q(**scales: Any) -> dict[str, Any]:
    return {"x_scale": 0.37, **scales}


CONVERSIONS = (
    Bench("quantize f32 -> u8", lambda i: Convert(U8, y_scale=0.9, y_zero_point=7, isa=i), F32, (131072,), (1600000,)),
    Bench("quantize f32 -> s8 per channel",
          lambda i: Convert(S8, y_scale=np.linspace(0.5, 1, 100), isa=i), F32, (1300, 100), (16000, 100)),
    Bench("dequantize u8 -> f32", lambda i: Convert(F32, **_q(x_zero_point=7), isa=i), U8, (131072,), (1600000,)),
    Bench("requantize s32 -> s8", lambda i: Convert(S8, **_q(y_scale=0.9), isa=i), np.dtype(np.int32), (131072,),
          (1600000,)),
    Bench("requantize u8 -> s8", lambda i: Convert(S8, **_q(y_scale=0.9), isa=i), U8, (327680,), (4000000,)),
    Bench("ReLU f32", lambda i: Convert(F32, post_ops=v.ReLU(), isa=i), F32, (81920,), (1000000,)),
    Bench("GELU u8", lambda i: Convert(U8, **_q(y_scale=0.9), post_ops=v.GELU(), isa=i), U8, (327680,), (4000000,)),
)  # fmt: skip
LAYOUTS = tuple(
    Bench(f"{layout[0]} -> {layout[1]} {name}{' 3 channels' * (c == 3)}",
          lambda i, q=q, out=out, layout=layout: Convert(out, layout=layout, isa=i, **q), source,
          l2 if layout == TO_NHWC else (l2[0], *l2[2:], l2[1]),
          large if layout == TO_NHWC else (large[0], *large[2:], large[1]))
    for layout in (TO_NHWC, TO_NCHW)
    for c, l2, large in (
        (64, (1, 64, 40, 48), (1, 64, 160, 160)),
        (3, (1, 3, 200, 200), (8, 3, 224, 224)),
    )
    for name, source, out, q in (
        ("f32 -> u8", F32, U8, {"y_scale": 0.9, "y_zero_point": 7}),
        ("u8 -> f32", U8, F32, _q(x_zero_point=7)),
        ("u8", U8, U8, {}),
        ("f32", F32, F32, {}),
    )
)  # fmt: skip
POOLS = tuple(
    Bench(f"{kind} pool {name} {'u8' if source == U8 else 'f32'}",
          lambda i, make=make, window=window: make(isa=i, **window), source,
          l2[1 if source == F32 else 0], large[1 if source == F32 else 0])
    for kind, make in (("max", MaxPool2d), ("average", AvgPool2d))
    for name, window, l2, large in (
        ("3x3/2", {"kernel": 3, "stride": 2, "padding": 1}, ((1, 64, 112, 64), (1, 16, 112, 64)),
         ((8, 112, 112, 64), (2, 112, 112, 64))),
        ("2x2/2", {"kernel": 2}, ((1, 40, 48, 256), (1, 20, 24, 256)), ((8, 56, 64, 256), (2, 56, 64, 256))),
        ("3x3/1", {"kernel": 3, "stride": 1, "padding": 1}, ((1, 56, 84, 64), (1, 28, 42, 64)),
         ((20, 56, 56, 64), (5, 56, 56, 64))),
        ("7x7 global", {"kernel": 7}, ((6, 7, 7, 2048), (2, 7, 7, 1536)), ((80, 7, 7, 2048), (20, 7, 7, 2048))),
    )
    for source in (U8, F32)
)  # fmt: skip
OTHERS = (
    Bench("sum u8 + u8 -> u8", lambda i: SumTensors(2, U8, scales=[0.3, 0.4], y_scale=0.5, isa=i), U8, (213000,),
          (2700000,), 2),
    Bench("sum f32 + f32", lambda i: SumTensors(2, F32, isa=i), F32, (53000,), (670000,), 2),
    Bench("concat 4 x 64 u8, one scale", lambda i: Concat(4, U8, isa=i), U8, (1250, 64), (15600, 64), 4),
    Bench("concat 4 x 64 u8, rescaled", lambda i: Concat(4, U8, scales=[0.3, 0.4, 0.5, 0.6], isa=i), U8, (1250, 64),
          (15600, 64), 4),
    Bench("softmax f32 rows of 128", Softmax, F32, (640, 128), (8000, 128)),
    Bench("softmax f32 rows of 1000", Softmax, F32, (80, 1000), (1000, 1000)),
)  # fmt: skip
ALL = (*CONVERSIONS, *LAYOUTS, *POOLS, *OTHERS)


def _buffer(shape: Shape, dtype: np.dtype[Any], seed: int = 0) -> Any:
    array = aligned_empty(shape, dtype)
    array[...] = np.random.default_rng(seed).integers(0, 100, shape)
    return array


def measure(bench: Bench, shape: Shape, tier: str | None, rounds: int) -> dict[str, Any]:
    """Time a kernel and the copy alternately."""
    sources = [_buffer(shape, bench.source, seed) for seed in range(bench.count)]
    plan = bench.operator(tier)._first(sources)
    out = _buffer(plan.y_shape, plan.y_dtype)
    moved = sum(x.nbytes for x in sources) + out.nbytes
    copy_from, copy_to = _buffer((moved // 2,), U8), _buffer((moved // 2,), U8)
    calls = []
    for call in plan.calls:
        first, *others = (sources[i].ctypes.data for i in call.sources)
        addresses = [first, out.ctypes.data, *others]
        calls.append((call.bound.descriptor, len(addresses), native.ffi.new("int64_t[]", addresses)))
    threads, run = num_threads(), native.lib.vg_call

    def kernel() -> None:
        for descriptor, count, block in calls:
            run(descriptor, count, block, threads)

    times = compare({"kernel": kernel, "copy": lambda: np.copyto(copy_to, copy_from)}, rounds=rounds)
    return {
        "bytes": moved,
        "kernels": [key.name for key in plan.keys],
        "gbps": moved / times["kernel"].best * 1e-9,
        "copy_gbps": moved / times["copy"].best * 1e-9,
        "ratio_best": times["copy"].best / times["kernel"].best,
        "ratio_median": times.speedup("kernel", "copy"),
    }


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Lay the figures out."""
    result = Table(title=title, title_justify="left")
    for name in ("kernel", "tier", "size"):
        result.add_column(name)
    for name in ("KB moved", "GB/s", "copy GB/s", "of copy", "(median)"):
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(
            row["name"], row["tier"], row["size"], f"{row['bytes'] / 1024:.0f}", f"{row['gbps']:.0f}",
            f"{row['copy_gbps']:.0f}", f"{row['ratio_best']:.2f}", f"{row['ratio_median']:.2f}",
        )  # fmt: skip
    return result


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Geometric mean of the ratios, and how many reach 0.8, per tier and size."""
    found: dict[str, dict[str, float]] = {}
    for key in sorted({(row["tier"], row["size"]) for row in rows}):
        ratios = [row["ratio_best"] for row in rows if (row["tier"], row["size"]) == key]
        found[" ".join(key)] = {
            "geometric mean": statistics.geometric_mean(ratios), "at least 0.8": sum(r >= 0.8 for r in ratios),
            "kernels": len(ratios),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.element", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11, help="samples of each candidate")
    parser.add_argument("--tier", choices=["best", "avx512", "avx2"], help="only this tier")
    parser.add_argument("--only", default="", help="only kernels with this in their name")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    warn_if_busy(console)
    v.set_num_threads(arguments.threads)
    rows = []
    for tier in [arguments.tier] if arguments.tier else ["best", *(t for t in ("avx2",) if t in v.tiers())]:
        for size in ("l2", "large"):
            for bench in ALL:
                if arguments.only in bench.name:
                    isa = None if tier == "best" else tier
                    found = measure(bench, getattr(bench, size), isa, arguments.rounds)
                    rows.append({"name": bench.name, "tier": tier, "size": size} | found)
    figures = context()
    console.print(table(rows, f"{figures['machine']['name']}, {arguments.threads} thread(s)"))
    for name, values in summary(rows).items():
        console.print(name, {k: round(x, 2) for k, x in values.items()})
    if arguments.json:
        write_json(arguments.json, figures | {"rows": rows, "summary": summary(rows)})


if __name__ == "__main__":
    main()
