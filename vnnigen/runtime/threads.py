"""How many threads kernels may use.

The default is the smaller of the CPUs that the process may run on and the CPU time that its cgroup grants;
`VNNIGEN_NUM_THREADS` or `set_num_threads` override it. The threads themselves belong to the native pool
(`csrc/pool.c`), which starts them on demand.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from vnnigen.errors import VnnigenError
from vnnigen.runtime import native

_chosen: int | None = None


def num_threads() -> int:
    """Return the number of threads a parallel kernel may use, the caller included."""
    global _chosen
    if _chosen is None:
        _chosen = _from_environment() or default_num_threads()
    return _chosen


def set_num_threads(n: int | None) -> None:
    """Use at most `n` threads from now on; None goes back to the environment or the default.

    Raises VnnigenError unless `n` is between 1 and the pool's largest size.
    """
    global _chosen
    _chosen = None if n is None else _checked(n, "set_num_threads")
    native.lib.vg_pool_trim(num_threads())


def default_num_threads() -> int:
    """Return what the affinity mask and the cgroup quota allow; a quota of 2.5 CPUs counts as 2.

    Rounded down because a pool that overruns its quota is stopped as a whole until the next period.
    """
    cpus = len(os.sched_getaffinity(0))
    limit: int = native.lib.VG_MAX_THREADS
    return max(1, min(cpus, limit, math.floor(min(cgroup_quota(), cpus))))


def _from_environment() -> int | None:
    text = os.environ.get("VNNIGEN_NUM_THREADS", "").strip()
    if not text:
        return None
    try:
        n = int(text)
    except ValueError:
        raise VnnigenError(f"VNNIGEN_NUM_THREADS={text!r} is not a number") from None
    return _checked(n, "VNNIGEN_NUM_THREADS")


def _checked(n: int, source: str) -> int:
    limit: int = native.lib.VG_MAX_THREADS
    if not 1 <= n <= limit:
        raise VnnigenError(f"{source}: {n} threads; give a number from 1 to {limit}")
    return n


def cgroup_quota(root: Path = Path("/")) -> float:
    """Return how many CPUs' worth of time the cgroups above this process grant; inf without a limit.

    Reads cgroup v2's `cpu.max` and v1's `cpu.cfs_quota_us` below `root`, at every level from the process's
    own group up: the tightest one counts.
    """
    quotas = [math.inf]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _levels(root / "sys/fs/cgroup", path):
                quotas.append(parse_cpu_max(_read(folder / "cpu.max")))
        elif "cpu" in controllers.split(","):
            for folder in _levels(root / "sys/fs/cgroup" / controllers, path):
                period = _read(folder / "cpu.cfs_period_us")
                quotas.append(parse_cpu_max(f"{_read(folder / 'cpu.cfs_quota_us')} {period}"))
    return min(quotas)


def parse_cpu_max(text: str) -> float:
    """Return quota/period of cgroup v2's `cpu.max`, as in "150000 100000"; inf for "max", -1 and no text.

    (Linux, Documentation/admin-guide/cgroup-v2.rst; -1 is v1's spelling of "max".)
    """
    match text.split():
        case [quota, period] if quota.isdigit() and period.isdigit() and int(period) > 0:
            return int(quota) / int(period)
        case _:
            return math.inf


def _levels(mount: Path, path: str) -> list[Path]:
    """Return the folders of a group and of all groups above it, as far as this namespace shows them."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
