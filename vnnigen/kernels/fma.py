"""An exact fused multiply-add of float32 arrays, as VFMADD213PS rounds it (once, to nearest even).

The product of two f32 numbers has at most 48 significant bits, so it is exact in float64, and so is the
error of the float64 sum (Knuth's two-sum). Rounding that sum "to odd" (Boldo & Melquiond, "Emulation of
FMA and correctly rounded sums", IEEE TC 2008) leaves enough of the lost bits for the final rounding to
f32 to be the right one: it needs two bits more than the target, and 53 >= 24 + 2. Denormal results need
fewer bits still.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vnnigen.kernels.types import F32, F64


def fma32(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> F32:
    """Return `a * b + c` rounded once to float32; the operands (float32) broadcast.

    Infinities and NaNs follow IEEE 754 (a NaN's payload is unspecified); denormals are kept, as under
    MXCSR 0x1F80.
    """
    a32, b32, c32 = (np.asarray(x, dtype=np.float32) for x in (a, b, c))
    with np.errstate(all="ignore"):
        product = a32.astype(np.float64) * b32
        addend = c32.astype(np.float64)
        total = np.asarray(product + addend)
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        _round_to_odd(total, np.broadcast_to(error, total.shape))
        return total.astype(np.float32)


def _round_to_odd(total: F64, error: F64) -> None:
    """Set, in place, the last bit of each finite `total` whose exact value is `total + error`, error != 0.

    An even last bit moves towards the error: away from zero when the signs agree, else towards it. (A zero
    `total` is always exact, so the bit pattern never steps across zero.)
    """
    inexact = (error != 0) & np.isfinite(total) & np.isfinite(error)
    if not inexact.any():
        return
    bits = total[inexact].view(np.int64)
    away = np.signbit(total[inexact]) == np.signbit(error[inexact])
    even = (bits & 1) == 0
    total[inexact] = np.where(even, bits + np.where(away, 1, -1), bits).view(np.float64)
