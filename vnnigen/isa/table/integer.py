"""General-purpose, mask-register and control instructions. Sources: Intel SDM volume 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnnigen.errors import EmulatorError
from vnnigen.isa.flags import CONDITIONS, Condition, Flags
from vnnigen.isa.insn import insn

if TYPE_CHECKING:
    from vnnigen.isa.machine import Machine

# -- moves ------------------------------------------------------------------------------------------------


@insn("mov", "movzx")
@insn("movsx", "movsxd", signed=True)
@insn("lea", address=True)
def _(_f: Flags, _n: int, a: int) -> int:
    return a


@insn("prefetcht0", "prefetcht1", "prefetchnta", "prefetchw", dest=False, address=True)
def _(_f: Flags, _n: int, _address: int) -> None:
    """Do nothing: a hint never faults, whatever the address."""


# -- arithmetic -------------------------------------------------------------------------------------------


@insn("add", reads_dest=True)
def _(f: Flags, n: int, a: int, b: int) -> int:
    s = a + b
    r = s & ((1 << n) - 1)
    f.cf = s >> n
    f.of = ((a ^ r) & (b ^ r)) >> (n - 1)
    return f.result(r, n)


@insn("sub", reads_dest=True)
@insn("cmp", dest=False)
def _(f: Flags, n: int, a: int, b: int) -> int:
    r = (a - b) & ((1 << n) - 1)
    f.cf = int(a < b)
    f.of = ((a ^ b) & (a ^ r)) >> (n - 1)
    return f.result(r, n)


@insn("inc", reads_dest=True)
def _(f: Flags, n: int, a: int) -> int:
    r = (a + 1) & ((1 << n) - 1)
    f.of = int(r == 1 << (n - 1))
    return f.result(r, n)


@insn("dec", reads_dest=True)
def _(f: Flags, n: int, a: int) -> int:
    r = (a - 1) & ((1 << n) - 1)
    f.of = int(a == 1 << (n - 1))
    return f.result(r, n)


@insn("neg", reads_dest=True)
def _(f: Flags, n: int, a: int) -> int:
    f.cf = int(a != 0)
    f.of = int(a == 1 << (n - 1))
    return f.result(-a & ((1 << n) - 1), n)


@insn("imul", reads_dest=True, signed=True)
def _(f: Flags, n: int, dest: int, a: int, *immediate: int) -> int:
    product = a * immediate[0] if immediate else dest * a
    fits = -(1 << (n - 1)) <= product < 1 << (n - 1)
    f.set(cf=int(not fits), zf=None, sf=None, of=int(not fits), pf=None)
    return product


@insn("cqo", kind="machine", bits=64)
def _(m: Machine, _n: int) -> None:
    m.gpr[2] = -(m.gpr[0] >> 63) & (2**64 - 1)


@insn("div", kind="machine")
def _(m: Machine, n: int, divisor: int) -> None:
    if n not in (32, 64):
        raise EmulatorError("DIV is known for 32 and 64 bits only")
    ones = (1 << n) - 1
    dividend = (m.gpr[2] & ones) << n | (m.gpr[0] & ones)
    if divisor == 0 or dividend // divisor > ones:
        raise EmulatorError(f"divide error: {dividend} / {divisor} does not fit {n} bits")
    m.gpr[0], m.gpr[2] = divmod(dividend, divisor)
    m.flags.set(None, None, None, None, None)


# -- logic and shifts -------------------------------------------------------------------------------------


@insn("and", reads_dest=True)
@insn("test", dest=False)
def _(f: Flags, n: int, a: int, b: int) -> int:
    f.cf = f.of = 0
    return f.result(a & b, n)


@insn("or", reads_dest=True)
def _(f: Flags, n: int, a: int, b: int) -> int:
    f.cf = f.of = 0
    return f.result(a | b, n)


@insn("xor", reads_dest=True)
def _(f: Flags, n: int, a: int, b: int) -> int:
    f.cf = f.of = 0
    return f.result(a ^ b, n)


@insn("not", reads_dest=True)
def _(_f: Flags, _n: int, a: int) -> int:
    return ~a


def _count(n: int, count: int) -> int:
    return count & (63 if n == 64 else 31)


@insn("shl", reads_dest=True)
def _(f: Flags, n: int, a: int, count: int) -> int:
    count = _count(n, count)
    if count == 0:
        return a
    r = (a << count) & ((1 << n) - 1)
    f.cf = (a >> (n - count)) & 1 if count < n else None
    f.of = (r >> (n - 1)) ^ ((a >> (n - 1)) & 1) if count == 1 else None
    return f.result(r, n)


@insn("shr", reads_dest=True)
def _(f: Flags, n: int, a: int, count: int) -> int:
    count = _count(n, count)
    if count == 0:
        return a
    f.cf = (a >> (count - 1)) & 1 if count < n else None
    f.of = a >> (n - 1) if count == 1 else None
    return f.result(a >> count, n)


@insn("sar", reads_dest=True, signed=True)
def _(f: Flags, n: int, a: int, count: int) -> int:
    count = _count(n, count)
    if count == 0:
        return a
    f.cf = (a >> (count - 1)) & 1
    f.of = 0 if count == 1 else None
    return f.result((a >> count) & ((1 << n) - 1), n)


@insn("shlx")
def _(_f: Flags, n: int, a: int, count: int) -> int:
    return a << (count & (n - 1))


@insn("shrx")
def _(_f: Flags, n: int, a: int, count: int) -> int:
    return a >> (count & (n - 1))


@insn("sarx", signed=True)
def _(_f: Flags, n: int, a: int, count: int) -> int:
    return a >> (count & (n - 1))


@insn("bzhi")
def _(f: Flags, n: int, a: int, index: int) -> int:
    index &= 255
    r = a & ((1 << index) - 1)
    f.result(r, n)
    f.cf, f.of, f.pf = int(index > n - 1), 0, None
    return r


# -- conditions and control -------------------------------------------------------------------------------


def _conditional(condition: Condition, name: str, *aliases: str) -> None:
    @insn(f"cmov{name}", reads_dest=True, aliases=tuple(f"cmov{x}" for x in aliases))
    def _(f: Flags, _n: int, dest: int, a: int) -> int:
        return a if condition(f) else dest

    @insn(f"set{name}", aliases=tuple(f"set{x}" for x in aliases))
    def _(f: Flags, _n: int) -> int:
        return condition(f)

    insn(f"j{name}", kind="control", aliases=tuple(f"j{x}" for x in aliases))(condition)


for _names, _test in CONDITIONS:
    _conditional(_test, *_names)


@insn("jmp", "ret", kind="control")
def _(_f: Flags) -> int:
    return 1


@insn("push", kind="machine", bits=64)
def _(m: Machine, _n: int, a: int) -> None:
    m.push(a)


@insn("pop", kind="machine", bits=64, dest=True)
def _(m: Machine, _n: int) -> int:
    return m.pop()


@insn("nop", kind="control")
def _(_f: Flags) -> int:
    return 0


@insn("vzeroupper", kind="machine")
def _(m: Machine, _n: int) -> None:
    m.vectors[:16, 16:] = 0


# -- mask registers ---------------------------------------------------------------------------------------


def _masks(suffix: str, bits: int) -> None:
    ones = (1 << bits) - 1

    @insn(f"kmov{suffix}", bits=bits)
    def _(_f: Flags, _n: int, a: int) -> int:
        return a

    @insn(f"knot{suffix}", bits=bits)
    def _(_f: Flags, _n: int, a: int) -> int:
        return ~a

    @insn(f"kand{suffix}", bits=bits)
    def _(_f: Flags, _n: int, a: int, b: int) -> int:
        return a & b

    @insn(f"kandn{suffix}", bits=bits)
    def _(_f: Flags, _n: int, a: int, b: int) -> int:
        return ~a & b

    @insn(f"kor{suffix}", bits=bits)
    def _(_f: Flags, _n: int, a: int, b: int) -> int:
        return a | b

    @insn(f"kxor{suffix}", bits=bits)
    def _(_f: Flags, _n: int, a: int, b: int) -> int:
        return a ^ b

    @insn(f"kxnor{suffix}", bits=bits)
    def _(_f: Flags, _n: int, a: int, b: int) -> int:
        return ~(a ^ b)

    @insn(f"kortest{suffix}", bits=bits, dest=False)
    def _(f: Flags, _n: int, a: int, b: int) -> None:
        f.set(cf=int(a | b == ones), zf=int(a | b == 0), sf=0, of=0, pf=0)


for _suffix, _bits in (("b", 8), ("w", 16), ("d", 32), ("q", 64)):
    _masks(_suffix, _bits)
