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
    floats = np.ascontiguousarray(v, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        result: Array = floats.astype(NUMPY["bf16"])  # to nearest, ties to even
    bits = floats.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    denormal, nan = (magnitude < 0x00800000) & (magnitude != 0), magnitude > 0x7F800000
    words = result.view(np.uint16)
    for odd, keep, quiet in ((denormal, 0x8000, 0), (nan, 0xFFFF, 0x40)):
        if odd.any():
            words[odd] = (bits[odd] >> np.uint32(16)).astype(np.uint16) & np.uint16(keep) | np.uint16(quiet)
    return result.reshape(np.shape(v))
