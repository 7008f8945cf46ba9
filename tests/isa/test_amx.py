"""AMX in the assembler and on the emulator; the references are in amx_cases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.isa.amx_cases import (
    INTEGER,
    PRODUCTS,
    SHAPES,
    bf16_product,
    integer_product,
    product_config,
    product_kernel,
    random_bf16,
    tile_config,
    to_bf16,
)
from vnnigen.errors import AssemblerError, EmulatorError
from vnnigen.isa.assembler import Arg, Assembler, Code, Mem
from vnnigen.isa.emulator import Emulator
from vnnigen.isa.memory import Memory
from vnnigen.isa.registry import MNEMONICS

FULL = tile_config([(16, 64)] * 8)

# -- assembler --------------------------------------------------------------------------------------------


def test_bytes_and_features() -> None:
    a = Assembler("amx")
    base, stride = a.gpr(at="rdi"), a.gpr(at="rax")
    t = [a.tile() for _ in range(8)]
    where = Mem(base, 0x40, stride)
    a.ldtilecfg(Mem(base))
    a.sttilecfg(Mem(base))
    a.tilezero(t[7])
    a.tileloadd(t[1], where)
    a.tileloaddt1(t[1], where)
    a.tilestored(where, t[1])
    a.tileloadd(t[1], Mem(base, 0x40))
    a.tilestored(Mem(base), t[1])
    a.tdpbssd(t[1], t[2], t[3])
    a.tdpbsud(t[1], t[2], t[3])
    a.tdpbusd(t[1], t[2], t[3])
    a.tdpbuud(t[1], t[2], t[3])
    a.tdpbf16ps(t[1], t[2], t[3])
    a.tilerelease()
    a.ret()
    code = a.finalize().encode()
    # As GNU as encodes them; test_encoding compares many more forms.
    assert code.data.hex(" ", 1) == " ".join(
        [
            "c4 e2 78 49 07",  # ldtilecfg [rdi]
            "c4 e2 79 49 07",  # sttilecfg [rdi]
            "c4 e2 7b 49 f8",  # tilezero tmm7
            "c4 e2 7b 4b 4c 07 40",  # tileloadd tmm1, [rdi+rax*1+0x40]
            "c4 e2 79 4b 4c 07 40",  # tileloaddt1 tmm1, [rdi+rax*1+0x40]
            "c4 e2 7a 4b 4c 07 40",  # tilestored [rdi+rax*1+0x40], tmm1
            "c4 e2 7b 4b 4c 27 40",  # tileloadd tmm1, [rdi+riz*1+0x40]: no index, the rows lie at one place
            "c4 e2 7a 4b 0c 27",  # tilestored [rdi+riz*1], tmm1
            "c4 e2 63 5e ca",  # tdpbssd tmm1, tmm2, tmm3
            "c4 e2 62 5e ca",  # tdpbsud
            "c4 e2 61 5e ca",  # tdpbusd
            "c4 e2 60 5e ca",  # tdpbuud
            "c4 e2 62 5c ca",  # tdpbf16ps
            "c4 e2 78 49 c0",  # tilerelease
            "c3",
        ]
    )
    assert code.features == {"amx_tile", "amx_int8", "amx_bf16"}


def test_rows_are_in_memory() -> None:
    a = Assembler("no_memory")
    with pytest.raises(AssemblerError, match="distance of rows in bytes, none means 0"):
        a.tileloadd(a.tile(), a.gpr())


@pytest.mark.parametrize(
    ("name", "needs"), [("tdpbusd", "amx_int8"), ("tdpbf16ps", "amx_bf16"), ("tilezero", "amx_tile")]
)
def test_features_are_required(name: str, needs: str) -> None:
    a = Assembler("none", features=frozenset({"amx_tile", "amx_int8", "amx_bf16"} - {needs}))
    operands = [a.tile() for _ in range(1 if name == "tilezero" else 3)]
    with pytest.raises(AssemblerError, match=f"needs the CPU features {needs}"):
        getattr(a, name)(*operands)


def test_eight_tiles() -> None:
    a = Assembler("pool")
    with a.scope():
        assert [a.tile().index for _ in range(8)] == list(range(8))
        with pytest.raises(AssemblerError, match="no free tile register"):
            a.tile()
    a.tile()


# -- products ---------------------------------------------------------------------------------------------


def emulate_product(name: str, c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    memory = Memory()
    pointers = [memory.map("a", a), memory.map("b", b), memory.map("c", c, writable=True)]
    args = memory.map("args", np.array([*pointers, *(x.nbytes // len(x) for x in (a, b, c))], "i8"))
    shape = (len(c), c.shape[1], len(b))
    Emulator(product_kernel(name), memory, tile_config=product_config(*shape)).call(args, 0, 0)
    return memory.array("c")


def integers(rng: np.random.Generator, shape: tuple[int, ...], lane: str) -> np.ndarray:
    info = np.iinfo(lane)
    x = rng.integers(info.min, info.max + 1, shape).astype(lane)
    return np.where(rng.random(shape) < 0.3, rng.choice([info.min, info.max], shape), x).astype(lane)


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integer_products(name: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    rng = np.random.default_rng([m, n, k, len(name)])
    a, b = integers(rng, (m, 4 * k), INTEGER[name][0]), integers(rng, (k, 4 * n), INTEGER[name][1])
    c = integers(rng, (m, n), "i4")  # extremes: sums wrap
    assert np.array_equal(emulate_product(name, c, a, b), integer_product(c, a, b))


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("ends", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_integer_extremes(name: str, ends: tuple[int, int]) -> None:
    limits = [(np.iinfo(x).min, np.iinfo(x).max)[end] for x, end in zip(INTEGER[name], ends, strict=True)]
    a, b = (np.full((16, 64), v, t) for v, t in zip(limits, INTEGER[name], strict=True))
    assert (emulate_product(name, np.zeros((16, 16), "i4"), a, b) == 64 * limits[0] * limits[1]).all()


@pytest.mark.parametrize("flavor", ["near", "wide", "tiny"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[1] * s[2] < 1000 or s == (16, 16, 16)], ids=str)
def test_bf16_products(flavor: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    rng = np.random.default_rng([m, n, k, len(flavor)])
    a, b = random_bf16(rng, (m, 2 * k), flavor), random_bf16(rng, (k, 2 * n), flavor)
    c = (rng.standard_normal((m, n)) * 2.0 ** (-125 if flavor == "tiny" else 0)).astype("f4")
    want = bf16_product(c, a, b)
    assert np.array_equal(emulate_product("tdpbf16ps", c, to_bf16(a), to_bf16(b)).view("u4"), want.view("u4"))


INF, NAN, DENORMAL, SMALLEST = np.inf, np.nan, 2.0**-127, 2.0**-126


@pytest.mark.parametrize(
    ("c", "a", "b", "bits"),
    [
        (0, (1, 1), (1, -1), 0x00000000),
        (-0.0, (0, 0), (1, 1), 0x00000000),  # sums start from +0
        (-0.0, (-0.0, -0.0), (1, 1), 0x00000000),
        (1, (INF, 0), (0, 0), 0xFFC00000),  # inf * 0: the default NaN
        (1, (INF, INF), (1, -1), 0xFFC00000),  # even + odd: inf - inf
        (INF, (-INF, 0), (1, 0), 0xFFC00000),
        (1, (NAN, 0), (1, 0), 0x7FC00000),
        (1, (1, 1), (1, NAN), 0x7FC00000),
        (1, (2.0**100, 0), (2.0**100, 0), 0x7F800000),
        (1, (2.0**100, -(2.0**100)), (2.0**100, 2.0**100), 0xFFC00000),  # each half overflows on its own
        (DENORMAL, (0, 0), (0, 0), 0x00000000),
        (0, (DENORMAL, 0), (2.0**100, 0), 0x00000000),
        (0, (SMALLEST, 0), (0.5, 0), 0x00000000),  # the product is tiny
        (-0.0, (-SMALLEST, 0), (0.5, 0), 0x00000000),  # -0 + 0
        (0, (SMALLEST, -SMALLEST), (1.5, 1), 0x00000000),  # even + odd is tiny
        (SMALLEST, (-SMALLEST, 0), (1.5, 0), 0x80000000),  # C + the sum is tiny
        (1, (2.0**-24, 2.0**-24), (1, 1), 0x3F800001),  # the halves are added before they meet C
        (1, (2.0**-24, 0), (1, 0), 0x3F800000),
    ],
)
def test_bf16_arithmetic(c: float, a: tuple[float, float], b: tuple[float, float], bits: int) -> None:
    left, right = (to_bf16(np.array([x], "f4")) for x in (a, b))
    got = emulate_product("tdpbf16ps", np.array([[c]], "f4"), left, right)
    assert int(got.view("u4")[0, 0]) == bits


def test_bf16_result_that_rounds_to_the_smallest_normal_is_flushed() -> None:
    # Pairs add up to 2**-126 in the even sum, then -2**-150: 24 bits with any exponent give less than 2**-126.
    a, b = np.zeros((1, 4), "f4"), np.zeros((2, 2), "f4")
    a[0, 0::2] = 2.0**-63, -(2.0**-75)
    b[:, 0] = 2.0**-63, 2.0**-75
    got = emulate_product("tdpbf16ps", np.zeros((1, 1), "f4"), to_bf16(a), to_bf16(b))
    assert int(got.view("u4")[0, 0]) == 0
    assert np.array_equal(got, bf16_product(np.zeros((1, 1), "f4"), a, b))


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    ("c", "a", "b"),
    [
        ((16, 64), (15, 64), (16, 64)),
        ((16, 60), (16, 64), (16, 64)),
        ((16, 64), (16, 60), (16, 64)),
        ((16, 64), (16, 64), (15, 64)),
        ((16, 62), (16, 64), (16, 62)),
    ],
)
def test_shapes_that_do_not_fit(name: str, c: tuple[int, int], a: tuple[int, int], b: tuple[int, int]) -> None:
    with pytest.raises(EmulatorError, match="shapes do not fit: tmm0"):
        run(lambda k: getattr(k, name)(*tiles(k, 3)), tile_config([c, a, b]))


@pytest.mark.parametrize("which", [(0, 0, 1), (0, 1, 0), (0, 1, 1)])
def test_tiles_of_a_product_are_different(which: tuple[int, int, int]) -> None:
    def body(k: Assembler) -> None:
        t = tiles(k, 2)
        k.tdpbusd(*(t[i] for i in which))

    with pytest.raises(AssemblerError, match="must all be different"):
        kernel(body)


# -- configuration ----------------------------------------------------------------------------------------


def tiles(a: Assembler, n: int) -> list:
    return [a.tile() for _ in range(n)]


def kernel(body: Callable[[Assembler], None]) -> Code:
    a = Assembler("amx", (Arg("p", "ptr"), Arg("pitch")))
    body(a)
    a.ret()
    return a.finalize().encode()


def run(body: Callable[[Assembler], None], config: bytes | None = None, data: object = 64 * b"\0") -> np.ndarray:
    """Run `body` with p -> data, pitch = 64; return the data after."""
    memory = Memory()
    p = memory.map("p", data, writable=True)
    Emulator(kernel(body), memory, tile_config=config).call(p, 64)
    return memory.array("p")


def changed(config: bytes, **bytes_at: int) -> bytes:
    out = bytearray(config)
    for name, value in bytes_at.items():
        out[int(name[1:])] = value
    return bytes(out)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(FULL, b0=2), "palette 2"),
        (changed(FULL, b2=1), "reserved"),
        (changed(FULL, b15=1), "reserved"),
        (changed(FULL, b32=1), "reserved"),
        (changed(FULL, b47=1), "reserved"),
        (changed(FULL, b56=1), "reserved"),
        (changed(FULL, b63=1), "reserved"),
        (changed(FULL, b16=65), "tmm0 has 16 rows of 65 bytes"),
        (changed(FULL, b19=1), "tmm1 has 16 rows of 320 bytes"),
        (changed(FULL, b51=17), "tmm3 has 17 rows"),
        (changed(FULL, b55=0), "tmm7 has 0 rows of 64 bytes"),
        (changed(FULL, b18=0), "tmm1 has 16 rows of 0 bytes"),
        (FULL[:63], "has 64 bytes, not 63"),
    ],
)
def test_bad_configurations(config: bytes, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        Emulator(kernel(lambda a: None), Memory(), tile_config=config)
    if len(config) == 64:
        with pytest.raises(EmulatorError, match=message):
            run(lambda a: a.ldtilecfg(Mem(a.load_argument("p"))), data=config)


def test_configurations_are_loaded_and_stored() -> None:
    shapes = [(16, 64), (0, 0), (3, 7), (1, 1), (16, 4), (9, 64), (0, 0), (2, 33)]

    def body(a: Assembler) -> None:
        p = a.load_argument("p")
        a.sttilecfg(Mem(p, 64))
        a.ldtilecfg(Mem(p))
        a.sttilecfg(Mem(p, 128))
        a.tilerelease()
        a.sttilecfg(Mem(p, 192))

    config = tile_config(shapes)
    got = run(body, data=np.frombuffer(config + b"\xff" * 192, np.uint8))
    assert got.tobytes() == config + bytes(64) + config + bytes(64)


@pytest.mark.parametrize(
    ("body", "before"),
    [
        (lambda a: a.ldtilecfg(Mem(a.load_argument("p"))), None),
        (lambda a: a.tilerelease(), FULL),
        (lambda a: a.ldtilecfg(Mem(a.load_argument("p"))), FULL),
    ],
)
def test_the_configuration_must_be_the_callers_at_ret(body: Callable[[Assembler], None], before: bytes | None) -> None:
    with pytest.raises(EmulatorError, match="tile configuration at ret"):
        run(body, before, tile_config([(8, 32)]))


def test_a_kernel_may_load_and_restore() -> None:
    def body(a: Assembler) -> None:
        p = a.load_argument("p")
        a.ldtilecfg(Mem(p))
        a.ldtilecfg(Mem(p, 64))

    run(body, FULL, tile_config([(1, 4)]) + FULL)


@pytest.mark.parametrize("config", [None, tile_config([(16, 64)])])
@pytest.mark.parametrize("op", ["tilezero", "tileloadd", "tilestored", "tdpbusd"])
def test_tiles_that_are_not_configured(config: bytes | None, op: str) -> None:
    def body(a: Assembler) -> None:
        t, rows = tiles(a, 4), Mem(a.load_argument("p"), index=a.load_argument("pitch"))
        operands = {"tilezero": t[2:3], "tileloadd": [t[2], rows], "tilestored": [rows, t[2]], "tdpbusd": t[1:4]}
        getattr(a, op)(*operands[op])

    with pytest.raises(EmulatorError, match="LDTILECFG is missing" if config is None else "not in the tile config"):
        run(body, config)


def test_tiles_arrive_as_garbage_and_a_configuration_clears_them() -> None:
    def body(a: Assembler) -> None:
        p, pitch, t = a.load_argument("p"), a.load_argument("pitch"), a.tile()
        a.tilestored(Mem(p, index=pitch), t)
        a.ldtilecfg(Mem(p, 2048))
        a.tilestored(Mem(p, 1024, index=pitch), t)

    got = run(body, FULL, np.frombuffer(bytes(2048) + FULL, np.uint8))
    assert got[:1024].all()
    assert not got[1024:2048].any()


# -- loads and stores -------------------------------------------------------------------------------------


def copy_kernel(name: str = "tileloadd") -> Code:
    """Tile tmm0 from (src, pitch) to (dst, pitch)."""
    a = Assembler("copy", [Arg(n, "i64") for n in ("src", "src_pitch", "dst", "dst_pitch")])
    src, src_pitch, dst, dst_pitch = (a.load_argument(n) for n in ("src", "src_pitch", "dst", "dst_pitch"))
    t = a.tile()
    getattr(a, name)(t, Mem(src, 8, src_pitch))
    a.tilestored(Mem(dst, -8, dst_pitch, 2), t)
    a.ret()
    return a.finalize().encode()


@given(
    rows=st.integers(1, 16),
    colsb=st.integers(1, 64),
    src_pitch=st.integers(-80, 80),
    dst_pitch=st.integers(-50, 50),
    name=st.sampled_from(["tileloadd", "tileloaddt1"]),
)
@settings(deadline=None, max_examples=200)
def test_rows_are_moved(rows: int, colsb: int, src_pitch: int, dst_pitch: int, name: str) -> None:
    rng = np.random.default_rng(rows * 64 + colsb)
    src = rng.integers(0, 256, 16 * 80 + 64, np.uint8)
    dst = rng.integers(0, 256, 16 * 100 + 64, np.uint8)
    # Exactly as far into the buffer as the rows reach: a byte more would be found out.
    start = max(0, -src_pitch * (rows - 1))
    src = src[: start + max(0, src_pitch * (rows - 1)) + colsb]
    to, pitch = max(0, -2 * dst_pitch * (rows - 1)), 2 * dst_pitch
    dst = dst[: to + max(0, pitch * (rows - 1)) + colsb]
    want = dst.copy()
    for r in range(rows):  # in this order, should rows overlap
        at, from_ = to + r * pitch, start + r * src_pitch
        want[at : at + colsb] = src[from_ : from_ + colsb]
    memory = Memory()
    s, d = memory.map("src", src), memory.map("dst", dst, writable=True)
    config = tile_config([(rows, colsb)])
    Emulator(copy_kernel(name), memory, tile_config=config).call(s + start - 8, src_pitch, d + to + 8, dst_pitch)
    assert np.array_equal(memory.array("dst"), want)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize(("offset", "pitch"), [(-1, 64), (1, 64), (0, 65), (0, -1), (15 * 64, -65)])
def test_a_row_outside_the_buffer(store: bool, offset: int, pitch: int) -> None:
    def body(a: Assembler) -> None:
        rows, t = Mem(a.load_argument("p"), index=a.load_argument("pitch")), a.tile()
        a.tilestored(rows, t) if store else a.tileloadd(t, rows)

    memory = Memory()
    p = memory.map("x", bytes(1024), writable=True)
    emulator = Emulator(kernel(body), memory, tile_config=FULL)
    emulator.call(p, 64)
    emulator.call(p + 15 * 64, -64)
    with pytest.raises(EmulatorError, match=f"{'write' if store else 'read'} of 64 bytes .*'x'"):
        emulator.call(p + offset, pitch)


def test_a_store_to_a_read_only_buffer() -> None:
    memory = Memory()
    s = memory.map("src", bytes(1024))
    with pytest.raises(EmulatorError, match="read-only buffer 'src'"):
        Emulator(copy_kernel(), memory, tile_config=FULL).call(s - 8, 64, s + 8, 32)


def test_rows_without_an_index_are_one_row() -> None:
    a = Assembler("repeat", [Arg(n, "i64") for n in ("src", "dst", "pitch")])
    src, dst, pitch, t = a.load_argument("src"), a.load_argument("dst"), a.load_argument("pitch"), a.tile()
    a.tileloadd(t, Mem(src, 64))
    a.tilestored(Mem(dst, index=pitch), t)
    a.ret()
    row = np.arange(64, dtype=np.uint8)
    memory = Memory()
    source, target = memory.map("src", bytes(64) + row.tobytes()), memory.map("dst", bytes(1024), writable=True)
    Emulator(a.finalize().encode(), memory, tile_config=FULL).call(source, target, 64)
    assert (memory.read_lanes(target, 1024, "u1", 1024).reshape(16, 64) == row).all()


def test_rows_in_two_buffers() -> None:
    memory = Memory()
    first, second = memory.map("first", bytes(64)), memory.map("second", bytes(64))
    emulator = Emulator(copy_kernel(), memory, tile_config=tile_config([(2, 64)]))
    with pytest.raises(EmulatorError, match="different buffers"):
        emulator.call(first - 8, second - first, first, 0)


def test_start_row() -> None:
    """A load restarts at start_row, keeps no earlier row's reads, and leaves start_row zero."""

    def body(a: Assembler) -> None:
        p, pitch, t = a.load_argument("p"), a.load_argument("pitch"), a.tile()
        a.ldtilecfg(Mem(p))
        a.tileloadd(t, Mem(p, 128, pitch))
        a.tilestored(Mem(p, 128 + 4 * 64, pitch), t)
        a.sttilecfg(Mem(p, 64))
        a.tilerelease()

    rows = np.arange(1, 257, dtype=np.uint8).reshape(4, 64)
    got = run(body, data=np.frombuffer(tile_config([(4, 64)], 2) + bytes(64) + rows.tobytes() + bytes(256), np.uint8))
    assert got[64:128].tobytes() == tile_config([(4, 64)])
    out = got[128 + 256 :].reshape(4, 64)
    assert not out[:2].any()
    assert np.array_equal(out[2:], rows[2:])


def test_errors_name_the_instruction() -> None:
    with pytest.raises(EmulatorError, match=r"in 'amx' at offset .*tilezero tmm0\n  listing: .*tilezero"):
        run(lambda a: a.tilezero(a.tile()))


def test_the_table_has_all_of_amx() -> None:
    tile = {name for name, insn in MNEMONICS.items() if insn.kind == "tile"}
    assert tile == {"ldtilecfg", "sttilecfg", "tilerelease", "tilezero", "tileloadd", "tileloaddt1", "tilestored"} | {
        *PRODUCTS
    }
