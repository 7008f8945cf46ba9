"""Times NumPy's f32 matrix product on request: `matmul M N K`; speaks the protocol of `benchmarks.peers.process`."""

from __future__ import annotations

import sys
import time

import numpy as np

Operands = tuple[np.ndarray, np.ndarray, np.ndarray]


def _kernel() -> str:
    """Return which BLAS this is and which of its kernels runs, as threadpoolctl finds them."""
    try:
        import threadpoolctl
    except ImportError:
        return "unknown-blas"
    found = [lib for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]
    parts = [f"{lib['internal_api']}-{lib['version']}-{lib.get('architecture', '?')}" for lib in found]
    return "+".join(parts) or "unknown-blas"


def _answer(line: str, jobs: dict[int, Operands], kernel: str) -> str:
    verb, *words = line.split()
    numbers = [int(word) for word in words]
    if verb == "run":
        a, b, out = jobs[numbers[0]]
        start, cpu = time.perf_counter_ns(), time.thread_time_ns()
        for _ in range(numbers[1]):
            np.matmul(a, b, out=out)
        return f"ok {time.perf_counter_ns() - start} {time.thread_time_ns() - cpu}"
    if verb == "drop":
        del jobs[numbers[0]]
        return "ok"
    m, n, k = numbers
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k), dtype=np.float32), rng.standard_normal((k, n), dtype=np.float32)
    number = max(jobs, default=0) + 1
    jobs[number] = a, b, np.empty((m, n), np.float32)
    return f"ok {number} {kernel}"


def main() -> None:
    kernel = _kernel()
    print("ready", np.__version__, kernel, flush=True)
    jobs: dict[int, Operands] = {}
    for line in sys.stdin:
        try:
            print(_answer(line, jobs, kernel), flush=True)
        except Exception as error:
            print("error", " ".join(str(error).split())[:300], flush=True)


if __name__ == "__main__":
    main()
