"""Fetching ahead: what a kernel brings into the L2 cache while it multiplies.

A network's weights do not fit the caches near a core, and a processor's own prefetching stops at every page and knows
nothing of the next layer. So the steps of a grid share out what will be read later: the rest of the kernel's own
weights, then the beginning of those of the kernel that runs next, as far as it is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from vnnigen.kernels.nest import NestKey

LINE = 64
#: Bytes of a kernel's weights that are fetched before it begins: at least, if it has so many, and at most.
FIRST_LEAST, FIRST_MOST = 64 << 10, 640 << 10


@dataclass(frozen=True)
class Shares:
    """Steps before `steps` fetch `own` bytes each of the kernel's weights from `start` on, the others `following`."""

    start: int
    steps: int
    own: int
    following: int


def first_bytes(key: NestKey, nbytes: int) -> int:
    """How many of a kernel's `nbytes` of weights are to be near before it begins: what its first strip reads."""
    if key.streams:
        return min(nbytes, FIRST_LEAST)
    if not key.columns_first:
        return min(nbytes, FIRST_MOST)
    return min(nbytes, max(_chunk_bytes(key, nbytes), FIRST_LEAST), FIRST_MOST)


def share_out(key: NestKey, nbytes: int, wanted: int) -> Shares:
    """Share out `nbytes` of a kernel's own weights and the `wanted` first bytes of the next one's."""
    if key.leaves_own or not key.columns_first:
        return Shares(nbytes, 0, 0, _lines(wanted, key.steps))
    start = first_bytes(key, nbytes)
    rest = nbytes - start
    # Evenly over all steps, but a chunk's weights must be there when its turn comes.
    own = max(_lines(rest + wanted, key.steps), _lines(_chunk_bytes(key, nbytes), key.steps // key.chunks))
    steps = -(-rest // own)
    return Shares(start, steps, own, _lines(wanted, key.steps - steps))


def _chunk_bytes(key: NestKey, nbytes: int) -> int:
    """Bytes of a whole chunk's weights."""
    return min(nbytes, nbytes * key.block_columns * key.blocking.chunk // key.padded_columns)


def _lines(nbytes: int, steps: int) -> int:
    """Bytes of whole cache lines of each of so many steps."""
    return -(-nbytes // (LINE * steps)) * LINE if steps else 0


def lines_per_turn(key: NestKey) -> int:
    """Cache lines that a turn of the K loop fetches: half as many again as its own weights take.

    None where a kernel has so few pixels that it waits for weights all the time.
    """
    b, tiles = key.blocking, key.pixel_blocks
    return 0 if tiles < b.nr else min(b.unroll, -(-3 * b.nr * b.unroll // (2 * tiles)))
