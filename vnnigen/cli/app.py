"""The command's groups, and how all commands print JSON."""

from __future__ import annotations

import json
from typing import Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Low-precision networks and kernels for x86 CPUs: what this machine can do, how fast, and why.",
)
bench = typer.Typer(
    no_args_is_help=True, help="Time a kernel or a network against the measured peak, and against others."
)
explain = typer.Typer(no_args_is_help=True, help="Show which kernels a problem or a network gets, and why.")
app.add_typer(bench, name="bench")
app.add_typer(explain, name="explain")


def print_json(value: dict[str, Any]) -> None:
    """Print the whole output of a command with `--json`."""
    print(json.dumps(value, indent=2))
