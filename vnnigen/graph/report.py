"""What a plan is and how long its layers take, for people and for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vnnigen.graph.lower import Step
from vnnigen.graph.plan import Plan, step_threads
from vnnigen.graph.storage import Place
from vnnigen.runtime.compiled import Launches
from vnnigen.runtime.peak import peak_for


@dataclass(frozen=True)
class StepReport:
    """One step: its node, what runs, on which tier, from and to which types; `reason` says why it is in NumPy."""

    node: str
    op: str
    kernel: str
    tier: str
    inputs: tuple[str, ...]
    output: str
    macs: int
    parallel: bool
    reason: str

    @classmethod
    def of(cls, step: Step) -> StepReport:
        """Describe a step."""
        native = step.native is not None and step.native.launches is not None
        launches = step.native.launches if step.native is not None else None
        return cls(
            step.node, step.op, step.kernel, _tier(launches), tuple(_words(p) for p in step.inputs if p is not None),
            _words(step.outputs[0]) if step.outputs else "", step.native.macs if step.native is not None else 0,
            native and step_threads(step) > 1, step.reason,
        )  # fmt: skip


def _tier(launches: Launches | None) -> str:
    return "numpy" if launches is None else launches.keys[-1].tier.name


def _words(p: Place) -> str:
    return f"{p.dtype}{list(p.shape)}"


@dataclass(frozen=True)
class Explanation:
    """A plan in words."""

    name: str
    steps: tuple[StepReport, ...]
    passes: tuple[str, ...]
    fallbacks: dict[str, str]
    peak_memory: int
    native_calls: int

    @classmethod
    def of(cls, name: str, plan: Plan, log: Sequence[str]) -> Explanation:
        """Describe a plan."""
        steps = tuple(StepReport.of(s) for s in plan.lowered.steps)
        calls = sum(s.native for s in plan.segments)
        return cls(name, steps, tuple(log), dict(plan.lowered.fallbacks), plan.peak_memory, calls)

    @property
    def numpy_steps(self) -> tuple[StepReport, ...]:
        """Steps without kernels."""
        return tuple(s for s in self.steps if s.tier == "numpy")

    @property
    def conversions(self) -> tuple[StepReport, ...]:
        """Steps that only change type or order."""
        return tuple(s for s in self.steps if s.op in ("Convert", "Copy"))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain types."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"network   {self.name}: {len(self.steps)} steps in {self.native_calls} native calls"]
        lines.append(f"memory    {self.peak_memory / 2**20:.2f} MiB of activations at most")
        lines += [f"pass      {line}" for line in self.passes]
        for s in self.steps:
            lines.append(f"  {s.op:18} {s.node:32} {' '.join(s.inputs)} -> {s.output}  {s.kernel}")
        for s in self.numpy_steps:
            lines.append(f"numpy     {s.node} ({s.op}): {s.reason}")
        lines += [f"fallback  {node} computes in f32: {why}" for node, why in self.fallbacks.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class LayerTime:
    """Time of a step: milliseconds, billions of operations a second, and percent of what the machine can do."""

    node: str
    op: str
    kernel: str
    ms: float
    gops: float | None
    percent_of_peak: float | None


@dataclass(frozen=True)
class Profile:
    """Time per layer."""

    name: str
    layers: tuple[LayerTime, ...]
    threads: int
    peak_memory: int

    @classmethod
    def of(cls, name: str, plan: Plan, ns: Sequence[int], threads: int) -> Profile:
        """Put times (nanoseconds) to the steps of a plan."""
        layers = []
        for step, t in zip(plan.lowered.steps, ns, strict=True):
            macs = step.native.macs if step.native is not None else 0
            gops = 2 * macs / t if macs and t else None
            peak = _peak(step, threads)
            percent = 100 * gops / peak if gops and peak else None
            layers.append(LayerTime(step.node, step.op, step.kernel, t / 1e6, gops, percent))
        return cls(name, tuple(layers), threads, plan.peak_memory)

    @property
    def ms(self) -> float:
        """Milliseconds of all steps."""
        return sum(layer.ms for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain types."""
        return asdict(self) | {"ms": self.ms}

    def __str__(self) -> str:
        total = self.ms
        lines = [f"{self.name}: {total:.3f} ms on {self.threads} threads, {self.peak_memory / 2**20:.2f} MiB at peak"]
        for layer in self.layers:
            speed = "" if layer.gops is None else f"{layer.gops:9.1f} GOP/s"
            share = "" if layer.percent_of_peak is None else f"{layer.percent_of_peak:5.1f} % of peak"
            part = 100 * layer.ms / total if total else 0.0
            lines.append(f"  {layer.ms:9.4f} ms {part:5.1f} %  {layer.op:14} {layer.node:32} {speed} {share}")
        return "\n".join(lines)


def _peak(step: Step, threads: int) -> float | None:
    """What the instructions of a step's kernel can do at most, in GOP/s, on so many threads."""
    if step.native is None or step.native.launches is None or not step.native.macs:
        return None
    key: Any = step.native.launches.keys[-1]
    mac = getattr(getattr(key, "one", key), "mac", None)
    if mac is None:
        return None
    peak = peak_for(key.tier.name, {mac.name: 1.0})
    return None if peak is None else peak * (threads if step_threads(step) > 1 else 1)
