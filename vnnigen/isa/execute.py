"""From a decoded instruction to a Python closure that executes it.

Everything that x86 does the same way for all instructions is here, once: fetching operands, embedded
broadcast, write masks (merging, zeroing, fault suppression), clearing the upper bits of the destination.
What is particular to an instruction is in its table entry.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from iced_x86 import Instruction, MemorySizeExt, Register, RoundingControl

from vnnigen.errors import EmulatorError
from vnnigen.isa.insn import Insn
from vnnigen.isa.lanes import Lanes
from vnnigen.isa.machine import Machine
from vnnigen.isa.operands import (
    Getter,
    address,
    integer,
    is_mask,
    is_memory,
    is_register,
    is_vector,
    number,
    setter,
    strided,
    width,
)

Step = Callable[[], None]
Filler = Callable[[], None]


def compile_step(m: Machine, ins: Instruction, insn: Insn) -> Step:
    """Return a closure that executes one instruction other than a jump.

    Raises EmulatorError for a form that the emulator does not know.
    """
    if ins.rounding_control != RoundingControl.NONE or ins.suppress_all_exceptions:
        raise EmulatorError("embedded rounding and {sae} are not supported")
    if insn.kind == "vector":
        return _Vector(m, ins, insn).step()
    if insn.kind == "tile":
        return _tile_step(m, ins, insn)
    return _integer_step(m, ins, insn)


def _integer_step(m: Machine, ins: Instruction, insn: Insn) -> Step:
    bits = insn.bits or (8 * width(ins, 0) if ins.op_count else 0)
    first = 0 if insn.reads_dest or not insn.dest or insn.kind == "machine" else 1
    if insn.mnemonic in ("imul", "pop"):
        first = {"imul": 0, "pop": 1}[insn.mnemonic]
        if insn.mnemonic == "imul" and ins.op_count == 1:
            raise EmulatorError("one-operand IMUL is not supported")
    get = [
        address(m, ins) if insn.address and is_memory(ins, op) else integer(m, ins, op, bits, insn.signed)
        for op in range(first, ins.op_count)
    ]
    meaning, context = insn.meaning, m if insn.kind == "machine" else m.flags
    if not insn.dest or (insn.kind == "machine" and insn.mnemonic != "pop"):

        def effect() -> None:  # what CMP and TEST compute is for the flags: a step's result is a jump's target
            meaning(context, bits, *[g() for g in get])

        return effect
    put = setter(m, ins, bits)
    if len(get) == 1:
        one = get[0]
        return lambda: put(meaning(context, bits, one()))
    if len(get) == 2:
        a, b = get
        return lambda: put(meaning(context, bits, a(), b()))
    return lambda: put(meaning(context, bits, *[g() for g in get]))


def _tile_step(m: Machine, ins: Instruction, insn: Insn) -> Step:
    get: list[Getter] = []
    for op in range(ins.op_count):
        if not is_memory(ins, op):
            get.append(partial(number, ins.op_register(op)))
        elif ins.op_count > 1:
            get += strided(m, ins)
        else:
            get.append(address(m, ins))
    meaning = insn.meaning
    if not any(is_memory(ins, op) for op in range(ins.op_count)):
        return partial(meaning, m, *[g() for g in get])
    return lambda: meaning(m, *[g() for g in get])


class _Vector:
    """The pieces of one vector instruction, and their assembly into a step.

    `args` is the argument list of the meaning: views of the register file, immediates, and for operands that
    move (memory, masks, GPRs) a slot that a filler writes before each execution.
    """

    def __init__(self, m: Machine, ins: Instruction, insn: Insn) -> None:
        self.m, self.ins, self.insn = m, ins, insn
        self.mask: Getter | None = None
        self.zeroing = bool(ins.zeroing_masking)
        first = 0 if insn.reads_dest or not insn.dest else 1
        self.sources = [op for op in range(first, ins.op_count) if op != insn.lane_mask]
        self.lanes_out, self.count = self._counts()
        self.args: list[Any] = [] if insn.dest else [m.flags]
        self.fillers: list[Filler] = []
        self._mask()
        for op in self.sources:
            self._source(op)

    # -- shapes --------------------------------------------------------------------------------------------

    def _lanes_of(self, op: int) -> int | None:
        """Return the number of lanes of a vector or memory operand, None for others."""
        if is_memory(self.ins, op) or (is_register(self.ins, op) and is_vector(self.ins.op_register(op))):
            return width(self.ins, op) // int(self.insn.lane(op)[1])
        return None

    def _counts(self) -> tuple[int, int]:
        """(lanes of the destination, lanes that the write mask governs)."""
        sources = [n for op in self.sources if (n := self._lanes_of(op)) is not None]
        out = self._lanes_of(0) if self.insn.dest else None
        if out is None:  # a k register or GPR: as many as the first source has
            out = sources[0] if sources else 0
        if self.insn.scalar:
            return out, 1
        if self.insn.cut:
            gpr = [1] if any(self._is_gpr(op) for op in range(self.ins.op_count)) else []
            return out, min([out, *sources, *gpr])
        return out, out

    def _is_gpr(self, op: int) -> bool:
        register = self.ins.op_register(op) if is_register(self.ins, op) else Register.NONE
        return register != Register.NONE and not is_vector(register) and not is_mask(register)

    # -- write mask ----------------------------------------------------------------------------------------

    def _mask(self) -> None:
        k, ins = self.m.k, self.ins
        ones = (1 << self.count) - 1
        if self.insn.lane_mask is not None:
            self.zeroing = True
            signs = self._view(self.insn.lane_mask, "i4")
            self.mask = lambda: _pack(signs < 0)
        elif ins.op_mask != Register.NONE:
            i = number(ins.op_mask)
            self.mask = lambda: k[i] & ones

    # -- sources -------------------------------------------------------------------------------------------

    def _view(self, op: int, lane: str) -> Lanes:
        """Lanes of a vector register, as a view of the register file."""
        row = self.m.vectors[number(self.ins.op_register(op))]
        return self._rows(row[: width(self.ins, op)].view(lane))

    def _rows(self, lanes: Lanes) -> Lanes:
        if not self.insn.rows:
            return lanes
        return lanes.reshape(-1, min(self.insn.rows // lanes.itemsize, lanes.size))

    def _source(self, op: int) -> None:
        ins, lane = self.ins, self.insn.lane(op)
        if is_memory(ins, op):
            self._memory_source(op, lane)
        elif not is_register(ins, op):
            self.args.append(ins.immediate(op) & 255)
        elif is_vector(ins.op_register(op)):
            view = self._view(op, lane)
            self.args.append(view[: self.count] if self.insn.cut and not self.insn.scalar else view)
        elif is_mask(ins.op_register(op)):
            k, i, count, m = self.m.k, number(ins.op_register(op)), self.lanes_out, self.m
            ones = (1 << count) - 1
            self._moving(lambda: m.lanes(k[i] & ones, count))
        else:
            g, i, ones = self.m.gpr, number(ins.op_register(op)), (1 << 8 * int(lane[1])) - 1
            self._moving(lambda: np.array((g[i] & ones,), lane))

    def _moving(self, value: Callable[[], Lanes]) -> None:
        args, slot = self.args, len(self.args)
        args.append(None)

        def fill() -> None:
            args[slot] = value()

        self.fillers.append(fill)

    def _memory_source(self, op: int, lane: str) -> None:
        m, where, size = self.m, address(self.m, self.ins), width(self.ins, op)
        mask = None if self.insn.reads_all or op == self.insn.whole else self.mask
        if self.ins.is_broadcast:
            self._broadcast_source(where, size, lane)
            return
        if self.insn.aligned:
            where = _aligned(where, size)
        if mask is None:
            count = size // int(lane[1])
            if self.insn.rows:
                self._moving(lambda: self._rows(m.memory.read_lanes(where(), count, lane, size)))
            else:
                self._moving(lambda: m.memory.read_lanes(where(), count, lane, size))
            return
        if self._elementwise(op, size):
            granule, active = size // self.count, mask
        else:  # one element or part for all lanes: read as soon as one lane is active
            granule, active = size, lambda: int(mask() != 0)
        self._moving(lambda: self._rows(m.memory.read_masked(where(), size, granule, active()).view(lane)))

    def _elementwise(self, op: int, size: int) -> bool:
        if self.insn.cut or self.insn.lane_mask is not None:
            return True
        first = self.sources[0]
        whole = width(self.ins, first if is_register(self.ins, 0) and is_mask(self.ins.op0_register) else 0)
        return size == whole

    def _broadcast_source(self, where: Getter, size: int, lane: str) -> None:
        """Append a static array of the operand's size, refilled from the element in memory."""
        m, mask = self.m, None if self.insn.reads_all else self.mask
        element = int(MemorySizeExt.size(self.ins.memory_size))
        fill = np.zeros(size // element, f"u{element}")
        self.args.append(self._rows(fill.view(lane)))

        def read() -> None:
            if mask is None or mask():
                fill.fill(m.memory.read_int(where(), element))

        self.fillers.append(read)

    # -- destination ---------------------------------------------------------------------------------------

    def step(self) -> Step:
        """Return the closure that fetches, computes and stores."""
        meaning, args, fillers = self.insn.meaning, self.args, self.fillers
        if len(fillers) == 1:
            fill = fillers[0]

            def result() -> Any:
                fill()
                return meaning(*args)
        else:

            def result() -> Any:
                for f in fillers:
                    f()
                return meaning(*args)

        if not self.insn.dest:
            return result
        if is_memory(self.ins, 0):
            return self._to_memory(result)
        if is_mask(self.ins.op0_register):
            return self._to_mask(result)
        if not is_vector(self.ins.op0_register):
            return self._to_gpr(result)
        if fillers or self.mask or self.insn.cut or self.insn.compare:
            return self._to_vector(result)
        return self._registers_only()

    def _to_gpr(self, result: Callable[[], Any]) -> Step:
        g, i = self.m.gpr, number(self.ins.op0_register)

        def step() -> None:
            out = result()
            g[i] = out if isinstance(out, int) else int(out[0])

        return step

    def _to_mask(self, result: Callable[[], Any]) -> Step:
        k, i, mask = self.m.k, number(self.ins.op0_register), self.mask
        if mask is None:

            def plain() -> None:
                k[i] = _pack(result())

            return plain

        def masked() -> None:
            k[i] = _pack(result()) & mask()

        return masked

    def _to_memory(self, result: Callable[[], Any]) -> Step:
        m, where, size = self.m, address(self.m, self.ins), width(self.ins, 0)
        lane, mask, count = self.insn.lane(0), self.mask, self.count
        granule = int(lane[1])
        if self.insn.aligned:
            where = _aligned(where, size)
        if mask is None:

            def plain() -> None:
                out = result().astype(lane, copy=False)
                buffer, offset = m.memory.locate(where(), size, True)
                np.ndarray((size // granule,), lane, buffer.raw, offset)[:] = out

            return plain

        def masked() -> None:
            active = mask()
            out = np.ascontiguousarray(result(), lane).view(np.uint8)
            m.memory.write_masked(where(), out, granule, active, m.lanes(active, count))

        return masked

    def _registers_only(self) -> Step:
        """Return the hot case: registers (and immediates) to a vector register, no mask."""
        meaning, args = self.insn.meaning, self.args
        dest, upper = self._view(0, self.insn.lane(0)), self._upper()
        if len(args) == 3:
            x, y, z = args

            def three() -> None:
                dest[...] = meaning(x, y, z)
                if upper is not None:
                    upper[:] = 0

            return three

        def step() -> None:
            dest[...] = meaning(*args)
            if upper is not None:
                upper[:] = 0

        return step

    def _upper(self) -> Lanes | None:
        """Bytes above the destination's width, which VEX and EVEX clear; None for a zmm."""
        size = width(self.ins, 0)
        return self.m.vectors[number(self.ins.op0_register), size:] if size < 64 else None

    def _to_vector(self, result: Callable[[], Any]) -> Step:
        dest, upper = self._view(0, self.insn.lane(0)), self._upper()
        if self.insn.compare:
            bools = result

            def widened() -> Any:  # True becomes all ones
                return -bools().view("i1")

            result = widened
        if self.mask is not None:
            store = self._masked_store(dest)
        elif self.insn.cut:

            def store(out: Lanes) -> None:
                dest[: out.size] = out
                dest[out.size :] = 0
        else:

            def store(out: Lanes) -> None:
                dest[...] = out

        def step() -> None:
            store(result())
            if upper is not None:
                upper[:] = 0

        return step

    def _masked_store(self, dest: Lanes) -> Callable[[Lanes], None]:
        m, mask, count, zeroing = self.m, self.mask, self.count, self.zeroing
        assert mask is not None
        cut, scalar = self.insn.cut, self.insn.scalar
        old = self._view(self.insn.merge, self.insn.lane(0))

        def store(out: Lanes) -> None:
            chosen = m.lanes(mask(), count)
            new = np.zeros_like(dest) if zeroing else old.copy()
            if scalar:
                new[1:] = 0
                new[1 : out.size] = out[1:]
                new[:1][chosen] = out[:1][chosen]
            elif cut:
                np.copyto(new[:count], out, where=chosen, casting="unsafe")
                new[count:] = 0
            else:
                np.copyto(new, out, where=chosen.reshape(dest.shape), casting="unsafe")
            dest[...] = new

        return store


def _aligned(where: Getter, size: int) -> Getter:
    def checked() -> int:
        at = where()
        if at % size:
            raise EmulatorError(f"address {at:#x} of an aligned move is not a multiple of {size}")
        return at

    return checked


def _pack(bools: Lanes) -> int:
    return int.from_bytes(np.packbits(bools, bitorder="little").tobytes(), "little")
