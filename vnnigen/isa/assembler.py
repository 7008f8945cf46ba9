"""The assembler: a Python function per kernel, one method call per instruction.

    a = Assembler("axpy", args=(Arg("x", "ptr"), Arg("n", "i64")), features=TIER.features)
    x, n = a.load_argument("x"), a.load_argument("n")
    acc = a.zmm("acc")
    a.vpxord(acc, acc, acc)
    with a.loop(n):
        a.vpaddd(acc, acc, Mem(x))
        a.add(x, 64)
    a.ret()
    code = a.finalize().encode()

Mnemonics are methods (`and_`, `or_`, `not_` where Python reserves the word). Registers come from pools that
fail loudly when empty: a microkernel that spills is a bug in its blocking.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.errors import AssemblerError
from vnnigen.isa.encode import Code, Insn, Item, Note, Program
from vnnigen.isa.forms import Form, immediate_kind, select
from vnnigen.isa.registers import (
    ARGUMENT_REGISTERS,
    CALLEE_SAVED,
    GPR,
    GPR_NAMES,
    RIP,
    RSP,
    Label,
    Mask,
    Mem,
    Operand,
    Reg,
    Tile,
    Vec,
)

__all__ = ["GPR", "Arg", "Assembler", "Code", "Label", "Mask", "Mem", "Program", "Tile", "Vec"]
from vnnigen.isa.registry import MNEMONICS

# Registers that cost nothing to use come first, callee-saved ones last.
_GPR_ORDER = ("rax", "r10", "r11", *reversed(ARGUMENT_REGISTERS), *CALLEE_SAVED)

# Forms chosen so far, per set of allowed features: {features: {mnemonic: {key: form}}}.
_FormCache = dict[tuple[Any, ...], Form]
_FORMS: dict[frozenset[str] | None, dict[str, _FormCache]] = {}


@dataclass(frozen=True, slots=True)
class Arg:
    """A parameter of the generated function: 'ptr' or 'i64', both passed in a 64-bit register."""

    name: str
    type: str = "i64"

    def __post_init__(self) -> None:
        if self.type not in ("ptr", "i64"):
            raise AssemblerError(f"argument {self.name!r} has type {self.type!r}; use 'ptr' or 'i64'")


class Assembler:
    """Records one function. `features` limits the encodings to those CPU features (None: any)."""

    def __init__(self, name: str, args: Sequence[Arg] = (), features: frozenset[str] | None = None) -> None:
        """Begin the function `name`; raises AssemblerError for more than six or equally named arguments."""
        if len(args) > len(ARGUMENT_REGISTERS) or len({a.name for a in args}) < len(args):
            raise AssemblerError(f"{name}: takes at most 6 arguments, with distinct names")
        self.name = name
        self.features = features
        self._items: list[Item] = []
        self._program: Program | None = None
        self._constants = bytearray()
        self._constant_at: dict[bytes, int] = {}
        self._stack_bytes = 0
        self._labels: set[Label] = set()
        self._arguments = {
            arg.name: GPR(GPR_NAMES.index(reg), 64, arg.name)
            for arg, reg in zip(args, ARGUMENT_REGISTERS, strict=False)
        }
        # Live registers by (file, index); the files are "gpr", "vector", "mask" and "tile".
        self._live: dict[tuple[str, int], Reg] = {("gpr", r.index): r for r in self._arguments.values()}
        self._saved: set[int] = set()
        self._forms = _FORMS.setdefault(features, {})

    # Registers

    def load_argument(self, name: str) -> GPR:
        """Return the register in which the argument `name` arrives; it stays there."""
        if name not in self._arguments:
            raise AssemblerError(f"{self.name} has no argument {name!r}, only {', '.join(self._arguments)}")
        return self._arguments[name]

    def gpr(self, name: str = "", at: str | None = None) -> GPR:
        """Allocate a 64-bit general-purpose register; `at` asks for one by its name (rcx for shifts, ...)."""
        if at is not None and at not in _GPR_ORDER:
            raise AssemblerError(f"{at!r} is no allocatable register; choose from {', '.join(_GPR_ORDER)}")
        order = _GPR_ORDER if at is None else (at,)
        index = self._take("gpr", [GPR_NAMES.index(n) for n in order])
        register = GPR(index, 64, name)
        self._live["gpr", index] = register
        if GPR_NAMES[index] in CALLEE_SAVED:
            self._saved.add(index)
        return register

    def zmm(self, name: str = "") -> Vec:
        """Allocate a 512-bit vector register."""
        return self.vec(512, name)

    def ymm(self, name: str = "") -> Vec:
        """Allocate a 256-bit vector register."""
        return self.vec(256, name)

    def xmm(self, name: str = "") -> Vec:
        """Allocate a 128-bit vector register."""
        return self.vec(128, name)

    def vec(self, bits: int, name: str = "") -> Vec:
        """Allocate a vector register of 512, 256 or 128 bits; all share one pool."""
        if bits == 512 and self.features is not None and "avx512f" not in self.features:
            raise AssemblerError(f"{self.name}: zmm registers need avx512f, which is not allowed here")
        limit = 32 if bits == 512 else self._short_vectors()
        index = self._take("vector", list(range(limit)))
        register = Vec(index, bits, name)
        self._live["vector", index] = register
        return register

    def kreg(self, name: str = "") -> Mask:
        """Allocate a mask register, k1-k7."""
        index = self._take("mask", list(range(1, 8)))
        register = Mask(index, 64, name)
        self._live["mask", index] = register
        return register

    def tile(self, name: str = "") -> Tile:
        """Allocate an AMX tile register, tmm0-tmm7."""
        index = self._take("tile", list(range(8)))
        register = Tile(index, 8192, name)
        self._live["tile", index] = register
        return register

    def _short_vectors(self) -> int:
        """Return how many registers xmm and ymm operands can name."""
        return 32 if self.features is None or "avx512vl" in self.features else 16

    def _take(self, file: str, order: list[int]) -> int:
        for index in order:
            if (file, index) not in self._live:
                return index
        live = [r for (f, _), r in self._live.items() if f == file]
        names = ", ".join(f"{r.asm}={r.name or '?'}" for r in live)
        raise AssemblerError(f"{self.name}: no free {file} register; live are {names}")

    def available_vectors(self) -> int:
        """Return how many vector registers of the assembler's widest kind are free."""
        wide = self.features is None or "avx512f" in self.features
        return (32 if wide else 16) - sum(file == "vector" for file, _ in self._live)

    def release(self, *registers: Reg) -> None:
        """Return registers (or any view of them) to their pools; AssemblerError if one is not live."""
        files = {GPR: "gpr", Vec: "vector", Mask: "mask", Tile: "tile"}
        for register in registers:
            if self._live.pop((files[type(register)], register.index), None) is None:
                raise AssemblerError(f"{self.name}: {register.asm} {register.name} is released but not live")

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Return every register allocated inside, and still live, to its pool at exit."""
        before = set(map(id, self._live.values()))
        yield
        self._live = {key: r for key, r in self._live.items() if id(r) in before}

    # Control flow, structure, memory

    def label(self, name: str) -> Label:
        """Make a branch target, to be placed by `bind`."""
        label = Label(name)
        self._labels.add(label)
        return label

    def bind(self, label: Label) -> None:
        """Place `label` before the next instruction; AssemblerError if it is placed already or foreign."""
        if label not in self._labels:
            raise AssemblerError(f"{self.name}: label {label.name!r} belongs to another assembler")
        if label.bound:
            raise AssemblerError(f"{self.name}: label {label.name!r} is bound twice")
        label.bound = True
        self._items.append(Note("label", label.name, label))

    @contextmanager
    def loop(self, counter: GPR, step: int = 1, name: str = "") -> Iterator[Label]:
        """Repeat the body while `counter -= step` stays above zero; the counter must begin at 1 or more."""
        head = self.label(name or f"{counter.name or counter.asm}_loop")
        self.bind(head)
        yield head
        if step == 1:
            self.dec(counter)
            self.jnz(head)
        else:
            self.sub(counter, step)
            self.jg(head)

    def comment(self, text: str) -> None:
        """Attach `text` to the next instruction in the listing."""
        self._items.append(Note("comment", text))

    @contextmanager
    def section(self, title: str) -> Iterator[None]:
        """Give the instructions inside a headline in the listing."""
        self._items.append(Note("section", title))
        yield
        self._items.append(Note("end"))

    @contextmanager
    def aside(self) -> Iterator[list[Insn]]:
        """Take the instructions emitted inside out of the stream, into the list; `put` brings them back.

        So two streams can be woven into one. Raises AssemblerError if the body binds a label or returns.
        """
        start = len(self._items)
        taken: list[Insn] = []
        yield taken
        items = self._items[start:]
        del self._items[start:]
        for item in items:
            if isinstance(item, Insn):
                taken.append(item)
            elif item.kind in ("label", "ret"):
                raise AssemblerError(f"{self.name}: instructions that are set aside cannot hold a {item.kind}")

    def put(self, instructions: Iterable[Insn]) -> None:
        """Append instructions that `aside` took."""
        self._items.extend(instructions)

    def const(self, values: npt.ArrayLike, align: int = 64) -> Mem:
        """Put an array into the constant pool (once, if its bytes are there already); return its operand."""
        data = np.ascontiguousarray(values).tobytes()
        self._check_alignment(align)
        at = self._constant_at.get(data)
        if at is None or at % align:
            at = -(-len(self._constants) // align) * align
            self._constants.extend(bytes(at - len(self._constants)) + data)
            self._constant_at[data] = at
        return Mem(RIP, at)

    def stack(self, nbytes: int, align: int = 64) -> Mem:
        """Reserve `nbytes` of stack for the function's whole run; a multiple of `align` (<= 64) from rsp.

        Operands are relative to rsp, so a function that uses this must not leave its own pushes open.
        """
        self._check_alignment(align)
        at = -(-self._stack_bytes // align) * align
        self._stack_bytes = at + nbytes
        return Mem(RSP, at)

    def _check_alignment(self, align: int) -> None:
        if align not in (1, 2, 4, 8, 16, 32, 64):
            raise AssemblerError(f"{self.name}: alignment can be 1, 2, 4, ... 64 bytes, not {align}")

    def ret(self) -> None:
        """Return to the caller: VZEROUPPER if ymm or zmm were used, callee-saved registers restored."""
        self._items.append(Note("ret"))

    # Instructions

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Make the method of a mnemonic: operands, then `mask=` and `zero=` for AVX-512 masking."""
        mnemonic = name.rstrip("_")
        if mnemonic not in MNEMONICS or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no method or instruction {name!r}")
        if self._program is not None:
            raise AssemblerError(f"{self.name} is finalized; no instruction can follow")
        cache = self._forms.setdefault(mnemonic, {})
        append = self._items.append

        def emit(*operands: Any, mask: Mask | None = None, zero: bool = False) -> None:
            try:
                kinds = [o.kind if o.__class__ is not int else immediate_kind(o) for o in operands]
                key = (mask and mask.kind, zero, *kinds)
                form = cache[key]
            except (AttributeError, KeyError):
                operands = tuple([_operand(mnemonic, o) for o in operands])
                form = self._form(mnemonic, operands, mask, zero)
            append(Insn(form, operands, mask, zero))

        emit.__name__ = name
        self.__dict__[name] = emit
        return emit

    def _form(self, mnemonic: str, operands: tuple[Operand, ...], mask: Mask | None, zero: bool) -> Form:
        """Choose a form and remember it."""
        if mask is not None and (not isinstance(mask, Mask) or mask.index == 0):
            raise AssemblerError(f"{mnemonic}: mask= takes a mask register k1-k7")
        if zero and mask is None:
            raise AssemblerError(f"{mnemonic}: zero=True is meaningful only with mask=")
        kinds = tuple([immediate_kind(o) if isinstance(o, int) else o.kind for o in operands])
        form = select(mnemonic, kinds, mask is not None, zero, self.features)
        key = (mask and mask.kind, zero, *kinds)
        self._forms.setdefault(mnemonic, {})[key] = form
        return form

    def _insn(self, mnemonic: str, *operands: Operand) -> Insn:
        return Insn(self._form(mnemonic, operands, None, False), operands)

    # The end

    def finalize(self) -> Program:
        """Close the function and return it with its prologue and epilogues in place.

        Raises AssemblerError if a used label is not bound, or control could run off the end.
        """
        if self._program is None:
            self._check_end()
            for name in [n for n, v in self.__dict__.items() if callable(v)]:
                del self.__dict__[name]  # instruction methods: from now on they raise
            self._program = Program(self.name, tuple(self._with_frame()), bytes(self._constants))
        return self._program

    def _check_end(self) -> None:
        last = next((i for i in reversed(self._items) if not (isinstance(i, Note) and i.kind == "end")), None)
        ends = last.form.ends if isinstance(last, Insn) else last is not None and last.kind == "ret"
        if not ends:
            raise AssemblerError(f"{self.name}: control runs off the end; finish with ret()")
        used = {o for item in self._items if item.__class__ is Insn for o in item.operands if o.__class__ is Label}
        for label in used:
            if not label.bound or label not in self._labels:
                raise AssemblerError(f"{self.name}: branch to label {label.name!r}, which is not bound here")

    def _with_frame(self) -> Iterator[Item]:
        """Yield the items with a prologue before them and every `ret` expanded (System V AMD64 ABI, 3.2)."""
        saved = [GPR(index, 64, GPR_NAMES[index]) for index in sorted(self._saved)]
        slot = Mem(RSP, -(-self._stack_bytes // 8) * 8)  # keeps the caller's rsp, as the frame is realigned
        prologue = [self._insn("push", r) for r in saved]
        if self._stack_bytes:
            old = GPR(0, 64, "caller_rsp")  # rax is free at entry
            prologue += [
                self._insn("mov", old, RSP),
                self._insn("sub", RSP, slot.disp + 8),
                self._insn("and", RSP, -64),
                self._insn("mov", slot, old),
            ]
        if prologue:
            yield Note("section", "prologue")
            yield from prologue
            yield Note("end")
        for item in self._items:
            if isinstance(item, Insn) or item.kind != "ret":
                yield item
                continue
            if any(isinstance(i, Insn) and i.form.wide for i in self._items):
                yield self._insn("vzeroupper")
            if self._stack_bytes:
                yield self._insn("mov", RSP, slot)
            for register in reversed(saved):
                yield self._insn("pop", register)
            yield self._insn("ret")


def _operand(mnemonic: str, value: Any) -> Operand:
    """Return `value` if it is an operand; turn other integers (NumPy's, bool) into int."""
    if isinstance(value, (Reg, Mem, Label)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise AssemblerError(f"{mnemonic}: {value!r} is not a register, Mem, Label or integer") from None
