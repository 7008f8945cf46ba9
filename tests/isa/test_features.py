"""CPUID decoding with the registers of real CPUs, tiers, caps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vnnigen.errors import ISAError
from vnnigen.isa import features as F
from vnnigen.isa import tiers as T

Table = dict[tuple[int, int], tuple[int, int, int, int]]

# CPUID of real machines (leaf, subleaf): eax, ebx, ecx, edx; from dumps, Zen 5 in a virtual machine.
HASWELL: Table = {
    (0, 0): (0xD, 0x756E6547, 0x6C65746E, 0x49656E69),
    (1, 0): (0x306C3, 0x03100800, 0x7FDAFBBF, 0xBFEBFBFF),
    (4, 0): (0x1C004121, 0x01C0003F, 0x3F, 0),
    (4, 1): (0x1C004122, 0x01C0003F, 0x3F, 0),
    (4, 2): (0x1C004143, 0x01C0003F, 0x1FF, 0),
    (4, 3): (0x1C03C163, 0x02C0003F, 0x1FFF, 6),
    (7, 0): (0, 0x27AB, 0, 0),
    (0x80000000, 0): (0x80000008, 0, 0, 0),
    (0x80000001, 0): (0, 0, 0x21, 0x2C100000),
}
SKYLAKE_X: Table = {
    (0, 0): (0x16, 0x756E6547, 0x6C65746E, 0x49656E69),
    (1, 0): (0x50654, 0x0A100800, 0x7FFEFBBF, 0xBFEBFBFF),
    (4, 0): (0x1C004121, 0x01C0003F, 0x3F, 0),
    (4, 1): (0x1C004122, 0x01C0003F, 0x3F, 0),
    (4, 2): (0x1C004143, 0x03C0003F, 0x3FF, 0),
    (4, 3): (0x1C03C163, 0x0280003F, 0x2FFF, 4),
    (7, 0): (0, 0xD39FFFFB, 0, 0x0C000000),
    # No subleaf 1: the CPU answers with what another leaf left, which must not be read.
    (7, 1): (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
    (0x80000000, 0): (0x80000008, 0, 0, 0),
    (0x80000001, 0): (0, 0, 0x121, 0x2C100800),
}
CASCADE_LAKE: Table = SKYLAKE_X | {
    (1, 0): (0x50657, 0x00400800, 0x7FFEFBFF, 0xBFEBFBFF),
    (4, 3): (0x7C0FC163, 0x0280003F, 0xDFFF, 5),
    (7, 0): (0, 0xD39FFFFB, 0x808, 0xBC000400),
}
ZEN4: Table = {
    (0, 0): (0x10, 0x68747541, 0x444D4163, 0x69746E65),
    (1, 0): (0xA60F12, 0x00100800, 0x7ED8320B, 0x178BFBFF),
    (7, 0): (1, 0xF1BF97A9, 0x00405FCE, 0x10000010),
    (7, 1): (0x20, 0, 0, 0),
    (0x80000000, 0): (0x80000028, 0x68747541, 0x444D4163, 0x69746E65),
    (0x80000001, 0): (0xA60F12, 0, 0x75C237FF, 0x2FD3FBFF),
    (0x8000001D, 0): (0x4121, 0x01C0003F, 0x3F, 0),
    (0x8000001D, 1): (0x4122, 0x01C0003F, 0x3F, 0),
    (0x8000001D, 2): (0x4143, 0x01C0003F, 0x7FF, 2),
    (0x8000001D, 3): (0x3C163, 0x03C0003F, 0x17FFF, 1),
}
ZEN5: Table = {
    (0, 0): (0x1C, 0x68747541, 0x444D4163, 0x69746E65),
    (1, 0): (0xB00F21, 0x01020800, 0xFFFA3203, 0x178BFBFF),
    (7, 0): (1, 0xF1BF07AB, 0x00405FC6, 0x110),
    (7, 1): (0x30, 0, 0, 0),
    (0x80000000, 0): (0x80000021, 0x68747541, 0x444D4163, 0x69746E65),
    (0x80000001, 0): (0xB00F21, 0x40000000, 0x4003F3, 0x2FD3FBFF),
    (0x8000001D, 0): (0x121, 0x02C0003F, 0x3F, 0),
    (0x8000001D, 1): (0x122, 0x01C0003F, 0x3F, 0),
    (0x8000001D, 2): (0x143, 0x03C0003F, 0x3FF, 2),
    (0x8000001D, 3): (0x4163, 0x03C0003F, 0x7FFF, 1),
}
# These two are composed from the SDM's bit assignments and the CPUs' published features, not recorded.
SAPPHIRE_RAPIDS: Table = SKYLAKE_X | {
    (0, 0): (0x20, 0x756E6547, 0x6C65746E, 0x49656E69),
    (7, 0): (2, 0xD39FFFFB | 1 << 21, 1 << 1 | 1 << 6 | 1 << 8 | 1 << 11 | 1 << 12 | 1 << 14, 0xF << 22),
    (7, 1): (1 << 4 | 1 << 5, 0, 0, 0),
}
ALDER_LAKE: Table = SKYLAKE_X | {
    (0, 0): (0x20, 0x756E6547, 0x6C65746E, 0x49656E69),
    (7, 0): (2, 0x239CA7EB, 1 << 8, 0),
    (7, 1): (1 << 4, 0, 0, 0),
}

AVX2 = {"sse3", "ssse3", "sse4_1", "sse4_2", "popcnt", "avx", "f16c", "fma", "avx2", "bmi1", "bmi2"}
AVX2 |= {"movbe", "lzcnt"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
ICE_LAKE = {"gfni", "avx512_vnni", "avx512_vbmi", "avx512_vbmi2", "avx512_bitalg", "avx512_vpopcntdq"}
AMX = {"amx_tile", "amx_int8", "amx_bf16"}

MACHINES = {
    "haswell": (HASWELL, 0x7, AVX2, "avx2"),
    "skylake_x": (SKYLAKE_X, 0xE7, AVX512, "avx512"),
    "cascade_lake": (CASCADE_LAKE, 0x2E7, AVX512 | {"avx512_vnni"}, "avx512_vnni"),
    "sapphire_rapids": (
        SAPPHIRE_RAPIDS,
        0x602E7,
        AVX512 | ICE_LAKE | AMX | {"avx512_ifma", "avx_vnni", "avx512_bf16", "avx512_fp16"},
        "amx_bf16",
    ),
    "alder_lake": (ALDER_LAKE, 0x207, AVX2 | {"gfni", "avx_vnni"}, "avx_vnni"),
    "zen4": (ZEN4, 0x2E7, AVX512 | ICE_LAKE | {"avx512_ifma", "avx512_bf16"}, "avx512_bf16"),
    "zen5": (ZEN5, 0xE7, AVX512 | ICE_LAKE | {"avx512_ifma", "avx512_bf16", "avx_vnni"}, "avx512_bf16"),
}


def cpuid_of(table: Table) -> F.Cpuid:
    return lambda leaf, sub: table.get((leaf, sub), (0, 0, 0, 0))


def decode(table: Table, xcr0: int, permission: bool = True) -> frozenset[str]:
    return F.decode(cpuid_of(table), lambda index: xcr0, lambda: permission)


@pytest.fixture(autouse=True)
def no_cap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("VNNIGEN_MAX_ISA", raising=False)
    T.set_max_isa(None)
    yield
    T.set_max_isa(None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def become(table: Table, xcr0: int, permission: bool = True) -> None:
        monkeypatch.setattr(T, "features", lambda: decode(table, xcr0, permission))
        monkeypatch.setattr(T, "cpu_features", lambda: F.decode_cpu(cpuid_of(table)))
        monkeypatch.setattr(T.native, "is_x86", lambda: bool(table))

    return become


@pytest.mark.parametrize("name", MACHINES)
def test_decode_of_known_machines(name: str) -> None:
    table, xcr0, expected, _ = MACHINES[name]
    assert decode(table, xcr0) == expected


@pytest.mark.parametrize("name", MACHINES)
def test_best_tier_of_known_machines(name: str, machine) -> None:
    table, xcr0, _, best = MACHINES[name]
    machine(table, xcr0)
    assert T.tiers()[0] == best
    assert T.tiers()[-1] == "reference"
    assert T.resolve_tier(None, [t.name for t in T.TIERS]) == best


def test_without_cpuid_there_is_nothing(machine) -> None:
    assert decode({}, 0x602E7) == frozenset()
    machine({}, 0)
    assert T.tiers() == ("reference",)
    assert T.why_not("avx2") == "this is not an x86-64 machine"
    assert T.why_not("reference") is None


@pytest.mark.parametrize(
    ("xcr0", "best"),
    [
        (0x602E7, "amx_bf16"),
        (0x2E7, "avx512_bf16"),
        (0x202E7, "avx512_bf16"),
        (0x207, "avx_vnni"),
        (0x3, "reference"),
    ],
)
def test_operating_system_support_decides(xcr0: int, best: str, machine) -> None:
    machine(SAPPHIRE_RAPIDS, xcr0)
    assert T.tiers()[0] == best
    if best != "amx_bf16":
        assert "does not enable" in (T.why_not("amx_bf16") or "")


def test_xgetbv_is_not_called_without_osxsave() -> None:
    def fail(index: int) -> int:
        raise AssertionError("XGETBV would fault")

    eax, ebx, ecx, edx = SKYLAKE_X[1, 0]
    table = SKYLAKE_X | {(1, 0): (eax, ebx, ecx & ~(1 << 27), edx)}
    found = F.decode(cpuid_of(table), fail, lambda: True)
    assert "sse4_2" in found
    assert not {f for f in found if f.startswith(("avx", "fma", "f16c"))}


def test_amx_needs_the_permission_and_asks_only_where_it_makes_sense() -> None:
    assert not AMX & decode(SAPPHIRE_RAPIDS, 0x602E7, permission=False)
    asked = []
    F.decode(cpuid_of(ZEN4), lambda i: 0x602E7, lambda: bool(asked.append(1)))
    F.decode(cpuid_of(SAPPHIRE_RAPIDS), lambda i: 0x2E7, lambda: bool(asked.append(1)))
    assert not asked


def test_this_machine_agrees_with_the_kernel() -> None:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = next((set(line.split(":")[1].split()) for line in text.splitlines() if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("no x86 flags in /proc/cpuinfo")
    renamed = {"avx512_vbmi": "avx512vbmi", "avx512_ifma": "avx512ifma", "sse3": "pni", "lzcnt": "abm"}
    for name in AVX512 | ICE_LAKE | {"avx_vnni", "avx512_bf16"}:
        assert (name in F.features()) == (renamed.get(name, name) in flags), name


# Sizes in KiB and sharing processors of the L1 data, L1 instruction, L2 and L3 caches.
CACHES = {
    "haswell": (HASWELL, [32, 32, 256, 6144], [2, 2, 2, 16]),
    "skylake_x": (SKYLAKE_X, [32, 32, 1024, 8448], [2, 2, 2, 16]),
    "zen4": (ZEN4, [32, 32, 1024, 98304], [2, 2, 2, 16]),
    "zen5": (ZEN5, [48, 32, 1024, 32768], [1, 1, 1, 2]),
    "none": ({}, [], []),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_of_known_machines(name: str) -> None:
    table, sizes, shared_by = CACHES[name]
    found = F.decode_caches(cpuid_of(table))
    assert [c.size // 1024 for c in found] == sizes
    assert [c.shared_by for c in found] == shared_by
    places = [(1, "data"), (1, "instruction"), (2, "unified"), (3, "unified")]
    assert [(c.level, c.kind) for c in found] == places[: len(found)]
    assert all(c.line == 64 for c in found)


def test_sysfs_caches(tmp_path: Path) -> None:
    def write(index: int, **files: str) -> None:
        (tmp_path / f"index{index}").mkdir()
        for name, text in files.items():
            (tmp_path / f"index{index}" / name).write_text(text + "\n")

    common = {"coherency_line_size": "64", "ways_of_associativity": "8"}
    write(0, level="1", type="Data", size="48K", shared_cpu_map="00000000,00000003", **common)
    write(1, level="1", type="Instruction", size="32K", shared_cpu_map="1", **common)
    write(2, level="2", type="Unified", shared_cpu_map="1", **common)  # no size, as on some Arm kernels
    write(3, level="3", type="Unified", size="2M", shared_cpu_map="ff", **common)
    assert F.read_sysfs_caches(tmp_path) == (
        F.Cache(1, "data", 48 * 1024, 64, 8, 2),
        F.Cache(1, "instruction", 32 * 1024, 64, 8, 1),
        F.Cache(3, "unified", 2 * 1024**2, 64, 8, 8),
    )
    assert F.read_sysfs_caches(tmp_path / "nothing") == ()


def test_caches_here_are_plausible() -> None:
    for c in F.caches():
        assert 1 <= c.level <= 4
        assert c.size >= 4096


# Tiers


def test_tiers_are_closed_and_distinct() -> None:
    assert [t.name for t in T.TIERS][-1] == "reference"
    assert len({t.features for t in T.TIERS}) == len(T.TIERS)
    prerequisites = {"avx2": "avx", "avx512f": "avx2", "avx512bw": "avx512f", "avx512_vnni": "avx512bw"}
    prerequisites |= {
        "avx512_bf16": "avx512bw",
        "amx_int8": "amx_tile",
        "amx_bf16": "amx_tile",
        "avx_vnni": "avx2",
    }
    for t in T.TIERS:
        for feature, base in prerequisites.items():
            assert feature not in t.features or base in t.features, (t.name, feature)


@pytest.mark.parametrize("how", ["call", "environment"])
@pytest.mark.parametrize(
    ("cap", "usable"),
    [
        ("amx_bf16", ["amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "reference"]),
        ("amx_int8", ["amx_int8", "avx512_vnni", "avx512", "avx2", "reference"]),
        ("avx512_vnni", ["avx512_vnni", "avx512", "avx2", "reference"]),
        ("avx512", ["avx512", "avx2", "reference"]),
        ("avx_vnni", ["avx_vnni", "avx2", "reference"]),
        ("avx2", ["avx2", "reference"]),
        ("reference", ["reference"]),
    ],
)
def test_cap(how: str, cap: str, usable: list[str], machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(SAPPHIRE_RAPIDS, 0x602E7)
    assert len(T.tiers()) == len(T.TIERS)
    if how == "call":
        T.set_max_isa(cap)
    else:
        monkeypatch.setenv("VNNIGEN_MAX_ISA", f" {cap.upper()} ")
    assert T.max_isa() == cap
    assert list(T.tiers()) == usable
    for t in T.TIERS:
        reason = T.why_not(t.name)
        assert (reason is None) == (t.name in usable)
        if reason is not None:
            assert "capped" in reason
            assert cap in reason


def test_a_call_overrides_the_environment_and_none_gives_it_back(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(SAPPHIRE_RAPIDS, 0x602E7)
    monkeypatch.setenv("VNNIGEN_MAX_ISA", "avx2")
    T.set_max_isa("avx512")
    assert T.max_isa() == "avx512"
    T.set_max_isa(None)
    assert T.max_isa() == "avx2"
    monkeypatch.setenv("VNNIGEN_MAX_ISA", "")
    assert T.max_isa() is None


def test_wrong_names_list_the_legal_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    legal = [t.name for t in T.TIERS]
    for call in (
        lambda: T.set_max_isa("sse9"),
        lambda: T.why_not("sse9"),
        lambda: T.resolve_tier("sse9", legal),
    ):
        with pytest.raises(ISAError, match="sse9") as caught:
            call()
        assert all(name in str(caught.value) for name in legal)
    monkeypatch.setenv("VNNIGEN_MAX_ISA", "avx1024")
    with pytest.raises(ISAError, match=r"VNNIGEN_MAX_ISA.*avx1024.*avx512_vnni"):
        T.max_isa()


def test_resolve_tier(machine) -> None:
    machine(CASCADE_LAKE, 0x2E7)
    assert T.resolve_tier(None, ["amx_int8", "avx512_vnni", "avx2"]) == "avx512_vnni"
    assert T.resolve_tier("AVX2", ["amx_int8", "avx512_vnni", "avx2"]) == "avx2"
    with pytest.raises(ISAError, match=r"amx_int8 cannot be used: this CPU lacks amx_int8, amx_tile"):
        T.resolve_tier("amx_int8", ["amx_int8", "avx512_vnni"])
    with pytest.raises(ISAError, match=r"avx512 is not implemented here; choose from amx_int8, avx2"):
        T.resolve_tier("avx512", ["amx_int8", "avx2"])
    with pytest.raises(ISAError, match=r"amx_int8: this CPU lacks.*avx_vnni: this CPU lacks avx_vnni"):
        T.resolve_tier(None, ["amx_int8", "avx_vnni"])


def test_require(machine) -> None:
    machine(CASCADE_LAKE, 0x2E7)
    T.require({"avx512_vnni", "avx512vl"}, "kernel k")
    with pytest.raises(ISAError, match=r"kernel k needs amx_int8, amx_tile"):
        T.require({"amx_int8", "amx_tile", "avx2"}, "kernel k")
    T.set_max_isa("avx512")
    with pytest.raises(ISAError, match=r"kernel k needs avx512_vnni, beyond the cap avx512"):
        T.require({"avx512_vnni"}, "kernel k")


@given(st.sampled_from([t.name for t in T.TIERS]), st.sampled_from([t.name for t in T.TIERS]))
def test_a_cap_allows_a_tier_iff_its_features_are_the_caps(cap: str, name: str) -> None:
    everything = frozenset().union(*(t.features for t in T.TIERS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T, "features", lambda: everything)
        patch.setattr(T, "cpu_features", lambda: everything)
        patch.setattr(T.native, "is_x86", lambda: True)
        patch.setattr(T, "_cap", cap)
        allowed = T.tier(name).features <= T.tier(cap).features
        assert (T.why_not(name) is None) == allowed
        assert (T.tier(name).features <= T.allowed_features()) == allowed
