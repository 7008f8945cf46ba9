"""AMX state: the tile configuration and eight tiles of up to 16 rows of 64 bytes.

Sources: Intel SDM volume 1, chapter 18 (programming with AMX); volume 2, LDTILECFG, STTILECFG and section 2.10
(exception classes AMX-E1 to AMX-E6). What faults on the processor is an EmulatorError here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vnnigen.errors import EmulatorError

Bytes = npt.NDArray[np.uint8]

CONFIG_BYTES = 64
NAMES, MAX_ROWS, MAX_COLSB = 8, 16, 64
"""Palette 1: number of tiles, rows, bytes per row."""

_COLSB, _ROWS = 16, 48  # where the configuration has the tiles' bytes per row (16 bits each) and rows (8 bits)


class Tiles:
    """The tile registers. Bytes outside a tile's configured shape are always zero.

    - `config`: the 64 bytes that STTILECFG would store, all zero while tiles are not configured.
    """

    def __init__(self) -> None:
        self.config = bytes(CONFIG_BYTES)
        self._data = np.zeros((NAMES, MAX_ROWS, MAX_COLSB), np.uint8)
        self._views: list[Bytes | None] = [None] * NAMES
        self._checked: dict[tuple[int, int, int], tuple[Bytes, Bytes, Bytes]] = {}

    def configure(self, config: bytes) -> None:
        """Load a configuration as LDTILECFG does; all tiles become zero.

        Raises EmulatorError where the processor raises #GP.
        """
        if len(config) != CONFIG_BYTES:
            raise EmulatorError(f"a tile configuration has {CONFIG_BYTES} bytes, not {len(config)}")
        palette = config[0]
        if palette == 0:
            self.release()
            return
        if palette != 1:
            raise EmulatorError(f"LDTILECFG: palette {palette} does not exist; use 1, or 0 to release the tiles")
        colsb = np.frombuffer(config, "<u2", NAMES, _COLSB).tolist()
        rows = list(config[_ROWS : _ROWS + NAMES])
        if any(config[2:_COLSB]) or any(config[_COLSB + 2 * NAMES : _ROWS]) or any(config[_ROWS + NAMES :]):
            raise EmulatorError("LDTILECFG: reserved bytes of the tile configuration are not zero")
        for i, (r, c) in enumerate(zip(rows, colsb, strict=True)):
            if r > MAX_ROWS or c > MAX_COLSB or (r == 0) != (c == 0):
                raise EmulatorError(
                    f"LDTILECFG: tmm{i} has {r} rows of {c} bytes; up to {MAX_ROWS} rows of up to {MAX_COLSB} "
                    "bytes are possible, and none of both for an unused tile"
                )
        self.release()
        self.config = bytes(config)
        self._views = [self._data[i, :r, :c] if r else None for i, (r, c) in enumerate(zip(rows, colsb, strict=True))]

    def release(self) -> None:
        """Return to the initial state, as TILERELEASE does."""
        self.config = bytes(CONFIG_BYTES)
        self._data[:] = 0
        self._views = [None] * NAMES
        self._checked.clear()

    def poison(self, rng: np.random.Generator) -> None:
        """Fill the configured tiles with garbage."""
        for view in self._views:
            if view is not None:
                view[:] = rng.integers(1, 256, view.shape, np.uint8)

    def tile(self, i: int) -> Bytes:
        """Return the configured part of tile `i`, rows by bytes, as a view; EmulatorError if there is none."""
        view = self._views[i]
        if view is not None:
            return view
        if not self.config[0]:
            raise EmulatorError("tiles are not configured; LDTILECFG is missing")
        raise EmulatorError(f"tmm{i} is not in the tile configuration")

    def take_start_row(self) -> int:
        """Return the row at which a load or store (re)starts, and set it to 0 as every tile instruction does."""
        start = self.config[1]
        if start:
            self.config = self.config[:1] + b"\0" + self.config[2:]
        return start

    def product(self, c: int, a: int, b: int) -> tuple[Bytes, Bytes, Bytes]:
        """Return the views of tiles for c += a * b; EmulatorError if their shapes do not fit (AMX-E4)."""
        key = (c, a, b)
        found = self._checked.get(key)
        if found is None:
            found = self._checked[key] = self._check_product(*key)
        self.take_start_row()
        return found

    def _check_product(self, c: int, a: int, b: int) -> tuple[Bytes, Bytes, Bytes]:
        tc, ta, tb = self.tile(c), self.tile(a), self.tile(b)
        (m, c_bytes), (a_rows, k_bytes), (k, b_bytes) = tc.shape, ta.shape, tb.shape
        if a_rows != m or b_bytes != c_bytes or k_bytes != 4 * k or c_bytes % 4:
            raise EmulatorError(
                f"shapes do not fit: tmm{c} has {m} rows of {c_bytes} bytes, tmm{a} {a_rows} of {k_bytes}, tmm{b} "
                f"{k} of {b_bytes}; a product wants M rows of 4*N, M of 4*K and K of 4*N"
            )
        return tc, ta, tb
