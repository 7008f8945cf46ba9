"""The emulator's memory: named, bounded buffers at fake addresses, so that every stray access is an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.errors import EmulatorError

Bytes = npt.NDArray[np.uint8]

# Each buffer has 64 GiB of addresses for itself and sits in the middle of them, so that an index gone wrong
# by less than 32 GiB in either direction still names the buffer it was meant for.
_SPAN_BITS = 36
_MIDDLE = 1 << (_SPAN_BITS - 1)
_MAX_BUFFERS = 1 << (47 - _SPAN_BITS)


@dataclass(frozen=True, eq=False)
class Buffer:
    """One mapped operand: `raw` and its NumPy view `data` are the same bytes."""

    name: str
    base: int
    raw: bytearray
    data: Bytes
    writable: bool
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Memory:
    """Named buffers. Reads and writes must lie wholly inside one, writes inside a writable one."""

    def __init__(self) -> None:
        self._by_slot: dict[int, Buffer] = {}
        self._by_name: dict[str, Buffer] = {}

    def map(
        self,
        name: str,
        data: npt.ArrayLike | bytes,
        writable: bool = False,
        *,
        align: int = 64,
        skew: int = 0,
    ) -> int:
        """Map a copy of `data` (an array of any dtype and shape, taken in C order, or bytes).

        Returns its address, which is a multiple of `align` (a power of two) plus `skew`. Raises EmulatorError
        if the name is taken or there are too many buffers.
        """
        if name in self._by_name:
            raise EmulatorError(f"a buffer named {name!r} is mapped already; unmap it or choose another name")
        slot = next((s for s in range(1, _MAX_BUFFERS) if s not in self._by_slot), 0)
        if not slot:
            raise EmulatorError(f"more than {_MAX_BUFFERS - 1} buffers are mapped")
        array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.asarray(data)
        raw = bytearray(array.tobytes())
        base = (slot << _SPAN_BITS) + _MIDDLE // align * align + skew
        view = np.frombuffer(raw, np.uint8)
        buffer = Buffer(name, base, raw, view, writable, array.dtype, array.shape)
        self._by_slot[slot] = self._by_name[name] = buffer
        return base

    def unmap(self, name: str) -> None:
        """Forget a buffer; its addresses become invalid."""
        buffer = self.buffer(name)
        del self._by_name[name], self._by_slot[buffer.base >> _SPAN_BITS]

    def buffer(self, name: str) -> Buffer:
        """Return the buffer of that name; EmulatorError if there is none."""
        if name not in self._by_name:
            raise EmulatorError(f"no buffer named {name!r}; mapped are {', '.join(self._by_name) or 'none'}")
        return self._by_name[name]

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a copy of a buffer's contents, with the dtype and shape it was mapped with."""
        buffer = self.buffer(name)
        contents: npt.NDArray[Any] = buffer.data.copy().view(buffer.dtype).reshape(buffer.shape)
        return contents

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def locate(self, address: int, size: int, write: bool = False) -> tuple[Buffer, int]:
        """Return the buffer and the offset of an access; EmulatorError if it is out of bounds or not allowed."""
        buffer = self._by_slot.get(address >> _SPAN_BITS)
        if buffer is not None:
            offset = address - buffer.base
            if 0 <= offset <= len(buffer.raw) - size and (buffer.writable or not write):
                return buffer, offset
        raise EmulatorError(f"{'write' if write else 'read'} of {size} bytes {_place(buffer, address)}")

    def read_int(self, address: int, size: int) -> int:
        """Read an unsigned integer."""
        buffer, offset = self.locate(address, size)
        return int.from_bytes(buffer.raw[offset : offset + size], "little")

    def write_int(self, address: int, size: int, value: int) -> None:
        """Write the low `size` bytes of an unsigned integer."""
        buffer, offset = self.locate(address, size, write=True)
        buffer.raw[offset : offset + size] = value.to_bytes(size, "little")

    def read_lanes(self, address: int, count: int, lane: str, size: int) -> npt.NDArray[Any]:
        """Read `size` bytes = `count` lanes of a NumPy type, as a view."""
        buffer, offset = self.locate(address, size)
        lanes: npt.NDArray[Any] = np.ndarray((count,), lane, buffer.raw, offset)
        return lanes

    def read_masked(self, address: int, size: int, granule: int, mask: int) -> Bytes:
        """Read the elements (of `granule` bytes) whose mask bit is set; the others are zeros, not accessed."""
        out = np.zeros(size, np.uint8)
        if mask:
            start, stop = _extent(mask, granule)
            buffer, offset = self.locate(address + start, stop - start)
            out[start:stop] = buffer.data[offset : offset + stop - start]
        return out

    def write_masked(self, address: int, data: Bytes, granule: int, mask: int, lanes: npt.NDArray[np.bool_]) -> None:
        """Write the elements of `granule` bytes whose mask bit (the same in `mask` and `lanes`) is set."""
        if mask:
            start, stop = _extent(mask, granule)
            buffer, offset = self.locate(address + start, stop - start, write=True)
            target = buffer.data[offset : offset + stop - start].reshape(-1, granule)
            first, last = start // granule, stop // granule
            chosen = lanes[first:last]
            target[chosen] = data.reshape(-1, granule)[first:last][chosen]


def _extent(mask: int, granule: int) -> tuple[int, int]:
    """Bytes from the first to the last active element: inside one buffer iff every active element is."""
    return ((mask & -mask).bit_length() - 1) * granule, mask.bit_length() * granule


def _place(buffer: Buffer | None, address: int) -> str:
    if buffer is None:
        return f"at {address:#x}, where no buffer is mapped"
    offset, kind = address - buffer.base, "" if buffer.writable else "read-only "
    where = f"{-offset} bytes before" if offset < 0 else f"at offset {offset} of"
    return f"{where} {kind}buffer {buffer.name!r}, which has {len(buffer.raw)} bytes"
