"""PyTorch's int8 operators as a peer, by fbgemm or by the oneDNN that PyTorch ships, which is newer than the wheel's.

PyTorch is large and stays optional: the interpreter named by VNNIGEN_TORCH_PYTHON must have torch (2.13 is what was
tried), or else the one that runs the benchmark. fbgemm picks its own instructions and cannot be capped, so it is
compared only with the best vector tier that it knows, AVX512-VNNI. Calls go through PyTorch's dispatcher and allocate
their result, which takes some microseconds: small problems say little.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.onednn import CAPS
from benchmarks.peers.process import PeerError, PeerJob, PeerProcess
from vnnigen.bench.problem_string import Axis, ConvShape, GemmShape

WORKER = Path(__file__).with_name("pytorch_worker.py")
TIER = "avx512_vnni"


def interpreter() -> str:
    """Return the interpreter that has torch; PeerError if it has not."""
    python = os.environ.get("VNNIGEN_TORCH_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    if found.returncode:
        raise PeerError(f"{python} has no torch: install it there, or set VNNIGEN_TORCH_PYTHON to one that has")
    return python


def _fits(axis: Axis) -> bool:
    """Whether padding both sides as much as the first gives the same output."""
    extent = (axis.kernel - 1) * axis.dilation + 1
    return (axis.size + 2 * axis.pad_before - extent) // axis.stride + 1 == axis.out


class FBGEMM(PeerProcess):
    """A process with torch, computing with fbgemm."""

    name = engine = "fbgemm"

    def __init__(self, tier: str, threads: int = 1) -> None:
        """Start it. PeerError for a tier that it cannot be compared on, or where there is no torch."""
        cap = self._cap(tier)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | cap
        super().__init__([interpreter(), str(WORKER), self.engine, str(threads)], environment)
        self.version = f"PyTorch {self.ready[1]}"

    def _cap(self, tier: str) -> dict[str, str]:
        """Return what keeps it on a tier."""
        if tier != TIER:
            raise PeerError(f"fbgemm chooses its own instructions; it is compared on {TIER} only")
        return {}

    def prepare(self, shape: ConvShape | GemmShape, dtype: str, _out: str, post_ops: str = "") -> PeerJob:
        """Create an operator and its operands; PeerError where PyTorch has nothing comparable."""
        if dtype != "u8s8":
            raise PeerError(f"PyTorch has no {dtype}")
        # ReLU6 with a fitting output scale is requantization's own saturation.
        ops = "relu" if post_ops.startswith("clip:0") else post_ops or "-"
        if ops not in ("-", "relu"):
            raise PeerError(f"PyTorch fuses no {ops}")
        if isinstance(shape, GemmShape):
            return self.job(f"linear {ops} {shape.m} {shape.n} {shape.k}")
        h, w = shape.h, shape.w
        if not all(_fits(axis) for axis in (h, w)):
            raise PeerError("PyTorch pads both sides alike")
        sizes = [shape.g, shape.mb, shape.ic, h.size, w.size, shape.oc, h.kernel, w.kernel, h.stride, w.stride]
        return self.job(" ".join(map(str, ["conv", ops, *sizes, h.pad_before, w.pad_before])))


class TorchOneDNN(FBGEMM):
    """A process with torch, computing with its oneDNN, capped to a tier."""

    name, engine = "PyTorch's oneDNN", "onednn"

    def __init__(self, tier: str, threads: int = 1) -> None:
        """Start it. PeerError for a tier that oneDNN does not know, or where there is no torch."""
        super().__init__(tier, threads)
        self.version += f", oneDNN {self.ready[2]}"

    def _cap(self, tier: str) -> dict[str, str]:
        if tier not in CAPS:
            raise PeerError(f"oneDNN has no tier {tier!r}")
        return {"ONEDNN_MAX_CPU_ISA": CAPS[tier]}
