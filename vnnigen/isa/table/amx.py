"""AMX: tile configuration, loads, stores and matrix products. Source: Intel SDM volume 2, operations.

Meanings get the machine and the operands: a tile register as its number, a memory operand as its address, a
tile load's or store's (`sibmem`) as two ints, the address of row 0 and the distance of rows in bytes.
"""

from __future__ import annotations

import numpy as np

from vnnigen.errors import EmulatorError
from vnnigen.isa.insn import insn
from vnnigen.isa.lanes import Lanes, flush, fma_flushed, nan_rule
from vnnigen.isa.machine import Machine
from vnnigen.isa.tiles import CONFIG_BYTES, Bytes

# -- configuration ----------------------------------------------------------------------------------------


@insn("ldtilecfg", kind="tile")
def _(m: Machine, address: int) -> None:
    m.tiles.configure(m.memory.read_lanes(address, CONFIG_BYTES, "u1", CONFIG_BYTES).tobytes())


@insn("sttilecfg", kind="tile")
def _(m: Machine, address: int) -> None:
    m.memory.write_int(address, CONFIG_BYTES, int.from_bytes(m.tiles.config, "little"))


@insn("tilerelease", kind="tile")
def _(m: Machine) -> None:
    m.tiles.release()


# -- moves ------------------------------------------------------------------------------------------------


@insn("tilezero", kind="tile")
def _(m: Machine, t: int) -> None:
    m.tiles.tile(t)[:] = 0
    m.tiles.take_start_row()


def _rows(m: Machine, tile: Bytes, address: int, stride: int, write: bool) -> Bytes:
    """Return the rows of a tile in memory, as a view; EmulatorError if one is not wholly inside the buffer."""
    rows, size = tile.shape
    buffer, offset = m.memory.locate(address, size, write)
    last = address + (rows - 1) * stride
    if m.memory.locate(last, size, write)[0] is not buffer:
        raise EmulatorError(f"the rows of a tile lie in different buffers: {rows} rows, {stride} bytes apart")
    view: Bytes = np.ndarray((rows, size), np.uint8, buffer.raw, offset, (stride, 1))
    return view


@insn("tileloadd", "tileloaddt1", kind="tile")
def _(m: Machine, t: int, address: int, stride: int) -> None:
    tile = m.tiles.tile(t)
    start = m.tiles.take_start_row()
    if start < len(tile):
        tile[start:] = _rows(m, tile[start:], address + start * stride, stride, False)


@insn("tilestored", kind="tile")
def _(m: Machine, address: int, stride: int, t: int) -> None:
    tile = m.tiles.tile(t)
    start = m.tiles.take_start_row()
    if start >= len(tile):
        return
    target = _rows(m, tile[start:], address + start * stride, stride, True)
    if abs(stride) >= tile.shape[1]:
        target[:] = tile[start:]
    else:  # rows overlap: later ones win
        for to, row in zip(target, tile[start:], strict=True):
            to[:] = row


# -- products ---------------------------------------------------------------------------------------------


def _columns(b: Lanes) -> Lanes:
    """Reorder a tile of rows [k][n][4] into a matrix [4*k][n]."""
    k, width = b.shape
    matrix: Lanes = b.reshape(k, width // 4, 4).transpose(0, 2, 1).reshape(4 * k, width // 4)
    return matrix


def _integer_product(name: str, a_lane: str, b_lane: str) -> None:
    @insn(name, kind="tile")
    def _(m: Machine, c: int, a: int, b: int) -> None:
        acc, x, y = m.tiles.product(c, a, b)
        # Exact in float32, whatever the order of summation: 64 * 255 * 255 < 2**24.
        product = x.view(a_lane).astype("f4") @ _columns(y.view(b_lane)).astype("f4")
        acc.view("i4")[...] += product.astype("i4")


_integer_product("tdpbssd", "i1", "i1")
_integer_product("tdpbsud", "i1", "u1")
_integer_product("tdpbusd", "u1", "i1")
_integer_product("tdpbuud", "u1", "u1")


def _widen(bf16: Bytes) -> Lanes:
    """float32 lanes of a tile of bfloat16, denormals turned into zeros."""
    return flush((bf16.view("u2").astype("u4") << 16).view("f4"))


@insn("tdpbf16ps", kind="tile")
def _(m: Machine, c: int, a: int, b: int) -> None:
    # Nearest even, denormals are zeros (inputs) and flushed (results), whatever MXCSR says. Even and odd elements
    # of the pairs are summed apart, each with one FMA a pair starting from +0; then even + odd, then C + that.
    acc, x, y = m.tiles.product(c, a, b)
    left, right = _widen(x), _widen(y)
    pairs, columns = len(right), right.shape[1] // 2
    left = left.reshape(len(left), pairs, 1, 2)
    right = right.reshape(pairs, columns, 2)
    sums: Lanes = np.zeros((len(acc), columns, 2), np.float32)
    for k in range(pairs):
        p, q = np.broadcast_to(left[:, k], sums.shape), np.broadcast_to(right[k], sums.shape)
        sums = nan_rule(fma_flushed(p, q, sums), p, q, sums)
    even, odd = sums[..., 0], sums[..., 1]
    dot = flush(nan_rule(even + odd, even, odd))
    old = flush(acc.view("f4"))
    acc.view("f4")[...] = flush(nan_rule(old + dot, old, dot))
