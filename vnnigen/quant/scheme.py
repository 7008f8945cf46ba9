"""What the user may choose about quantization, and what the choices mean for one value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import numpy as np

from vnnigen.errors import QuantizationError
from vnnigen.graph.ir import Graph, Node, Precision, ValueQuant
from vnnigen.kernels.qparams import choose_qparams

Activations = Literal["asymmetric", "symmetric"]
Granularity = Literal["channel", "tensor"]
Method = Literal["minmax", "kl", "percentile"]
First = Literal["auto", "u8", "s8", "bf16", "f32"]
Last = Literal["int8", "bf16", "f32"]
ByteType = Literal["u8", "s8"]


@dataclass(frozen=True)
class QuantConfig:
    """Choices of static post-training quantization.

    `activations`: "asymmetric" is u8 with a zero point, "symmetric" is s8 without one (u8 for values never negative).
    `weights`: one scale per output "channel", or per "tensor"; always symmetric.
    `method`: how ranges are chosen from what calibration saw: all of it ("minmax"), what loses least information
    ("kl"), or what `percentile` per cent of the elements lie in.
    `first`: the type that the first layers read; "auto" follows `activations` and the range of the input. "bf16" and
    "f32" keep those layers out of int8; likewise `last`, whose results are f32 in any case.
    `bias_correction`: take the mean error that rounded weights make out of the bias (Nagel et al. 2019, "Data-Free
    Quantization Through Weight Equalization and Bias Correction", section 4.2, with means observed in calibration).
    `equalization`: give the channels that enter depthwise convolutions one range (same paper, section 4.1).
    `overrides`: glob patterns of names of nodes or operators, and the precision of nodes that match; of several that
    match, the last counts, and they count more than `first` and `last`.

    Raises QuantizationError, naming the field, for a value that is none of these.
    """

    activations: Activations = "asymmetric"
    weights: Granularity = "channel"
    method: Method = "minmax"
    percentile: float = 99.99
    first: First = "auto"
    last: Last = "int8"
    bias_correction: bool = True
    equalization: bool = True
    overrides: Mapping[str, Precision] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields."""
        choices: dict[str, Any] = {
            "activations": Activations, "weights": Granularity, "method": Method, "first": First, "last": Last,
        }  # fmt: skip
        for name, kind in choices.items():
            _check_choice(name, getattr(self, name), get_args(kind))
        number = isinstance(self.percentile, (int, float)) and not isinstance(self.percentile, bool)
        if not number or not 50 < self.percentile <= 100:
            raise QuantizationError(f"percentile must be above 50 and at most 100, not {self.percentile!r}")
        for name in ("bias_correction", "equalization"):
            if not isinstance(getattr(self, name), bool):
                raise QuantizationError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.overrides, Mapping):
            raise QuantizationError(f"overrides must map patterns to precisions, not {self.overrides!r}")
        for pattern, precision in self.overrides.items():
            if not isinstance(pattern, str) or not pattern:
                raise QuantizationError(f"overrides: a pattern must be a text, not {pattern!r}")
            _check_choice(f"overrides[{pattern!r}]", precision, get_args(Precision))
        object.__setattr__(self, "overrides", dict(self.overrides))

    def override(self, node: Node) -> tuple[Precision, str] | None:
        """The precision that the user wants a node to have and the pattern that says so, None if there is none."""
        found = None
        for pattern, precision in self.overrides.items():
            if fnmatchcase(node.name, pattern) or fnmatchcase(node.op, pattern):
                found = precision, pattern
        return found

    def check_patterns(self, graph: Graph) -> None:
        """Raise QuantizationError for a pattern of `overrides` that matches no node: it may be misspelt."""
        names = {text for node in graph for text in (node.name, node.op)}
        for pattern in self.overrides:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise QuantizationError(f"overrides: no node and no operator matches {pattern!r}")

    def byte_type(self, low: float) -> ByteType:
        """The type of a value whose smallest element is `low`."""
        return "u8" if self.activations == "asymmetric" or low >= 0 else "s8"

    def value_quant(self, low: float, high: float, dtype: ByteType | None = None) -> ValueQuant:
        """How a value in the range [low, high] is stored; `dtype` forces a type."""
        name = self.byte_type(low) if dtype is None else dtype
        symmetric = self.activations == "symmetric"
        scale, zero_point = choose_qparams(
            low, high, dtype=np.uint8 if name == "u8" else np.int8, symmetric=symmetric
        )  # fmt: skip
        return ValueQuant(name, float(scale), int(zero_point))


def _check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise QuantizationError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
