"""The state of the emulated machine."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from vnnigen.errors import EmulatorError
from vnnigen.isa.flags import Flags
from vnnigen.isa.memory import Memory
from vnnigen.isa.tiles import Tiles

RSP = 4
CALLEE_SAVED = {"rbx": 3, "rsp": RSP, "rbp": 5, "r12": 12, "r13": 13, "r14": 14, "r15": 15}
ARGUMENTS = (7, 6, 2, 1, 8, 9)
"""Numbers of rdi, rsi, rdx, rcx, r8, r9 (System V AMD64 ABI, section 3.2.3)."""

_POISON_SEED = 0x7FC0


class Machine:
    """Registers and memory: 16 GPRs and 8 masks as Python ints, 32 vectors as a (32, 64) byte array, and AMX tiles.

    The registers are the same objects for ever, the memory may be exchanged.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.gpr = [0] * 16
        self.k = [0] * 8
        self.vectors = np.zeros((32, 64), np.uint8)
        self.flags = Flags()
        self.tiles = Tiles()
        self._lanes: dict[tuple[int, int], npt.NDArray[np.bool_]] = {}

    def reset(self, tile_config: bytes, *, poison: bool) -> None:
        """Clear all registers, or fill them with garbage, and load a configuration of tiles.

        Garbage is the same each time: random integers, and vectors whose floats are all NaN. Flags are undefined.
        """
        gpr, k, vectors = _garbage() if poison else ([0] * 16, [0] * 8, np.zeros((32, 64), np.uint8))
        self.gpr[:], self.k[:], self.vectors[:] = gpr, k, vectors
        self.flags.set(None, None, None, None, None)
        self.tiles.configure(tile_config)
        if poison:
            self.tiles.poison(np.random.default_rng(_POISON_SEED))

    def push(self, value: int) -> None:
        """Push a 64-bit value."""
        self.gpr[RSP] -= 8
        self.memory.write_int(self.gpr[RSP], 8, value)

    def pop(self) -> int:
        """Pop a 64-bit value."""
        value = self.memory.read_int(self.gpr[RSP], 8)
        self.gpr[RSP] += 8
        return value

    def lanes(self, mask: int, count: int) -> npt.NDArray[np.bool_]:
        """Return the low `count` bits of a mask as bools; callers must not write to the array."""
        key = (mask, count)
        found = self._lanes.get(key)
        if found is None:
            if len(self._lanes) > 10000:
                self._lanes.clear()
            bits = np.frombuffer(mask.to_bytes(8, "little"), np.uint8)
            found = self._lanes[key] = np.unpackbits(bits, bitorder="little")[:count].view(np.bool_)
        return found

    def check_return(self, entry: list[int], wide: bool) -> None:
        """Check the calling convention at `ret`, given the GPRs at entry.

        `wide`: ymm or zmm registers 0..15 were used, whose upper parts must now be clear (VZEROUPPER; without
        it, SSE code that runs later pays for false dependences or state transitions).

        Raises EmulatorError if a callee-saved register, the stack pointer or the upper parts are not right.
        """
        changed = [name for name, i in CALLEE_SAVED.items() if self.gpr[i] != entry[i] + 8 * (i == RSP)]
        if changed:
            raise EmulatorError(f"callee-saved registers are not restored at ret: {', '.join(changed)}")
        if wide and self.vectors[:16, 16:].any():
            raise EmulatorError("upper halves of ymm registers are not clear at ret; VZEROUPPER is missing")


@cache
def _garbage() -> tuple[list[int], list[int], npt.NDArray[np.uint8]]:
    """GPRs, masks and vectors of a poisoned machine."""
    rng = np.random.default_rng(_POISON_SEED)
    gpr, k = rng.integers(2**63, 2**64, 16, np.uint64).tolist(), rng.integers(0, 2**64, 8, np.uint64).tolist()
    words = np.empty((32, 32), np.uint16)
    words[:, 0::2] = rng.integers(1, 2**16, (32, 16))
    words[:, 1::2] = 0x7FC0 | rng.integers(0, 64, (32, 16))
    return gpr, k, words.view(np.uint8)
