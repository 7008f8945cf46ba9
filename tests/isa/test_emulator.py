"""The emulator as a whole: memory checks, calling convention, control flow, faults under masks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from iced_x86 import Code, Encoder, Instruction, MemoryOperand, Register

from vnnigen.errors import EmulatorError
from vnnigen.isa import emulator
from vnnigen.isa.assembler import Arg, Assembler, Mem
from vnnigen.isa.emulator import Emulator
from vnnigen.isa.memory import Memory


@dataclass(frozen=True)
class RawCode:
    """Instructions that the assembler would not emit."""

    data: bytes
    name: str = "raw"
    entry: int = 0

    def line_at(self, offset: int) -> str:
        return f"line {offset}"


def raw(*instructions: Instruction) -> RawCode:
    encoder, data = Encoder(64), b""
    for ins in instructions:
        encoder.encode(ins, len(data))
        data += encoder.take_buffer()
    return RawCode(data)


RET = Instruction.create(Code.RETNQ)


def kernel(body: Callable[..., None], *args: str) -> emulator.CodeLike:
    """Assemble `body(a, *argument registers)`; every argument is a pointer or integer."""
    a = Assembler("under_test", args=[Arg(n, "i64") for n in args])
    body(a, *[a.load_argument(n) for n in args])
    a.ret()
    return a.finalize().encode()


def call(body: Callable[..., None], memory: Memory, **args: int) -> emulator.Stats:
    return Emulator(kernel(body, *args), memory).call(*args.values())


def load(a: Assembler, x: object) -> None:
    a.vmovdqu8(a.zmm(), Mem(x))


def store(a: Assembler, x: object) -> None:
    a.vmovdqu8(Mem(x), a.zmm())


# -- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "offset", "message"),
    [
        (load, 37, "read of 64 bytes at offset 37 of read-only buffer 'x', which has 100 bytes"),
        (load, -1, "read of 64 bytes 1 bytes before read-only buffer 'x'"),
        (load, 2**40, "where no buffer is mapped"),
        (store, 0, "write of 64 bytes at offset 0 of read-only buffer 'x'"),
        (lambda a, x: a.mov(a.gpr(), Mem(x)), 93, "read of 8 bytes at offset 93"),
        (lambda a, x: a.mov(Mem(x), x), 0, "write of 8 bytes at offset 0 of read-only"),
        (lambda a, x: a.vpaddd(a.zmm(), a.zmm(), Mem(x, bcast=True)), 97, "read of 4 bytes at offset 97"),
        (lambda a, x: a.vpmovzxbd(a.zmm(), Mem(x)), 85, "read of 16 bytes at offset 85"),
        (lambda a, x: a.vmovdqa64(a.zmm(), Mem(x)), 4, "not a multiple of 64"),
    ],
)
def test_stray_access_is_named(body: Callable[..., None], offset: int, message: str) -> None:
    memory = Memory()
    x = memory.map("x", np.zeros(100, np.uint8))
    with pytest.raises(EmulatorError, match=message) as caught:
        call(body, memory, x=x + offset)
    assert "in 'under_test' at offset 0x" in str(caught.value)
    assert "listing: 0000" in str(caught.value)


@pytest.mark.parametrize("size", [1, 64, 100])
@pytest.mark.parametrize("skew", [0, 1, 60])
def test_a_whole_buffer_is_accessible(size: int, skew: int) -> None:
    memory, data = Memory(), np.arange(size, dtype=np.uint8)
    x, y = memory.map("x", data, skew=skew), memory.map("y", np.zeros_like(data), writable=True, skew=skew)
    assert x % 64 == skew

    def copy(a: Assembler, x: object, y: object, n: object) -> None:
        t = a.gpr()
        with a.loop(n):
            a.movzx(t.r32, Mem(x, -1, index=n, size=8))
            a.mov(Mem(y, -1, index=n), t.r8)

    call(copy, memory, x=x, y=y, n=size)
    assert np.array_equal(memory.array("y"), data)


def test_buffers_keep_dtype_and_shape_and_do_not_alias_the_source() -> None:
    memory, data = Memory(), np.arange(6, dtype=np.float32).reshape(2, 3)
    memory.map("x", data[:, ::-1])
    data[:] = 0
    assert np.array_equal(memory.array("x"), [[2, 1, 0], [5, 4, 3]])
    assert memory.array("x").dtype == np.float32


def test_names_are_unique_and_can_be_unmapped() -> None:
    memory = Memory()
    x = memory.map("x", b"abc")
    with pytest.raises(EmulatorError, match="named 'x' is mapped already"):
        memory.map("x", b"")
    memory.unmap("x")
    with pytest.raises(EmulatorError, match="no buffer named 'x'"):
        memory.array("x")
    with pytest.raises(EmulatorError, match="no buffer is mapped"):
        memory.read_int(x, 1)


# -- masks and faults -------------------------------------------------------------------------------------

# 100 bytes: at +36, 64 bytes fit exactly; at +80, only the first 20 bytes are inside.
MASKED: list[tuple[str, Callable[..., None], int, int]] = [
    ("byte load", lambda a, x, k: a.vmovdqu8(a.zmm(), Mem(x), mask=k, zero=True), 80, 2**20 - 1),
    ("byte load, merging", lambda a, x, k: a.vmovdqu8(a.zmm(), Mem(x), mask=k), 80, 2**20 - 1),
    ("byte store", lambda a, x, k: a.vmovdqu8(Mem(x), a.zmm(), mask=k), 80, 2**20 - 1),
    ("dword arithmetic", lambda a, x, k: a.vpaddd(a.zmm(), a.zmm(), Mem(x), mask=k), 80, 2**5 - 1),
    ("dot product", lambda a, x, k: a.vpdpbusd(a.zmm(), a.zmm(), Mem(x), mask=k), 80, 2**5 - 1),
    ("widening load", lambda a, x, k: a.vpmovzxbd(a.zmm(), Mem(x), mask=k, zero=True), 95, 2**5 - 1),
    ("narrowing store", lambda a, x, k: a.vpmovdb(Mem(x), a.zmm(), mask=k), 95, 2**5 - 1),
    ("compare", lambda a, x, k: a.vpcmpd(a.kreg(), a.zmm(), Mem(x), 1, mask=k), 80, 2**5 - 1),
    ("before the start", lambda a, x, k: a.vmovdqu8(a.zmm(), Mem(x, -10), mask=k), 0, 2**64 - 2**10),
    ("broadcast", lambda a, x, k: a.vpaddd(a.zmm(), a.zmm(), Mem(x, bcast=True), mask=k), 100, 0),
    ("broadcasting load", lambda a, x, k: a.vpbroadcastd(a.zmm(), Mem(x), mask=k), 100, 0),
]


@pytest.mark.parametrize(("body", "offset", "mask"), [m[1:] for m in MASKED], ids=[m[0] for m in MASKED])
def test_masked_off_lanes_are_not_accesses(body: Callable[..., None], offset: int, mask: int) -> None:
    def masked(a: Assembler, x: object, m: object) -> None:
        k = a.kreg()
        a.kmovq(k, m)
        body(a, x, k)

    memory = Memory()
    x = memory.map("x", np.zeros(100, np.uint8), writable=True)
    call(masked, memory, x=x + offset, m=mask)
    too_much = 2**64 - 2**9 if offset == 0 else 2 * mask + 1
    with pytest.raises(EmulatorError, match="buffer 'x'"):
        call(masked, memory, x=x + offset, m=too_much)


def test_shuffles_read_masked_off_lanes_too() -> None:
    def shuffle(a: Assembler, x: object) -> None:
        k = a.kreg()
        a.kxorq(k, k, k)
        a.vpshufb(a.zmm(), a.zmm(), Mem(x), mask=k)

    memory = Memory()
    x = memory.map("x", np.zeros(100, np.uint8))
    with pytest.raises(EmulatorError, match="read of 64 bytes at offset 80"):
        call(shuffle, memory, x=x + 80)


@pytest.mark.parametrize("active", [0, 3, 8])
def test_vpmaskmovd_accesses_what_the_signs_select(active: int) -> None:
    def body(a: Assembler, x: object, m: object) -> None:
        v, s = a.ymm(), a.ymm()
        a.vmovdqu(s, Mem(m))
        a.vpmaskmovd(v, s, Mem(x))
        a.vpaddd(v, v, v)
        a.vpmaskmovd(Mem(x), s, v)

    memory = Memory()
    data = np.arange(1, max(active, 1) + 1, dtype=np.int32)
    x = memory.map("x", data, writable=True)
    m = memory.map("m", np.where(np.arange(9) < active, -1, 1).astype(np.int32))
    call(body, memory, x=x, m=m)
    assert np.array_equal(memory.array("x"), data * 2 if active else data)
    if active:
        with pytest.raises(EmulatorError, match="buffer 'x'"):
            call(body, memory, x=x + 4, m=m)


# -- control flow and the calling convention --------------------------------------------------------------


def move(register: int, value: int) -> Instruction:
    return Instruction.create_reg_i64(Code.MOV_R64_IMM64, register, value)


ymm_move = Instruction.create_reg_reg(Code.VEX_VMOVDQU_YMM_YMMM256, Register.YMM1, Register.YMM2)
vzeroupper = Instruction.create(Code.VEX_VZEROUPPER)
push_rbx = Instruction.create_reg(Code.PUSH_R64, Register.RBX)
pop_rbx = Instruction.create_reg(Code.POP_R64, Register.RBX)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (raw(move(Register.RBX, 1), move(Register.R12, 1), RET), "not restored at ret: rbx, r12"),
        (raw(push_rbx, RET), "unbalanced push and pop"),
        (raw(ymm_move, RET), "VZEROUPPER is missing"),
        (raw(vzeroupper, ymm_move, RET), "used after VZEROUPPER"),
        (raw(Instruction.create_branch(Code.JE_REL8_64, 2), RET), "reads a flag that is undefined"),
        (raw(Instruction.create_branch(Code.JMP_REL8_64, 0)), "more than 1000 instructions"),
        (raw(Instruction.create_branch(Code.JMP_REL8_64, 100), RET), "the jump leaves the code"),
        (raw(move(Register.RAX, 1)), "execution ran past the end"),
        (raw(Instruction.create(Code.CPUID), RET), "not in the table"),
        (raw(Instruction.create_reg(Code.DIV_RM64, Register.RSI), RET), "divide error"),
        (raw(Instruction.create_reg_reg(Code.MOV_R8_RM8, Register.AH, Register.AL), RET), "ah, bh, ch and dh"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_broken_code_is_named(code: RawCode, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        Emulator(code, Memory()).call(0, 0, max_instructions=1000)


@pytest.mark.parametrize(
    "code",
    [
        raw(push_rbx, move(Register.RBX, 1), pop_rbx, RET),
        raw(ymm_move, vzeroupper, RET),
        raw(Instruction.create_reg_reg(Code.VEX_VMOVDQU_XMM_XMMM128, Register.XMM1, Register.XMM2), RET),
        raw(Instruction.create_branch(Code.JMP_REL8_64, 4), *[Instruction.create(Code.INT3)] * 2, RET),
    ],
)
def test_sound_code_returns(code: RawCode) -> None:
    Emulator(code, Memory()).call()


def test_embedded_rounding_is_refused() -> None:
    ins = Instruction.create_reg_reg_reg(
        Code.EVEX_VADDPS_ZMM_K1Z_ZMM_ZMMM512B32_ER, Register.ZMM0, Register.ZMM1, Register.ZMM2
    )
    ins.rounding_control = 1
    with pytest.raises(EmulatorError, match="embedded rounding"):
        Emulator(raw(ins, RET), Memory()).call()


def test_arguments_beyond_six_are_on_the_stack() -> None:
    stack = [
        Instruction.create_reg_mem(Code.MOV_R64_RM64, Register.RAX, MemoryOperand(Register.RSP, displ=d, displ_size=1))
        for d in (8, 16)
    ]
    store_rax = Instruction.create_mem_reg(Code.MOV_RM64_R64, MemoryOperand(Register.RDI), Register.RAX)
    for ins, expected in zip(stack, (-7, 8), strict=True):
        memory = Memory()
        out = memory.map("out", np.zeros(1, np.int64), writable=True)
        Emulator(raw(ins, store_rax, RET), memory).call(out, 2, 3, 4, 5, 6, -7, 8)
        assert memory.array("out")[0] == expected


def test_registers_are_poisoned_and_reproducible() -> None:
    results = []
    for poison in (True, True, False):
        memory = Memory()
        x = memory.map("x", np.zeros(16, np.float32), writable=True)
        Emulator(kernel(store, "x"), memory, poison=poison).call(x)
        results.append(memory.array("x"))
    assert np.isnan(results[0]).all()
    assert results[0].tobytes() == results[1].tobytes()
    assert not results[2].any()


def test_constants_and_local_stack() -> None:
    table = np.arange(16, dtype=np.int32)

    def body(a: Assembler, x: object) -> None:
        v, local = a.zmm(), a.stack(128)
        a.vmovdqa32(v, a.const(table))
        a.vpaddd(v, v, a.const(np.full(1, 5, np.int32)).broadcast())
        a.vmovdqa32(local + 64, v)
        a.vmovdqu32(v, local + 64)
        a.vmovdqu32(Mem(x), v)

    memory = Memory()
    call(body, memory, x=memory.map("x", np.zeros(16, np.int32), writable=True))
    assert np.array_equal(memory.array("x"), table + 5)


# -- kernels ----------------------------------------------------------------------------------------------

ROWS, DEPTH = 4, 48


def gemm(a: Assembler, x: object, w: object, out: object, k: object) -> None:
    """C[4, 32] = A[4, 48] u8 times B[12, 32, 4] s8."""
    acc = [[a.zmm(), a.zmm()] for _ in range(ROWS)]
    for v in (v for row in acc for v in row):
        a.vpxord(v, v, v)
    b = [a.zmm(), a.zmm()]
    with a.loop(k):
        for j in range(2):
            a.vmovdqu8(b[j], Mem(w, 64 * j))
        for i, row in enumerate(acc):
            t = a.zmm()
            a.vpbroadcastd(t, Mem(x, i * DEPTH))
            for j in range(2):
                a.vpdpbusd(row[j], t, b[j])
            a.release(t)
        a.add(x, 4)
        a.add(w, 128)
    for i, row in enumerate(acc):
        for j in range(2):
            a.vmovdqu32(Mem(out, i * 128 + 64 * j), row[j])


def gemm_in_memory(rng: np.random.Generator) -> tuple[Memory, tuple[int, ...], np.ndarray]:
    x = rng.integers(0, 256, (ROWS, DEPTH // 4, 4), np.uint8)
    w = rng.integers(-128, 128, (DEPTH // 4, 32, 4), np.int8)
    memory = Memory()
    places = (
        memory.map("x", x, skew=int(rng.integers(64))),
        memory.map("w", w, skew=int(rng.integers(64))),
        memory.map("out", np.zeros((ROWS, 32), np.int32), writable=True, skew=4 * int(rng.integers(16))),
    )
    return memory, (*places, DEPTH // 4), np.einsum("ikf,knf->in", x.astype(np.int32), w.astype(np.int32))


def test_gemm_kernel_and_its_counts() -> None:
    memory, args, expected = gemm_in_memory(np.random.default_rng(0))
    stats = Emulator(kernel(gemm, "x", "w", "out", "k"), memory).call(*args)
    assert np.array_equal(memory.array("out"), expected)
    assert stats.counts["vpdpbusd"] == ROWS * 2 * DEPTH // 4
    assert stats.counts["vmovdqu32"] == ROWS * 2
    assert stats.counts["ret"] == 1
    assert stats.instructions == sum(stats.counts.values())


def test_each_instruction_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    real = emulator.compile_step

    def counting(m: object, ins: Instruction, insn: object) -> object:
        compiled.append(ins.ip)
        return real(m, ins, insn)  # type: ignore[arg-type]

    monkeypatch.setattr(emulator, "compile_step", counting)
    monkeypatch.setattr(emulator, "_steps", {})
    memory, args, expected = gemm_in_memory(np.random.default_rng(1))
    emu = Emulator(kernel(gemm, "x", "w", "out", "k"), memory)
    for _ in range(3):
        emu.call(*args)
    assert len(compiled) == len(set(compiled)) > 20
    assert np.array_equal(memory.array("out"), expected)
    before = len(compiled)
    memory, args, expected = gemm_in_memory(np.random.default_rng(2))
    Emulator(kernel(gemm, "x", "w", "out", "k"), memory).call(*args)
    assert len(compiled) == before
    assert np.array_equal(memory.array("out"), expected)


def test_steps_of_another_place_read_their_own_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes at another distance from a constant are another instruction; a full table is emptied."""

    def body(value: int) -> Callable[..., None]:
        def constant(a: Assembler, x: object) -> None:
            v = a.zmm()
            a.vmovdqu32(v, a.const(np.full(16, value, np.int32)))
            a.vmovdqu32(Mem(x), v)

        return constant

    for limit in (50_000, 1):
        monkeypatch.setattr(emulator, "_MAX_STEPS", limit)
        memory = Memory()
        x = memory.map("x", np.zeros(16, np.int32), writable=True)
        for value in (1, 2, 3):  # each kernel is mapped at addresses of its own
            Emulator(kernel(body(value), "x"), memory).call(x)
            assert (memory.array("x") == value).all()


def test_emulators_in_several_threads_take_turns() -> None:
    def run(seed: int) -> bool:
        memory, args, expected = gemm_in_memory(np.random.default_rng(seed))
        Emulator(kernel(gemm, "x", "w", "out", "k"), memory).call(*args)
        return np.array_equal(memory.array("out"), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(8)))


def test_several_emulators_share_a_memory() -> None:
    memory, args, expected = gemm_in_memory(np.random.default_rng(2))
    code = kernel(gemm, "x", "w", "out", "k")
    for _ in range(2):
        Emulator(code, memory).call(*args)
    assert np.array_equal(memory.array("out"), expected)


def test_no_module_is_large() -> None:
    root = Path(emulator.__file__).parent
    assert max(len(p.read_text().splitlines()) for p in root.rglob("*.py")) <= 500
