"""Kernels between guard pages, called through a trampoline that checks what they do to the machine.

Run as a program in a process of its own (a stray access kills it): `python -m tests.kernels.guarded avx2` takes
every case on that tier, with every operand beginning where a PROT_NONE page ends ("start"), and with every operand
ending where one begins ("end"). It names each case before it runs.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import iced_x86 as iced
import numpy as np
from iced_x86 import Code, Instruction, MemoryOperand, Register

import vnnigen as v
from tests.kernels.cases import POST_OPS, Case, assert_same_bits, expected, out_shape, random_numbers, seeded
from tests.kernels.emulation import Lowered, always_winograd, fine_grid, lower
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ARG_SLOTS, ARG_SRC, ARG_TENSORS, ARG_WEIGHTS
from vnnigen.runtime import codemem

# --- guarded memory ---------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PAGE = mmap.PAGESIZE
_NONE, _READ, _READ_WRITE = 0, 1, 3
# Mappings live as long as the process: unmapping would let the next one take a guard's address.
_mappings: list[mmap.mmap] = []


def _protect(address: int, size: int, how: int) -> None:
    if _libc.mprotect(address, size, how):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(data: np.ndarray[Any, Any], place: str, *, read_only: bool = False) -> np.ndarray[Any, Any]:
    """Copy an array between two PROT_NONE pages, hard at the upper ("end") or lower ("start") one."""
    inner = max(1, -(-data.nbytes // _PAGE)) * _PAGE
    pages = mmap.mmap(-1, inner + 2 * _PAGE)
    _mappings.append(pages)
    base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    offset = _PAGE if place == "start" else _PAGE + inner - data.nbytes
    array = np.frombuffer(pages, data.dtype, data.size, offset).reshape(data.shape)
    array[...] = data
    _protect(base, _PAGE, _NONE)
    _protect(base + _PAGE + inner, _PAGE, _NONE)
    if read_only:
        _protect(base + _PAGE, inner, _READ)
    return array


# --- the trampoline ---------------------------------------------------------------------------------------

_SAVED = (Register.RBX, Register.RBP, Register.R12, Register.R13, Register.R14, Register.R15)
_KNOWN = [0x1111_2222_3333_0000 + i for i in range(len(_SAVED))]
_NAN = 0x7FC0_1234
# Offsets in the record: what goes in, then what was found after the call.
_POISON, _SAVED_AT, _MXCSR_BEFORE, _MXCSR_AFTER, _VECTORS, _RECORD_BYTES = 0, 64, 128, 132, 192, 192 + 16 * 64


@dataclass(frozen=True)
class Raw:
    """Machine code without an assembler."""

    name: str
    data: bytes
    entry: int = 0
    listing: str = ""


def _at(base: int, disp: int) -> MemoryOperand:
    return MemoryOperand(base, displ=disp, displ_size=8 if disp else 0)


def _trampoline(wide: bool) -> Raw:
    """Make `f(args, index, scratch, kernel, record)`: poison registers, call the kernel, record what it left."""
    make = Instruction
    reg, mem = make.create_reg_reg, make.create_reg_mem
    record = Register.R8
    code = [make.create_reg(Code.PUSH_R64, r) for r in (*_SAVED, record)]
    for i in range(32 if wide else 16):
        move = Code.EVEX_VMOVDQU64_ZMM_K1Z_ZMMM512 if wide else Code.VEX_VMOVDQU_YMM_YMMM256
        first = Register.ZMM0 if wide else Register.YMM0
        code.append(mem(move, first + i, _at(record, _POISON)))
    if wide:
        code += [mem(Code.VEX_KMOVQ_KR_KM64, Register.K1 + i, _at(record, _POISON)) for i in range(7)]
    code += [make.create_reg_u64(Code.MOV_R64_IMM64, r, k) for r, k in zip(_SAVED, _KNOWN, strict=True)]
    code += [
        make.create_mem(Code.STMXCSR_M32, _at(record, _MXCSR_BEFORE)),
        reg(Code.MOV_R64_RM64, Register.RAX, Register.RCX),
        # What is left of the arguments is garbage for the kernel.
        mem(Code.MOV_R64_RM64, Register.RCX, _at(record, _POISON)),
        mem(Code.MOV_R64_RM64, Register.R9, _at(record, _POISON)),
        mem(Code.MOV_R64_RM64, Register.R10, _at(record, _POISON)),
        mem(Code.MOV_R64_RM64, Register.R8, _at(record, _POISON)),
        make.create_reg(Code.CALL_RM64, Register.RAX),
        make.create_reg(Code.POP_R64, Register.RAX),
        make.create_mem(Code.STMXCSR_M32, _at(Register.RAX, _MXCSR_AFTER)),
    ]
    code += [
        make.create_mem_reg(Code.MOV_RM64_R64, _at(Register.RAX, _SAVED_AT + 8 * i), r) for i, r in enumerate(_SAVED)
    ]
    for i in range(16):
        move = Code.EVEX_VMOVDQU64_ZMMM512_K1Z_ZMM if wide else Code.VEX_VMOVDQU_YMMM256_YMM
        first = Register.ZMM0 if wide else Register.YMM0
        code.append(make.create_mem_reg(move, _at(Register.RAX, _VECTORS + 64 * i), first + i))
    code += [make.create_reg(Code.POP_R64, r) for r in reversed(_SAVED)]
    code += [make.create(Code.VEX_VZEROUPPER), make.create(Code.RETNQ)]
    encoder = iced.BlockEncoder(64)
    encoder.add_many(code)
    return Raw("trampoline", encoder.encode(0))


class Tiles:
    """Loads and releases AMX configurations, as the runtime does around kernels on tiles."""

    def __init__(self) -> None:
        # ldtilecfg [rdi] ; ret, and tilerelease ; ret
        self._code = [codemem.load(Raw("tiles", bytes.fromhex(code))) for code in ("c4e2784907c3", "c4e27849c0c3")]
        self.load, self.release = (ctypes.CFUNCTYPE(None, ctypes.c_int64)(code.address) for code in self._code)

    @contextmanager
    def __call__(self, config: bytes | None) -> Iterator[None]:
        """Have a configuration loaded; None: nothing is to be done."""
        if config is None:
            yield
            return
        held = np.frombuffer(config, np.uint8)
        self.load(held.ctypes.data)
        yield
        self.release(0)


class Caller:
    """Calls kernels and checks the calling convention."""

    def __init__(self) -> None:
        self.code = codemem.load(_trampoline("avx512bw" in v.features()))
        self.call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(self.code.address)
        self.tiles = Tiles()

    def __call__(self, kernel: int, args: int, index: int, scratch: int) -> None:
        record = np.zeros(_RECORD_BYTES, np.uint8)
        record[:64].view(np.uint32)[:] = _NAN
        self.call(args, index, scratch, kernel, record.ctypes.data)
        saved = record[_SAVED_AT : _SAVED_AT + 48].view(np.int64).tolist()
        assert saved == _KNOWN, f"callee-saved registers were changed: {[hex(s) for s in saved]}"
        before, after = record[_MXCSR_BEFORE : _MXCSR_BEFORE + 8].view(np.uint32).tolist()
        assert before & ~0x3F == after & ~0x3F, f"MXCSR was {before:#x}, is {after:#x}"
        upper = record[_VECTORS:].reshape(16, 64)[:, 16:]
        assert not upper.any(), "upper halves of vector registers are not clear: VZEROUPPER is missing"


# --- running ----------------------------------------------------------------------------------------------


def run(low: Lowered, caller: Caller, case: Case, place: str, in_place: bool) -> None:
    """Run all steps of all launches with every operand guarded, and compare the result."""
    x = case.source()
    tensors = case.tensors(low.y_shape)
    want = expected(case, low.op, x, tensors)
    out = guarded(tensors[0] if in_place else np.zeros_like(want), place)
    operands: dict[int, np.ndarray[Any, Any]] = {ARG_SRC: guarded(x, place, read_only=True), ARG_DST: out}
    for i, t in enumerate(tensors):
        operands[ARG_TENSORS + i] = out if in_place and i == 0 else guarded(t, place, read_only=True)
    for i, packed in enumerate(low.packed.runs):
        operands[ARG_WEIGHTS + 2 * i] = guarded(packed.weights, place, read_only=True)
        operands[ARG_CONSTS + 2 * i] = guarded(packed.consts, place, read_only=True)
    args = np.zeros(ARG_SLOTS, np.int64)
    for slot, array in operands.items():
        args[slot] = array.ctypes.data
    args = guarded(args, place, read_only=True)
    for key, loaded in zip(low.keys, codemem.load_batch(low.codes), strict=True):
        # Scratch is 64-byte aligned and at least as large as asked for; here, not a cache line larger.
        scratch = guarded(np.full(-(-key.scratch // 64) * 64, 0xFF, np.uint8), place)
        with caller.tiles(key.tile_config):
            for index in range(key.steps):
                caller(loaded.address, args.ctypes.data, index, scratch.ctypes.data)
    assert_same_bits(np.array(out), want, (case, place))


#: How a case is lowered: as it is, cut into many steps, or by Winograd's algorithm.
Cut = Callable[[], AbstractContextManager[None]]


def all_cases(tier: str) -> Sequence[tuple[Case, Cut]]:
    """Cases with every tail, and how to lower them."""
    found: list[tuple[Case, Cut]] = []
    if tier == "amx_bf16":
        return bf16_cases()
    lanes = 16 if tier.startswith(("avx512", "amx")) else 8
    for n in (*range(1, 2 * lanes + 2), 4 * lanes - 1, 4 * lanes, 4 * lanes + 1):  # every tail of a vector of columns
        found.append((Case((5, 9), (n, 9)), nullcontext))
    for k in (*range(1, 18), *range(28, 36), 63, 64, 65):  # every tail of a row of the source
        found.append((Case((3, k), (lanes + 1, k)), nullcontext))
        found.append((Case((1, 3, 2, k), (3, k, 2, 2), padding=((0, 1), (1, 0))), fine_grid))
    for c in (*range(2, 20), 31, 32, 33, 63, 64, 65, 100):  # every tail of depthwise channels
        found.append((Case((1, 4, 5, c), (c, 1, 3, 3), groups=c, padding=1), nullcontext))
        found.append((Case((1, 5, 4, c), (c, 1, 2, 3), groups=c, stride=2), fine_grid))
    for pad in (((0, 0), (0, 0)), ((1, 0), (0, 2)), ((0, 2), (1, 0)), ((3, 3), (4, 4))):
        found.append((Case((2, 5, 6, 7), (lanes + 3, 7, 3, 3), padding=pad, stride=(2, 1)), fine_grid))
        found.append((Case((1, 6, 7, 6), (10, 3, 2, 3), padding=pad, groups=2, dilation=(1, 2)), fine_grid))
    for c in (*range(1, 5), 15, 16, 17, 31, 32, 33, 65):  # every tail of a vector of channels
        found.append((Case((1, 5, 6, c), (2 * lanes + 3, c, 3, 3), padding=((1, 0), (0, 2))), always_winograd))
    varied = []
    for i, (case, cut) in enumerate(found):
        for j, src in enumerate(("u8", "s8") if tier.startswith("amx") else ("u8", "s8", "f32")):
            varied.append((random_numbers(case, seeded(3 * i + j), src), cut))
    for name in POST_OPS:
        for out in ("u8", "s8", "f32"):
            chain, sums = POST_OPS[name]
            types = tuple(out if s == "out" else s for s in sums)
            for n in (lanes - 3, 3 * lanes + 5):
                varied.append((Case((4, 8), (n, 8), out=out, post_ops=chain, sums=types, bias="f32"), nullcontext))
    return varied


def bf16_cases() -> Sequence[tuple[Case, Cut]]:
    """Products and convolutions of bf16 on tiles: tails of columns, short and long K, stems whose rows are spread."""
    found: list[tuple[Case, Cut]] = []
    for out in ("f32", "bf16"):
        kind = {"src": "bf16", "out": out, "weights": "small"}
        for n in (1, 15, 16, 17, 33, 70):
            found.append((Case((19, 64), (n, 64), **kind), nullcontext))
        for k in (2, 4, 16, 32, 96, 640):
            found.append((Case((35, k), (20, k), **kind), nullcontext))
        for c in (1, 3, 5, 7, 8, 16):
            found.append((Case((1, 9, 21, c), (18, c, 3, 3), padding=((0, 1), (1, 0)), **kind), fine_grid))
            found.append((Case((1, 12, 9, c), (18, c, 2, 3), stride=2, **kind), fine_grid))
    return found


def main(tier: str) -> None:
    caller = Caller()
    for case, cut in all_cases(tier):
        in_place = case.sums[:1] == (case.out,)
        op = case.operator("reference")
        out_shape(op, case)
        with cut():
            low = lower(op, case.x, case.src, tier)
        for place in ("start", "end"):
            print(place, repr(case), *case.post_ops(), flush=True)
            run(low, caller, case, place, in_place)
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
