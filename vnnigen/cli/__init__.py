"""The `vnnigen` command: `probe`, `bench`, `explain`, `compile`, `run`, `demo`.

With `--json`, standard output holds JSON and nothing else. What vnnigen refuses (any VnnigenError) is one
line on standard error and exit status 2.

A module here holds the commands of one subject. Those of a group in `app` register themselves, the others below, in
the order of the help. Options that several commands share are in `options`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vnnigen.cli import demo, kernels, network, probe
from vnnigen.cli.app import app
from vnnigen.errors import VnnigenError

__all__ = ["demo", "kernels", "main", "network", "probe"]

app.command()(probe.probe)
app.command("compile")(network.compile_)
app.command()(network.run)
app.command()(demo.demo)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and one line on standard error for what vnnigen refuses."""
    try:
        app(args=args, prog_name="vnnigen")
    except VnnigenError as error:
        print(f"vnnigen: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
