"""A copy between any strides, for plans: operands are places in memory, not whole arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vnnigen.isa import tiers
from vnnigen.kernels.element.permute import Move, move_launches
from vnnigen.kernels.element.plan import code_tier
from vnnigen.kernels.layout import ARG_DST, ARG_SRC
from vnnigen.kernels.types import Array
from vnnigen.ops.element_base import Call
from vnnigen.ops.step import NativeStep

Shape = tuple[int, ...]


def copy_step(shape: Shape, src: Shape, dst: Shape, dtype: np.dtype[Any], isa: str | None = None) -> NativeStep:
    """The step that copies `shape` elements between strides, which count elements; no length may be 0."""
    name = tiers.resolve_tier(isa, [t.name for t in tiers.TIERS])
    tier = code_tier(tiers.tier(name).vector_bits)

    def function(arrays: Sequence[Array]) -> Array:
        return arrays[0]

    if tier is None:
        return NativeStep(None, (), shape, dtype, function)
    bound = Call.of(move_launches(Move(0, shape, src, dst), dtype.itemsize, tier)).bound
    return NativeStep(bound, ((ARG_SRC, ("in", 0)), (ARG_DST, ("out", 0))), shape, dtype, function)
