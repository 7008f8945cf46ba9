"""What `explain` shows: which kernel computes a problem, how it is blocked, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from vnnigen.isa.assembler import Code
from vnnigen.runtime.tuner import Tuning

if TYPE_CHECKING:
    from vnnigen.ops.operator import Plan


@dataclass(frozen=True)
class KernelReport:
    """One generated kernel of a plan."""

    name: str
    tier: str
    columns: tuple[int, int]
    chain: str
    blocking: dict[str, Any]
    grid_steps: int
    scratch_bytes: int
    features: tuple[str, ...]
    code_size: int
    instructions: int
    jit_ms: float
    from_disk: bool
    tuning: Tuning
    code: Code

    @property
    def step(self) -> str:
        """The multiply step in words."""
        if self.chain != "amx":
            return CHAINS[self.chain]
        instruction = "TDPBF16PS" if "amx_bf16" in self.features else "TDPBUSD" if "-u8" in self.name else "TDPBSSD"
        return f"{CHAINS['amx']} {instruction}"

    def lines(self) -> list[str]:
        """Human-readable description."""
        b = self.blocking
        made = "loaded from the cache on disk" if self.from_disk else "generated"
        copy = f"copied to scratch ({self.scratch_bytes} bytes)" if b["copy"] else "read in place"
        return [
            f"kernel    {self.name}",
            f"  columns   {self.columns[0]}..{self.columns[1] - 1}, {self.step}",
            f"  blocking  {_in_words(b)}, {self.grid_steps} steps",
            f"  chosen    {self.tuning.source}",
            *(f"    {s * 1e6:10.1f} us  {_in_words(asdict(m))}" for m, s in self.tuning.measured),
            f"  source    {copy}",
            f"  needs     {', '.join(self.features)}",
            f"  code      {self.code_size} bytes, {self.instructions} instructions, {made} in {self.jit_ms:.1f} ms",
        ]


def _in_words(b: dict[str, Any]) -> str:
    """A blocking in one line."""
    tile = f"tile {b['th']}x{b['tw']} pixels x {b['nr']} vectors, unroll {b['unroll']}"
    return f"{tile}, strip {b['strip']} rows, chunk {b['chunk']} column blocks"


#: Multiply steps in words.
CHAINS = {
    "vnni": "VPDPBUSD",
    "fast": "fast chain VPMADDUBSW+VPMADDWD+VPADDD (weights are chain-safe)",
    "exact": "exact chain VPMADDWD+VPADDD on 16-bit words",
    "winograd": "Winograd F(4x4, 3x3) on 16-bit words, exact",
    "fma": "VFMADD231PS",
    "bf16": "VDPBF16PS",
    "amx": "tile products",
}


def columns_by_chain(kernels: Iterable[KernelReport]) -> dict[str, int]:
    """Multiply steps, with the output columns (of a group) that each computes; {} for the reference."""
    columns: Counter[str] = Counter()
    for kernel in kernels:
        columns[kernel.chain] += kernel.columns[1] - kernel.columns[0]
    return dict(columns)


@dataclass(frozen=True)
class Explanation:
    """A plan in words: `str()` prints it, `to_dict()` is for machines, `listing()` the annotated assembly."""

    op: str
    tier: str
    problem: str
    kernels: tuple[KernelReport, ...]
    candidates: tuple[tuple[str, str | None], ...]

    @classmethod
    def of(cls, plan: Plan) -> Explanation:
        """Describe a plan."""
        reports = []
        if plan.bound is not None:
            runs: Any = getattr(plan.bound, "runs", plan.prepared.packed.runs)
            chains = [(r.run.start, r.run.stop, r.mac.name) for r in runs]
            tunings = plan.tunings or (Tuning(),) * len(chains)
            rows = zip(plan.bound.keys, plan.bound.kernels, chains, tunings, strict=True)
            for key, kernel, (start, stop, mac), tuning in rows:
                blocking: Any = key.blocking  # type: ignore[attr-defined]
                code = kernel.code
                reports.append(
                    KernelReport(
                        key.name,
                        key.tier.name,
                        (start, stop),
                        mac,
                        asdict(blocking),
                        key.steps,
                        key.scratch,
                        tuple(sorted(code.features)),
                        len(code.data),
                        code.instruction_count,
                        kernel.jit_ms,
                        kernel.stored,
                        tuning,
                        code,
                    )
                )
        op = "gemm" if type(plan.problem).__name__.startswith("Gemm") else "conv"
        choice = plan.prepared.choice
        return cls(op, choice.tier, str(plan.problem), tuple(reports), choice.considered)

    @property
    def kernel(self) -> str:
        """The kernels' names, `numpy-reference` where none is generated."""
        return " + ".join(k.name for k in self.kernels) or "numpy-reference"

    @property
    def chain(self) -> str:
        """The chain of each block of columns."""
        return ", ".join(f"{k.columns[0]}..{k.columns[1] - 1}: {k.chain}" for k in self.kernels)

    @property
    def blocking(self) -> tuple[dict[str, Any], ...]:
        """The blocking of each kernel."""
        return tuple(k.blocking for k in self.kernels)

    @property
    def tuning(self) -> str:
        """How the kernels' blockings were chosen: `analytic`, `tuned (stored)` or `tuned (measured now)`."""
        return ", ".join(dict.fromkeys(k.tuning.source for k in self.kernels))

    @property
    def features(self) -> tuple[str, ...]:
        """CPU features the code needs, derived from its instructions."""
        return tuple(sorted({f for k in self.kernels for f in k.features}))

    @property
    def code_size(self) -> int:
        """Bytes of code and constants."""
        return sum(k.code_size for k in self.kernels)

    @property
    def jit_ms(self) -> float:
        """Milliseconds that generation took."""
        return sum(k.jit_ms for k in self.kernels)

    def listing(self) -> str:
        """The annotated assembly of all kernels."""
        return "\n".join(k.code.listing for k in self.kernels)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the listing, as plain types."""
        kernels = [
            {f.name: getattr(k, f.name) for f in fields(k) if f.name != "code"} | {"tuning": asdict(k.tuning)}
            for k in self.kernels
        ]
        return {
            "op": self.op, "tier": self.tier, "problem": self.problem, "kernel": self.kernel, "chain": self.chain,
            "features": list(self.features), "code_size": self.code_size, "jit_ms": self.jit_ms,
            "kernels": kernels, "candidates": [list(c) for c in self.candidates],
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"problem   {self.problem}", f"tier      {self.tier}"]
        for k in self.kernels:
            lines += k.lines()
        if not self.kernels:
            lines.append("kernel    NumPy reference (no generated kernel)")
        lines.append("candidates")
        lines += [f"  {name:28} {'taken' if why is None else why}" for name, why in self.candidates]
        return "\n".join(lines)
