"""Element types of a graph's values, as NumPy and ONNX (TensorProto.DataType) call them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from vnnigen.errors import ModelError
from vnnigen.graph.ir import ElemType

NUMPY_DTYPES: dict[ElemType, np.dtype[Any]] = {
    "f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16),
    "f64": np.dtype(np.float64), "bool": np.dtype(np.bool_), "u8": np.dtype(np.uint8), "s8": np.dtype(np.int8),
    "u16": np.dtype(np.uint16), "s16": np.dtype(np.int16), "u32": np.dtype(np.uint32), "s32": np.dtype(np.int32),
    "u64": np.dtype(np.uint64), "s64": np.dtype(np.int64),
}  # fmt: skip
ELEM_TYPES: dict[np.dtype[Any], ElemType] = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
#: The numbers are TensorProto.DataType's; they never change.
ONNX_TYPES: dict[int, ElemType] = {
    1: "f32", 2: "u8", 3: "s8", 4: "u16", 5: "s16", 6: "s32", 7: "s64", 9: "bool", 10: "f16", 11: "f64", 12: "u32",
    13: "u64", 16: "bf16",
}  # fmt: skip


def numpy_dtype(name: ElemType) -> np.dtype[Any]:
    """The NumPy type of an element type."""
    return NUMPY_DTYPES[name]


def elem_type(dtype: npt.DTypeLike) -> ElemType:
    """The element type of a NumPy type. ModelError for one that graphs do not hold (strings, complex, 4 bits)."""
    found = ELEM_TYPES.get(np.dtype(dtype))
    if found is None:
        raise ModelError(f"tensors of {np.dtype(dtype)} are not supported, only {', '.join(NUMPY_DTYPES)}")
    return found


def onnx_type(number: int) -> ElemType:
    """The element type of a TensorProto.DataType number. ModelError for those that graphs do not hold."""
    found = ONNX_TYPES.get(number)
    if found is None:
        raise ModelError(f"tensors of ONNX data type {number} are not supported, only {', '.join(NUMPY_DTYPES)}")
    return found
