"""What of K a tile multiplies: pixels leave out the taps in which they meet padding only.

Padding adds nothing to f32 sums; what it adds to integer ones is known, and is in the start values of the pixels that
leave it out.  A filter row is cut where the pixels change that it matters to, so that each piece has a loop of its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from vnnigen.kernels.geometry import Geometry, Segments, TileClass, tile_classes
from vnnigen.kernels.mac import Mac

#: Channels from which, and outputs of a row up to which, filter columns that meet padding are worth leaving out.
EDGE_CHANNELS, EDGE_WIDTH = 32, 32


@dataclass(frozen=True)
class Taps:
    """Which taps of a tile's pixels count: row h by `rows[filter row][h]`, column w by `cols[filter column][w]`."""

    rows: tuple[tuple[bool, ...], ...]
    cols: tuple[tuple[bool, ...], ...]

    def pixels(self, row: int, tap: int) -> tuple[int, ...]:
        """The pixels, counted along the tile's rows, to which tap `tap` of filter row `row` matters."""
        width = len(self.cols[0])
        down, along = self.rows[row], self.cols[tap]
        return tuple(h * width + w for h, here in enumerate(down) if here for w in range(width) if along[w])

    def missing(self, pixel: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The taps that a pixel leaves out, by filter row."""
        if all(map(all, (*self.rows, *self.cols))):
            return ()
        found = []
        for row in range(len(self.rows)):
            taps = tuple(tap for tap in range(len(self.cols)) if pixel not in self.pixels(row, tap))
            if taps:
                found.append((row, taps))
        return tuple(found)

    def by_pixels(self) -> Counter[int]:
        """How many taps matter to how many pixels."""
        return Counter(sum(down) * sum(along) for down in self.rows for along in self.cols)


@dataclass(frozen=True)
class Piece:
    """Neighbouring taps of a filter row that matter to the same pixels: `runs` of `dwords`.

    They begin `src` bytes of source and `dword` steps of weights from the filter row's beginning.
    """

    pixels: tuple[int, ...]
    src: int
    dword: int
    runs: int
    dwords: int


@dataclass(frozen=True)
class Part:
    """`count` filter rows from `first` on with the same pieces."""

    first: int
    count: int
    pieces: tuple[Piece, ...]

    @property
    def products(self) -> int:
        """Dwords multiplied, of all pixels."""
        return self.count * sum(p.runs * p.dwords * len(p.pixels) for p in self.pieces)


def parts(seg: Segments, taps: Taps) -> tuple[Part, ...]:
    """What a tile multiplies, in K's order."""
    kw = len(taps.cols)

    def pieces(row: int) -> tuple[Piece, ...]:
        found = []
        for pixels, members in groupby(range(kw), lambda tap: taps.pixels(row, tap)):
            these = list(members)
            if not pixels:
                continue
            if seg.inner == 1:  # taps follow each other in one run
                first = these[0] * seg.dwords // kw
                found.append(Piece(pixels, 4 * first, first, 1, len(these) * seg.dwords // kw))
            else:
                first = these[0]
                found.append(Piece(pixels, first * seg.inner_stride, first * seg.dwords, len(these), seg.dwords))
        return tuple(found)

    result = []
    for same, members in groupby(range(len(taps.rows)), pieces):
        rows = list(members)
        if same:
            result.append(Part(rows[0], len(rows), same))
    return tuple(result)


def everything(size: int) -> TileClass:
    """Tiles of `size` outputs to which all taps matter."""
    return TileClass(0, 1, size, ())


def tile_taps(g: Geometry, rows: TileClass, cols: TileClass) -> Taps:
    """The taps that matter to a tile in a row and a column of tiles; those of `everything` do whatever they meet."""

    def used(tile: TileClass, taps: int, stride: int, dilation: int) -> tuple[tuple[bool, ...], ...]:
        if not tile.inside:
            return ((True,) * tile.size,) * taps
        return tuple(tuple(tile.inside[i * stride + t * dilation] for i in range(tile.size)) for t in range(taps))

    return Taps(used(rows, g.kh, g.sh, g.dh), used(cols, g.kw, g.sw, g.dw))


@lru_cache(maxsize=1024)
def cuts_columns(g: Geometry, mac: Mac) -> bool:
    """Whether tiles leave out filter columns too, each pixel its own.

    Only where a run of K is cut into long pieces of whole dwords for that, and where edges are a part of the work that
    is worth the code of more kinds of tiles.
    """
    if not g.padded or g.kw == 1 or g.groups != 1 or g.dw != 1:
        return False
    return g.ic >= EDGE_CHANNELS and g.ic % mac.k_per_dword == 0 and g.ow <= EDGE_WIDTH


def column_classes(g: Geometry, tw: int) -> tuple[TileClass, ...]:
    """Classes of tiles `tw` outputs wide along a row, by what they see of the image."""
    return tile_classes(g.ow, tw, g.w, g.sw, g.kw, g.dw, g.left)
