"""The native extension's builder, and the short way to a working checkout.

`setup.py` takes `native_extension` from here (cffi, API mode). Run as a script this file makes a virtual
environment in `.venv`, installs vnnigen into it and starts something:

    python build.py demo [arguments of `vnnigen demo`]
    python build.py test [arguments of pytest]
    python build.py install
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cffi import FFI

CSRC = Path("vnnigen/runtime/csrc")  # relative: setuptools builds with the project's root as its directory
SOURCES = ("call.c", "codemem.c", "cpu.c", "pool.c", "scratch.c")


def native_extension() -> FFI:
    """Return the cffi builder of `vnnigen.runtime._native`; called by setuptools."""
    from cffi import FFI

    ffi = FFI()
    ffi.cdef((CSRC / "api.h").read_text())
    ffi.set_source(
        "vnnigen.runtime._native",
        '#include "vg.h"',
        sources=[str(CSRC / name) for name in SOURCES],
        depends=[str(CSRC / name) for name in ("api.h", "vg.h")],
        include_dirs=[str(CSRC)],
        # No -march: the processor is asked at run time, and fast code is generated there.
        extra_compile_args=["-O2", "-fvisibility=hidden"],
        libraries=["pthread"],
    )
    return ffi
