"""Rounding f32 to bf16, exactly as VCVTNEPS2BF16 does (Intel SDM vol. 2, its "Operation").

To nearest, ties to even, whatever MXCSR says; denormal inputs become zeros of their sign; a NaN keeps its upper
payload bits and is made quiet. Widening bf16 to f32 is exact and keeps denormals.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vnnigen.kernels.types import NUMPY, Array


def round_to_bf16(v: npt.ArrayLike) -> Array:
    """Return f32 `v` as an array of ml_dtypes.bfloat16 of its shape."""
    bits = np.ascontiguousarray(v, dtype=np.float32).view(np.uint32)
    top, magnitude = bits >> np.uint32(16), bits & np.uint32(0x7FFFFFFF)
    # Adding just under half, and the last bit kept, carries into it exactly where rounding goes up.
    with np.errstate(over="ignore"):
        rounded = (bits + np.uint32(0x7FFF) + (top & np.uint32(1))) >> np.uint32(16)
    rounded = np.where(magnitude > 0x7F800000, top | np.uint32(0x40), rounded)
    rounded = np.where(magnitude < 0x00800000, top & np.uint32(0x8000), rounded)
    result: Array = rounded.astype(np.uint16).view(NUMPY["bf16"]).reshape(np.shape(v))
    return result
