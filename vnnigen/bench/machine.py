"""What this machine is, as far as kernels care: name, features, tiers, caches, threads."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from vnnigen.isa.features import features
from vnnigen.isa.tiers import TIERS, max_isa, tiers, why_not
from vnnigen.runtime import native
from vnnigen.runtime.threads import num_threads


def describe_machine() -> dict[str, Any]:
    """Return what `vnnigen probe --json` prints, without the peaks."""
    usable = tiers()
    # `reference` needs nothing, so it is always usable and always last.
    names = [tier.name for tier in TIERS] + [name for name in usable if name not in {t.name for t in TIERS}]
    return {
        "name": cpu_name(),
        "features": sorted(features()),
        "tiers": [
            {"name": name, "usable": name in usable, "why_not": None if name in usable else why_not(name)}
            for name in names
        ],
        "best_tier": usable[0],
        "max_isa": max_isa(),
        "caches": caches(),
        "cpus": os.cpu_count(),
        "threads": num_threads(),
    }


def cpu_name() -> str:
    """Return the marketing name, from CPUID leaves 0x80000002 to 0x80000004 (Intel SDM vol. 2, CPUID)."""
    if native.cpuid(0x80000000)[0] < 0x80000004:
        return platform.processor() or platform.machine()
    words = [word for leaf in (0x80000002, 0x80000003, 0x80000004) for word in native.cpuid(leaf)]
    raw = b"".join(word.to_bytes(4, "little") for word in words)
    return " ".join(raw.split(b"\0")[0].decode("ascii", "replace").split())


def caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[dict[str, Any]]:
    """Return the first CPU's caches as Linux reports them: level, type, size in bytes, CPUs that share it."""
    found = []
    for folder in sorted(root.glob("index[0-9]*")):
        try:
            level, kind, size, shared = (
                (folder / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:  # virtual machines may leave some of the files out
            continue
        found.append({"level": int(level), "type": kind.lower(), "bytes": parse_size(size), "cpus": shared})
    return found


def parse_size(text: str) -> int:
    """Return the bytes that a sysfs size such as `48K` or `2M` means."""
    factors = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * factors[text[-1]] if text[-1] in factors else int(text)
