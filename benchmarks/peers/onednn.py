"""oneDNN as a peer: its matmul and convolution, capped to a tier, timed by itself in a process of its own.

`OneDNN(tier, threads)` is one such process; `prepare` gives a job whose `sample(calls)` returns nanoseconds, and
`time_matmul` and `time_conv` return GOP/s at once. Weights are packed and layouts are chosen by oneDNN (format
`any`), scales are per channel, bias and post-ops are fused: what a good user of oneDNN would do.

The library is that of the wheel `onednn-cpu-gomp` with the headers of `onednn-devel-cpu-gomp`, taken by pip into a
cache directory and not installed; or, where ONEDNN_ROOT is set, `$ONEDNN_ROOT/include` and `$ONEDNN_ROOT/lib`.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from benchmarks.peers.process import PeerError, PeerJob, PeerProcess
from vnnigen.bench.problem_string import Axis, ConvShape, GemmShape
from vnnigen.bench.workload import Request

RELEASE = "2023.2.0"  # oneDNN 3.2, the last release on PyPI built for GNU OpenMP
WHEELS = (f"onednn-cpu-gomp=={RELEASE}", f"onednn-devel-cpu-gomp=={RELEASE}")
SOURCE = Path(__file__).with_name("onednn_driver.cpp")

#: Our tiers as values of ONEDNN_MAX_CPU_ISA. oneDNN has one step for all of AMX.
CAPS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX2_VNNI",
    "avx512": "AVX512_CORE",
    "avx512_vnni": "AVX512_CORE_VNNI",
    "avx512_bf16": "AVX512_CORE_BF16",
    "amx_int8": "AVX512_CORE_AMX",
    "amx_bf16": "AVX512_CORE_AMX",
}


def cache_directory() -> Path:
    """Return where libraries and drivers are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vnnigen-benchmarks"


def _library() -> tuple[Path, Path]:
    """Return the directories of headers and library, fetching the wheels if need be."""
    if root := os.environ.get("ONEDNN_ROOT"):
        return Path(root, "include"), Path(root, "lib")
    home = cache_directory() / f"onednn-{RELEASE}"
    if not (home / "lib" / "libdnnl.so").exists():
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            done = subprocess.run([*pip, "--dest", folder, *WHEELS], capture_output=True, text=True, check=False)
            if done.returncode:
                raise PeerError(f"pip could not fetch {' and '.join(WHEELS)}: {done.stderr.strip()[-500:]}")
            for wheel in Path(folder).glob("*.whl"):
                _unpack(wheel, home)
        (home / "lib" / "libdnnl.so").symlink_to("libdnnl.so.3")
    return home / "include", home / "lib"


def _unpack(wheel: Path, home: Path) -> None:
    """Take headers and the library out of a wheel; the latter is in it three times, once is enough."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inner = name.partition(".data/data/")[2]
            if inner.startswith("include/") or inner == "lib/libdnnl.so.3":
                target = home / inner
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def build_driver() -> Path:
    """Compile the driver, once per source and library; PeerError with the compiler's words if that fails."""
    include, lib = _library()
    key = hashlib.sha256(SOURCE.read_bytes() + str(lib).encode()).hexdigest()[:16]
    binary = cache_directory() / f"onednn-driver-{key}"
    if not binary.exists():
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        command = [*compiler, "-O2", "-std=c++17", f"-I{include}", str(SOURCE), "-o", f"{binary}.{os.getpid()}"]
        command += [f"-L{lib}", "-ldnnl", f"-Wl,-rpath,{lib}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise PeerError(f"no C++ compiler {compiler[0]!r} to build the oneDNN driver with") from None
        if done.returncode:
            raise PeerError(f"the oneDNN driver does not compile: {done.stderr[:2000]}")
        Path(f"{binary}.{os.getpid()}").replace(binary)
    return binary


class OneDNN(PeerProcess):
    """A driver process under an ISA cap. A context manager; leaving it ends the process."""

    name = "oneDNN"

    def __init__(self, tier: str, threads: int = 1) -> None:
        """Start the driver. PeerError where oneDNN has no such cap, or cannot be fetched, built or started."""
        if tier not in CAPS:
            raise PeerError(f"oneDNN has no tier {tier!r}; known are {', '.join(CAPS)}")
        self.tier, self.threads = tier, threads
        environment = os.environ | {"ONEDNN_MAX_CPU_ISA": CAPS[tier], "OMP_NUM_THREADS": str(threads)}
        super().__init__([str(build_driver())], environment)
        self.version = self.ready[1] if len(self.ready) == 3 else "unknown"

    def prepare(
        self, shape: ConvShape | GemmShape, dtype: str = "u8s8", out: str = "u8", post_ops: str = ""
    ) -> PeerJob:
        """Create a primitive and its operands.

        `dtype` is u8s8, s8s8, f32 or bf16; `post_ops` as in `vnnigen.bench.post_op_string`. PeerError where
        oneDNN has no implementation.
        """
        if isinstance(shape, GemmShape):
            verb, sizes = "matmul", [shape.m, shape.n, shape.k]
        else:
            verb, sizes = "conv", _conv_sizes(shape)
        words = [verb, dtype, out, post_ops.replace(" ", "") or "-", *map(str, sizes)]
        return self.job(" ".join(words))


def _conv_sizes(s: ConvShape) -> list[int]:
    """Return a convolution as the driver reads it."""

    def both(name: str) -> list[int]:
        return [getattr(axis, name) for axis in (s.h, s.w)]

    def holes(axis: Axis) -> int:
        return axis.dilation - 1

    head = [s.g, s.mb, s.ic, *both("size"), s.oc, *both("out"), *both("kernel"), *both("stride")]
    return [*head, holes(s.h), holes(s.w), *both("pad_before"), *both("pad_after")]


def time_shape(
    shape: ConvShape | GemmShape, tier: str, *, dtype: str = "u8s8", out: str = "u8", post_ops: str = "relu",
    threads: int = 1,
) -> float:  # fmt: skip
    """Return oneDNN's GOP/s on one problem (taps on the padding counted), in a process of its own."""
    with OneDNN(tier, threads) as process:
        return shape.ops / process.prepare(shape, dtype, out, post_ops).median_ns()


def time_matmul(
    m: int, n: int, k: int, tier: str, *, dtype: str = "u8s8", out: str = "u8", post_ops: str = "relu",
    threads: int = 1,
) -> float:  # fmt: skip
    """Return oneDNN's GOP/s on a [m, k] by [k, n] multiplication; arguments as in `OneDNN.prepare`."""
    return time_shape(GemmShape(m, n, k), tier, dtype=dtype, out=out, post_ops=post_ops, threads=threads)


def time_conv(
    shape: ConvShape, tier: str, *, dtype: str = "u8s8", out: str = "u8", post_ops: str = "relu",
    threads: int = 1,
) -> float:  # fmt: skip
    """Return oneDNN's GOP/s on a convolution; arguments as in `OneDNN.prepare`."""
    return time_shape(shape, tier, dtype=dtype, out=out, post_ops=post_ops, threads=threads)


@dataclass
class OneDNNPeer:
    """oneDNN as `benchmarks.common.run_case` wants a peer: one process for each tier and number of threads."""

    processes: dict[tuple[str, int], OneDNN] = field(default_factory=dict)

    def __enter__(self) -> OneDNNPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes.values():
            process.close()

    def __call__(self, request: Request, tier: str) -> PeerJob | None:
        """Prepare the problem of a request under the cap of `tier`; None on the reference tier."""
        if tier not in CAPS:
            return None
        key = tier, request.threads
        if key not in self.processes:
            self.processes[key] = OneDNN(*key)
        return self.processes[key].prepare(request.shape, request.dtype, request.out, request.post_ops)

    @property
    def version(self) -> str:
        """The library's version, known once a process has started."""
        return next((p.version for p in self.processes.values()), "unknown")
