"""AMX tile configurations: who loads and releases them when.

The runtime's own sources are compiled once more with the tile instructions replaced by counters and with
futex calls watched, so that the bookkeeping is tested on machines without AMX.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cffi import FFI
from iced_x86 import Decoder

from vnnigen.isa import tiers
from vnnigen.isa.assembler import Arg, Assembler, Code
from vnnigen.kernels.mac import TIER_CODE, TierCode
from vnnigen.runtime import compiled, native
from vnnigen.runtime.compiled import Bound

CSRC = Path(native.__file__).parent / "csrc"
CONFIG_BYTES = 64

FAKES = r"""
#undef syscall
#include "vg.h"
#include <linux/futex.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static __thread uint8_t current[64];
static _Atomic int64_t loads, releases, live, slept, slept_live, idle_releases;

void vg_fake_ldtilecfg(const void *config) {
    loads++;
    live += current[0] == 0;
    memcpy(current, config, 64);
}
void vg_fake_tilerelease(void) {
    releases++;
    if (current[0] == 0) idle_releases++;
    else live--;
    memset(current, 0, 64);
}
long fake_syscall(long number, ...) {
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_futex && (int)a[1] == FUTEX_WAIT_PRIVATE) {
        slept++;
        slept_live += current[0] != 0;
    }
    return syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
int64_t test_count(int which) {
    int64_t all[] = {loads, releases, live, slept, slept_live, idle_releases};
    return all[which];
}
int test_current(void) { return current[0] ? current[16] : -1; }
/* args: microseconds to sleep on the thread that called vg_call, and on others. */
static __thread int is_caller;
static _Atomic int64_t n_notes;
static int notes[4096];
void test_caller(void) { is_caller = 1; }
int test_take_notes(int *out) {
    int64_t n = n_notes;
    memcpy(out, notes, (size_t)n * sizeof *notes);
    n_notes = 0;
    return (int)n;
}
void test_unit(const int64_t *args, int64_t index, void *scratch) {
    (void)index, (void)scratch;
    notes[n_notes++] = test_current();
    if (args[!is_caller]) usleep((useconds_t)args[!is_caller]);
}
"""
COUNTS = ("loads", "releases", "live", "slept", "slept_live", "idle_releases")


Unit = int | Callable[[], object]


class Fake:
    """The runtime with counted tile instructions."""

    def __init__(self, path: Path) -> None:
        self.ffi = FFI()
        self.ffi.cdef((CSRC / "api.h").read_text())
        self.ffi.cdef("int64_t test_count(int); int test_current(void); int test_take_notes(int *);")
        self.ffi.cdef("void test_caller(void); void test_unit(const int64_t *, int64_t, void *);")
        self.lib: Any = self.ffi.dlopen(str(path))
        self.lib.test_caller()
        self.before = dict.fromkeys(COUNTS, 0)

    def count(self, name: str) -> int:
        return int(self.lib.test_count(COUNTS.index(name))) - self.before[name]

    def start(self) -> None:
        self.lib.vg_pool_trim(1)
        self.before = dict.fromkeys(COUNTS, 0)
        self.before = {name: self.count(name) for name in COUNTS}

    def call(
        self, *launches: tuple[Unit, bytes | None], nthreads: int = 1, sleep_us: tuple[int, int] = (0, 0)
    ) -> list[int]:
        """Run launches of (units, or a host function run twice; configuration).

        Return the tag of the configuration that each unit found, or -1, in the order in which they began.
        """
        ffi, k, kept = self.ffi, self.ffi.new("vg_kernel *"), []
        k.n_launch = len(launches)
        for launch, (units, tiles) in zip(k.launch, launches, strict=False):
            if callable(units):
                kept.append(ffi.callback("vg_fn", lambda _a, _i, _s, body=units: body()))
                launch.fn, launch.count = kept[-1], 2
            else:
                launch.fn, launch.count = self.lib.test_unit, units
            if tiles is not None:
                kept.append(ffi.new("char[]", tiles))
                launch.tile_config = kept[-1]
        assert self.lib.vg_call(k, 2, ffi.new("int64_t[2]", sleep_us), nthreads) == 0
        notes = ffi.new("int[4096]")
        return list(notes[0 : self.lib.test_take_notes(notes)])


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("fake_tiles")
    (folder / "fakes.c").write_text(FAKES)
    sources = [str(p) for p in sorted(CSRC.glob("*.c"))]
    flags = ["-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-DVG_FAKE_TILES", "-Dsyscall=fake_syscall"]
    command = [compiler, *flags, f"-I{CSRC}", *sources, "fakes.c", "-o", "fake.so", "-lpthread"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "fake.so"


@pytest.fixture(scope="session")
def session_fake(library: Path) -> Fake:
    return Fake(library)


@pytest.fixture
def fake(session_fake: Fake) -> Fake:
    session_fake.start()
    return session_fake


def config(tag: int) -> bytes:
    """Make a configuration that can be told from others: tmm0 has `tag` bytes a row."""
    out = bytearray(CONFIG_BYTES)
    out[0], out[16], out[48] = 1, tag, 1
    return bytes(out)


def test_no_tile_instruction_without_a_configuration(fake: Fake) -> None:
    assert fake.call((50, None), (50, None), nthreads=3) == [-1] * 100
    assert fake.count("loads") == fake.count("releases") == 0


@pytest.mark.parametrize(
    ("tags", "loads"),
    [((4,), 1), ((4, 4), 1), ((4, 8), 2), ((4, 8, 4), 3), ((4, None, 4), 1), ((None, 4), 1), ((4, None), 1)],
)
def test_loaded_when_it_changes_and_released_at_the_end(fake: Fake, tags: tuple[int | None, ...], loads: int) -> None:
    found = fake.call(*((10, None if tag is None else config(tag)) for tag in tags))
    for i, tag in enumerate(tags):
        if tag is not None:
            assert found[10 * i : 10 * i + 10] == [tag] * 10
    assert (fake.count("loads"), fake.count("releases"), fake.count("live")) == (loads, 1, 0)
    assert fake.lib.test_current() == -1


def wait_until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def test_every_thread_has_the_configuration_and_sleeps_without(fake: Fake) -> None:
    for _ in range(5):
        found = fake.call((40, config(4)), (40, config(8)), (40, config(8)), nthreads=4, sleep_us=(300, 300))
        assert found == [4] * 40 + [8] * 80
        assert fake.lib.test_current() == -1
        assert wait_until(lambda: fake.count("live") == 0)  # threads of the pool have stopped spinning
    # At most once a thread and launch, as threads may sleep between launches; there are 600 units.
    assert 2 * 5 < fake.count("loads") <= 3 * 4 * 5
    assert fake.count("slept") > 0
    assert fake.count("slept_live") == fake.count("idle_releases") == 0


def test_a_caller_that_sleeps_for_its_helpers_releases_and_loads_again(fake: Fake) -> None:
    for _ in range(10):
        # The caller begins one of two units and, when done, has to wait for the helper with the other.
        found = fake.call((2, config(4)), (1, config(4)), nthreads=2, sleep_us=(5000, 30000))
        assert found == [4, 4, 4]
    assert fake.count("slept_live") == 0
    assert fake.count("loads") > 10  # a helper took part
    assert wait_until(lambda: fake.count("live") == 0)


def test_another_configuration_in_the_same_buffer_is_noticed(fake: Fake) -> None:
    for round_ in range(50):
        tag = 4 + round_ % 8
        assert fake.call((8, config(tag)), nthreads=2, sleep_us=(50, 50)) == [tag] * 8


@pytest.mark.parametrize("inner", [None, 4, 8])
def test_after_a_nested_call_the_next_unit_has_its_configuration(fake: Fake, inner: int | None) -> None:
    found = []

    def unit() -> None:
        found.append(fake.lib.test_current())
        fake.call((3, None if inner is None else config(inner)))

    fake.call((unit, config(4)))
    assert found == [4, 4]
    assert fake.count("live") == fake.count("idle_releases") == 0


def test_ending_threads_release(fake: Fake) -> None:
    fake.call((30, config(4)), nthreads=3, sleep_us=(300, 300))
    fake.lib.vg_pool_trim(1)
    assert fake.count("live") == 0
    assert fake.count("loads") == fake.count("releases") > 1


def test_instruction_bytes() -> None:
    listed = re.findall(r'"\.byte ([^"]+)"', (CSRC / "tiles.c").read_text())
    code = [bytes(int(x, 16) for x in line.split(",")) for line in listed]
    assert [str(next(Decoder(64, c))) for c in code] == ["ldtilecfg [rax]", "tilerelease"]


# The Python side


@dataclass(frozen=True)
class Key:
    tile_config: bytes | None
    name: str = "nothing"
    tier: TierCode = TIER_CODE["avx2"]
    steps: int = 3
    scratch: int = 0

    def build(self, features: frozenset[str] | None) -> Code:
        a = Assembler(self.name, (Arg("args", "ptr"), Arg("i"), Arg("scratch", "ptr")), features)
        a.ret()
        return a.finalize().encode()


@dataclass
class Run:
    weights: np.ndarray
    consts: np.ndarray


@pytest.mark.skipif("avx2" not in tiers.tiers(), reason="loads code for x86-64 with AVX2")
def test_bound_passes_the_keys_configurations() -> None:
    arrays = Run(np.zeros(1), np.zeros(1))
    bound = Bound([Key(config(4)), Key(None), Key(config(8))], [arrays] * 3)
    found = []
    for i in range(3):
        pointer = bound.descriptor.launch[i].tile_config
        found.append(None if pointer == native.ffi.NULL else bytes(native.ffi.buffer(pointer, CONFIG_BYTES)))
    assert found == [config(4), None, config(8)]
    assert compiled.compiled(Key(None)) is bound.kernels[1]
