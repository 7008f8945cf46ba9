"""The command `demo`."""

from __future__ import annotations

from vnnigen.cli.options import Json, Threads


def demo(threads: Threads = 1, as_json: Json = False) -> None:
    """Run a trained MobileNetV2 on photos, float against int8 (needs the extra `demo`)."""
    from vnnigen.demo.report import run_demo

    run_demo(threads=threads, as_json=as_json)
