"""The checkout's driver, as far as it can be tested without installing anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("build.py", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "vnnigen/runtime/csrc", tmp_path / "vnnigen/runtime/csrc")
    return tmp_path


def build(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(checkout / "build.py"), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def pretend_installed(checkout: Path, extra: str) -> None:
    """Make an environment whose Python and vnnigen only report how they are called."""
    folder = checkout / ".venv/bin"
    folder.mkdir(parents=True)
    for name in ("python", "vnnigen", "pip"):
        (folder / name).write_text(f'#!/bin/sh\necho "{name}: $*"\n')
        (folder / name).chmod(0o755)
    code = "import sys, build; print(build.fingerprint(sys.argv[1]))"
    command = [sys.executable, "-c", code, extra]
    found = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    (checkout / ".venv/vnnigen-installed").write_text(f"{extra} {found.stdout}")


def test_no_compiler_is_one_sentence(checkout: Path) -> None:
    done = build(checkout, "test", PATH="/nonexistent", CC="")
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "install gcc or clang" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(("arguments", "code"), [((), 2), (("fly",), 2), (("--help",), 0)])
def test_usage(checkout: Path, arguments: tuple[str, ...], code: int) -> None:
    done = build(checkout, *arguments)
    assert done.returncode == code
    assert "python build.py demo" in done.stdout


@pytest.mark.parametrize(
    ("extra", "arguments", "last_line"),
    [
        ("demo", ["demo", "--int8", "a b"], "vnnigen: demo --int8 a b"),
        ("dev", ["demo"], "vnnigen: demo"),
        ("dev", ["test", "-k", "pool"], " --dist worksteal -k pool"),
        ("dev", ["install"], "is up to date"),
    ],
)
def test_second_run_installs_nothing(checkout: Path, extra: str, arguments: list[str], last_line: str) -> None:
    pretend_installed(checkout, extra)
    done = build(checkout, *arguments, PATH="/nonexistent:/bin:/usr/bin")
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout
    assert done.stdout.splitlines()[-1].endswith(last_line)


@pytest.mark.parametrize(
    ("extra", "verb", "changed", "target"),
    [
        ("demo", "demo", "vnnigen/runtime/csrc/call.c", ".[demo]"),
        ("demo", "demo", "vnnigen/new.py", ".[demo]"),
        ("demo", "test", None, "-e .[dev]"),
        ("dev", "test", "vnnigen/runtime/csrc/call.c", "-e .[dev]"),
        ("dev", "test", "pyproject.toml", "-e .[dev]"),
        ("dev", "demo", "build.py", "-e .[dev]"),
        ("dev", "test", "vnnigen/new.py", None),
    ],
)
def test_what_a_change_installs(checkout: Path, extra: str, verb: str, changed: str | None, target: str | None) -> None:
    pretend_installed(checkout, extra)
    if changed:
        with (checkout / changed).open("a") as file:
            file.write("\n")
    done = build(checkout, verb)
    assert done.returncode == 0, done.stderr
    called = [line for line in done.stdout.splitlines() if line.startswith("python: -m pip install")]
    installed = [line.split("version-check ")[1] for line in called if "--no-deps" not in line]
    assert installed == ([target] if target else [])
    assert len(called) == 2 * len(installed)  # each time with the demo's data
    assert "up to date" in build(checkout, verb).stdout
