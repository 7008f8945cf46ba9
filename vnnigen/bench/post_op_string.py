"""Post-ops on a command line: `relu`, `clip:0:6`, `leaky:0.1`, `sum:0.5`, `gelu`, `mul`, comma-separated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vnnigen.errors import VnnigenError
from vnnigen.kernels.post_ops import (
    GELU,
    Binary,
    BinaryOp,
    Clip,
    HardSwish,
    LeakyReLU,
    Linear,
    PostOp,
    ReLU,
    Sigmoid,
    SiLU,
    Sum,
    Tanh,
)

_BINARY: tuple[BinaryOp, ...] = ("add", "sub", "mul", "max", "min")
#: name -> (constructor, least and greatest number of arguments, how to write it)
_FORMS: dict[str, tuple[Callable[..., PostOp], int, int, str]] = {
    "relu": (ReLU, 0, 0, "relu"),
    "clip": (Clip, 2, 2, "clip:LOW:HIGH"),
    "leaky": (LeakyReLU, 0, 1, "leaky[:ALPHA]"),
    "sum": (Sum, 0, 1, "sum[:SCALE]"),
    "linear": (Linear, 2, 2, "linear:ALPHA:BETA"),
    "hardswish": (HardSwish, 0, 0, "hardswish"),
    "sigmoid": (Sigmoid, 0, 0, "sigmoid"),
    "tanh": (Tanh, 0, 0, "tanh"),
    "silu": (SiLU, 0, 1, "silu[:ALPHA]"),
    "gelu": (GELU, 0, 0, "gelu"),
    "gelu_tanh": (partial(GELU, "tanh"), 0, 0, "gelu_tanh"),
    **{op: (partial(Binary, op, None), 0, 1, f"{op}[:SCALE]") for op in _BINARY},
}


class PostOpStringError(VnnigenError, ValueError):
    """A list of post-ops that cannot be read."""


def parse_post_ops(text: str) -> tuple[PostOp, ...]:
    """Read a comma-separated list of post-ops, empty for none.

    `sum`, `add`, `sub`, `mul`, `max` and `min` combine with what the output buffer held before.

    Raises PostOpStringError for an unknown name, a wrong number of arguments or one that is no number, and
    whatever the post-op itself raises for values it cannot take.
    """
    return tuple(_parse_one(part.strip()) for part in text.split(",")) if text.strip() else ()


def _parse_one(text: str) -> PostOp:
    name, *words = text.split(":")
    if name not in _FORMS:
        known = ", ".join(form for *_, form in _FORMS.values())
        raise PostOpStringError(f"post-op {text!r} is not known; write one of {known}")
    make, least, most, form = _FORMS[name]
    if not least <= len(words) <= most:
        raise PostOpStringError(f"post-op {text!r} has {len(words)} arguments; write {form}")
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise PostOpStringError(f"post-op {text!r} has an argument that is no number; write {form}") from None
    return make(*values)
