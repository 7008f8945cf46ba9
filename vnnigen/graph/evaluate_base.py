"""The table of operators that `evaluate` knows by its own NumPy, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

#: An array of any element type: the operators take what ONNX lets them take.
AnyArray = npt.NDArray[Any]
#: Called as `evaluator(node, *inputs)`, inputs that are left out as None or not at all.
Evaluator = Callable[..., "AnyArray | tuple[AnyArray, ...]"]

_Function = TypeVar("_Function", bound=Evaluator)

EVALUATORS: dict[str, Evaluator] = {}


def evaluates(*ops: str) -> Callable[[_Function], _Function]:
    """Enter a function into the table under the names of the operators it computes."""

    def enter(function: _Function) -> _Function:
        for op in ops:
            assert op not in EVALUATORS, op
            EVALUATORS[op] = function
        return function

    return enter


def wide(x: AnyArray) -> AnyArray:
    """The array in at least f32: half-precision numbers are computed in f32 and rounded once, at the end."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind not in "iu" else x


def exact(x: AnyArray) -> AnyArray:
    """8-bit integers as f64: products of a BLAS that are exact for any length that fits into memory."""
    return x.astype(np.float64)


def per_channel(values: AnyArray, rank: int, axis: int) -> AnyArray:
    """A vector, reshaped to lie along `axis` of a tensor of `rank` dimensions (a scalar stays one)."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)
