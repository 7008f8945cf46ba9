"""Every error the project raises on purpose.

One root, `VnnigenError`, so that a caller can catch all of them; each subclass also derives from the
builtin exception that Python users expect (`ValueError`, `TypeError`, ...).
"""

from __future__ import annotations


class VnnigenError(Exception):
    """Root of all errors raised on purpose by vnnigen."""


class ShapeError(VnnigenError, ValueError):
    """A shape, stride, padding, layout or memory order that the operation cannot take."""


class DTypeError(VnnigenError, TypeError):
    """An array or argument of the wrong type."""


class QuantizationError(VnnigenError, ValueError):
    """A scale, zero point or bound that is not usable, or an accumulation that could overflow s32."""


class ISAError(VnnigenError, RuntimeError):
    """An instruction-set tier that is unknown, not available on this machine, or capped away."""


class AssemblerError(VnnigenError, ValueError):
    """A call to the assembler that cannot be encoded: operand kinds, register pools, labels."""


class EmulatorError(VnnigenError, RuntimeError):
    """Emulated code did something it must not: access outside an operand, broken ABI, unknown instruction."""


class BuildError(VnnigenError, ImportError):
    """The native runtime is missing or could not be built."""


class ModelError(VnnigenError, ValueError):
    """A model file or data file that is damaged, hostile or not understood."""


class MissingExtraError(VnnigenError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""

    def __init__(self, extra: str, module: str) -> None:
        """Name the missing `module` and the `extra` of the distribution that provides it."""
        super().__init__(f"this needs {module!r}: pip install 'vnnigen[{extra}]'")
