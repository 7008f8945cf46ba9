"""Measured peak throughput of the multiply instructions, from loops that our own assembler generates.

Each loop keeps enough independent accumulators in registers to hide the instruction's latency, and touches no
memory, so what it reaches is the ceiling for a kernel built on that instruction. Peaks are measured and not
computed from port counts: model numbers under a hypervisor lie, and so do clock frequencies.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache

import numpy as np

from vnnigen.isa.assembler import GPR, Arg, Assembler, Code, Mem, Tile, Vec
from vnnigen.isa.features import features
from vnnigen.isa.tiers import TIERS
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.runtime import codemem, native

_SAMPLE_SECONDS = 2e-3
_ROUNDS = 9
_WARM_UP_SECONDS = 20e-3
#: Multiply steps in one turn of a loop: enough to drown the loop's own counter.
_STEPS_PER_TURN = 96


@dataclass(frozen=True)
class Operands:
    """Registers of one multiply step; `temp` carries a chain's value from one instruction to the next."""

    acc: Vec | Tile
    temp: Vec | Tile
    src: Vec | Tile
    weights: Vec | Tile
    ones: Vec | Tile


#: Emits one instruction of a multiply step.
Phase = Callable[[Assembler, Operands], None]


@dataclass(frozen=True)
class Loop:
    """One multiply step to measure: the instructions `label` on vectors of `bits`, encoded for `tier`.

    `ops_per_lane` counts multiplications and additions per 32-bit lane and step.
    """

    step: str
    label: str
    tier: str
    bits: int
    ops_per_lane: int
    phases: tuple[Phase, ...]

    @property
    def name(self) -> str:
        """The instructions and the register they work on, such as `vpdpbusd zmm`."""
        return f"{self.label} {'t' if self.bits == TILE_BITS else 'xyz'[self.bits // 256]}mm"

    @property
    def ops_per_turn(self) -> int:
        """Multiplications and additions of one turn of the loop."""
        return _STEPS_PER_TURN * self.bits // 32 * self.ops_per_lane


@dataclass(frozen=True)
class Peak:
    """Measured throughput of one loop, or why there is none."""

    name: str
    gops: float | None
    why_not: str | None = None


#: A whole tile: 16 rows of 64 bytes.
TILE_BITS = 16 * 64 * 8
#: LDTILECFG's operand for eight whole tiles: palette 1, 64 bytes a row, 16 rows.
TILE_CONFIG = bytes([1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8)

_TDPBUSD: tuple[Phase, ...] = (lambda a, r: a.tdpbusd(r.acc, r.src, r.weights),)
_TDPBF16PS: tuple[Phase, ...] = (lambda a, r: a.tdpbf16ps(r.acc, r.src, r.weights),)
_FMA: tuple[Phase, ...] = (lambda a, r: a.vfmadd231ps(r.acc, r.src, r.weights),)
_VNNI: tuple[Phase, ...] = (lambda a, r: a.vpdpbusd(r.acc, r.src, r.weights),)
_BF16: tuple[Phase, ...] = (lambda a, r: a.vdpbf16ps(r.acc, r.src, r.weights),)
_FAST: tuple[Phase, ...] = (
    lambda a, r: a.vpmaddubsw(r.temp, r.src, r.weights),
    lambda a, r: a.vpmaddwd(r.temp, r.temp, r.ones),
    lambda a, r: a.vpaddd(r.acc, r.acc, r.temp),
)
_EXACT: tuple[Phase, ...] = (
    lambda a, r: a.vpmaddwd(r.temp, r.src, r.weights),
    lambda a, r: a.vpaddd(r.acc, r.acc, r.temp),
)

LOOPS: tuple[Loop, ...] = (
    Loop("fma", "vfmadd231ps", "avx2", 128, 2, _FMA),
    Loop("fma", "vfmadd231ps", "avx2", 256, 2, _FMA),
    Loop("fma", "vfmadd231ps", "avx512", 512, 2, _FMA),
    Loop("vnni", "vpdpbusd", "avx_vnni", 256, 8, _VNNI),
    Loop("vnni", "vpdpbusd", "avx512_vnni", 512, 8, _VNNI),
    Loop("fast", "vpmaddubsw+vpmaddwd+vpaddd", "avx2", 256, 8, _FAST),
    Loop("fast", "vpmaddubsw+vpmaddwd+vpaddd", "avx512", 512, 8, _FAST),
    Loop("exact", "vpmaddwd+vpaddd", "avx2", 256, 4, _EXACT),
    Loop("exact", "vpmaddwd+vpaddd", "avx512", 512, 4, _EXACT),
    Loop("bf16", "vdpbf16ps", "avx512_bf16", 512, 4, _BF16),
    Loop("amx", "tdpbusd", "amx_int8", TILE_BITS, 128, _TDPBUSD),
    Loop("amx", "tdpbf16ps", "amx_bf16", TILE_BITS, 64, _TDPBF16PS),
)

_TIERS = {tier.name: tier for tier in TIERS}
#: One measurement at a time: two at once would measure each other.
_measuring = threading.Lock()


def measure_peaks(threads: int = 1) -> dict[str, Peak]:
    """Measure every multiply step this machine has, by name; the others say why not.

    Takes about 50 ms for each instruction the first time, then answers from a cache.
    """
    peaks = [_peak(loop, threads) for loop in LOOPS]
    return {peak.name: peak for peak in peaks}


def peak_for(tier: str, steps: Mapping[str, float], threads: int = 1) -> float | None:
    """GOP/s that a kernel of `tier` cannot exceed, or None where no such loop can run.

    `steps` maps the kernel's multiply steps ("fma", "vnni", "fast", "exact", "bf16", "amx") to their shares of the
    work, in any unit; a kernel that mixes them has the weighted harmonic mean of their peaks. "winograd" counts as the
    tier's usual step for bytes, which it exceeds, as it does fewer products than are counted.
    """
    bits = _TIERS[tier].vector_bits

    def fits(loop: Loop) -> bool:
        return loop.tier == tier if loop.bits == TILE_BITS else loop.bits == bits

    seconds_per_gop = 0.0
    for step, share in steps.items():
        usual = ("vnni" if TIER_CODE[tier].vnni else "fast") if step == "winograd" else step
        gops = next((_peak(x, threads).gops for x in LOOPS if x.step == usual and fits(x)), None)
        if gops is None:
            return None
        seconds_per_gop += share / gops
    return sum(steps.values()) / seconds_per_gop if steps else None


def build(loop: Loop) -> Code:
    """Generate the loop: `args[0]` turns of independent multiply steps."""
    tier = _TIERS[loop.tier]
    a = Assembler(
        f"peak-{loop.label}-{loop.bits}",
        args=(Arg("params", "ptr"), Arg("index", "i64"), Arg("scratch", "ptr")),
        features=tier.features,
    )
    turns = a.gpr("turns")
    a.mov(turns, Mem(a.load_argument("params")))
    if loop.bits == TILE_BITS:
        return _build_tiles(a, loop, turns)
    src, weights, ones = (_load(a, loop.bits, name, data) for name, data in _operands(loop.step))
    # Ten independent accumulators cover a latency of 5 at two a cycle. Chains need as many temporaries, since
    # running each phase over the whole group is up to 10 % faster than finishing one step after the other.
    chain = len(loop.phases) > 1
    size = (12 if loop.bits == 512 else 6) if chain else 12
    temps = [a.vec(loop.bits, f"t{i:02}") if chain else src for i in range(size)]
    group = [Operands(a.vec(loop.bits, f"acc{i:02}"), temps[i], src, weights, ones) for i in range(size)]
    zero = a.vpxord if loop.bits == 512 else a.vpxor
    for r in group:
        zero(r.acc, r.acc, r.acc)
    with a.loop(turns):
        for _ in range(_STEPS_PER_TURN // size):
            for phase in loop.phases:
                for r in group:
                    phase(a, r)
    a.ret()
    return a.finalize().encode()


def _build_tiles(a: Assembler, loop: Loop, turns: GPR) -> Code:
    """The rest of a tile loop: 2 x 2 accumulators, as kernels have them; every row of an operand is the same."""
    zero, at = a.gpr("zero"), a.gpr("row")
    a.mov(zero, 0)
    acc = [a.tile(f"acc{i}") for i in range(4)]
    for tile in acc:
        a.tilezero(tile)
    operands = {}
    for name, data in _operands("bf16" if "bf16" in loop.label else loop.step)[:2]:
        operands[name] = [a.tile(f"{name}{i}") for i in range(2)]
        a.lea(at, a.const(data))
        for tile in operands[name]:
            a.tileloadd(tile, Mem(at, index=zero))
    with a.loop(turns):
        for i in range(_STEPS_PER_TURN):
            src, weights = operands["src"][i // 2 % 2], operands["weights"][i % 2]
            loop.phases[0](a, Operands(acc[i % 4], src, src, weights, src))
    a.ret()
    return a.finalize().encode()


def _operands(step: str) -> list[tuple[str, np.ndarray]]:
    """Source, weights and ones: ordinary values, since some processors treat special ones differently."""
    if step in ("fma", "bf16"):
        dtype, one, tiny = (np.float32, 1.0, 2.0**-20) if step == "fma" else (np.uint16, 0x3F80, 0x3580)
        x, w = (
            np.full(64 // np.dtype(dtype).itemsize, one, dtype),
            np.full(64 // np.dtype(dtype).itemsize, tiny, dtype),
        )
    else:
        rng = np.random.default_rng(1)
        x, w = rng.integers(0, 256, 64, dtype=np.uint8), rng.integers(-64, 65, 64, dtype=np.int8)
    return [("src", x), ("weights", w), ("ones", np.ones(32, np.int16))]


def _load(a: Assembler, bits: int, name: str, data: np.ndarray) -> Vec:
    reg = a.vec(bits, name)
    a.vmovups(reg, a.const(data))
    return reg


def _lacks(missing: Set[str]) -> str:
    return f"this machine lacks {', '.join(sorted(missing))}"


def _peak(loop: Loop, threads: int) -> Peak:
    """Measure one loop, once for each number of threads."""
    with _measuring:
        return _measure(loop, threads)


@cache
def _measure(loop: Loop, threads: int) -> Peak:
    code = build(loop)
    missing = code.features - features()
    if missing:
        return Peak(loop.name, None, _lacks(missing))
    # More units than threads, so that a thread that starts late does less of them.
    units = 1 if threads == 1 else 8 * threads
    config = TILE_CONFIG if loop.bits == TILE_BITS else None
    return Peak(loop.name, loop.ops_per_turn * units / seconds_per_turn(code, (), units, threads, config) * 1e-9)


def seconds_per_turn(
    code: Code, args: Sequence[int], units: int, threads: int, tile_config: bytes | None = None
) -> float:
    """Measure one turn of a loop whose arguments are `args` and then the number of turns, at its fastest.

    Each of `units` calls of the code, shared by the threads, takes these turns. Raises VnnigenError if it cannot run.
    """
    loaded = codemem.load(code)
    kernel = native.ffi.new("vg_kernel *")
    kernel.n_launch, kernel.n_args = 1, len(args) + 1
    kernel.launch[0].fn = native.ffi.cast("vg_fn", loaded.address)
    kernel.launch[0].count = units
    config = native.ffi.NULL if tile_config is None else native.ffi.from_buffer(tile_config)
    kernel.launch[0].tile_config = config
    for i, value in enumerate(args):
        kernel.args[i] = value

    def seconds(turns: int) -> float:
        kernel.args[len(args)] = turns
        start = time.perf_counter_ns()
        native.check(native.lib.vg_call(kernel, 0, native.ffi.NULL, threads))
        return max(time.perf_counter_ns() - start, 1) * 1e-9

    turns = 1
    while (elapsed := seconds(turns)) < _SAMPLE_SECONDS / 2:
        turns = max(2 * turns, int(turns * _SAMPLE_SECONDS / elapsed / 2))
    turns = max(1, int(turns * _SAMPLE_SECONDS / elapsed))
    end = time.perf_counter() + _WARM_UP_SECONDS
    while time.perf_counter() < end:
        seconds(turns)
    return min(seconds(turns) for _ in range(_ROUNDS)) / turns
