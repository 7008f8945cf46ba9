"""What the AMX tests share: configurations, a kernel for one product, and references that say it the long way."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from vnnigen.isa.assembler import Arg, Assembler, Code, Mem

INTEGER = {"tdpbssd": ("i1", "i1"), "tdpbsud": ("i1", "u1"), "tdpbusd": ("u1", "i1"), "tdpbuud": ("u1", "u1")}
PRODUCTS = (*INTEGER, "tdpbf16ps")

# (M, N, K groups of four bytes): all tails of each, and the full tile.
SHAPES = [(16, 16, 16), (1, 1, 1), (16, 1, 16), (1, 16, 1), (16, 16, 1), (5, 7, 3)]
SHAPES += [(m, 16, 16) for m in range(1, 16)] + [(3, n, 16) for n in range(1, 16)] + [(3, 16, k) for k in range(1, 16)]


def tile_config(shapes: Sequence[tuple[int, int]], start_row: int = 0) -> bytes:
    """64 bytes for LDTILECFG (palette 1) from (rows, bytes per row) of each tile."""
    out = bytearray(64)
    out[:2] = 1, start_row
    for i, (rows, colsb) in enumerate(shapes):
        out[16 + 2 * i : 18 + 2 * i] = colsb.to_bytes(2, "little")
        out[48 + i] = rows
    return bytes(out)


def product_config(m: int, n: int, k: int) -> bytes:
    """tmm0 is C, tmm1 is A, tmm2 is B."""
    return tile_config([(m, 4 * n), (m, 4 * k), (k, 4 * n)])


def product_kernel(name: str) -> Code:
    """C += A * B on one tile each; arguments as a launch's: args -> (A, B, C, row pitches of each)."""
    a = Assembler(name, (Arg("args", "ptr"), Arg("index"), Arg("scratch", "ptr")))
    args = a.load_argument("args")
    tiles = [a.tile(x) for x in ("acc", "left", "right")]
    pointers = []
    for i in (2, 0, 1):
        pointer, pitch = a.gpr(), a.gpr()
        a.mov(pointer, Mem(args, 8 * i))
        a.mov(pitch, Mem(args, 8 * (3 + i)))
        pointers.append(Mem(pointer, index=pitch))
    a.tileloadd(tiles[0], pointers[0])
    a.tileloadd(tiles[1], pointers[1])
    a.tileloaddt1(tiles[2], pointers[2])
    getattr(a, name)(*tiles)
    a.tilestored(pointers[0], tiles[0])
    a.ret()
    return a.finalize().encode()


def integer_product(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """C [m][n] + A [m][4k] * B [k][4n], in unbounded integers that wrap at the end."""
    out = c.astype(object)
    for (m, n), _ in np.ndenumerate(c):
        for k in range(len(b)):
            for i in range(4):
                out[m, n] += int(a[m, 4 * k + i]) * int(b[k, 4 * n + i])
    return np.array([((int(x) + 2**31) % 2**32) - 2**31 for x in out.ravel()], "i4").reshape(c.shape)


def to_f32(x: Fraction, sign_of_zero: float = 1.0) -> float:
    """Round to 24 bits, nearest even, exponent unbounded below; then tiny results become zeros."""
    if x == 0:
        return 0.0 * sign_of_zero
    sign, x = (-1.0 if x < 0 else 1.0), abs(x)
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if x < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    mantissa = round(x / unit)  # Fraction's round is to even
    value = mantissa * unit
    if value < Fraction(2) ** -126:
        return 0.0 * sign
    return sign * (float(value) if value < Fraction(2) ** 128 else float("inf"))


def daz(x: float) -> float:
    return x if abs(x) >= 2.0**-126 else 0.0 * np.copysign(1.0, x)


def fma(a: float, b: float, c: float) -> float:
    """One FMA of finite numbers, denormals flushed."""
    a, b, c = daz(a), daz(b), daz(c)
    if a * b == 0 and c == 0:
        return float(np.copysign(0.0, a) * np.copysign(1.0, b) + c)
    return to_f32(Fraction(a) * Fraction(b) + Fraction(c))


def bf16_product(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """C [m][n] + A [m][2k] * B [k][2n]; a and b are float32 that bfloat16 can hold. Finite values only."""
    out = np.zeros_like(c)
    for (m, n), old in np.ndenumerate(c):
        sums = [0.0, 0.0]
        for k in range(len(b)):
            for i in range(2):
                sums[i] = fma(float(a[m, 2 * k + i]), float(b[k, 2 * n + i]), sums[i])
        out[m, n] = fma(fma(sums[0], 1.0, sums[1]), 1.0, float(old))
    return out


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of float32 values that are bfloat16 values."""
    bits = np.asarray(x, "f4").view("u4")
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype("u2")


def random_bf16(rng: np.random.Generator, shape: tuple[int, ...], flavor: str) -> np.ndarray:
    """float32 values that bfloat16 can hold."""
    if flavor == "near":  # magnitudes that cancel: every rounding shows
        x = rng.standard_normal(shape) * 2.0 ** rng.integers(-2, 3, shape)
    elif flavor == "wide":
        x = rng.standard_normal(shape) * 2.0 ** rng.integers(-60, 60, shape)
    else:  # tiny: products and sums around the smallest normal number, denormal inputs
        x = rng.standard_normal(shape) * 2.0 ** rng.choice([-130, -127, -126, -66, -63, -62, 0], shape)
    return (np.asarray(x, "f4").view("u4") & 0xFFFF0000).astype("u4").view("f4")
