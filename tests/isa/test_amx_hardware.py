"""AMX instructions on the processor against the emulator, bit for bit, through the runtime's own entry."""

from __future__ import annotations

import numpy as np
import pytest

from tests.isa.amx_cases import PRODUCTS, SHAPES, product_config, product_kernel
from vnnigen.isa.emulator import Emulator
from vnnigen.isa.features import features
from vnnigen.isa.memory import Memory
from vnnigen.runtime import codemem, native


def random_tiles(rng: np.random.Generator, name: str, shape: tuple[int, int, int]) -> list[np.ndarray]:
    """A, B and C as bytes: anything, or floats with specials and tiny values."""
    m, n, k = shape
    sizes = [(m, 4 * k), (k, 4 * n), (m, 4 * n)]
    if name != "tdpbf16ps":
        return [rng.integers(0, 256, s, np.uint8) for s in sizes]
    out = []
    for rows, colsb in sizes:
        scale = 2.0 ** rng.choice([0, 0, 0, -62, -63, -126], (rows, colsb // 2))
        bits = (rng.standard_normal((rows, colsb // 2)) * scale).astype("f4").view("u4") >> 16
        special = rng.choice(np.array([0x7F80, 0xFF80, 0x7FC1, 0x8000, 0x0001, 0x7F7F, 0x0080]), bits.shape)
        out.append(np.where(rng.random(bits.shape) < rng.choice([0, 0.01]), special, bits).astype("u2").view("u1"))
    return out


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_match_the_processor(name: str) -> None:
    code = product_kernel(name)
    if missing := code.features - features():
        pytest.skip(f"the processor lacks {', '.join(sorted(missing))}")
    loaded = codemem.load(code)
    ffi, lib = native.ffi, native.lib
    rng = np.random.default_rng(len(name))
    for shape in SHAPES * 3:
        a, b, c = random_tiles(rng, name, shape)
        config = product_config(*shape)
        memory = Memory()
        pointers = [memory.map("a", a), memory.map("b", b), memory.map("c", c, writable=True)]
        pitches = [x.shape[1] for x in (a, b, c)]
        Emulator(code, memory, tile_config=config).call(memory.map("args", np.array(pointers + pitches)), 0, 0)

        k = ffi.new("vg_kernel *")
        k.n_launch, k.n_args = 1, 6
        k.launch[0].fn, k.launch[0].count = ffi.cast("vg_fn", loaded.address), 1
        k.launch[0].tile_config = ffi.from_buffer(config)
        args = [*(x.ctypes.data for x in (a, b, c)), *pitches]
        assert lib.vg_call(k, 6, ffi.new("int64_t[6]", args), 1) == 0
        want, got = c, memory.array("c")
        if name == "tdpbf16ps":  # which of several NaNs wins is not documented
            nans = [np.isnan(x.view("f4")) for x in (want, got)]
            assert np.array_equal(*nans), shape
            want, got = (np.where(nans[0], 0, x.view("u4")) for x in (want, got))
        assert np.array_equal(want, got), (name, shape)
