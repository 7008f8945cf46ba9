"""Copies between any strides: permutations, slices, repetitions, padding, of elements of 1, 2 or 4 bytes.

Neighbours in both tensors are copied by vectors; where neighbours of the destination are not neighbours in the source,
but others are, blocks of both are transposed in registers; repeated elements are broadcast; only what is left (steps in
a slice) goes element by element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.isa.assembler import Code, Mem
from vnnigen.kernels.element.affine import make_affine
from vnnigen.kernels.element.common import SIZE, Run, load_some, store_some
from vnnigen.kernels.element.plan import reorder_image
from vnnigen.kernels.element.strided import WIDE, Dim, Strided, StridedKey, Strides, blocks, collapse, make_launches
from vnnigen.kernels.element.transpose import TransposeCode, TransposeKey
from vnnigen.kernels.emit_common import set_mask
from vnnigen.kernels.layout import ARG_DST
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.packing import aligned
from vnnigen.kernels.types import DType

Reg = Any
Launch = tuple[Any, Run]
KIND: dict[int, DType] = {1: "u8", 2: "bf16", 4: "f32"}
#: Elements that are moved one by one in a turn.
SINGLES = 8


@dataclass(frozen=True)
class Move:
    """A copy of `shape` elements of source number `source`; strides and offsets count elements."""

    source: int
    shape: tuple[int, ...]
    src: Strides
    dst: Strides
    src_offset: int = 0
    dst_offset: int = 0


@dataclass(frozen=True)
class Fill:
    """A block of the destination that gets the value of padding."""

    shape: tuple[int, ...]
    dst: Strides
    dst_offset: int


@dataclass(frozen=True)
class CopyKey(StridedKey):
    """Copies of rows. Without a source, the first element of the constants fills the destination."""

    @property
    def unit(self) -> int:
        """Elements of a vector."""
        return self.tier.vector_bytes // self.size(-1)

    @property
    def vectors(self) -> int:
        """Vectors of a tile."""
        return 8

    @property
    def singly(self) -> bool:
        """Whether elements are moved one by one."""
        return len(self.kinds) > 1 and self.col[0] not in (0, 1)

    @property
    def width(self) -> int:
        """Elements of a row that a full tile covers."""
        if self.singly:
            return min(self.cols, SINGLES)
        return min(WIDE, -(-self.cols // self.unit)) * self.unit

    @property
    def tile_rows(self) -> int:
        """Rows of a tile."""
        return 1 if self.singly else max(1, min(self.rows, self.vectors * self.unit // self.width))

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _Copy(self, features).build()


class _Copy(Strided):
    """Tiles of elements that stay what they are."""

    key: CopyKey

    def setup(self) -> None:
        """Set the mask of the last vector; what fills a destination stays in a register."""
        a, key = self.a, self.key
        rest = key.cols % key.unit
        self.mask = self.filler = None
        if key.tier.masks and rest and not key.singly:
            self.mask = a.kreg("tail")
            set_mask(a, self.mask, rest * key.size(-1), self.ptr)
        self.dst = a.gpr("dst")
        a.mov(self.dst, Mem(self.args, 8 * ARG_DST))
        self.regs = [a.vec(key.tier.bits, f"v{i}") for i in range(0 if key.singly else key.vectors)]
        if not self.sources:
            self.filler = self.regs[0]
            self._broadcast(self.filler, Mem(self.consts))

    def _broadcast(self, v: Reg, mem: Mem) -> None:
        a = self.a
        {1: a.vpbroadcastb, 2: a.vpbroadcastw, 4: a.vpbroadcastd}[self.key.size(-1)](v, mem)

    def _out(self, i: int, j: int) -> Mem:
        size = self.key.size(-1)
        return Mem(self.dst, (i * self.key.row[-1] + j) * size, index=self.off, scale=size)

    def tile(self, th: int, count: int) -> None:
        """Copy `count` elements of `th` rows."""
        a, key = self.a, self.key
        unit, size = key.unit, key.size(-1)
        if key.singly:
            self._singles(count)
            return
        pieces = [(i, j, min(unit, count - j)) for i in range(th) for j in range(0, count, unit)]
        loads = []
        for (i, j, n), v in zip(pieces, self.regs, strict=False):
            if self.filler is not None:
                loads.append(self.filler)
            elif key.col[0]:
                load_some(a, key.tier, v, Mem(self.src[0], (i * key.row[0] + j) * size), n * size, self.mask)
                loads.append(v)
            else:
                if j == 0:
                    self._broadcast(v, Mem(self.src[0], i * key.row[0] * size))
                loads.append(v if j == 0 else loads[-1])
        for (i, j, n), v in zip(pieces, loads, strict=True):
            store_some(a, key.tier, self._out(i, j), v, n * size, self.mask)

    def _singles(self, count: int) -> None:
        a, key = self.a, self.key
        size = key.size(-1)
        with a.scope():
            temps = [a.gpr(f"element{i}") for i in range(2)]
            for j in range(count):
                t = temps[j % 2]
                mem = Mem(self.src[0], j * key.col[0] * size, size=8 * size)
                if size == 4:
                    a.mov(t.r32, mem)
                    a.mov(self._out(0, j), t.r32)
                else:
                    a.movzx(t.r32, mem)
                    a.mov(self._out(0, j), t.r8 if size == 1 else t.r16)


@dataclass(frozen=True)
class BlockTransposeKey(TransposeKey):
    """Transposition of `batch` blocks at distances that a table says (`table_at` bytes into the constants)."""

    src_pitch: int = 0
    dst_pitch: int = 0
    table_at: int = 0

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"transpose-{self.src}-{self.tier.name}"

    @property
    def pitches(self) -> tuple[int, int]:
        """Bytes between rows of the source, and between rows of the destination."""
        return self.src_pitch, self.dst_pitch

    @property
    def staged(self) -> bool:
        """Scratch is for dense planes."""
        return False

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        return _BlockTranspose(self, features).build()


class _BlockTranspose(TransposeCode):
    """Transposes at any distance."""

    key: BlockTransposeKey

    def _find_image(self, image: Reg) -> None:
        a, r = self.a, self.r
        a.shl(image, 4)
        a.add(image, r["consts"])
        a.mov(r["src"], Mem(image, self.key.table_at))
        a.mov(r["dst"], Mem(image, self.key.table_at + 8))


def move_launches(move: Move, size: int, tier: TierCode, extras: frozenset[str] = frozenset()) -> list[Launch]:
    """Launches of a copy of elements of `size` bytes (1, 2, 4 or 8); `extras` as for `reorder_image`."""
    shape, src, dst = move.shape, move.src, move.dst
    src_offset, dst_offset = move.src_offset, move.dst_offset
    if size == 8:
        shape, size = (*shape, 2), 4
        src, dst = ((*(2 * s for s in strides), 1) for strides in (src, dst))
        src_offset, dst_offset = 2 * src_offset, 2 * dst_offset
    dims: list[Dim] = collapse(shape, [src, dst])
    inner = dims[-1][1] if dims else (1, 1)
    along = next((i for i, (_, strides) in enumerate(dims) if strides[0] == 1), None)
    if inner[0] not in (0, 1) and inner[1] == 1 and along is not None:
        return _transposed(dims, along, size, tier, (src_offset, dst_offset), extras)
    if inner == (1, 1):
        # Bytes are as good as elements, and have one kernel for all sizes.
        *outer, (n, _) = dims or [(1, inner)]
        dims = [*((m, (s * size, d * size)) for m, (s, d) in outer), (n * size, inner)]
        src_offset, dst_offset, size = src_offset * size, dst_offset * size, 1
    elif inner[1] != 1:
        dims.append((1, (1, 1)))
    key = _copy_key(tier, (KIND[size], KIND[size]))
    parts = _parts(key, dims)
    return [(k, Run(c)) for k, c in make_launches(key, parts, aligned(64), (src_offset, dst_offset))]


def _copy_key(tier: TierCode, kinds: tuple[DType, ...]) -> CopyKey:
    none = (0,) * len(kinds)
    return CopyKey("copy" if len(kinds) > 1 else "fill", tier, kinds, 1, 1, none, none, none, 1, 1, 0)


def _parts(key: CopyKey, dims: list[Dim]) -> Any:
    col = dims[-1][1] if dims else (1,) * len(key.kinds)

    def tile_rows(cols: int) -> int:
        return replace(key, cols=cols, rows=1 << 20, col=col).tile_rows

    return blocks(dims, len(key.kinds), key.unit, tile_rows, lambda cols: cols * sum(SIZE[k] for k in key.kinds))


def fill_launches(fill: Fill, value: npt.NDArray[Any], tier: TierCode) -> list[Launch]:
    """Launches that fill a block with a value (an array of one element of 1, 2 or 4 bytes)."""
    key = _copy_key(tier, (KIND[value.itemsize],))
    consts = aligned(64)
    consts[:] = np.resize(value.reshape(1).view(np.uint8), 64)
    dims = collapse(fill.shape, [fill.dst])
    if dims and dims[-1][1] != (1,):
        dims.append((1, (1,)))
    return [(k, Run(c)) for k, c in make_launches(key, _parts(key, dims), consts, (fill.dst_offset,))]


def _transposed(
    dims: list[Dim], along: int, size: int, tier: TierCode, offsets: tuple[int, int], extras: frozenset[str]
) -> list[Launch]:
    """Blocks of the source's innermost dimension by the destination's."""
    (cols, (_, dst_pitch)), (rows, (src_pitch, _)) = dims[along], dims[-1]
    distances = np.array([offsets], np.int64)
    for n, strides in [d for i, d in enumerate(dims[:-1]) if i != along]:
        distances = (distances[:, None] + np.arange(n)[:, None] * np.array(strides, np.int64)).reshape(-1, 2)
    count = len(distances)
    if (src_pitch, dst_pitch) == (cols, rows) and (distances == np.arange(count)[:, None] * rows * cols).all():
        plain, to_nhwc = make_affine(src=KIND[size], out=KIND[size]), rows <= cols
        image = (count, rows, cols) if to_nhwc else (count, cols, rows)
        return [*reorder_image(plain, tier, image, to_nhwc=to_nhwc, extras=extras)]
    block = aligned(64 + distances.nbytes)
    block[64:] = (distances * size).view(np.uint8).reshape(-1)
    key = BlockTransposeKey(
        tier, count, rows, cols, KIND[size], KIND[size], None, False, False, True, src_pitch=src_pitch * size,
        dst_pitch=dst_pitch * size, table_at=64,
    )  # fmt: skip
    return [(key, Run(block))]
