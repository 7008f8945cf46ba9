"""Times PyTorch's quantized operators on request; speaks the protocol of `benchmarks.peers.process`.

Runs under any interpreter that has torch, with the engine (`fbgemm` or `onednn`) and the number of threads as
arguments, and imports nothing of this project:

    linear POST_OPS M N K
    conv   POST_OPS G MB IC IH IW OC KH KW SH SW PH PW
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable

import torch

_RELU = {"-": "", "relu": "_relu"}


def _weights(*shape: int) -> torch.Tensor:
    """Return full-range weights with a scale for each channel."""
    n = shape[0]
    return torch.quantize_per_channel(
        torch.randn(*shape) * 0.2, torch.full((n,), 0.005), torch.zeros(n, dtype=torch.int), 0, torch.qint8
    )


def _source(*shape: int) -> torch.Tensor:
    x = torch.rand(*shape) * 5
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return torch.quantize_per_tensor(x, 0.02, 0, torch.quint8)


def linear(relu: str, m: int, n: int, k: int) -> Callable[[], object]:
    packed = torch.ops.quantized.linear_prepack(_weights(n, k), torch.randn(n))
    x, run = _source(m, k), getattr(torch.ops.quantized, "linear" + relu)
    return lambda: run(x, packed, 0.5, 0)


def conv(
    relu: str, g: int, mb: int, ic: int, ih: int, iw: int, oc: int, kh: int, kw: int, sh: int, sw: int, ph: int, pw: int
) -> Callable[[], object]:
    weights = _weights(oc, ic // g, kh, kw)
    packed = torch.ops.quantized.conv2d_prepack(weights, torch.randn(oc), [sh, sw], [ph, pw], [1, 1], g)
    x, run = _source(mb, ic, ih, iw), getattr(torch.ops.quantized, "conv2d" + relu)
    return lambda: run(x, packed, 0.5, 0)


def _answer(line: str, jobs: dict[int, Callable[[], object]]) -> str:
    verb, *words = line.split()
    if verb == "run":
        job, calls = jobs[int(words[0])], int(words[1])
        start, cpu = time.perf_counter_ns(), time.thread_time_ns()
        for _ in range(calls):
            job()
        return f"ok {time.perf_counter_ns() - start} {time.thread_time_ns() - cpu}"
    if verb == "drop":
        del jobs[int(words[0])]
        return "ok"
    make = {"linear": linear, "conv": conv}[verb]
    number = max(jobs, default=0) + 1
    jobs[number] = make(_RELU[words[0]], *map(int, words[1:]))
    jobs[number]()
    return f"ok {number} {torch.backends.quantized.engine}"


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.backends.quantized.engine = sys.argv[1]
    torch.set_num_threads(int(sys.argv[2]))
    torch.manual_seed(0)
    onednn = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    print("ready", torch.__version__, onednn[1] if onednn else "unknown", flush=True)
    jobs: dict[int, Callable[[], object]] = {}
    with torch.inference_mode():
        for line in sys.stdin:
            try:
                print(_answer(line, jobs), flush=True)
            except Exception as error:
                print("error", " ".join(str(error).split())[:300], flush=True)


if __name__ == "__main__":
    main()
