"""Steps of a plan: what one native call computes, where its operands go, without the operands themselves.

Operators run on arrays; a plan runs the same kernels on places in an arena.  `native(...)` of every operator therefore
gives `NativeStep`s: kernels in a descriptor, and for each argument slot that the descriptor leaves open, which input,
output or temporary memory it takes.  Where no kernels can be generated (the `reference` tier) a step is a Python
function of arrays instead, with the same inputs and output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vnnigen.kernels.types import Array
from vnnigen.runtime.compiled import Launches

#: What goes into an argument slot: an input of the step, its output, or one of its temps.
Operand = tuple[Literal["in", "out", "temp"], int]


@dataclass(frozen=True, eq=False)
class Temp:
    """Memory that a step needs besides its operands; with `initial` it holds that before the first run, and is kept."""

    bytes: int
    initial: Array | None = None


@dataclass(frozen=True, eq=False)
class NativeStep:
    """One native call, or (`launches` None) `function` of the inputs, for tiers without kernels.

    Inputs are the operator's sources, then the tensors of its post-ops. `macs` counts multiply-accumulates, 0 where
    memory is what counts.
    """

    launches: Launches | None
    slots: tuple[tuple[int, Operand], ...]
    y_shape: tuple[int, ...]
    y_dtype: np.dtype[Any]
    function: Callable[[Sequence[Array]], Array]
    macs: int = 0
    temps: tuple[Temp, ...] = ()
    #: Called after each run with the contents of temp 0 (bytes); raises where a kernel found an input to be wrong.
    check: Callable[[Array], None] | None = None
    #: Inputs that the output may overlay: each element is read at the place where the result goes.
    in_place: tuple[int, ...] = ()

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels' names."""
        return ("numpy-reference",) if self.launches is None else tuple(key.name for key in self.launches.keys)
