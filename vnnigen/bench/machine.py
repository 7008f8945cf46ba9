"""What this machine is, as far as kernels care, in a form that JSON can hold."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from vnnigen.isa.features import caches, cpu_name, features
from vnnigen.isa.tiers import TIERS, max_isa, tiers, why_not
from vnnigen.runtime.threads import num_threads


def describe_machine() -> dict[str, Any]:
    """Return what `vnnigen probe --json` prints, without the peaks.

    `tiers` lists all tiers, best first, with the reason (`why_not`) where one cannot be used; `max_isa` is
    the cap in force, if any; `threads` is how many kernels use by default.
    """
    usable = tiers()
    return {
        "name": cpu_name(),
        "features": sorted(features()),
        "tiers": [{"name": tier.name, "usable": tier.name in usable, "why_not": why_not(tier.name)} for tier in TIERS],
        "best_tier": usable[0],
        "max_isa": max_isa(),
        "caches": [asdict(cache) for cache in caches()],
        "cpus": os.cpu_count(),
        "threads": num_threads(),
    }
