"""From a request to figures: build the handles, time them in pairs, compare with the measured peak."""

from __future__ import annotations

from typing import Any

from vnnigen.bench.problem_string import ConvShape
from vnnigen.bench.timing import Samples, compare
from vnnigen.bench.workload import Request, Workload, build_workload, f32_request
from vnnigen.runtime.peak import peak_for


def measure(request: Request, *, vs: str | None = None, rounds: int = 11) -> dict[str, Any]:
    """Time one problem; `vs="f32"` times the f32 kernel of the same problem alternately in the same run.

    Returns what `vnnigen bench --json` prints. Always: `ms_median`, `ms_min`, `gops` (from the median),
    `pct_peak` (of the multiply instruction's measured peak, None where unknown), `isa`, `kernel`, `threads`.
    With `vs`: `vs_f32` (median over rounds of f32's time by this kernel's) and the f32 kernel's own figures
    under `f32`. `gops` counts taps on the padding; for convolutions, `gops_without_padding` does not.
    """
    main = build_workload(request)
    candidates = {"main": main.run}
    if vs is not None:
        base = build_workload(f32_request(request, main.explanation.tier))
        candidates["f32"] = base.run
    times = compare(candidates, rounds=rounds)
    result = _figures(main, times["main"])
    if vs is not None:
        result["vs_f32"] = times.speedup("main", "f32")
        result["f32"] = _figures(base, times["f32"])
    return result


def _figures(workload: Workload, samples: Samples) -> dict[str, Any]:
    request = workload.request
    gops = request.shape.ops / samples.median * 1e-9
    tier, chains = workload.explanation.tier, workload.chains
    peak = peak_for(tier, chains, request.threads)
    figures: dict[str, Any] = {
        "problem": str(request.shape),
        "dtype": request.dtype,
        "isa": tier,
        "kernel": workload.explanation.kernel,
        "chains": chains,
        "threads": request.threads,
        "ms_median": samples.median * 1e3,
        "ms_min": samples.best * 1e3,
        "gops": gops,
        "peak_gops": peak,
        "pct_peak": None if peak is None else 100 * gops / peak,
    }
    if isinstance(request.shape, ConvShape):
        figures["gops_without_padding"] = request.shape.ops_without_padding / samples.median * 1e-9
    return figures
