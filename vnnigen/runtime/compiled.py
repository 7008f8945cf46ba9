"""From kernel keys to callable code: generate once, check the machine, load, remember."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from vnnigen.isa import tiers
from vnnigen.isa.assembler import Code
from vnnigen.kernels.ahead import first_bytes, share_out
from vnnigen.kernels.layout import (
    ARG_AHEAD,
    ARG_AHEAD_FROM,
    ARG_AHEAD_SHARE,
    ARG_CONSTS,
    ARG_NEXT,
    ARG_NEXT_SHARE,
    ARG_SLOTS,
    ARG_WEIGHTS,
)
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.nest import NestKey
from vnnigen.runtime import codemem, kernel_store, native
from vnnigen.runtime.cache import KernelCache


class KernelKey(Hashable, Protocol):
    """A frozen, hashable description of one kernel that can generate its code."""

    @property
    def name(self) -> str:
        """The kernel's name."""

    @property
    def tier(self) -> TierCode:
        """The tier it is generated for."""

    @property
    def steps(self) -> int:
        """Steps of its grid."""

    @property
    def scratch(self) -> int:
        """Bytes of scratch one step needs."""

    @property
    def tile_config(self) -> bytes | None:
        """The AMX tile configuration (64 bytes) under which the code runs, None if it uses no tiles."""

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""


@dataclass(frozen=True, eq=False)
class Compiled:
    """A kernel ready to run, and what it cost to make; `stored` says that it came from the cache on disk."""

    key: KernelKey
    loaded: codemem.LoadedCode
    jit_ms: float
    stored: bool = False

    @cached_property
    def code(self) -> Code:
        """The code with its listing, generated anew: what makes a listing takes far more memory than the code."""
        return generate(self.key)


_CACHE: KernelCache[KernelKey, Compiled] = KernelCache()


def generate(key: KernelKey) -> Code:
    """Generate a kernel's code for its tier, on any machine."""
    return key.build(tiers.tier(key.tier.name).features)


def compiled(key: KernelKey) -> Compiled:
    """The executable kernel of a key, generated once, or found in the cache on disk (see `kernel_store`).

    Raises:
        ISAError: when the code needs features that this machine, or the cap, does not have.
        VnnigenError: when VNNIGEN_KERNEL_CACHE is neither on nor off.

    """
    return _CACHE.get(key, lambda: _find_or_compile(key))


def _find_or_compile(key: KernelKey) -> Compiled:
    start = time.perf_counter()
    # A dump needs the listing, which is not stored.
    place = None if codemem.dump_folder() else kernel_store.path_of(key)
    found = None if place is None else kernel_store.load(*place)
    if found is not None:
        tiers.require(found.features, found.name)
        return Compiled(key, codemem.load(found), (time.perf_counter() - start) * 1e3, stored=True)
    code, new = _generate_and_load(key)
    if place is not None:
        kernel_store.save(*place, code)
    return new


def compile_new(key: KernelKey) -> Compiled:
    """Generate and load a kernel that no cache keeps.

    Raises:
        ISAError: when the code needs features that this machine, or the cap, does not have.

    """
    return _generate_and_load(key)[1]


def _generate_and_load(key: KernelKey) -> tuple[Code, Compiled]:
    start = time.perf_counter()
    code = generate(key)
    # What counts is what was emitted, not what the tier promises.
    tiers.require(code.features, code.name)
    return code, Compiled(key, codemem.load(code), (time.perf_counter() - start) * 1e3)


#: Gives a key's kernel: `compiled`, or `compile_new` for one that is not to stay.
Getter = Callable[[KernelKey], Compiled]


class Runner(Protocol):
    """What `Bound` needs of packed weights: the arrays of one launch."""

    @property
    def weights(self) -> Any:
        """Packed weights."""

    @property
    def consts(self) -> Any:
        """Constant block."""


class Launches:
    """Kernels in the native descriptor that `vg_call` takes; the template of its argument block is all zeros."""

    def __init__(self, keys: Sequence[KernelKey], get: Getter = compiled) -> None:
        """Compile every key, with `get`, and fill the descriptor's launches."""
        self.keys = tuple(keys)
        self.kernels = [get(key) for key in keys]
        self._configs = [key.tile_config for key in keys]
        ffi = native.ffi
        k = ffi.new("vg_kernel *")
        k.n_launch = len(self.keys)
        k.n_args = ARG_SLOTS
        for i, (key, kernel, config) in enumerate(zip(self.keys, self.kernels, self._configs, strict=True)):
            k.launch[i].fn = ffi.cast("vg_fn", kernel.loaded.address)
            k.launch[i].count = key.steps
            k.launch[i].scratch_bytes = key.scratch
            k.launch[i].tile_config = ffi.NULL if config is None else ffi.from_buffer(config)
        self.descriptor = k


class Bound(Launches):
    """Kernels bound to packed weights."""

    def __init__(self, keys: Sequence[KernelKey], runs: Sequence[Runner], get: Getter = compiled) -> None:
        """Compile every key and fill the descriptor; `runs` holds each launch's arrays."""
        super().__init__(keys, get)
        self.runs = runs
        for i, run in enumerate(runs):
            self.descriptor.args[ARG_WEIGHTS + 2 * i] = run.weights.ctypes.data
            self.descriptor.args[ARG_CONSTS + 2 * i] = run.consts.ctypes.data
        self.fetch_ahead(None)

    @property
    def fetches_ahead(self) -> bool:
        """Whether the kernels bring weights near before they are read."""
        return len(self.keys) == 1 and isinstance(self.keys[0], NestKey)

    def fetch_ahead(self, following: Bound | None) -> None:
        """Let the kernels fetch, while they run, the weights that `following`, which runs next, reads first."""
        if not self.fetches_ahead:
            return
        key = self.keys[0]
        assert isinstance(key, NestKey)
        args, weights, wanted = self.descriptor.args, self.runs[0].weights, 0
        if following is not None and isinstance(first := following.keys[0], NestKey):
            args[ARG_NEXT] = following.runs[0].weights.ctypes.data
            wanted = first_bytes(first, following.runs[0].weights.nbytes)
        shares = share_out(key, weights.nbytes, wanted)
        args[ARG_AHEAD_FROM] = shares.steps
        args[ARG_AHEAD], args[ARG_AHEAD_SHARE] = weights.ctypes.data + shares.start, shares.own
        args[ARG_NEXT_SHARE] = shares.following
