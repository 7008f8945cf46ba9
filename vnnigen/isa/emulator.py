"""A functional x86 emulator: runs generated kernels on any host, and checks every access they make.

iced decodes, NumPy executes. Each instruction is compiled once into a Python closure over the registers; after that
a kernel runs at hundreds of thousands of instructions per second, enough for every kernel in the tests.

Compiling takes ten times as long as executing, and most kernels run a few times only. So there is one set of
registers in the process, on which calls take turns, and an instruction is compiled once for all kernels.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Protocol

import numpy as np
from iced_x86 import Decoder, Instruction, Mnemonic, OpKind, Register, RegisterExt

from vnnigen.errors import EmulatorError
from vnnigen.isa.execute import Step, compile_step
from vnnigen.isa.insn import Insn
from vnnigen.isa.machine import ARGUMENTS, RSP, Machine
from vnnigen.isa.memory import Memory
from vnnigen.isa.operands import is_vector, number
from vnnigen.isa.registry import MNEMONICS
from vnnigen.isa.tiles import Tiles

Op = Callable[[], "int | None"]

STACK_BYTES = 64 * 1024
_RETURN_ADDRESS = 0x00DEAD00C0DE0000
_DONE = -1


class CodeLike(Protocol):
    """What the emulator needs of the assembler's Code."""

    @property
    def name(self) -> str:
        """Name of the kernel."""

    @property
    def data(self) -> bytes:
        """Constants, then instructions."""

    @property
    def entry(self) -> int:
        """Offset of the first instruction; instructions fill the rest of `data`."""

    def line_at(self, offset: int) -> str:
        """Return the listing line of the instruction at `offset`, or ''."""


@dataclass
class Stats:
    """What a call executed."""

    instructions: int = 0
    counts: Counter[str] = field(default_factory=Counter)


def _known_mnemonics() -> dict[int, Insn]:
    """By iced's number; a name that the installed iced does not have cannot be decoded either."""
    numbers = {i.mnemonic: getattr(Mnemonic, i.mnemonic.upper(), None) for i in MNEMONICS.values()}
    return {n: MNEMONICS[name] for name, n in numbers.items() if n is not None}


_INSNS = _known_mnemonics()


def find_insn(ins: Instruction) -> Insn:
    """Return the table entry of a decoded instruction; EmulatorError if there is none."""
    if ins.mnemonic not in _INSNS:
        raise EmulatorError("the instruction is not in the table (vnnigen/isa/table)")
    return _INSNS[ins.mnemonic]


_machine = Machine(Memory())
_turn = threading.Lock()
# Steps of `_machine` by the instruction's bytes and the address that they cannot tell. Bounded: 1 KB each.
_steps: dict[tuple[bytes, int], Step] = {}
_MAX_STEPS = 50_000


class Emulator:
    """One kernel, ready to be called any number of times with buffers of one `Memory`."""

    def __init__(
        self, code: CodeLike, memory: Memory, *, poison: bool = True, tile_config: bytes | None = None
    ) -> None:
        """Map the code (readable, as constants live in it) and a stack; decode all instructions.

        `poison` fills all registers and the stack with garbage at each call's entry, where otherwise they are
        zeros. `tile_config` is the AMX
        configuration (64 bytes) that the caller has loaded before each call, None if tiles are not configured;
        the kernel must leave it so. Raises EmulatorError if the processor would refuse the configuration.
        """
        self.code, self.memory, self._poison = code, memory, poison
        tiles = Tiles()
        if tile_config is not None:
            tiles.configure(tile_config)
        self._tile_config = tiles.config
        names = (f"code of {code.name}" + f" ({i})" * (i > 0) for i in count())
        name = next(n for n in names if n not in memory)
        self._base = memory.map(name, code.data)
        if "stack" not in memory:
            memory.map("stack", np.zeros(STACK_BYTES, np.uint8), writable=True)
        self._stack = memory.buffer("stack")
        self._instructions = list(Decoder(64, code.data[code.entry :], ip=self._base + code.entry))
        self._index = {ins.ip: i for i, ins in enumerate(self._instructions)}
        self._ops: list[Op] = [partial(self._first_time, i) for i in range(len(self._instructions))]
        self._entry_gpr: list[int] = []
        self._hits: list[int] = []

    # -- calling -------------------------------------------------------------------------------------------

    def call(self, *args: int, max_instructions: int = 50_000_000) -> Stats:
        """Call the kernel with integer or pointer arguments (System V: six registers, then the stack).

        Returns the counts of executed instructions. Raises EmulatorError for an access outside a buffer, a
        write to a read-only one, an unknown instruction or form, an undefined flag that is read,
        `max_instructions` exceeded, or a broken calling convention; the message ends with the instruction,
        its offset in the code and its line of the listing.
        """
        with _turn, np.errstate(all="ignore"):
            self._enter(args)
            self._run(max_instructions)
            return self._stats()

    def _enter(self, args: tuple[int, ...]) -> None:
        m = _machine
        m.memory = self.memory
        m.reset(self._tile_config, poison=self._poison)
        self._stack.data[:] = 0xCC if self._poison else 0
        # The stack pointer is 16-byte aligned before the call pushes the return address.
        spilled = args[6:]
        m.gpr[RSP] = (self._stack.base + STACK_BYTES - 8 * len(spilled)) & ~15
        for i, value in enumerate(spilled):
            self.memory.write_int(m.gpr[RSP] + 8 * i, 8, value & (2**64 - 1))
        for i, value in zip(ARGUMENTS, args, strict=False):
            m.gpr[i] = int(value) & (2**64 - 1)
        m.push(_RETURN_ADDRESS)
        self._entry_gpr = m.gpr.copy()
        self._hits = [0] * len(self._ops)

    def _run(self, limit: int) -> None:
        ops, hits = self._ops, self._hits
        i = start = done = 0
        try:
            while i != _DONE:
                hits[i] += 1
                to = ops[i]()
                if to is None:
                    i += 1
                    continue
                done += i - start + 1
                if done > limit:
                    raise EmulatorError(f"more than {limit} instructions executed; an endless loop?")
                i = start = to
        except EmulatorError as e:
            raise EmulatorError(f"{e}\n  {self._where(i)}") from e
        except IndexError as e:
            if i < len(ops):
                raise
            raise EmulatorError(f"execution ran past the end of {self.code.name!r}; ret is missing") from e

    def _where(self, i: int) -> str:
        ins = self._instructions[i]
        offset = ins.ip - self._base
        line = self.code.line_at(offset)
        return f"in {self.code.name!r} at offset {offset:#x}: {ins}" + f"\n  listing: {line}" * bool(line)

    def _stats(self) -> Stats:
        stats = Stats(sum(self._hits))
        for ins, hits in zip(self._instructions, self._hits, strict=True):
            if hits:
                stats.counts[find_insn(ins).mnemonic] += hits
        return stats

    # -- decoding ------------------------------------------------------------------------------------------

    def _first_time(self, i: int) -> int | None:
        """Compile instruction `i` when it is reached, put the result in its place, and run it."""
        self._ops[i] = self._compile(self._instructions[i])
        return self._ops[i]()

    def _compile(self, ins: Instruction) -> Op:
        insn = find_insn(ins)
        if insn.kind != "control":
            return self._step(ins, insn)
        if insn.mnemonic == "ret":
            return partial(self._return, self._index[ins.ip])
        if insn.mnemonic == "nop":
            return lambda: None
        if ins.op0_kind != OpKind.NEAR_BRANCH64 or ins.near_branch_target not in self._index:
            raise EmulatorError("the jump leaves the code")
        target, flags, condition = self._index[ins.near_branch_target], _machine.flags, insn.meaning
        if insn.mnemonic == "jmp":
            return lambda: target
        return lambda: target if condition(flags) else None

    def _step(self, ins: Instruction, insn: Insn) -> Step:
        start = ins.ip - self._base
        target = ins.ip_rel_memory_address if ins.is_ip_rel_memory_operand else 0
        key = self.code.data[start : start + ins.len], target
        step = _steps.get(key)
        if step is None:
            if len(_steps) >= _MAX_STEPS:
                _steps.clear()
            step = _steps[key] = compile_step(_machine, ins, insn)
        return step

    def _return(self, at: int) -> int:
        m = _machine
        if m.pop() != _RETURN_ADDRESS:
            raise EmulatorError("ret does not find the caller's address: unbalanced push and pop?")
        executed = (ins for ins, hits in zip(self._instructions, self._hits, strict=True) if hits)
        m.check_return(self._entry_gpr, any(map(_is_wide, executed)))
        if m.tiles.config != self._tile_config:
            raise EmulatorError("the tile configuration at ret is not the caller's: reload or TILERELEASE it")
        # Clear values are not enough for the processor: nothing wide may come between VZEROUPPER and RET.
        for ins in reversed(self._instructions[:at]):
            if ins.mnemonic == Mnemonic.VZEROUPPER:
                break
            if _is_wide(ins):
                raise EmulatorError("ymm or zmm registers are used after VZEROUPPER")
        return _DONE


def _is_wide(ins: Instruction) -> bool:
    """Whether the instruction names a ymm or zmm register below 16."""
    registers = (ins.op_register(i) for i in range(ins.op_count) if ins.op_kind(i) == OpKind.REGISTER)
    return any(r != Register.NONE and is_vector(r) and RegisterExt.size(r) > 16 and number(r) < 16 for r in registers)
