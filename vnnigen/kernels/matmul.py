"""Products of two activations: where their matrices lie, and the two kernels that a product is lowered to.

Neither operand is known before the call.  A packing kernel brings b into panels; then the GEMM kernel, generated for
one product, runs over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vnnigen.errors import QuantizationError, ShapeError
from vnnigen.kernels.amx import PackedAmx
from vnnigen.kernels.amx_key import AmxKey
from vnnigen.kernels.batched import ENTRY, BatchedKey, FusedKey
from vnnigen.kernels.epilogue import Epilogue
from vnnigen.kernels.geometry import gemm_geometry
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ARG_SRC, ARG_TENSORS, ARG_WEIGHTS, ConstLayout
from vnnigen.kernels.mac import AMX, BF16, CHAIN_EXACT, FMA, VNNI, Mac, TierCode
from vnnigen.kernels.nest import NestKey
from vnnigen.kernels.pack_kernel import PackKey, pack_constants
from vnnigen.kernels.packed import Packed, PackedRun
from vnnigen.kernels.packing import Columns, Run, aligned, fill_constants, pad_vector, start_values
from vnnigen.kernels.problem import GemmProblem
from vnnigen.kernels.types import INT_RANGE, Array, DType, itemsize

#: Batches from which there are products enough for all threads, so that each packs what it multiplies, and how large a
#: packed matrix may then be to stay in the L2 cache.
FUSED_BATCHES = 8
FUSED_BYTES = 512 << 10


# --- where the matrices lie -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """The shapes of a product [*batch, m, k] x [*batch, k, n] and where its operands lie.

    Pitches are the bytes between rows of a and rows of b, or, `transposed`, columns of b. `a_at` and `b_at` are the
    distances in bytes of each matrix from the first, one for each product and for each matrix of b; `b_of` is the
    number of the matrix of b that each product takes.
    """

    m: int
    k: int
    n: int
    batch: tuple[int, ...]
    a_pitch: int
    b_pitch: int
    transposed: bool
    a_at: NDArray[np.int64]
    b_at: NDArray[np.int64]
    b_of: NDArray[np.int64]

    @property
    def batches(self) -> int:
        """The number of products."""
        return len(self.a_at)


def a_in_place(a: Array) -> bool:
    """Whether kernels can read a: rows without gaps, whole rows apart (an empty a is for `look` to refuse)."""
    if a.size == 0:
        return True
    (m, k), (down, along) = a.shape[-2:], a.strides[-2:]
    row = k * a.itemsize
    return (k == 1 or along == a.itemsize) and (m == 1 or (down >= row and down % row == 0))


def b_in_place(b: Array) -> bool:
    """Whether the packing kernel can read b: rows, or columns, without gaps."""
    return _b_pitch(b) is not None


def _b_pitch(b: Array) -> tuple[int, bool] | None:
    """(bytes from row to row, False), or (from column to column, True), or None."""
    (k, n), (down, along), size = b.shape[-2:], b.strides[-2:], b.itemsize
    if (n == 1 or along == size) and (k == 1 or down >= n * size):
        return (down if k > 1 else n * size), False
    if (k == 1 or down == size) and (n == 1 or along >= k * size):
        return (along if n > 1 else k * size), True
    return None


def look(a: Array, b: Array) -> Views:
    """Describe a product of arrays that are both in place; ShapeError where they do not multiply."""
    if a.ndim < 2 or b.ndim < 2:
        raise ShapeError(f"a and b must have at least 2 dimensions, not shapes {a.shape} and {b.shape}")
    if 0 in a.shape or 0 in b.shape:
        raise ShapeError(f"arrays must not be empty: a has shape {a.shape}, b has shape {b.shape}")
    (m, k), (rows, n) = a.shape[-2:], b.shape[-2:]
    if k != rows:
        raise ShapeError(f"a has {k} columns but b has {rows} rows; they must be equal")
    try:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ShapeError(
            f"the batch dimensions {a.shape[:-2]} of a and {b.shape[:-2]} of b do not broadcast together"
        ) from None
    pitch = _b_pitch(b)
    assert pitch is not None
    a_pitch = a.strides[-2] if m > 1 else k * a.itemsize
    count = math.prod(b.shape[:-2])
    a_at = _distances(np.broadcast_to(a, (*batch, m, k)))
    if count == 1 and a.flags.c_contiguous:
        # All products share b: they are one, with more rows.
        m, a_pitch, a_at = m * len(a_at), k * a.itemsize, a_at[:1]
        b_of = np.zeros(1, np.int64)
    else:
        b_of = np.broadcast_to(np.arange(count).reshape(b.shape[:-2]), batch).reshape(-1)
    return Views(m, k, n, batch, a_pitch, *pitch, a_at, _distances(b), b_of)


def _distances(x: Array) -> NDArray[np.int64]:
    """Bytes from the first matrix of x to each of them."""
    at = np.zeros((), np.int64)
    for length, stride in zip(x.shape[:-2], x.strides[:-2], strict=True):
        at = at[..., None] + np.arange(length, dtype=np.int64) * stride
    return at.reshape(-1)


# --- how they are multiplied ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Integers:
    """What an int8 product knows of its operands' zero points; zeros for real numbers."""

    a: DType
    b: DType
    a_zp: int = 0
    b_zp: int = 0

    def bound(self, k: int) -> int:
        """The largest magnitude of a sum of k products; QuantizationError if s32 cannot hold it."""
        largest = k * math.prod(
            max(abs(end - zp) for end in INT_RANGE[t]) for t, zp in ((self.a, self.a_zp), (self.b, self.b_zp))
        )
        if largest > INT_RANGE["s32"][1]:
            raise QuantizationError(
                f"K too large: a sum of {k} products of {self.a} and {self.b} can reach {largest}, beyond s32; "
                "split the reduction"
            )
        return largest


def choose_mac(family: str, tier: TierCode, src: DType) -> Mac:
    """The multiply-accumulate of a family. Operands of unknown values are never safe for the fast chain."""
    if family == "tiles":
        return AMX[src]
    if family == "dot":
        return BF16
    if src in ("f32", "bf16"):
        return FMA
    return VNNI if tier.vnni else CHAIN_EXACT


@dataclass(frozen=True, eq=False)
class Lowered:
    """A product lowered to a packing and a multiplying kernel, and the constants of both.

    `consts` is the constant block of one product; `dynamic` says that the packing kernel writes into it, so that every
    matrix of b needs its own.
    """

    views: Views
    packed: Packed | PackedAmx
    pack: PackKey
    gemm: NestKey | BatchedKey
    consts: NDArray[np.uint8]
    pack_consts: NDArray[np.uint8]
    dynamic: bool

    @property
    def keys(self) -> tuple[PackKey | NestKey | BatchedKey, ...]:
        """The kernels' keys, in the order of the launches; the last one multiplies."""
        return (self.gemm,) if self.fused else (self.pack, self.gemm)

    @property
    def fused(self) -> bool:
        """Whether one kernel does both."""
        return isinstance(self.gemm, FusedKey)

    def table(self, tensors: Sequence[DType]) -> NDArray[np.int64]:
        """The batch's table (see `batched`); `tensors` are the types of the epilogue's tensors."""
        v = self.views
        table = np.zeros((v.batches, ENTRY), np.int64)
        outputs = np.arange(v.batches) * (v.m * v.n)
        table[:, ARG_SRC] = v.a_at
        table[:, ARG_DST] = outputs * itemsize(self.packed.epilogue.spec.out)
        for i, t in enumerate(tensors):
            table[:, ARG_TENSORS + i] = outputs * itemsize(t)
        table[:, ARG_WEIGHTS] = v.b_of * self.pack.stride
        table[:, ARG_CONSTS] = v.b_of * (self.consts_stride if self.dynamic else 0)
        return table

    @property
    def consts_stride(self) -> int:
        """Bytes from one constant block to the next."""
        return len(self.consts)

    def buffers(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Room for b packed, and the constant blocks."""
        count = len(self.views.b_at)
        if self.fused:
            return aligned(0), self.consts
        if not self.dynamic:
            return aligned(self.pack.stride * count), self.consts
        blocks = aligned(self.consts_stride * count)
        blocks.reshape(count, -1)[:] = self.consts
        return aligned(self.pack.stride * count), blocks


def lower(v: Views, tier: TierCode, family: str, numbers: Integers, epilogue: Epilogue) -> Lowered:
    """Generate keys and constants for a product on a tier."""
    src = numbers.a
    mac = choose_mac(family, tier, src)
    element = {"u8": "s8"}.get(mac.element, mac.element)
    b_zp = numbers.b_zp - 128 if numbers.b == "u8" and element == "s8" else numbers.b_zp
    shift = 128 if src == "s8" and mac.element == "u8" else 0
    # On the exact chain the zero point of b is subtracted when it is packed.
    row_sums = b_zp != 0 and element == "s8"
    dynamic = mac.acc == "s32" and numbers.a_zp + shift != 0
    zeros = np.zeros((1, v.n), np.int64)
    w_zp = np.full((1, v.n), b_zp if row_sums else 0)
    start: Array = np.zeros((1, v.n), np.float32)
    if mac.acc == "s32":
        start = start_values(Columns(zeros, w_zp, zeros), k=v.k, x_zp=numbers.a_zp, shift=shift, folded_zp=False)
    padded = -(-v.n // tier.lanes) * tier.lanes
    layout = ConstLayout(padded)
    consts = fill_constants(
        layout, groups=1, columns=slice(0, v.n), start=start, epilogue=epilogue,
        pad=pad_vector(mac, numbers.a_zp, shift), w_zp=w_zp if row_sums else None,
    )  # fmt: skip
    block = aligned(-(-len(consts) // 64) * 64)
    block[: len(consts)] = consts
    run = PackedRun(Run(0, v.n, True), mac, row_sums, aligned(0), block)
    kind = PackedAmx if family == "tiles" else Packed
    packed = kind("matmul", tier, src, epilogue, (run,))
    one = _one(v, packed, max(v.batches, FUSED_BATCHES))
    dwords = -(-v.k // mac.k_per_dword)
    if isinstance(one, AmxKey):
        dwords = one.steps_of_run.count * one.steps_of_run.size // 4
    pack = PackKey(
        tier, numbers.b, element, v.transposed, v.k, v.n, v.b_pitch, dwords, len(v.b_at),
        len(block) if dynamic else 0, layout.init if dynamic else None,
    )  # fmt: skip
    gemm: NestKey | BatchedKey
    if v.batches >= FUSED_BATCHES and len(v.b_at) == v.batches and one.steps == 1 and pack.stride <= FUSED_BYTES:
        gemm = FusedKey(one, v.batches, replace(pack, batches=1))
    else:
        one = _one(v, packed, v.batches)
        gemm = BatchedKey(one, v.batches) if v.batches > 1 else one
    starts = np.zeros(padded, np.int32)
    if dynamic:
        starts[: v.n] = start[0]
    return Lowered(v, packed, pack, gemm, block, pack_constants(starts, numbers.a_zp + shift, b_zp), dynamic)


def _one(v: Views, packed: Packed | PackedAmx, batches: int) -> NestKey:
    """The kernel of one product, blocked as a part of `batches` of them."""
    # Rows of a that lie further apart than they are long are pixels of a wider image, of which one column is used.
    wide = v.a_pitch // (v.k * itemsize(packed.src))
    g = replace(gemm_geometry(GemmProblem(v.m, v.n, v.k, packed.src, packed.epilogue.spec.out)), w=wide)
    (key,) = packed.keys_for(replace(g, images=batches))
    # b was packed a moment ago: nothing is fetched ahead, and a batch's own argument block has no slots for it.
    return replace(key, g=g, ahead=0)
