"""Runs whole networks on one engine; speaks the protocol of `benchmarks.peers.process`.

    python network_worker.py ENGINE THREADS CPUS                    then, a line each:
        load MODEL PRECISION INPUTS      a job that computes INPUTS, an .npz of the model's inputs
        answers JOB INPUTS OUTPUTS       compute each sample of INPUTS alone and write all outputs to an .npz
    python network_worker.py ENGINE THREADS CPUS quantize MODEL CALIBRATION OUT [transformer]
    python network_worker.py ENGINE THREADS CPUS first MODEL PRECISION INPUTS [CACHE]

`first` prints seconds for importing the engine, seconds from the file to the first result, and the process's peak
memory in bytes. CPUS, comma-separated, are what the process is bound to; `-` leaves that to the system.

Runs under any interpreter that has the engine, and imports nothing of this project unless that is the engine.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
#: Computes the outputs by name.
Run = Callable[[Feeds], dict[str, Array]]
#: The peers, from a file that imports nothing of the package, which this interpreter may not have.
_PEERS = Path(__file__).parents[2] / "vnnigen" / "bench" / "engines.py"


def peers() -> dict[str, Callable[[int], Any]]:
    """Load the classes of the peers."""
    spec = importlib.util.spec_from_file_location("engines", _PEERS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Callable[[int], Any]] = module.ENGINES
    return found


def read(path: str) -> dict[str, Array]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def one_by_one(feeds: Feeds) -> Iterator[dict[str, Array]]:
    """Split a batch into samples of batch 1."""
    for i in range(len(next(iter(feeds.values())))):
        yield {name: np.ascontiguousarray(values[i : i + 1]) for name, values in feeds.items()}


class Vnnigen:
    """The library of this project; a cap on instructions comes from the environment."""

    module = "vnnigen"

    def __init__(self, threads: int) -> None:
        self.api = importlib.import_module(self.module)
        self.api.set_num_threads(threads)
        self.version = f"vnnigen-{self.api.__version__}"

    def load(self, model: str, precision: str, _feeds: Feeds, cache: str | None = None) -> Run:
        """Make a model ready for inputs of the shapes of `feeds`."""
        if cache:
            os.environ["VNNIGEN_CACHE_DIR"] = cache
        network = self.api.load(model) if model.endswith(".vnni") else self.api.compile(model, precision=precision)
        names = list(network.outputs)

        def run(x: Feeds) -> dict[str, Array]:
            values = network(dict(x))
            return dict(zip(names, values if isinstance(values, tuple) else (values,), strict=True))

        return run

    def quantize(self, model: str, samples: list[dict[str, Array]], out: str, _transformer: bool) -> None:
        """Write the model in int8, calibrated on `samples`."""
        self.api.compile(model, precision="int8", calibration=samples).save(out)


ENGINES: dict[str, Callable[[int], Any]] = {**peers(), "vnnigen": Vnnigen}
Job = tuple[Run, Feeds]


def peak_memory() -> int:
    """Peak resident bytes of this program; getrusage would count what the parent had before exec (proc(5), VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def answer(engine: Any, line: str, jobs: dict[int, Job]) -> str:
    verb, *words = line.split()
    if verb == "run":
        run, feeds = jobs[int(words[0])]
        start, cpu = time.perf_counter_ns(), time.process_time_ns()
        for _ in range(int(words[1])):
            run(feeds)
        return f"ok {time.perf_counter_ns() - start} {time.process_time_ns() - cpu}"
    if verb == "drop":
        del jobs[int(words[0])]
        return "ok"
    if verb == "answers":
        run, _ = jobs[int(words[0])]
        found = [{k: np.array(v) for k, v in run(x).items()} for x in one_by_one(read(words[1]))]
        together: dict[str, Any] = {name: np.concatenate([y[name] for y in found]) for name in found[0]}
        np.savez(words[2], **together)
        return "ok"
    model, precision, inputs = words
    feeds = read(inputs)
    number = max(jobs, default=0) + 1
    jobs[number] = engine.load(model, precision, feeds), feeds
    jobs[number][0](feeds)
    return f"ok {number} {engine.version}"


def first(engine: Any, imported: float, model: str, precision: str, inputs: str, cache: str | None = None) -> None:
    """Time from the file to the first result."""
    feeds = read(inputs)
    start = time.perf_counter()
    engine.load(model, precision, feeds, cache)(feeds)
    print("ok", imported, time.perf_counter() - start, peak_memory(), flush=True)


def main() -> None:
    name, threads, cpus, *rest = sys.argv[1:]
    if cpus != "-":
        os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    start = time.perf_counter()
    engine = ENGINES[name](int(threads))
    imported = time.perf_counter() - start
    try:
        match rest:
            case ["quantize", model, calibration, out, *kind]:
                engine.quantize(model, list(one_by_one(read(calibration))), out, bool(kind))
            case ["first", *words]:
                first(engine, imported, *words)
            case _:
                serve(engine)
    except Exception as error:
        sys.exit(in_one_line(error))


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def serve(engine: Any) -> None:
    print("ready", engine.version, flush=True)
    jobs: dict[int, Job] = {}
    for line in sys.stdin:
        try:
            print(answer(engine, line, jobs), flush=True)
        except Exception as error:
            print("error", in_one_line(error), flush=True)


if __name__ == "__main__":
    main()
