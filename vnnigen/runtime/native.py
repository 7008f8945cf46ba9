"""Typed access to the native runtime, `vnnigen.runtime._native` (C sources in `csrc/`).

`lib` and `ffi` are cffi's; kernels are called through `lib.vg_call` and `lib.vg_call2`, which release the
GIL and answer with a code for `check`. The rest of this module wraps what the ISA probe needs.
"""

from __future__ import annotations

import os
from typing import Any

from vnnigen.errors import BuildError, VnnigenError

try:
    from vnnigen.runtime import _native
except ImportError as cause:
    raise BuildError(
        f"vnnigen's native runtime is missing or does not load ({cause}); install a C compiler "
        "(gcc or clang) and reinstall vnnigen, in a checkout with: pip install -e ."
    ) from cause

lib: Any = _native.lib
ffi: Any = _native.ffi


def check(code: int) -> None:
    """Raise VnnigenError if `code`, the result of a native function, says that it failed."""
    if code == lib.VG_OK:
        return
    if code == lib.VG_NO_SCRATCH:
        raise VnnigenError("out of memory for a kernel's scratch buffer; free memory and try again")
    if code == lib.VG_BAD_CALL:
        raise VnnigenError(
            "bad kernel descriptor: counts must not be negative, and there may be at most "
            f"{lib.VG_MAX_LAUNCH} launches and {lib.VG_MAX_ARGS} arguments"
        )
    raise VnnigenError(f"the operating system refused memory for kernels: {os.strerror(-code)}")


def is_x86() -> bool:
    """Tell whether this is an x86-64 process, which can run generated code."""
    return bool(lib.vg_is_x86())


def cpuid(leaf: int, sub: int = 0) -> tuple[int, int, int, int]:
    """Return CPUID's (eax, ebx, ecx, edx); zeros for a leaf the processor lacks and on other machines."""
    out = ffi.new("uint32_t[4]")
    lib.vg_cpuid(leaf, sub, out)
    eax, ebx, ecx, edx = out
    return eax, ebx, ecx, edx


def xgetbv(index: int = 0) -> int:
    """Return an extended control register (0: XCR0, the states the system saves), or 0 without XSAVE."""
    return int(lib.vg_xgetbv(index))


def amx_permission() -> bool:
    """Ask Linux for the right to use AMX tiles in this process; True if it is (or was already) granted."""
    return bool(lib.vg_amx_permission())
