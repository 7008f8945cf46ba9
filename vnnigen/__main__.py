"""`python -m vnnigen` is the `vnnigen` command."""

from vnnigen.cli import main

main()
