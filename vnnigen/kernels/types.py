"""Names of the element types, and what NumPy calls them.

Kernel keys, packing and code generation speak of types by short strings (`"u8"`, `"s8"`, ...): they hash,
they print as part of a kernel's name, and they do not depend on NumPy's dtype objects.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt

from vnnigen.errors import DTypeError

DType = Literal["u8", "s8", "s32", "f32", "bf16"]

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
S32 = npt.NDArray[np.int32]

DTYPES: tuple[DType, ...] = get_args(DType)

NUMPY: dict[DType, np.dtype[Any]] = {
    "u8": np.dtype(np.uint8),
    "s8": np.dtype(np.int8),
    "s32": np.dtype(np.int32),
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES: dict[np.dtype[Any], DType] = {numpy: name for name, numpy in NUMPY.items()}

INT_RANGE: dict[DType, tuple[int, int]] = {
    "u8": (0, 255),
    "s8": (-128, 127),
    "s32": (-(2**31), 2**31 - 1),
}


def itemsize(name: DType) -> int:
    """Return the bytes that one element of type `name` takes."""
    return NUMPY[name].itemsize


def dtype_name(dtype: npt.DTypeLike, what: str, allowed: tuple[DType, ...] = DTYPES) -> DType:
    """Return the short name of a NumPy `dtype` (or anything `np.dtype` takes, or a short name).

    Raises DTypeError, naming the argument `what` and the types it may have, for any type not in `allowed`.
    """
    name: DType | None = None
    if isinstance(dtype, str) and dtype in DTYPES:
        name = dtype
    else:
        try:
            name = _NAMES.get(np.dtype(dtype))
        except TypeError:
            name = None
    if name is None or name not in allowed:
        wanted = ", ".join(f"{n} ({NUMPY[n].name})" for n in allowed)
        raise DTypeError(f"{what} has type {dtype!r}; it must be one of {wanted}")
    return name
