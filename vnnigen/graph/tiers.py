"""Which tier each kind of operator of a network runs on, when the network as a whole is held to one."""

from __future__ import annotations

from dataclasses import dataclass

from vnnigen.errors import ISAError
from vnnigen.isa import tiers
from vnnigen.runtime.dispatch import candidates


@dataclass(frozen=True)
class Tiers:
    """A cap for all operators of a network, None for the best of the machine. ISAError if it cannot be used here."""

    isa: str | None = None

    def __post_init__(self) -> None:
        """Check the name."""
        if self.isa is not None and (why := tiers.why_not(self.isa)) is not None:
            raise ISAError(f"{self.isa} cannot be used: {why}")

    def of(self, kind: str) -> str | None:
        """The `isa=` argument of operators on operands of a kind ("int8", "bf16", "f32")."""
        if self.isa is None:
            return None
        allowed = tiers.tier(self.isa).features
        return next(n for n in candidates(kind) if tiers.tier(n).features <= allowed and tiers.why_not(n) is None)

    @property
    def element(self) -> str | None:
        """The `isa=` argument of element operators."""
        return self.isa
