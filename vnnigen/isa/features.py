"""What this machine offers: CPU features that the operating system supports too, caches, the CPU's name.

Feature names are those of the assembler's `Code.features`. The decoders are pure functions of a `cpuid`
callable, so that they can be tested with the recorded registers of other machines.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from vnnigen.runtime import native

Cpuid = Callable[[int, int], tuple[int, int, int, int]]

# (leaf, subleaf, register) -> {name: bit}. Intel SDM vol. 2A, CPUID, tables 3-8 and following (and the
# Instruction Set Extensions reference for leaf 7, subleaf 1).
_EAX, _EBX, _ECX, _EDX = range(4)
_BITS: dict[tuple[int, int, int], dict[str, int]] = {
    (1, 0, _ECX): {
        "sse3": 0, "ssse3": 9, "fma": 12, "sse4_1": 19, "sse4_2": 20, "movbe": 22, "popcnt": 23,
        "avx": 28, "f16c": 29,
    },
    (7, 0, _EBX): {
        "bmi1": 3, "avx2": 5, "bmi2": 8, "avx512f": 16, "avx512dq": 17, "avx512_ifma": 21, "avx512cd": 28,
        "avx512bw": 30, "avx512vl": 31,
    },
    (7, 0, _ECX): {
        "avx512_vbmi": 1, "avx512_vbmi2": 6, "gfni": 8, "avx512_vnni": 11, "avx512_bitalg": 12,
        "avx512_vpopcntdq": 14,
    },
    (7, 0, _EDX): {"amx_bf16": 22, "avx512_fp16": 23, "amx_tile": 24, "amx_int8": 25},
    (7, 1, _EAX): {"avx_vnni": 4, "avx512_bf16": 5, "amx_fp16": 21, "avx_ifma": 23},
    (7, 1, _EDX): {"avx_vnni_int8": 4, "avx_ne_convert": 5, "avx_vnni_int16": 10},
    (0x80000001, 0, _ECX): {"lzcnt": 5},
}  # fmt: skip

_OSXSAVE = 27  # CPUID.1:ECX: XGETBV may be executed
# XCR0: SDM vol. 1, 13.1. SSE and AVX state; with opmask, ZMM_Hi256, Hi16_ZMM; TILECFG and TILEDATA.
_XCR0_AVX = 0x6
_XCR0_AVX512 = 0xE6
_XCR0_AMX = 0x60000


def decode_cpu(cpuid: Cpuid) -> frozenset[str]:
    """Return the features that the CPU reports, whether or not the operating system supports them."""
    limits = {0: cpuid(0, 0)[0], 0x80000000: cpuid(0x80000000, 0)[0]}
    found = set()
    for (leaf, sub, register), bits in _BITS.items():
        known = leaf <= limits[leaf & 0x80000000] and (leaf != 7 or sub <= cpuid(7, 0)[_EAX])
        word = cpuid(leaf, sub)[register] if known else 0
        found |= {name for name, bit in bits.items() if word >> bit & 1}
    return frozenset(found)


def decode(cpuid: Cpuid, xgetbv: Callable[[int], int], amx_permission: Callable[[], bool]) -> frozenset[str]:
    """Return the usable features: those of the CPU whose register state the operating system saves.

    `xgetbv` is called only if CPUID says that the operating system enabled it, `amx_permission` only if AMX
    state is enabled in XCR0.
    """
    found = decode_cpu(cpuid)
    xcr0 = xgetbv(0) if cpuid(1, 0)[_ECX] >> _OSXSAVE & 1 else 0
    usable = frozenset(name for name in found if _os_supports(name, xcr0))
    amx = frozenset(filter(_is_amx, usable))
    return usable if amx and amx_permission() else usable - amx


def _is_amx(name: str) -> bool:
    return name.startswith("amx")


def _os_supports(name: str, xcr0: int) -> bool:
    """Tell whether XCR0 enables the registers that the feature needs."""
    if _is_amx(name):
        needed = _XCR0_AMX
    elif name.startswith("avx512"):
        needed = _XCR0_AVX512
    elif name.startswith("avx") or name in ("fma", "f16c"):
        needed = _XCR0_AVX
    else:
        needed = 0
    return xcr0 & needed == needed


@cache
def cpu_features() -> frozenset[str]:
    """Return what this CPU reports (empty on other architectures), operating-system support aside."""
    return decode_cpu(native.cpuid) if native.is_x86() else frozenset()


@cache
def features() -> frozenset[str]:
    """Return the features that generated code may use on this machine (empty on other architectures)."""
    if not native.is_x86():
        return frozenset()
    return decode(native.cpuid, native.xgetbv, native.amx_permission)


@dataclass(frozen=True, slots=True)
class Cache:
    """One cache: sizes in bytes; `shared_by` counts the logical processors that share it."""

    level: int
    kind: Literal["data", "instruction", "unified"]
    size: int
    line: int
    ways: int
    shared_by: int


def decode_caches(cpuid: Cpuid) -> tuple[Cache, ...]:
    """Return the caches by CPUID leaf 4 (Intel) or 0x8000001D (AMD, where it says so); SDM and APM vol. 3."""
    found = _cache_leaf(cpuid, 4) if cpuid(0, 0)[0] >= 4 else ()
    topology_extensions = cpuid(0x80000000, 0)[0] >= 0x8000001D and cpuid(0x80000001, 0)[_ECX] >> 22 & 1
    return found or (_cache_leaf(cpuid, 0x8000001D) if topology_extensions else ())


def _cache_leaf(cpuid: Cpuid, leaf: int) -> tuple[Cache, ...]:
    kinds: dict[int, Literal["data", "instruction", "unified"]] = {1: "data", 2: "instruction", 3: "unified"}
    found = []
    for sub in range(16):
        eax, ebx, ecx, _ = cpuid(leaf, sub)
        if eax & 0x1F not in kinds:
            break
        line, partitions, ways = (ebx & 0xFFF) + 1, (ebx >> 12 & 0x3FF) + 1, (ebx >> 22) + 1
        size = line * partitions * ways * (ecx + 1)
        found.append(Cache(eax >> 5 & 7, kinds[eax & 0x1F], size, line, ways, (eax >> 14 & 0xFFF) + 1))
    return tuple(found)


_SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")


def read_sysfs_caches(root: Path = _SYSFS) -> tuple[Cache, ...]:
    """Return the caches that Linux lists under `root`, whatever the architecture; () if there are none."""
    kinds: dict[str, Literal["data", "instruction", "unified"]] = {
        "Data": "data",
        "Instruction": "instruction",
        "Unified": "unified",
    }
    found = []
    for index in sorted(root.glob("index*")):
        try:
            text = {
                name: (index / name).read_text().strip()
                for name in ("level", "type", "size", "coherency_line_size", "ways_of_associativity")
            }
            shared = (index / "shared_cpu_map").read_text().replace(",", "")
            found.append(
                Cache(
                    int(text["level"]),
                    kinds[text["type"]],
                    _bytes(text["size"]),
                    int(text["coherency_line_size"]),
                    int(text["ways_of_associativity"]),
                    int(shared, 16).bit_count(),
                )
            )
        except (OSError, KeyError, ValueError):
            continue  # virtual machines and Arm kernels leave out some files
    return tuple(found)


def _bytes(text: str) -> int:
    scale = {"K": 1024, "M": 1024**2}.get(text[-1:], 1)
    return int(text.rstrip("KM")) * scale


@cache
def caches() -> tuple[Cache, ...]:
    """Return this machine's caches, from CPUID or else from sysfs; () if neither tells."""
    found = decode_caches(native.cpuid) if native.is_x86() else ()
    return found or read_sysfs_caches()


@cache
def cpu_name() -> str:
    """Return the CPU's marketing name, for reports only. Slow at the first call."""
    import cpuinfo

    return str(cpuinfo.get_cpu_info().get("brand_raw") or platform.processor() or platform.machine())
