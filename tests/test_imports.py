"""Imports point one way (CONTRIBUTING.md): a module that reaches back is a mistake in where something belongs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "vnnigen").rglob("*.py"))

# Who may import whom, by the longest prefix that fits. `errors` and `runtime.native` are everybody's.
EVERYBODY = ("vnnigen.errors", "vnnigen.runtime.native", "vnnigen.runtime._native")
# Machine code in memory, threads, the cache: below kernels, knows nothing of what is computed.
BASE_RUNTIME = ("codemem", "threads", "cache", "native")
ALLOWED: dict[str, tuple[str, ...]] = {
    "vnnigen.errors": (),
    "vnnigen.isa": ("vnnigen.isa",),
    **{f"vnnigen.runtime.{name}": ("vnnigen.runtime.native",) for name in BASE_RUNTIME},
    "vnnigen.kernels": ("vnnigen.isa", "vnnigen.kernels"),
    "vnnigen.runtime": ("vnnigen.isa", "vnnigen.kernels", "vnnigen.runtime"),
    "vnnigen.ops": ("vnnigen.isa", "vnnigen.kernels", "vnnigen.runtime", "vnnigen.ops"),
    "vnnigen.graph": ("vnnigen.isa", "vnnigen.kernels", "vnnigen.runtime", "vnnigen.ops", "vnnigen.graph"),
    "vnnigen.quant": ("vnnigen.kernels", "vnnigen.runtime", "vnnigen.ops", "vnnigen.graph", "vnnigen.quant"),
}
# The rest (tuning, bench, demo, cli, the package itself) stands on top and may import anything below.
TOP = (
    "vnnigen", "vnnigen.cli", "vnnigen.compiler", "vnnigen.__main__", "vnnigen.bench", "vnnigen.demo", "vnnigen.tuning",
)  # fmt: skip
# These parts must not import the top, whatever else they may.
ORDER_OF_TOP = {"vnnigen.bench": ("vnnigen.cli",), "vnnigen.demo": ("vnnigen.cli",), "vnnigen.tuning": ("vnnigen.cli",)}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import, also those inside functions, except for type checkers only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide what is imported"
            for alias in node.names:
                # `from vnnigen.runtime import native` imports a module, `from vnnigen.errors import X` a name.
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT / full.replace(".", "/")).with_suffix(".py").exists() or (
                    ROOT / full.replace(".", "/")
                ).is_dir()
                yield node.lineno, full if is_module or full in EVERYBODY else str(node.module)


def rule(name: str) -> tuple[str, ...] | None:
    """What a module may import; None for anything."""
    fitting = [prefix for prefix in ALLOWED if within(name, prefix)]
    return ALLOWED[max(fitting, key=len)] if fitting else None


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    name = module_name(path)
    allowed = rule(name)
    if allowed is None:
        assert any(within(name, top) for top in TOP[1:]) or name == "vnnigen", f"{name} has no place in the order"
        forbidden = next((f for prefix, f in ORDER_OF_TOP.items() if within(name, prefix)), ())
        wrong = [(line, m) for line, m in imports_of(path) if any(within(m, f) for f in forbidden)]
    else:
        wrong = [
            (line, m)
            for line, m in imports_of(path)
            if within(m, "vnnigen") and not any(within(m, a) for a in (*allowed, *EVERYBODY))
        ]
    assert not wrong, f"{name} must not import {wrong}"


def test_the_rule_bites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports of every form are seen."""
    source = (
        "from typing import TYPE_CHECKING\nimport vnnigen.ops.conv\nfrom vnnigen.kernels import mac\n"
        "from vnnigen.runtime import native, threads\nfrom vnnigen.errors import ShapeError\n"
        "if TYPE_CHECKING:\n    from vnnigen.cli import main\ndef f():\n    from vnnigen.tuning import search\n"
    )
    path = tmp_path / "m.py"
    path.write_text(source)
    found = [m for _, m in imports_of(path)]
    assert found == [
        "typing", "vnnigen.ops.conv", "vnnigen.kernels.mac", "vnnigen.runtime.native", "vnnigen.runtime.threads",
        "vnnigen.errors", "vnnigen.tuning",
    ]  # fmt: skip
    assert rule("vnnigen.runtime.codemem") == ("vnnigen.runtime.native",)
    assert rule("vnnigen.runtime.dispatch") == ALLOWED["vnnigen.runtime"]
    assert rule("vnnigen.cli") is None
