"""One instruction on the processor and in the emulator, from the same state: registers, masks, flags, memory.

A state is a block of bytes. The native side is a fixed prologue that loads every register from the block,
the instruction under test, and a fixed epilogue that stores every register back; all three are plain bytes
from iced's encoder, so that neither the assembler nor the emulator takes part in the native run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from iced_x86 import (
    Code,
    CpuidFeature,
    Encoder,
    EncodingKind,
    Instruction,
    MemoryOperand,
    OpCodeInfo,
    OpCodeOperandKind,
    OpKind,
    Register,
    RflagsBits,
)

from vnnigen.isa.emulator import find_insn
from vnnigen.isa.execute import compile_step
from vnnigen.isa.insn import Insn
from vnnigen.isa.machine import Machine
from vnnigen.isa.memory import Memory
from vnnigen.isa.registry import MNEMONICS
from vnnigen.runtime import codemem, native

# The state block. rdi (7) points to it and rsp (4) is the caller's: neither is loaded, stored or compared.
VECTORS, MASKS, GPRS, FLAGS, MEMORY = 0, 2048, 2112, 2240, 2304
MEMORY_BYTES = 512
BLOCK_BYTES = MEMORY + MEMORY_BYTES
PINNED = (4, 7)
FLAG_BITS = {n: getattr(RflagsBits, n.upper()) for n in ("cf", "zf", "sf", "of", "pf")}
AH_BITS = {"cf": 0, "pf": 2, "zf": 6, "sf": 7}

_NAMES = ("AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI")
GPR64 = [getattr(Register, n) for n in (*(f"R{x}" for x in _NAMES), *(f"R{i}" for i in range(8, 16)))]
GPR32 = [getattr(Register, n) for n in (*(f"E{x}" for x in _NAMES), *(f"R{i}D" for i in range(8, 16)))]
GPR16 = [getattr(Register, n) for n in (*_NAMES, *(f"R{i}W" for i in range(8, 16)))]
GPR8 = [getattr(Register, n) for n in ("AL", "CL", "DL", "BL", "SPL", "BPL", "SIL", "DIL")]
GPR8 += [getattr(Register, f"R{i}L") for i in range(8, 16)]
GPRS_OF = {"R64": GPR64, "R32": GPR32, "R16": GPR16, "R8": GPR8}
VECTOR_CLASSES = {"XMM": Register.XMM0, "YMM": Register.YMM0, "ZMM": Register.ZMM0}
FIXED = {"CL": Register.CL, "AL": Register.AL, "AX": Register.AX, "EAX": Register.EAX, "RAX": Register.RAX}
IMMEDIATES = {
    "IMM8": (OpKind.IMMEDIATE8, 8), "IMM8SEX16": (OpKind.IMMEDIATE8TO16, 8),
    "IMM8SEX32": (OpKind.IMMEDIATE8TO32, 8), "IMM8SEX64": (OpKind.IMMEDIATE8TO64, 8),
    "IMM8_CONST_1": (OpKind.IMMEDIATE8, 0), "IMM16": (OpKind.IMMEDIATE16, 16), "IMM32": (OpKind.IMMEDIATE32, 32),
    "IMM32SEX64": (OpKind.IMMEDIATE32TO64, 32), "IMM64": (OpKind.IMMEDIATE64, 64),
}  # fmt: skip

# Forms that the emulator refuses: no generator has a use for them.
UNSUPPORTED = {Code.DIV_RM8, Code.DIV_RM16, Code.IMUL_RM8, Code.IMUL_RM16, Code.IMUL_RM32, Code.IMUL_RM64}
ENCODINGS = {EncodingKind.LEGACY, EncodingKind.VEX, EncodingKind.EVEX}

_KIND_NAMES = {getattr(OpCodeOperandKind, n): n for n in dir(OpCodeOperandKind) if n.isupper()}
_FEATURES = {getattr(CpuidFeature, n): n.lower() for n in dir(CpuidFeature) if n.isupper()}
_OPTIONAL = ("avx", "bmi", "fma", "f16c")  # prefixes of the features that an x86-64 processor may lack


# -- forms ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """An opcode with a choice of register or memory, masking and broadcast."""

    code: int
    memory: bool
    masking: str  # "", "merge", "zero"
    broadcast: bool

    def __str__(self) -> str:
        traits = [t for t in ("memory" * self.memory, self.masking, "broadcast" * self.broadcast) if t]
        return " ".join([OpCodeInfo(self.code).instruction_string, *traits])


def required_features(code: int) -> frozenset[str]:
    ins = Instruction()
    ins.code = code
    return frozenset(f for c in ins.cpuid_features() if (f := _FEATURES[c]).startswith(_OPTIONAL))


def operand_kinds(code: int) -> list[str]:
    info = OpCodeInfo(code)
    return [_KIND_NAMES[info.op_kind(i)] for i in range(info.op_count)]


def _known_kind(kind: str) -> bool:
    stem = kind.split("_", maxsplit=1)[0]
    return kind == "MEM" or kind in FIXED or kind in IMMEDIATES or stem in (*VECTOR_CLASSES, *GPRS_OF, "K")


@cache
def all_codes() -> dict[str, list[int]]:
    """iced's codes of each registered mnemonic that the harness can execute."""
    executed = (i for i in MNEMONICS.values() if i.kind not in ("control", "tile"))
    known = {i.mnemonic for i in executed} - {"push", "pop"}
    names = sorted(n for n in dir(Code) if n.isupper())
    found: dict[str, list[int]] = {m: [] for m in sorted(known)}
    for code in (getattr(Code, n) for n in names):
        info = OpCodeInfo(code)
        if code in UNSUPPORTED or not info.mode64 or info.encoding not in ENCODINGS:
            continue
        ins = Instruction()
        ins.code = code
        try:
            mnemonic = find_insn(ins).mnemonic
        except Exception:
            continue
        if mnemonic in found and all(_known_kind(k) for k in operand_kinds(code)):
            found[mnemonic].append(code)
    return found


def forms(code: int) -> list[Form]:
    """Register, memory and broadcast forms of an opcode, each without mask, merging and zeroing."""
    info, kinds = OpCodeInfo(code), operand_kinds(code)
    places = [False] * (not any(k == "MEM" for k in kinds)) + [True] * any(k.endswith("MEM") for k in kinds)
    maskings = ["", *["merge"] * info.can_use_op_mask_register, *["zero"] * info.can_use_zeroing_masking]
    found = []
    for memory in places:
        for masking in maskings:
            if memory and masking == "zero" and (kinds[0] == "MEM" or kinds[0].endswith("OR_MEM")):
                continue  # a store cannot zero
            found += [Form(code, memory, masking, b) for b in [False] + [True] * (memory and info.can_broadcast)]
    return found


def instruction(form: Form, rng: np.random.Generator) -> Instruction:
    """Choose registers, immediates and the place in memory."""
    info, kinds = OpCodeInfo(form.code), operand_kinds(form.code)
    insn_address = "lea" in str(info.instruction_string).lower()
    high = info.encoding == EncodingKind.EVEX
    ins = Instruction()
    ins.code = form.code
    same = int(rng.integers(16)) if rng.random() < 0.15 else None
    for i, kind in enumerate(kinds):
        stem = kind.split("_")[0]
        if kind in IMMEDIATES:
            op_kind, bits = IMMEDIATES[kind]
            ins.set_op_kind(i, op_kind)
            value = int(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1))) if bits else 1
            if bits == 8 and kind == "IMM8":
                ins.set_immediate_u64(i, value & 255)
            elif bits in (0, 16):
                ins.set_immediate_u64(i, value & 0xFFFF)
            else:
                ins.set_immediate_i64(i, value)
        elif kind == "MEM" or (form.memory and kind.endswith("OR_MEM")):
            _place(ins, i, form, insn_address, rng)
        else:
            ins.set_op_kind(i, OpKind.REGISTER)
            ins.set_op_register(i, _register(kind, stem, high, same, rng, exclude_rdx=_is_div(ins)))
    if form.masking:
        ins.op_mask = Register.K1 + int(rng.integers(7))
        ins.zeroing_masking = form.masking == "zero"
    ins.is_broadcast = form.broadcast
    return ins


def _is_div(ins: Instruction) -> bool:
    return find_insn(ins).mnemonic == "div"


def _register(kind: str, stem: str, high: bool, same: int | None, rng: np.random.Generator, exclude_rdx: bool) -> int:
    if kind in FIXED:
        return int(FIXED[kind])
    if stem in VECTOR_CLASSES:
        number = same if same is not None else int(rng.integers(32 if high else 16))
        return int(VECTOR_CLASSES[stem]) + number
    if stem == "K":
        return int(Register.K0) + int(rng.integers(8))
    allowed = [i for i in range(16) if i not in PINNED and not (exclude_rdx and i in (0, 2))]
    return int(GPRS_OF[stem][int(rng.choice(allowed))])


def _place(ins: Instruction, op: int, form: Form, address_only: bool, rng: np.random.Generator) -> None:
    """A memory operand inside the block, aligned if the instruction wants it; for LEA, any address."""
    ins.set_op_kind(op, OpKind.MEMORY)
    offset = int(rng.integers(0, MEMORY_BYTES - 64))
    if find_insn(ins).aligned:
        offset &= ~63
    ins.memory_displacement = MEMORY + offset
    ins.memory_displ_size = 8
    ins.memory_base = Register.RDI
    if address_only:
        ins.memory_base = Register.RSI
        ins.memory_index = GPR64[int(rng.choice([0, 1, 2, 3, 5, 6, 8, 15]))]
        ins.memory_index_scale = int(rng.choice([1, 2, 4, 8]))


# -- states -----------------------------------------------------------------------------------------------

_F32 = np.array(
    [0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7F800001,
     0xFFA00000, 0x7FFFFFFF, 0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF, 0x00800000, 0x80800000, 0x7F7FFFFF,
     0xFF7FFFFF, 0x3F000000, 0x3FC00000, 0xC0200000, 0x4F000000, 0xCF000000, 0x4EFFFFFF, 0xCF000001, 0x4B000001,
     0x3F808000, 0x3F818000, 0x7F7F8000, 0x00400000, 0x1F800000, 0x20000000, 0x9F800000],
    np.uint32,
)  # fmt: skip


def random_lanes(rng: np.random.Generator, flavor: str) -> np.ndarray:
    """64 bytes of lanes: extremes, specials and random values."""
    if flavor in ("f4", "bf16"):
        special = rng.choice(_F32, 16)
        near = (1 + rng.integers(0, 2**23, 16) / 2**23) * 2.0 ** rng.integers(-3, 4, 16) * rng.choice([-1, 1], 16)
        short = rng.integers(-64, 65, 16) / 8
        tiny = short * 2.0 ** rng.choice([-66, -64, -62, -127, -126, -125], 16)  # products are tiny too
        anything = rng.integers(0, 2**32, 16, np.uint32)
        options = [special, *(x.astype("f4").view("u4") for x in (near, tiny, short)), anything]
        out = options[rng.integers(len(options))]
        if flavor == "bf16":
            out = (out >> 16) | (np.roll(out, 3) & np.uint32(0xFFFF0000))
        if rng.random() < 0.3:
            out = np.where(rng.random(16) < 0.5, out, special)
        return out.astype("u4").view("u1")
    if flavor == "u1":
        return rng.integers(0, 256, 64, np.uint8)
    size = int(flavor[1])
    count, top = 64 // size, 1 << (8 * size - 1)
    extremes = np.array([0, 1, -1, top - 1, -top, top // 2, 127, -128, 255, 5], object)
    chosen = [int(x) & (2 * top - 1) for x in rng.choice(extremes, count)]
    lanes = np.array(chosen, f"u{size}")
    return np.where(rng.random(count) < 0.6, lanes, rng.integers(0, 2 * top, count, f"u{size}")).view("u1")


def flavors(insn: Insn) -> list[str]:
    """Return the kinds of lanes worth feeding to an instruction."""
    if "bf16" in insn.mnemonic:
        return ["f4", "bf16"]
    return [*(["f4"] * 3 if "f4" in insn.lanes else []), *("i" + x[1] for x in insn.lanes), "u1"]


def random_state(rng: np.random.Generator, insn: Insn) -> np.ndarray:
    """Build a state block."""
    block = np.zeros(BLOCK_BYTES, np.uint8)
    kinds = flavors(insn)
    rows = [random_lanes(rng, kinds[rng.integers(len(kinds))]) for _ in range(32 + MEMORY_BYTES // 64)]
    block[:2048] = np.concatenate(rows[:32])
    block[MEMORY:] = np.concatenate(rows[32:])
    words = block.view("u8")
    masks = rng.integers(0, 2**64, 8, np.uint64)
    words[MASKS // 8 : MASKS // 8 + 8] = np.where(
        rng.random(8) < 0.3, rng.choice(np.array([0, 2**64 - 1, 1, 2**16 - 1, 2**63], "u8"), 8), masks
    )
    words[GPRS // 8 : GPRS // 8 + 16] = np.concatenate([random_lanes(rng, "i8"), random_lanes(rng, "i4")]).view("u8")
    if rng.random() < 0.5:  # small numbers: shift counts, indices
        words[GPRS // 8 + 1] = rng.integers(0, 80)
    words[FLAGS // 8] = rng.integers(0, 256) << 8 | rng.integers(0, 2)
    if insn.mnemonic == "div":  # no divide error: rdx = 0, divisors are not 0
        words[GPRS // 8 : GPRS // 8 + 16] |= np.uint64(0x0000000100000001)
        words[GPRS // 8 + 2] = 0
        block[MEMORY:] |= 1
    for i in PINNED:
        words[GPRS // 8 + i] = 0
    return block


# -- the processor ----------------------------------------------------------------------------------------


def _at(offset: int) -> MemoryOperand:
    return MemoryOperand(Register.RDI, displ=offset, displ_size=8)


def _frame(wide: bool) -> tuple[bytes, bytes]:
    """Prologue and epilogue: load and store all state. `wide`: 32 zmm and 8 masks, else 16 ymm."""
    load, store = [], []
    saved = [3, 5, 12, 13, 14, 15]
    load += [Instruction.create_reg(Code.PUSH_R64, GPR64[i]) for i in saved]
    if wide:
        zmm = (Code.EVEX_VMOVDQU64_ZMM_K1Z_ZMMM512, Code.EVEX_VMOVDQU64_ZMMM512_K1Z_ZMM)
        mask = (Code.VEX_KMOVQ_KR_KM64, Code.VEX_KMOVQ_M64_KR)
        moves = [(*zmm, Register.ZMM0 + i, _at(64 * i)) for i in range(32)]
        moves += [(*mask, Register.K0 + i, _at(MASKS + 8 * i)) for i in range(8)]
    else:
        ymm = (Code.VEX_VMOVDQU_YMM_YMMM256, Code.VEX_VMOVDQU_YMMM256_YMM)
        moves = [(*ymm, Register.YMM0 + i, _at(64 * i)) for i in range(16)]
    for load_code, store_code, register, place in moves:
        load.append(Instruction.create_reg_mem(load_code, register, place))
        store.append(Instruction.create_mem_reg(store_code, place, register))
    rax = Register.RAX
    # al is 0 or 1: adding 0x7F sets OF from it, and SAHF then sets the other flags from ah, but not OF.
    load += [
        Instruction.create_reg_mem(Code.MOV_R64_RM64, rax, _at(FLAGS)),
        Instruction.create_reg_i32(Code.ADD_AL_IMM8, Register.AL, 0x7F),
        Instruction.create(Code.SAHF),
    ]
    after = [
        Instruction.create_mem_reg(Code.MOV_RM64_R64, _at(GPRS), rax),
        Instruction.create(Code.LAHF),
        Instruction.create_reg(Code.SETO_RM8, Register.AL),
        Instruction.create_mem_reg(Code.MOV_RM64_R64, _at(FLAGS), rax),
    ]
    for i in range(16):
        if i not in PINNED:
            load.append(Instruction.create_reg_mem(Code.MOV_R64_RM64, GPR64[i], _at(GPRS + 8 * i)))
            if i:
                after.append(Instruction.create_mem_reg(Code.MOV_RM64_R64, _at(GPRS + 8 * i), GPR64[i]))
    ending = [Instruction.create_reg(Code.POP_R64, GPR64[i]) for i in reversed(saved)]
    ending += [Instruction.create(Code.VEX_VZEROUPPER), Instruction.create(Code.RETNQ)]
    return encode(load), encode(after + store + ending)


def encode(instructions: list[Instruction]) -> bytes:
    encoder, out = Encoder(64), b""
    for ins in instructions:
        encoder.encode(ins, 0)
        out += encoder.take_buffer()
    return out


@dataclass(frozen=True)
class Snippet:
    """What codemem.load takes."""

    name: str
    data: bytes
    entry: int = 0


class Processor:
    """Runs instructions natively."""

    def __init__(self, wide: bool) -> None:
        self.wide = wide
        self._prologue, self._epilogue = _frame(wide)
        self._memory = np.zeros(BLOCK_BYTES + 64, np.uint8)
        start = -self._memory.ctypes.data % 64
        self._block = self._memory[start : start + BLOCK_BYTES]
        self._pointer = native.ffi.cast("const int64_t *", self._block.ctypes.data)

    def load(self, instructions: list[Instruction]) -> list[codemem.LoadedCode]:
        bodies = [self._prologue + encode([i]) + self._epilogue for i in instructions]
        return codemem.load_batch([Snippet(f"test{n}", body) for n, body in enumerate(bodies)])

    def run(self, code: codemem.LoadedCode, state: np.ndarray) -> np.ndarray:
        """Return the state after the instruction."""
        self._block[:] = state
        function = native.ffi.cast("void (*)(const int64_t *, int64_t, void *)", code.address)
        function(self._pointer, 0, native.ffi.NULL)
        return self._block.copy()


# -- the emulator -----------------------------------------------------------------------------------------


class Emulated:
    """Runs single instructions in the emulator on the same state blocks."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.address = self.memory.map("state", np.zeros(BLOCK_BYTES, np.uint8), writable=True)
        self.block = self.memory.buffer("state").data
        self.m = Machine(self.memory)

    def run(self, ins: Instruction, states: list[np.ndarray]) -> list[tuple[np.ndarray, list[str]]]:
        """Return for each state the state after it, and the names of the flags left undefined."""
        m, words, out = self.m, self.block.view("u8"), []
        step = compile_step(m, ins, find_insn(ins))
        for state in states:
            self.block[:] = state
            m.vectors[:] = self.block[:2048].reshape(32, 64)
            m.k[:] = words[MASKS // 8 : MASKS // 8 + 8].tolist()
            m.gpr[:] = words[GPRS // 8 : GPRS // 8 + 16].tolist()
            m.gpr[7] = self.address
            flags = int(words[FLAGS // 8])
            for name, bit in AH_BITS.items():
                setattr(m.flags, name, flags >> (8 + bit) & 1)
            m.flags.of = flags & 1
            with np.errstate(all="ignore"):
                step()
            self.block[:2048] = m.vectors.ravel()
            words[MASKS // 8 : MASKS // 8 + 8] = m.k
            gpr = [0 if i in PINNED else x for i, x in enumerate(m.gpr)]
            words[GPRS // 8 : GPRS // 8 + 16] = gpr
            undefined = [n for n in FLAG_BITS if getattr(m.flags, n) is None]
            after = (m.flags.of or 0) | sum((getattr(m.flags, n) or 0) << (8 + bit) for n, bit in AH_BITS.items())
            words[FLAGS // 8] = after
            out.append((self.block.copy(), undefined))
        return out


def comparable(state: np.ndarray, undefined: list[str], wide: bool) -> np.ndarray:
    """Clear what must not be compared: undefined flags, AF and the rest of ah, and registers not stored."""
    out = state.copy()
    keep = sum(1 << (8 + bit) for n, bit in AH_BITS.items() if n not in undefined) | ("of" not in undefined)
    out.view("u8")[FLAGS // 8] &= np.uint64(keep)
    if not wide:
        out[:2048].reshape(32, 64)[:, 32:] = 0
        out[1024:GPRS] = 0
    return out


def describe(expected: np.ndarray, got: np.ndarray, before: np.ndarray) -> str:
    """Name the registers that differ."""
    lines = []
    for i in np.flatnonzero((expected != got)[:2048].reshape(32, 64).any(1)):
        a, b, c = (x[64 * i : 64 * i + 64].tobytes().hex() for x in (before, expected, got))
        lines.append(f"zmm{i}\n  before   {a}\n  hardware {b}\n  emulator {c}")
    for base, end, name in ((MASKS, GPRS, "k"), (GPRS, FLAGS, "gpr"), (FLAGS, FLAGS + 8, "flags")):
        for i, (a, b) in enumerate(zip(expected[base:end].view("u8"), got[base:end].view("u8"), strict=True)):
            if a != b:
                lines.append(f"{name}{i}: hardware {int(a):#x} emulator {int(b):#x}")
    if (expected[MEMORY:] != got[MEMORY:]).any():
        at = np.flatnonzero(expected[MEMORY:] != got[MEMORY:])
        lines.append(f"memory at {at[0]}..{at[-1]}")
    return "\n".join(lines)
