"""Options that commands share, and dataclasses of options as single parameters of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter
from typing import Annotated, Any, get_type_hints

import typer

from vnnigen.bench.problem_string import ConvShape, GemmShape, parse_conv, parse_gemm
from vnnigen.bench.workload import Request
from vnnigen.errors import VnnigenError

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads to run on.")]


@dataclass(frozen=True)
class GemmOptions:
    """A matrix multiplication, by its three sizes or in benchdnn's notation."""

    m: Annotated[int | None, typer.Option("-m", min=1, help="Rows of the source.")] = None
    n: Annotated[int | None, typer.Option("-n", min=1, help="Columns of the weights.")] = None
    k: Annotated[int | None, typer.Option("-k", min=1, help="Columns of the source, rows of the weights.")] = None
    shape: Annotated[str | None, typer.Option(help="Instead of -m -n -k: MxK:KxN, as in benchdnn.")] = None

    def parse(self) -> GemmShape:
        """Return the shape; VnnigenError if it is given twice or not at all."""
        if self.shape is not None:
            if (self.m, self.n, self.k) != (None, None, None):
                raise VnnigenError("give either --shape or -m, -n and -k, not both")
            return parse_gemm(self.shape)
        if self.m is None or self.n is None or self.k is None:
            raise VnnigenError("a matrix multiplication needs -m, -n and -k, or --shape MxK:KxN")
        return GemmShape(self.m, self.n, self.k)


@dataclass(frozen=True)
class ConvOptions:
    """A convolution in benchdnn's notation."""

    shape: Annotated[str, typer.Option(help="benchdnn problem, such as mb1ic64ih56oc64oh56kh3ph1.")]

    def parse(self) -> ConvShape:
        """Return the shape; VnnigenError if the string is not one."""
        return parse_conv(self.shape)


@dataclass(frozen=True)
class KernelOptions:
    """What to multiply and on what, besides the shape."""

    dtype: Annotated[str, typer.Option(help="Source and weights: u8s8, s8s8, bf16 or f32.")] = "u8s8"
    out_dtype: Annotated[
        str | None,
        typer.Option(help="Output: u8, s8, s32, bf16 or f32.", show_default="u8; bf16 for bf16, f32 for f32"),
    ] = None
    isa: Annotated[str | None, typer.Option(help="Tier, as `vnnigen probe` names them.", show_default="the best")] = (
        None
    )
    threads: Threads = 1
    post_ops: Annotated[str, typer.Option(help="Such as relu,clip:0:6,leaky:0.1,sum:0.5,linear:2:1 in any order.")] = ""
    weights: Annotated[
        str, typer.Option(help="Random weights: full range, or safe for the fast chain without VNNI.")
    ] = "full"

    def request(self, problem: GemmOptions | ConvOptions) -> Request:
        """Return what to run; VnnigenError for a shape or value that is not known."""
        return Request(problem.parse(), self.dtype, self.out_dtype, self.isa, self.threads, self.post_ops, self.weights)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Make each field of a parameter that is a dataclass an option of its own, as Typer wants it."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    @wraps(command)
    def spread(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    options: list[Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            options.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))
            continue
        types = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = Parameter.empty if field.default is MISSING else field.default
            kind = Parameter.KEYWORD_ONLY
            options.append(Parameter(field.name, kind, default=default, annotation=types[field.name]))
    # Typer reads the one or the other, by its version.
    spread.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    spread.__annotations__ = {option.name: option.annotation for option in options}
    return spread
