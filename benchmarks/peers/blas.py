"""NumPy's matrix product, that is OpenBLAS in its wheels, as a peer for f32: without bias and post-ops.

Runs in a process without OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE, which some systems set to work around older
releases and which would slow it; for the tier `avx2` the former caps it instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.peers.process import PeerError, PeerJob, PeerProcess
from vnnigen.bench.problem_string import ConvShape, GemmShape

WORKER = Path(__file__).with_name("blas_worker.py")
#: Values of OPENBLAS_CORETYPE; None leaves the choice to OpenBLAS.
CAPS = {"avx2": "Haswell", "avx512": None}


def environment(base: Mapping[str, str], tier: str, threads: int) -> dict[str, str]:
    """Return the worker's environment."""
    clean = {k: v for k, v in base.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    cap = CAPS[tier]
    return clean | {"OPENBLAS_NUM_THREADS": str(threads)} | ({"OPENBLAS_CORETYPE": cap} if cap else {})


class Blas(PeerProcess):
    """A process with NumPy."""

    name = "NumPy"

    def __init__(self, tier: str, threads: int = 1) -> None:
        """Start it. PeerError for a tier without f32."""
        if tier not in CAPS:
            raise PeerError(f"NumPy's f32 product is compared on {', '.join(CAPS)}, not on {tier}")
        super().__init__([sys.executable, str(WORKER)], environment(os.environ, tier, threads))
        self.version = f"NumPy {self.ready[1]}"

    def prepare(self, shape: ConvShape | GemmShape, dtype: str, _out: str, _post_ops: str = "") -> PeerJob:
        """Create operands; PeerError for anything but an f32 matrix product."""
        if dtype != "f32" or not isinstance(shape, GemmShape):
            raise PeerError("NumPy is a peer for f32 matrix products only")
        return self.job(f"matmul {shape.m} {shape.n} {shape.k}")
