"""The implicit-GEMM view that GEMM and convolution share.

A convolution multiplies a matrix whose rows are output pixels and whose columns are the K = kh*kw*ic taps of a
pixel with the weights.  That matrix is never built: each of its rows is a few *segments*, runs of consecutive bytes
of the NHWC source, and all rows share the distances between their segments.  A GEMM is the case of one segment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

from vnnigen.kernels.mac import Mac
from vnnigen.kernels.problem import ConvProblem, GemmProblem

SRC_BYTES = {"u8": 1, "s8": 1, "bf16": 2, "f32": 4}


@dataclass(frozen=True)
class Geometry:
    """Sizes, in elements, of one implicit GEMM: `images * oh * ow` rows, `groups * n` columns.

    `h`, `w`, `ic` are the source's rows, columns and channels (all groups); `top`, `left` its padding. `pitch` is the
    distance of output pixels where others lie between them (a slice of a concatenation), else 0.
    """

    images: int
    groups: int
    oh: int
    ow: int
    n: int
    h: int
    w: int
    ic: int
    kh: int
    kw: int
    sh: int
    sw: int
    dh: int
    dw: int
    top: int
    left: int
    padded: bool
    src: str
    pitch: int = 0

    @property
    def icg(self) -> int:
        """Source channels of one group."""
        return self.ic // self.groups

    @property
    def k(self) -> int:
        """Multiply-accumulates of one output element."""
        return self.kh * self.kw * self.icg

    @property
    def ldo(self) -> int:
        """Elements from one output pixel to the next."""
        return self.pitch or self.groups * self.n

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole problem."""
        return self.images * self.oh * self.ow * self.groups * self.n * self.k

    @property
    def padded_w(self) -> int:
        """Source columns that one row of outputs reads, padding included."""
        return (self.ow - 1) * self.sw + (self.kw - 1) * self.dw + 1

    def strip_rows(self, oh: int) -> int:
        """Source rows that `oh` rows of outputs read, padding included."""
        return (oh - 1) * self.sh + (self.kh - 1) * self.dh + 1


@dataclass(frozen=True)
class Segments:
    """How K lies in memory: `outer` x `inner` runs of `elements`, `outer_stride` and `inner_stride` bytes apart.

    `dwords` counts the K steps of one run; the last one covers `tail` real elements (the rest meets zero weights).
    """

    outer: int
    inner: int
    elements: int
    dwords: int
    tail: int
    outer_stride: int
    inner_stride: int

    @property
    def total_dwords(self) -> int:
        """K steps of the whole multiplication."""
        return self.outer * self.inner * self.dwords


def conv_geometry(p: ConvProblem) -> Geometry:
    """The implicit GEMM of a convolution; a 1x1 one without stride and padding is one flat GEMM."""
    (top, bottom), (left, right) = p.pad
    g = Geometry(
        images=p.n, groups=p.groups, oh=p.oh, ow=p.ow, n=p.oc // p.groups, h=p.ih, w=p.iw, ic=p.ic,
        kh=p.kh, kw=p.kw, sh=p.stride[0], sw=p.stride[1], dh=p.dilation[0], dw=p.dilation[1],
        top=top, left=left, padded=bool(top or bottom or left or right), src=p.src,
    )  # fmt: skip
    if p.kh == p.kw == 1 and p.stride == (1, 1) and not g.padded:
        rows = p.n * p.oh * p.ow
        return replace(g, images=1, oh=rows, ow=1, h=rows, w=1)
    return g


def gemm_geometry(p: GemmProblem) -> Geometry:
    """A GEMM is a 1x1 convolution over M pixels of K channels."""
    return Geometry(
        images=1, groups=1, oh=p.m, ow=1, n=p.n, h=p.m, w=1, ic=p.k, kh=1, kw=1, sh=1, sw=1, dh=1, dw=1,
        top=0, left=0, padded=False, src=p.src,
    )  # fmt: skip


def needs_copy(g: Geometry, mac: Mac) -> bool:
    """Whether the source rows must go through scratch before they can be multiplied.

    They must when padding has to be there as bytes, when the element changes (s8 shifted to u8, bytes widened to
    words), and when a run of K ends inside a dword, because reading that dword could leave the operand.
    """
    seg = segments(g, mac, row_pitch=0, pixel_pitch=0)
    return g.padded or g.src != mac.element or seg.tail != mac.k_per_dword


def segments(g: Geometry, mac: Mac, *, row_pitch: int, pixel_pitch: int) -> Segments:
    """Split K into runs, given the byte pitches of the rows and pixels that will be read."""
    merged = g.groups == 1 and (g.dw == 1 or g.kw == 1)
    inner = 1 if merged else g.kw
    elements = g.kw * g.ic if merged else g.icg
    per = mac.k_per_dword
    dwords = -(-elements // per)
    return Segments(
        outer=g.kh, inner=inner, elements=elements, dwords=dwords, tail=elements - (dwords - 1) * per,
        outer_stride=g.dh * row_pitch, inner_stride=g.dw * pixel_pitch,
    )  # fmt: skip


@dataclass(frozen=True)
class TileClass:
    """`count` tiles of `size` outputs from number `first` on, whose windows see `inside` (by offset) of the image."""

    first: int
    count: int
    size: int
    inside: tuple[bool, ...]


@lru_cache(maxsize=1024)
def tile_classes(
    outputs: int, tile: int, source: int, stride: int, kernel: int, dilation: int, before: int
) -> tuple[TileClass, ...]:
    """Cut a row (or column) of `outputs` into tiles and group neighbours with the same size and padding."""

    def describe(t: int) -> tuple[int, tuple[bool, ...]]:
        size = min(tile, outputs - t * tile)
        reach = (size - 1) * stride + (kernel - 1) * dilation + 1
        start = t * tile * stride - before
        return size, tuple(0 <= start + i < source for i in range(reach))

    found = []
    for (size, inside), members in groupby(range(-(-outputs // tile)), describe):
        tiles = list(members)
        found.append(TileClass(tiles[0], len(tiles), size, inside))
    return tuple(found)


def row_classes(g: Geometry, th: int) -> tuple[TileClass, ...]:
    """Classes of rows of tiles `th` outputs high; a problem without padding has a full one and a tail."""
    if g.padded:
        return tile_classes(g.oh, th, g.h, g.sh, g.kh, g.dh, g.top)
    full, tail = divmod(g.oh, th)
    reach = g.strip_rows(th)
    classes = [TileClass(0, full, th, (True,) * min(reach, 1 << 12))] if full else []
    return (*classes, TileClass(full, 1, tail, (True,) * min(g.strip_rows(tail), 1 << 12))) if tail else (*classes,)


def taps_inside(g: Geometry, rows: TileClass) -> tuple[int, int]:
    """First and past-the-last filter row that meets the image anywhere in a row of tiles."""
    used = [
        kr for kr in range(g.kh) if any(rows.inside[h * g.sh + kr * g.dh] for h in range(rows.size))
    ] if g.padded else list(range(g.kh))  # fmt: skip
    return (used[0], used[-1] + 1) if used else (0, 0)
