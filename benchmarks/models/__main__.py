"""Write a network to a file: `python -m benchmarks.models resnet50 -o resnet50.onnx [--batch 1]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx

from benchmarks.models import MODELS, build


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.models", description=(__doc__ or "").split(":")[0])
    p.add_argument("name", choices=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    p.add_argument("--batch", help="a number, or a name for a symbolic batch (default N)", default="N")
    arguments = p.parse_args()
    batch = int(arguments.batch) if arguments.batch.isdigit() else arguments.batch
    onnx.save_model(build(arguments.name, batch), arguments.output)


if __name__ == "__main__":
    main()
