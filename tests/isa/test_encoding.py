"""Every form that the assembler emits, against GNU as and PeachPy, and the choice between encodings."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from iced_x86 import Decoder, EncodingKind, Instruction, OpCodeInfo

from tests.isa.encoding_cases import Case, assemble_all, cases
from vnnigen.errors import AssemblerError
from vnnigen.isa.assembler import GPR, Assembler, Code, Mask, Mem, Vec
from vnnigen.isa.forms import ALIASES, candidates
from vnnigen.isa.registers import Operand
from vnnigen.isa.registry import MNEMONICS

AX, K1 = GPR(0, 64), Mask(1, 64)


def X(index: int) -> Vec:
    return Vec(index, 128)


def Y(index: int) -> Vec:
    return Vec(index, 256)


def Z(index: int) -> Vec:
    return Vec(index, 512)


needs_binutils = pytest.mark.skipif(
    not all(map(shutil.which, ("as", "objdump", "objcopy"))), reason="GNU binutils are not installed"
)


def gnu_assemble(source: str, folder: Path) -> bytes:
    """Return the text section that GNU as makes of `source` (Intel syntax)."""
    (folder / "a.s").write_text(".intel_syntax noprefix\n" + source)
    done = subprocess.run(["as", "-o", "a.o", "a.s"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "a.o", "a.bin"], cwd=folder, check=True)
    return (folder / "a.bin").read_bytes()


def disassemble(data: bytes, folder: Path) -> list[str]:
    """Return objdump's text for each instruction."""
    (folder / "d.bin").write_bytes(data)
    command = [
        "objdump",
        "-D",
        "-b",
        "binary",
        "-m",
        "i386:x86-64",
        "-M",
        "intel",
        "--insn-width=16",
        "d.bin",
    ]
    out = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    fields = [line.split("\t") for line in out.splitlines() if line.startswith(" ") and line.count("\t") >= 2]
    return [" ".join(f[2].split()) for f in fields]


def known_difference(case: Case) -> bool:
    """Tell whether GNU as reads the text differently, for a reason that is no fault."""
    if case.mnemonic == "movsxd" and getattr(case.operands[0], "bits", 0) == 16:
        return True  # vendors disagree on the source's width
    # VEX.W is ignored here; as clears it, and objdump prints the destination by it.
    return case.mnemonic in ("vmovmskps", "vpmovmskb") and case.operands[0].bits == 64


@needs_binutils
def test_every_form_against_gnu_as(tmp_path: Path) -> None:
    wanted = [case for case in cases() if not known_difference(case)]
    order, encodings, data = assemble_all(wanted)
    assert len(order) > 20000
    source = "".join((f"{{{e}}} " if e else "") + c.text + "\n" for c, e in zip(order, encodings, strict=True))
    theirs = disassemble(gnu_assemble(source, tmp_path), tmp_path)
    ours = disassemble(data, tmp_path)
    assert len(theirs) == len(ours) == len(order)
    wrong = [f"{c.text}: {b!r}" for c, a, b in zip(order, theirs, ours, strict=True) if a != b]
    assert not wrong, wrong[:20]


def test_the_cases_cover_every_registered_instruction_and_operand_shape() -> None:
    seen = Counter()
    for case in cases(memory_variants=2, register_variants=1):
        seen[case.mnemonic] += 1
        seen["mask"] += case.mask is not None
        seen["zero"] += case.zero
        seen["high"] += any(isinstance(o, Vec) and o.index >= 16 for o in case.operands)
        for m in (o for o in case.operands if isinstance(o, Mem)):
            seen["bcast"] += m.bcast
            seen[f"base {m.base.asm}"] += 1
            seen["index"] += m.index is not None
    branches = {name for name in MNEMONICS if name.startswith("j")}
    assert set(MNEMONICS) - set(seen) - branches - {"ret"} == set()
    for shape in ("mask", "zero", "high", "bcast", "index"):
        assert seen[shape] > 100, shape
    for base in ("rsp", "rbp", "r12", "r13"):
        assert seen[f"base {base}"] > 100, base


@needs_binutils
@pytest.mark.parametrize("distance", [0, 30, 31, 40, 400])
def test_branches_against_gnu_as(distance: int, tmp_path: Path) -> None:
    a = Assembler("branches")
    jumps = [name for name in MNEMONICS if name.startswith("j")]
    lines = []

    def padding() -> None:
        for _ in range(distance):
            a.vpaddd(Z(0), Z(1), Z(2))
            lines.append("vpaddd zmm0, zmm1, zmm2")

    for number, name in enumerate(jumps):
        head, tail = a.label(f"head{number}"), a.label(f"tail{number}")
        a.bind(head)
        lines.append(f"head{number}:")
        getattr(a, name)(tail)
        lines.append(f"{name} tail{number}")
        padding()
        getattr(a, name)(head)
        lines.append(f"{name} head{number}")
        a.bind(tail)
        lines.append(f"tail{number}:")
    a.ret()
    lines += ["vzeroupper"] * bool(distance) + ["ret"]
    assert a.finalize().encode().data == gnu_assemble("\n".join(lines) + "\n", tmp_path)


# PeachPy

SYSTEM_PYTHON = "/usr/bin/python3"


def peachpy_bytes(wanted: list[Case]) -> list[str | None]:
    """Return what PeachPy encodes, or skip the test where it is not installed."""
    probe = [SYSTEM_PYTHON, "-c", "import peachpy.x86_64"]
    if not Path(SYSTEM_PYTHON).exists() or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("Debian's python3-peachpy is not installed")
    lines = []
    for case in wanted:
        operands = [peachpy_operand(o, case) for o in case.operands]
        lines.append([case.mnemonic, operands, case.mask.asm if case.mask else None, case.zero])
    command = [SYSTEM_PYTHON, str(Path(__file__).with_name("peachpy_oracle.py"))]
    done = subprocess.run(command, input=json.dumps(lines), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def peachpy_operand(operand: Operand, case: Case) -> object:
    if isinstance(operand, int):
        return operand
    if not isinstance(operand, Mem):
        return operand.asm
    return {
        "base": operand.base.asm,
        "index": operand.index.asm if operand.index else None,
        "scale": operand.scale,
        "disp": operand.disp,
        "bits": case.bits,
        "element": case.element if operand.bcast else 0,
    }


def wrong_in_peachpy(case: Case) -> bool:
    """Tell whether PeachPy's own encoding is at fault (GNU as agrees with ours)."""
    for o in case.operands:
        if isinstance(o, Mem) and o.bcast and o.disp:
            return True  # compresses the displacement by the vector's width, not the element's
    # For an unmasked compare it puts the destination's number into the field of the write mask.
    compare = case.mnemonic.startswith(("vpcmp", "vcmp", "vptest")) and any(
        isinstance(o, Mask) for o in case.operands[:1]
    )
    return compare and case.mask is None


def test_forms_that_peachpy_knows() -> None:
    wanted = [c for c in cases(2, 1) if not known_difference(c) and not wrong_in_peachpy(c)]
    order, _, data = assemble_all(wanted)
    theirs = peachpy_bytes(order)
    known = {c.mnemonic for c, t in zip(order, theirs, strict=True) if t is not None}
    too_new = {name for name in MNEMONICS if name.startswith(("vpdp", "vdpbf16", "vcvtne"))}
    too_new |= {name for name, i in MNEMONICS.items() if i.kind == "tile"}
    branches = {name for name in MNEMONICS if name.startswith("j")}
    assert set(MNEMONICS) - known <= too_new | branches | {"ret"}
    wrong = []
    for case, their, ours in zip(order, theirs, Decoder(64, data), strict=True):
        if their is not None:
            other = Decoder(64, bytes.fromhex(their)).decode()
            if plain(ours) != plain(other):
                wrong.append(f"{case.text}: {plain(ours)} / {plain(other)}")
    assert not wrong, wrong[:20]


def plain(decoded: Instruction) -> str:
    """Return the text without the access width, which the formatter gives for some encodings only."""
    return re.sub(r"\w+ ptr ", "", str(decoded))


# The choice between encodings


def encoded(features: str | None, name: str, *operands: Operand, mask: Mask | None = None) -> Code:
    a = Assembler("one", features=None if features is None else frozenset(features.split()))
    getattr(a, name)(*operands, mask=mask)
    end = a.label("end")
    a.bind(end)
    a.jmp(end)
    return a.finalize().encode()


ALL512 = "avx avx2 avx512f avx512bw avx512dq avx512vl avx512_vnni"


@pytest.mark.parametrize(
    ("features", "name", "operands", "mask", "expected", "needs"),
    [
        # VEX before EVEX, EVEX where a register, mask, broadcast or width demands it.
        (ALL512, "vpaddd", (Y(0), Y(1), Y(2)), None, "VEX", "avx2"),
        (ALL512, "vpaddd", (X(0), X(1), X(2)), None, "VEX", "avx"),
        (ALL512, "vpaddd", (Y(0), Y(1), Y(16)), None, "EVEX", "avx512f avx512vl"),
        (ALL512, "vpaddd", (Y(0), Y(1), Y(2)), K1, "EVEX", "avx512f avx512vl"),
        (ALL512, "vpaddd", (Y(0), Y(1), Mem(AX, bcast=True)), None, "EVEX", "avx512f avx512vl"),
        (ALL512, "vpaddd", (Z(0), Z(1), Z(2)), None, "EVEX", "avx512f"),
        (ALL512, "vpaddb", (Z(0), Z(1), Z(2)), None, "EVEX", "avx512bw"),
        (ALL512, "vpdpbusd", (Z(0), Z(1), Z(2)), None, "EVEX", "avx512_vnni"),
        (ALL512, "vpdpbusd", (Y(0), Y(1), Y(2)), None, "EVEX", "avx512_vnni avx512vl"),
        (ALL512 + " avx_vnni", "vpdpbusd", (Y(0), Y(1), Y(2)), None, "VEX", "avx_vnni"),
        ("avx avx2 avx_vnni", "vpdpbusd", (Y(0), Y(1), Y(2)), None, "VEX", "avx_vnni"),
        (None, "vpdpbusd", (Y(0), Y(1), Y(2)), None, "VEX", "avx_vnni"),
        ("avx avx2", "vfmadd231ps", (Y(0), Y(1), Y(2)), None, None, None),
        ("avx avx2 avx512f", "vpaddd", (Y(0), Y(1), Y(2)), K1, None, None),
        (ALL512, "vcmpps", (Y(0), Y(1), Y(2), 1), None, "VEX", "avx"),
        (ALL512, "vcmpps", (K1, Y(1), Y(2), 1), None, "EVEX", "avx512f avx512vl"),
        (ALL512, "kmovb", (K1, GPR(0, 32)), None, "VEX", "avx512dq"),
        (None, "bzhi", (AX, AX, AX), None, "VEX", "bmi2"),
        (None, "mov", (AX, Mem(AX)), None, "LEGACY", ""),
        (None, "prefetchw", (Mem(AX),), None, "LEGACY", ""),
        ("avx fma", "vfmadd231ps", (Y(0), Y(1), Y(2)), None, "VEX", "fma"),
    ],
)
def test_choice_of_encoding_and_features(features, name, operands, mask, expected, needs) -> None:
    if expected is None:
        with pytest.raises(AssemblerError, match=f"{name} .*needs the CPU features"):
            encoded(features, name, *operands, mask=mask)
        return
    code = encoded(features, name, *operands, mask=mask)
    info = OpCodeInfo(Decoder(64, code.data).decode().code)
    assert info.encoding == getattr(EncodingKind, expected)
    assert code.features == frozenset(needs.split())


@pytest.mark.parametrize(
    ("name", "operands", "expected"),
    [
        ("mov", (AX, 0x7FFFFFFF), "48c7c0ffffff7f"),
        ("mov", (AX, -1), "48c7c0ffffffff"),
        ("mov", (GPR(0, 32), 0xFFFFFFFF), "b8ffffffff"),
        ("mov", (GPR(0, 32), -1), "b8ffffffff"),
        ("mov", (AX, 0xFFFFFFFF), "48b8ffffffff00000000"),
        ("mov", (AX, 2**64 - 1), "48b8ffffffffffffffff"),
        ("mov", (AX, -(2**63)), "48b80000000000000080"),
        ("mov", (Mem(AX, size=32), 5), "c70005000000"),
        ("add", (AX, 127), "4883c07f"),
        ("add", (AX, 128), "4881c080000000"),
        ("add", (AX, True), "4883c001"),
        ("add", (AX, np.int64(3)), "4883c003"),
        ("movzx", (GPR(0, 32), Mem(AX, size=8)), "0fb600"),
        ("movzx", (GPR(0, 32), Mem(AX, size=16)), "0fb700"),
        ("vmovq", (X(0), Mem(AX)), "c5fa7e00"),
        ("vmovdqu", (Mem(AX), Y(9)), "c57e7f08"),
        ("vmovdqu", (Y(9), Mem(AX)), "c57e6f08"),
        # disp8*N: the displacement counts in 64 bytes, or in 4 for a broadcast.
        ("vpaddd", (Z(0), Z(0), Mem(AX, 127 * 64)), "62f17d48fe407f"),
        ("vpaddd", (Z(0), Z(0), Mem(AX, 128 * 64)), "62f17d48fe8000200000"),
        ("vpaddd", (Z(0), Z(0), Mem(AX, 4, bcast=True)), "62f17d58fe4001"),
        ("vpaddd", (Z(0), Z(0), Mem(AX, 2, bcast=True)), "62f17d58fe8002000000"),
    ],
)
def test_expected_bytes(name: str, operands: tuple, expected: str) -> None:
    assert encoded(None, name, *operands).data[:-2].hex() == expected


def test_every_condition_alias_is_the_same_instruction() -> None:
    for alias, name in ALIASES.items():
        assert candidates(alias) == candidates(name), alias
