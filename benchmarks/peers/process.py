"""A peer in a process of its own that answers one line to each line: `ok ANSWER` or `error MESSAGE`.

Commands that all peers know are `run JOB CALLS` (nanoseconds of that many calls, by the peer's own clock, and of
the processor's time that its thread took) and `drop JOB`; those that make a job answer with its number and the name
of the kernel.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from vnnigen.errors import VnnigenError

_SAMPLE_NS = 2_000_000
_ROUNDS = 11


class PeerError(VnnigenError, RuntimeError):
    """A peer cannot be had, or refuses a problem."""


@dataclass
class PeerJob:
    """A problem with its operands, prepared in a peer's process."""

    process: PeerProcess
    number: int
    impl: str
    by_cpu: bool = False

    def sample(self, calls: int) -> int:
        """Run it `calls` times; nanoseconds by the peer's clock, or `by_cpu` of its thread's processor time."""
        return int(self.process.ask(f"run {self.number} {calls}").split()[self.by_cpu])

    def median_ns(self) -> float:
        """Return the nanoseconds of one call, the median of several samples."""
        self.sample(1)
        calls = max(1, math.ceil(_SAMPLE_NS / max(self.sample(3) // 3, 1)))
        return sorted(self.sample(calls) / calls for _ in range(_ROUNDS))[_ROUNDS // 2]

    def drop(self) -> None:
        """Free it."""
        self.process.ask(f"drop {self.number}")


Self = TypeVar("Self", bound="PeerProcess")


class PeerProcess:
    """A running peer. A context manager; leaving it ends the process. `ready` is its first line, in words."""

    name = "peer"

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it and wait for its first line; PeerError if there is none."""
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self._read().split()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, command: str) -> str:
        """Send a command and return what follows the answer's `ok`; PeerError for anything else."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        verdict, _, rest = self._read().partition(" ")
        if verdict != "ok":
            raise PeerError(f"{self.name} refuses `{command}`: {rest}")
        return rest

    def job(self, command: str) -> PeerJob:
        """Send a command that makes a job."""
        number, _, impl = self.ask(command).partition(" ")
        return PeerJob(self, int(number), impl)

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"the process of {self.name} ended with status {self._process.wait()}")
        return line.strip()
