"""The assembler's surface: registers, structure, constants, frames, listings, errors."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from iced_x86 import Decoder

from vnnigen.errors import AssemblerError
from vnnigen.isa.assembler import GPR, Arg, Assembler, Code, Label, Mask, Mem, Vec
from vnnigen.isa.emulator import Emulator
from vnnigen.isa.memory import Memory
from vnnigen.isa.registers import ARGUMENT_REGISTERS, CALLEE_SAVED, RSP

AVX2 = frozenset({"avx", "avx2", "fma", "bmi1", "bmi2"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
VNNI = AVX512 | {"avx512_vnni"}


def texts(code: Code) -> list[str]:
    return [str(i) for i in Decoder(64, code.data[code.entry :], ip=code.entry)]


def done(a: Assembler) -> Code:
    a.ret()
    return a.finalize().encode()


def test_small_function_encodes_to_the_expected_instructions() -> None:
    a = Assembler("f", args=(Arg("p", "ptr"), Arg("n", "i64")), features=VNNI)
    p, n = a.load_argument("p"), a.load_argument("n")
    acc = a.zmm("acc")
    one = a.const(np.full(16, 1, np.int32))
    a.vpxord(acc, acc, acc)
    with a.loop(n):
        a.vpdpbusd(acc, acc, Mem(p, 4, bcast=True))
        a.add(p, 64)
    a.vpaddd(acc, acc, one)
    a.vmovdqu32(Mem(p), acc)
    code = done(a)
    assert code.entry == 64
    assert code.data[:64] == np.full(16, 1, np.int32).tobytes()
    assert code.features == {"avx", "avx512f", "avx512_vnni"}
    assert code.instruction_count == 9
    assert texts(code) == [
        "vpxord zmm0,zmm0,zmm0",
        "vpdpbusd zmm0,zmm0,dword bcst [rdi+4]",
        "add rdi,40h",
        "dec rsi",
        "jne short 0000000000000046h",
        "vpaddd zmm0,zmm0,[0]",
        "vmovdqu32 [rdi],zmm0",
        "vzeroupper",
        "ret",
    ]


# Arguments and register pools


def test_arguments_arrive_in_system_v_order() -> None:
    a = Assembler("f", args=[Arg(f"a{i}") for i in range(6)])
    assert [a.load_argument(f"a{i}").asm for i in range(6)] == list(ARGUMENT_REGISTERS)
    assert a.load_argument("a0") == a.load_argument("a0")
    with pytest.raises(AssemblerError, match=r"f has no argument 'zz', only a0, a1"):
        a.load_argument("zz")


@pytest.mark.parametrize("args", [[Arg(f"a{i}") for i in range(7)], [Arg("x"), Arg("x", "ptr")]])
def test_wrong_arguments(args: list[Arg]) -> None:
    with pytest.raises(AssemblerError, match="at most 6 arguments, with distinct names"):
        Assembler("f", args)


def test_wrong_argument_type() -> None:
    with pytest.raises(AssemblerError, match=r"'x' has type 'f32'; use 'ptr' or 'i64'"):
        Arg("x", "f32")


def test_general_registers_avoid_arguments_and_prefer_caller_saved_ones() -> None:
    a = Assembler("f", args=(Arg("p"), Arg("q")))
    names = [a.gpr(f"r{i}").asm for i in range(13)]
    assert not {"rdi", "rsi", "rsp"} & set(names)
    assert len(set(names)) == 13
    assert set(names[-6:]) == set(CALLEE_SAVED)
    with pytest.raises(AssemblerError, match=r"f: no free gpr register; live are .*rdi=p.*r15=r12"):
        a.gpr("one_more")
    a.release(a.load_argument("q"))
    assert a.gpr("one_more").asm == "rsi"


def test_a_register_by_name() -> None:
    a = Assembler("f", args=(Arg("p"),))
    assert a.gpr("count", at="rcx").asm == "rcx"
    with pytest.raises(AssemblerError, match="no free gpr register"):
        a.gpr("again", at="rcx")
    for name in ("rsp", "ecx"):
        with pytest.raises(AssemblerError, match=f"'{name}' is no allocatable register"):
            a.gpr(at=name)


def test_register_views() -> None:
    assert [getattr(GPR(0, 64), v).asm for v in ("r64", "r32", "r16", "r8")] == ["rax", "eax", "ax", "al"]
    assert [getattr(GPR(6, 64), v).asm for v in ("r64", "r32", "r16", "r8")] == ["rsi", "esi", "si", "sil"]
    assert [getattr(GPR(9, 64), v).asm for v in ("r64", "r32", "r16", "r8")] == ["r9", "r9d", "r9w", "r9b"]
    assert [getattr(Vec(17, 512), v).asm for v in ("zmm", "ymm", "xmm")] == ["zmm17", "ymm17", "xmm17"]
    v = Assembler("f").zmm("acc")
    assert v.ymm.zmm == v
    assert v.xmm.name == "acc"
    with pytest.raises(AttributeError):
        v.index = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("features", "bits", "count"),
    [(AVX2, 256, 16), (AVX2, 128, 16), (AVX512, 512, 32), (AVX512, 256, 32), (None, 128, 32)],
)
def test_vector_pool(features: frozenset[str] | None, bits: int, count: int) -> None:
    a = Assembler("f", features=features)
    assert a.available_vectors() == count
    registers = [a.vec(bits, f"v{i}") for i in range(count)]
    assert {r.index for r in registers} == set(range(count))
    assert a.available_vectors() == 0
    with pytest.raises(AssemblerError, match=rf"no free vector register; live are .*v0.*v{count - 1}"):
        a.vec(bits)
    a.release(registers[5].xmm)  # any view
    assert a.vec(bits).index == 5


def test_short_vectors_stay_low_without_avx512vl() -> None:
    a = Assembler("f", features=AVX2 | {"avx512f"})
    assert a.available_vectors() == 32
    for _ in range(16):
        a.ymm()
    with pytest.raises(AssemblerError, match="no free vector register"):
        a.ymm()
    assert a.zmm().index == 16


def test_zmm_needs_avx512f() -> None:
    with pytest.raises(AssemblerError, match="zmm registers need avx512f"):
        Assembler("f", features=AVX2).zmm()


def test_masks_and_tiles_have_their_own_pools() -> None:
    a = Assembler("f")
    assert [a.kreg().index for _ in range(7)] == [1, 2, 3, 4, 5, 6, 7]
    assert [a.tile().index for _ in range(8)] == list(range(8))
    assert a.available_vectors() == 32
    with pytest.raises(AssemblerError, match="no free mask register"):
        a.kreg()
    with pytest.raises(AssemblerError, match="no free tile register"):
        a.tile()


def test_release_of_what_is_not_live() -> None:
    a = Assembler("f")
    v = a.zmm("acc")
    a.release(v)
    with pytest.raises(AssemblerError, match="zmm0 acc is released but not live"):
        a.release(v)


def test_scope_returns_what_was_allocated_inside() -> None:
    a = Assembler("f", features=AVX512)
    outer = a.zmm("outer")
    with a.scope():
        for _ in range(31):
            a.zmm()
        a.gpr()
        a.kreg()
        with a.scope(), pytest.raises(AssemblerError):
            a.zmm()
    assert a.available_vectors() == 31
    assert a.kreg().index == 1
    with a.scope():
        a.release(outer)
        assert a.zmm("inner").index == outer.index
    assert a.available_vectors() == 32


@given(st.lists(st.sampled_from(["take", "give", "open", "close"]), max_size=60))
def test_pools_never_hand_out_a_live_register(actions: list[str]) -> None:
    a = Assembler("f", features=AVX512)
    live: list[list[Vec]] = [[]]
    scopes = []
    for action in actions:
        if action == "take" and a.available_vectors():
            register = a.zmm()
            assert register not in [r for level in live for r in level]
            live[-1].append(register)
        elif action == "give" and live[-1]:
            a.release(live[-1].pop())
        elif action == "open":
            scopes.append(a.scope())
            scopes[-1].__enter__()
            live.append([])
        elif action == "close" and scopes:
            scopes.pop().__exit__(None, None, None)
            live.pop()
        assert a.available_vectors() == 32 - sum(map(len, live))


# Labels and loops


@pytest.mark.parametrize(("start", "step", "rounds"), [(1, 1, 1), (7, 1, 7), (64, 16, 4), (65, 16, 5), (5, 16, 1)])
def test_loop_runs_the_body_as_often_as_it_says(start: int, step: int, rounds: int) -> None:
    a = Assembler("f", args=(Arg("n"), Arg("out", "ptr")))
    n, total = a.load_argument("n"), a.gpr("total")
    a.xor(total.r32, total.r32)
    with a.loop(n, step=step):
        a.inc(total)
    a.mov(Mem(a.load_argument("out")), total)
    memory = Memory()
    out = memory.map("out", np.zeros(1, np.int64), writable=True)
    Emulator(done(a), memory).call(start, out, max_instructions=1000)
    assert memory.array("out")[0] == rounds


def test_forward_and_backward_branches_over_any_distance() -> None:
    a = Assembler("f", args=(Arg("n"), Arg("out", "ptr")))
    n, out, r = a.load_argument("n"), a.load_argument("out"), a.gpr("r")
    skip, again = a.label("skip"), a.label("again")
    a.mov(r, 0)
    a.bind(again)
    a.cmp(n, 3)
    a.jg(skip)
    for _ in range(50):
        a.lea(r, Mem(r, 1000))
    a.bind(skip)
    a.inc(r)
    a.dec(n)
    a.jnz(again)
    a.mov(Mem(out), r)
    memory = Memory()
    address = memory.map("out", np.zeros(1, np.int64), writable=True)
    Emulator(done(a), memory).call(5, address, max_instructions=1000)
    assert memory.array("out")[0] == 5 + 3 * 50000


def test_label_mistakes() -> None:
    a = Assembler("f")
    label = a.label("top")
    a.bind(label)
    with pytest.raises(AssemblerError, match=r"f: label 'top' is bound twice"):
        a.bind(label)
    with pytest.raises(AssemblerError, match="label 'other' belongs to another assembler"):
        a.bind(Label("other"))
    a.jmp(a.label("nowhere"))
    with pytest.raises(AssemblerError, match="branch to label 'nowhere', which is not bound here"):
        a.finalize()


def test_branch_into_another_function() -> None:
    a, b = Assembler("a"), Assembler("b")
    label = a.label("theirs")
    a.bind(label)
    b.jmp(label)
    with pytest.raises(AssemblerError, match="b: branch to label 'theirs', which is not bound here"):
        b.finalize()


def test_a_label_that_no_branch_uses_need_not_be_bound() -> None:
    a = Assembler("f")
    a.label("unused")
    assert texts(done(a)) == ["ret"]


@pytest.mark.parametrize("ending", ["nothing", "mov", "comment", "label", "section"])
def test_control_must_not_run_off_the_end(ending: str) -> None:
    a = Assembler("f")
    if ending == "mov":
        a.mov(a.gpr(), 1)
    elif ending != "nothing":
        a.ret()
        a.comment("a remark") if ending == "comment" else None
        a.bind(a.label("end")) if ending == "label" else None
        if ending == "section":
            with a.section("tail"):
                a.inc(a.gpr())
    with pytest.raises(AssemblerError, match="control runs off the end"):
        a.finalize()


def test_finalize_seals_and_repeats() -> None:
    a = Assembler("f")
    r = a.gpr()
    a.inc(r)
    a.ret()
    program = a.finalize()
    assert a.finalize() is program
    assert program.encode() == program.encode()
    for name in ("inc", "dec"):
        with pytest.raises(AssemblerError, match="f is finalized"):
            getattr(a, name)(r)


# Frame


def run_with_frame(saved: int, stack: int, wide: bool) -> Code:
    """Clobber registers and stack scratch under the emulator, which checks the calling convention."""
    a = Assembler("f", args=(Arg("out", "ptr"),), features=AVX2)
    out = a.load_argument("out")
    registers = [a.gpr(f"r{i}") for i in range(8 + saved)]
    for i, r in enumerate(registers):
        a.mov(r, i + 1)
    total = registers.pop(0)
    if stack:
        first, second = a.stack(stack), a.stack(8, align=8)
        v = a.vec(256 if wide else 128)
        a.vpcmpeqb(v, v, v)
        a.vmovdqa(first, v)  # faults in the emulator if the scratch is not aligned
        a.mov(second, total)
        a.mov(total, second)
    for r in registers:
        a.add(total, r)
    a.mov(Mem(out), total)
    code = done(a)
    memory = Memory()
    address = memory.map("out", np.zeros(1, np.int64), writable=True)
    Emulator(code, memory).call(address)
    assert memory.array("out")[0] == sum(range(1, 9 + saved))
    return code


@pytest.mark.parametrize("stack", [0, 32, 64, 100, 1000])
@pytest.mark.parametrize("saved", [0, 1, 6])
@pytest.mark.parametrize("wide", [False, True])
def test_frame(saved: int, stack: int, wide: bool) -> None:
    text = texts(run_with_frame(saved, stack, wide))
    assert [t for t in text if t.startswith("push")] == [f"push {r}" for r in sorted_registers(saved)]
    assert [t for t in text if t.startswith("pop")] == [f"pop {r}" for r in reversed(sorted_registers(saved))]
    assert ("vzeroupper" in text) == (wide and stack > 0)
    assert ("and rsp,0FFFFFFFFFFFFFFC0h" in text) == (stack > 0)


def sorted_registers(saved: int) -> list[str]:
    return list(CALLEE_SAVED[:saved])


def test_every_ret_gets_the_epilogue() -> None:
    a = Assembler("f", args=(Arg("n"),), features=AVX512)
    n = a.load_argument("n")
    a.gpr(at="rbx")
    v = a.zmm()
    a.vpxord(v, v, v)
    other = a.label("other")
    a.test(n, n)
    a.jz(other)
    a.ret()
    a.bind(other)
    text = texts(done(a))
    assert [t for t in text if t in ("vzeroupper", "pop rbx", "ret")] == ["vzeroupper", "pop rbx", "ret"] * 2
    assert text[0] == "push rbx"


def test_wide_registers_that_only_stores_touch_count() -> None:
    a = Assembler("f", args=(Arg("p"),), features=AVX512)
    a.vmovdqu64(Mem(a.load_argument("p")), a.zmm())
    assert texts(done(a))[-2:] == ["vzeroupper", "ret"]
    b = Assembler("f", args=(Arg("p"),), features=AVX512)
    b.vmovdqu(Mem(b.load_argument("p")), b.zmm().xmm)
    assert texts(done(b)) == ["vmovdqu xmmword ptr [rdi],xmm0", "ret"]


# Memory operands and constants


def test_memory_arithmetic() -> None:
    p, i = GPR(7, 64), GPR(1, 64)
    m = Mem(p, 8, i, 4)
    assert m + 64 == Mem(p, 72, i, 4)
    assert m - 8 == Mem(p, 0, i, 4)
    assert m.broadcast() == Mem(p, 8, i, 4, bcast=True)
    assert m.broadcast() + 4 == Mem(p, 12, i, 4, bcast=True)
    assert m.sized(32) + 1 == Mem(p, 9, i, 4, size=32)
    assert hash(m) == hash(Mem(p, 8, i, 4))
    with pytest.raises(AttributeError):
        m.disp = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Mem(p.r32), "base must be a 64-bit register, not edi"),
        (lambda p: Mem(Vec(3, 512)), "base must be a 64-bit register, not zmm3"),
        (lambda p: Mem(p, 2**31), "displacement 2147483648 does not fit"),
        (lambda p: Mem(p, -(2**31)) - 1, "displacement -2147483649 does not fit"),
        (lambda p: Mem(p, 0, p, 3), "scaled by 1, 2, 4 or 8, not 3"),
        (lambda p: Mem(p, 0, RSP), "index must be a 64-bit register other than rsp, not rsp"),
        (lambda p: Mem(p, 0, p.r32), "index must be a 64-bit register other than rsp, not edi"),
        (lambda p: Mem(p, 0, Mask(1, 64)), "index must be a 64-bit register other than rsp, not k1"),
        (lambda p: Mem(p, 0, Vec(1, 512), 4, bcast=True), "index must be a 64-bit register"),
        (lambda p: Mem(Assembler("f").const(1.0).base, 0, p), "cannot have an index; lea"),
    ],
)
def test_bad_memory_operands(make: Callable[[GPR], Mem], message: str) -> None:
    with pytest.raises(AssemblerError, match=re.escape(message)):
        make(GPR(7, 64))


def test_constants_are_shared_aligned_and_reachable() -> None:
    a = Assembler("f", args=(Arg("out", "ptr"),), features=AVX512)
    out, v = a.load_argument("out"), a.zmm()
    table = np.arange(16, dtype=np.int32)
    first, _, half = a.const(table), a.const(np.float32(3), align=4), a.const(np.float32(0.5), align=4)
    again = a.const(table.copy())
    other = a.const(np.arange(64, dtype=np.uint8), align=64)
    assert first == again
    assert (first.disp, half.disp, other.disp) == (0, 68, 128)
    assert a.const(np.float32(0.5), align=64).disp == 192  # the same bytes, but not aligned enough before
    a.vmovdqu32(v, first)
    a.vmovdqu32(Mem(out), v)
    a.vbroadcastss(v, half)
    a.vaddps(v, v, half.broadcast())
    a.vmovups(Mem(out, 64), v)
    a.vmovdqu8(v.xmm, other + 16)
    a.vmovdqu(Mem(out, 128), v.xmm)
    code = done(a)
    assert code.entry == 256
    memory = Memory()
    address = memory.map("out", np.zeros(144, np.uint8), writable=True)
    Emulator(code, memory).call(address)
    result = memory.array("out").view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(result[:64].view(np.int32), table)
    np.testing.assert_array_equal(result[64:128].view(np.float32), np.ones(16, np.float32))
    np.testing.assert_array_equal(result[128:], np.arange(16, 32))


@pytest.mark.parametrize("align", [0, 3, 128])
def test_bad_alignment(align: int) -> None:
    a = Assembler("f")
    with pytest.raises(AssemblerError, match=f"not {align}"):
        a.const(1.0, align=align)
    with pytest.raises(AssemblerError, match=f"not {align}"):
        a.stack(64, align=align)


# Wrong operands: the error names the instruction, what was given and what is legal.

AX, V, Y9, K = GPR(0, 64), Vec(0, 512), Vec(9, 256), Mask(1, 64)


@pytest.mark.parametrize(
    ("name", "operands", "how", "message"),
    [
        ("vpdpbusd", (V, V), {}, r"vpdpbusd \(zmm, zmm\) has no enc.*zmm1 \{k1\}\{z\}, zmm2, zmm3/m512"),
        ("vpdpbusd", (V, V, V, V), {}, r"vpdpbusd \(zmm, zmm, zmm, zmm\) has no encoding"),
        ("vpdpbusd", (V, V, Y9), {}, r"\(zmm, zmm, ymm\) has no encoding"),
        ("vpdpbusd", (V, V, AX), {}, r"\(zmm, zmm, 64-bit register\) has no encoding"),
        ("vpdpbusd", (V, V, 3), {}, r"\(zmm, zmm, immediate\) has no encoding"),
        ("vpdpbusd", (Mem(AX), V, V), {}, r"\(memory, zmm, zmm\) has no encoding"),
        ("vpdpbusd", (V, V, "zmm2"), {}, r"vpdpbusd: 'zmm2' is not a register, Mem, Label or integer"),
        ("vpdpbusd", (V, V, 1.5), {}, r"vpdpbusd: 1.5 is not a register"),
        ("vpdpbusd", (V, V, V), {"zero": True}, r"vpdpbusd: zero=True is meaningful only with mask="),
        ("vpdpbusd", (V, V, V), {"mask": AX}, r"vpdpbusd: mask= takes a mask register k1-k7"),
        ("vpdpbusd", (V, V, V), {"mask": Mask(0, 64)}, r"vpdpbusd: mask= takes a mask register k1-k7"),
        ("vpdpbusd", (V, V, V), {"mask": 0}, r"vpdpbusd: mask= takes a mask register k1-k7"),
        ("vpaddb", (V, V, Mem(AX, bcast=True)), {}, r"vpaddb \(zmm, zmm, broadcast memory\) has no encoding"),
        ("vpblendd", (Y9, Y9, Y9, 1), {"mask": K}, r"vpblendd .* masked has no encoding"),
        ("vpmaskmovd", (Vec(20, 256), Y9, Mem(AX)), {}, r"\(ymm16-31, ymm, memory\) has no encoding"),
        ("vmovdqu8", (Mem(AX), V), {"mask": K, "zero": True}, r"vmovdqu8 .* masked zeroing has no encoding"),
        ("vpcmpeqb", (K, V, V), {"mask": K, "zero": True}, r"vpcmpeqb .* masked zeroing has no encoding"),
        ("vpshufd", (V, V, 256), {}, r"vpshufd \(zmm, zmm, immediate of 16 bits\) has no encoding"),
        ("mov", (AX, 2**64), {}, r"immediate 18446744073709551616 does not fit in 64 bits"),
        ("mov", (Mem(AX), 1), {}, r"mov \(memory, immediate\): .* could be 8, 16, 32, 64 bits; say which"),
        ("add", (AX, 2**31), {}, r"add \(64-bit register, immediate of 32 bits, unsigned\) has no encoding"),
        ("mov", (AX, GPR(1, 32)), {}, r"mov \(64-bit register, 32-bit register\) has no encoding"),
        ("shl", (AX, GPR(3, 8)), {}, r"shl \(64-bit register, 8-bit register\) has no encoding"),
        ("movzx", (AX.r32, Mem(AX)), {}, r"movzx .* could be 8, 16 bits; say which with Mem\("),
        ("movzx", (AX.r32, Mem(AX, size=32)), {}, r"movzx .* with a 32-bit memory operand has no encoding"),
        ("jmp", (3,), {}, r"jmp \(immediate\) has no encoding"),
        ("vpaddd", (Label("x"),), {}, r"vpaddd \(label\) has no encoding"),
        ("ret", (AX,), {}, r"takes 1 positional argument"),
    ],
)  # fmt: skip
def test_wrong_operands(name: str, operands: tuple, how: dict, message: str) -> None:
    a = Assembler("f")
    expected = TypeError if name == "ret" else AssemblerError
    for _ in range(2):  # a failure must not be remembered as a success
        with pytest.raises(expected, match=re.compile(message, re.S)):
            getattr(a, name)(*operands, **how)
    assert texts(done(a)) == ["ret"]


def test_missing_features_are_named() -> None:
    a = Assembler("f", features=AVX2)
    y = a.ymm()
    with pytest.raises(AssemblerError, match=r"vpdpbusd .*needs the CPU features avx512_vnni\+avx512vl or avx_vnni"):
        a.vpdpbusd(y, y, y)


@pytest.mark.parametrize("name", ["vpfoo", "VPADDD", "_private", "cpuid"])
def test_unknown_instructions(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no method or instruction '{name}'"):
        getattr(Assembler("f"), name)


def test_python_keywords_have_an_underscore() -> None:
    a = Assembler("f")
    r = a.gpr()
    a.and_(r, 3)
    a.or_(r, r)
    a.not_(r)
    assert texts(done(a)) == ["and rax,3", "or rax,rax", "not rax", "ret"]


def test_features_limit_the_encodings_of_each_assembler_separately() -> None:
    # The choice is remembered per feature set: one assembler must not see another's.
    for features, expected in ((VNNI, "avx512vl"), (AVX2 | {"avx_vnni"}, "avx_vnni"), (VNNI, "avx512vl")):
        a = Assembler("f", features=features)
        y = a.ymm()
        a.vpdpbusd(y, y, y)
        assert expected in done(a).features


# Listing


def listed() -> Code:
    a = Assembler("gemm-u8s8-2x16-avx512_vnni", args=(Arg("params", "ptr"), Arg("n")), features=VNNI)
    p, n, acc, k = a.load_argument("params"), a.load_argument("n"), a.zmm("acc00"), a.kreg("tail")
    table = a.const(np.arange(16, dtype=np.int32))
    with a.section("setup"):
        a.comment("clear")
        a.comment("the accumulator")
        a.vpxord(acc, acc, acc)
    with a.loop(n, name="k_loop"):
        a.vpdpbusd(acc, acc, Mem(p, 8, bcast=True))
    with a.section("epilogue"), a.section("store"):
        a.kmovw(k, n.r32)
        a.vpaddd(acc, acc, table + 4)
        a.vmovdqu8(Mem(p, -64, n, 4), acc.xmm, mask=k)
    return done(a)


def test_listing_is_annotated() -> None:
    code = listed()
    lines = code.listing.splitlines()
    size = len(code.data) - code.entry
    assert lines[0] == f"; gemm-u8s8-2x16-avx512_vnni: 9 instructions, {size} bytes"
    assert lines[1] == "; needs avx, avx512_vnni, avx512bw, avx512f, avx512vl"
    assert lines[2] == "; 64 bytes of constants at 0, entry at 0x40"
    body = "\n".join(re.sub(r" {2,}", "  ", line) for line in lines[3:])
    assert body == (
        "; == setup\n"
        "  000040  62f17d48efc0  vpxord zmm0, zmm0, zmm0  ; acc00, acc00, acc00; clear; the accumulator\n"
        "k_loop:\n"
        "  000046  62f27d58504702  vpdpbusd zmm0, zmm0, [rdi+8]{1to16}  ; acc00, acc00, [params+8]\n"
        "  00004d  48ffce  dec rsi  ; n\n"
        "  000050  75f4  jnz k_loop\n"
        "; == epilogue\n"
        "; ==== store\n"
        "  000052  c5f892ce  kmovw k1, esi  ; tail, n\n"
        "  000056  62f17d48fe05a4ffffff  vpaddd zmm0, zmm0, [rip-0x5c]  ; acc00, acc00, constant@0x4\n"
        "  000060  62f17f097f44b7fc  vmovdqu8 [rdi+rsi*4-0x40]{k1}, xmm0  ; [params+n*4-64], acc00\n"
        "  000068  c5f877  vzeroupper\n"
        "  00006b  c3  ret"
    )


def test_listing_lines_by_offset_cover_every_instruction() -> None:
    code = listed()
    decoded = list(Decoder(64, code.data[code.entry :], ip=code.entry))
    assert len(decoded) == code.instruction_count
    for instruction in decoded:
        line = code.line_at(instruction.ip)
        start, end = instruction.ip, instruction.ip + instruction.len
        assert line.startswith(f"{start:06x}  {code.data[start:end].hex()} ")
    assert code.line_at(decoded[0].ip + 1) == ""


def test_repr_of_code_is_short() -> None:
    assert len(repr(listed())) < 250
