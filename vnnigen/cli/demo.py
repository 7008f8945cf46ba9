"""The command `demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from vnnigen.cli.options import Json, Threads


def demo(
    network: Annotated[str, typer.Option(help="mobilenet, text or digits.")] = "all",
    threads: Threads = 1,
    layers: Annotated[bool, typer.Option("--layers", help="Add the time of each layer in int8.")] = False,
    as_json: Json = False,
) -> None:
    """Run trained networks in f32 and int8: accuracy, agreement, speed (needs the extra `demo`)."""
    from vnnigen.demo.report import run_demo

    run_demo(network=network, threads=threads, layers=layers, as_json=as_json)
