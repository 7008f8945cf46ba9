"""Where a kernel finds its operands: argument slots, and the block of constants that packing fills.

A kernel is called as `fn(args, index, scratch)`; `args` is an array of 64-bit slots.  The first six are set at each
call, the rest once when a handle is prepared.  All per-column vectors and per-kernel scalars live in one constant
block, so that a kernel's code depends on shapes and never on values: layers of one shape share one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

ARG_SRC = 0
ARG_DST = 1
ARG_TENSORS = 2
MAX_TENSORS = 4
#: Weights and constants of launch i are at ARG_WEIGHTS + 2*i and ARG_CONSTS + 2*i.
ARG_WEIGHTS = ARG_TENSORS + MAX_TENSORS
ARG_CONSTS = ARG_WEIGHTS + 1
MAX_LAUNCHES = 4
#: What the grid's steps fetch into the L2 cache meanwhile. Steps before ARG_AHEAD_FROM: ARG_AHEAD_SHARE bytes each of
#: what lies at ARG_AHEAD, one step's bytes behind the other's; those after it the same of ARG_NEXT.
ARG_AHEAD_FROM = ARG_WEIGHTS + 2 * MAX_LAUNCHES
ARG_AHEAD, ARG_AHEAD_SHARE, ARG_NEXT, ARG_NEXT_SHARE = range(ARG_AHEAD_FROM + 1, ARG_AHEAD_FROM + 5)
ARG_SLOTS = ARG_NEXT_SHARE + 1

#: Scalars (f32) a post-op chain may use in all.
MAX_SCALARS = 64


@dataclass(frozen=True)
class ConstLayout:
    """Byte offsets inside the constant block; `columns` is the padded column count of all groups.

    pad: 64 bytes of what spatial padding holds.  zero_point: 32 words of the destination's zero point.
    scalars: f32 operands of the post-ops.  init, m, b, w_zp, `taps` of what a filter row on padding adds (a tile
    that leaves such rows out starts with it), `cells` of what a single tap adds, and `vectors` for post-ops with a
    constant per channel: one 32-bit vector
    of `columns` each.
    """

    columns: int
    vectors: int = 0
    taps: int = 0
    cells: int = 0

    pad: int = 0
    zero_point: int = 64
    scalars: int = 128
    init: int = 128 + 4 * MAX_SCALARS

    @property
    def m(self) -> int:
        """Multipliers of the accumulator (f32)."""
        return self.init + 4 * self.columns

    @property
    def b(self) -> int:
        """Addends of the scaled accumulator (f32)."""
        return self.m + 4 * self.columns

    @property
    def w_zp(self) -> int:
        """Weight zero points (s32)."""
        return self.b + 4 * self.columns

    def tap(self, row: int) -> int:
        """What filter row `row` adds to the accumulator where it meets padding only (s32)."""
        return self.w_zp + 4 * self.columns * (1 + row)

    def cell(self, i: int) -> int:
        """What tap i of the filter, counted along its rows, adds where it meets padding (s32)."""
        return self.tap(self.taps + i)

    def vector(self, i: int) -> int:
        """Constants per channel of post-ops: vector i (f32)."""
        return self.tap(self.taps + self.cells + i)

    @property
    def size(self) -> int:
        """Bytes of the whole block, with room for a full vector past the last column."""
        return self.vector(self.vectors) + 64
