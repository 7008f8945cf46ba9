"""The arithmetic flags, and the sixteen conditions of Jcc, SETcc and CMOVcc."""

from __future__ import annotations

from collections.abc import Callable

from vnnigen.errors import EmulatorError

PARITY = bytes(1 - (i.bit_count() & 1) for i in range(256))


class Flags:
    """CF, ZF, SF, OF and PF as 0 or 1; None is "undefined", and reading that is an error."""

    __slots__ = ("cf", "of", "pf", "sf", "zf")

    def __init__(self) -> None:
        self.cf: int | None = None
        self.zf: int | None = None
        self.sf: int | None = None
        self.of: int | None = None
        self.pf: int | None = None

    def result(self, value: int, bits: int) -> int:
        """Set ZF, SF and PF from an unsigned result of that many bits; returns the result."""
        self.zf = int(value == 0)
        self.sf = value >> (bits - 1)
        self.pf = PARITY[value & 255]
        return value

    def set(self, cf: int | None, zf: int | None, sf: int | None, of: int | None, pf: int | None) -> None:
        """Set all five."""
        self.cf, self.zf, self.sf, self.of, self.pf = cf, zf, sf, of, pf


def _known(flag: int | None) -> int:
    if flag is None:
        raise EmulatorError("a condition reads a flag that is undefined here")
    return flag


Condition = Callable[[Flags], int]


def _negated(condition: Condition) -> Condition:
    return lambda f: 1 - condition(f)


_POSITIVE: tuple[tuple[tuple[str, ...], tuple[str, ...], Condition], ...] = (
    (("o",), ("no",), lambda f: _known(f.of)),
    (("b", "c"), ("ae", "nc"), lambda f: _known(f.cf)),
    (("e", "z"), ("ne", "nz"), lambda f: _known(f.zf)),
    (("be",), ("a",), lambda f: _known(f.cf) | _known(f.zf)),
    (("s",), ("ns",), lambda f: _known(f.sf)),
    (("p",), ("np",), lambda f: _known(f.pf)),
    (("l",), ("ge",), lambda f: _known(f.sf) ^ _known(f.of)),
    (("le",), ("g",), lambda f: _known(f.zf) | (_known(f.sf) ^ _known(f.of))),
)

CONDITIONS: tuple[tuple[tuple[str, ...], Condition], ...] = tuple(
    pair for yes, no, condition in _POSITIVE for pair in ((yes, condition), (no, _negated(condition)))
)
"""(names, test) of each condition; the first name is iced's, the others are aliases."""
