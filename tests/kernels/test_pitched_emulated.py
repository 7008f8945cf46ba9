"""Outputs with gaps between pixels, as slices of a concatenation have them: what lies in the gaps is not touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import vnnigen as v
from tests.kernels.emulation import Lowered, emulate, lower
from vnnigen.kernels.geometry import conv_geometry
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.kernels.problem import ConvProblem
from vnnigen.runtime.compiled import generate

GAP = 7


def conv(kind: str, oc: int, groups: int) -> Any:
    """A convolution of 8 channels, of the reference tier."""
    rng = np.random.default_rng(oc)
    icg = 8 // groups
    if kind == "f32":
        w = rng.standard_normal((oc, icg, 3, 3)).astype(np.float32)
        return v.Conv2dF32(w, padding=1, groups=groups, isa="reference")
    if kind == "bf16":
        w = rng.standard_normal((oc, icg, 3, 3)).astype(np.float32)
        return v.Conv2dBf16(w, padding=1, groups=groups, isa="reference")
    w = rng.integers(-128, 128, (oc, icg, 3, 3)).astype(np.int8)
    return v.Conv2dInt8(w, padding=1, groups=groups, y_scale=200.0, y_zero_point=100, x_zero_point=3, isa="reference")


def source(kind: str, shape: tuple[int, ...]) -> Any:
    rng = np.random.default_rng(5)
    if kind == "int8":
        return rng.integers(0, 256, shape).astype(np.uint8)
    x = rng.standard_normal(shape).astype(np.float32)
    return x if kind == "f32" else v.as_bf16(x) if hasattr(v, "as_bf16") else x.astype("bfloat16")


def cases() -> list[Any]:
    kinds = {"int8": ("int8", "u8"), "f32": ("f32", "f32"), "bf16": ("bf16", "bf16")}
    found = []
    for kind in kinds:
        for tier, code in TIER_CODE.items():
            if kind in code.kinds:
                found += [pytest.param(kind, tier, oc, g, id=f"{kind}-{tier}-{oc}-g{g}") for oc, g in ((21, 1), (8, 8))]
    return found


@pytest.mark.parametrize(("kind", "tier", "oc", "groups"), cases())
def test_gaps_are_not_touched(kind: str, tier: str, oc: int, groups: int) -> None:
    op = conv(kind, oc, groups)
    src: Any = {"int8": "u8"}.get(kind, kind)
    x = source(kind, (1, 5, 6, 8))
    want = op(x)
    low = lower(op, x.shape, src, tier)
    problem = op._problem(x.shape, src)
    assert isinstance(problem, ConvProblem)
    pitched = replace(conv_geometry(problem), pitch=oc + GAP)
    assert pitched.macs == conv_geometry(problem).macs
    keys = low.packed.keys_for(pitched)
    codes = tuple(generate(key) for key in keys)
    wide = Lowered(low.op, low.packed, keys, codes, (*want.shape[:-1], oc + GAP))
    y = emulate(wide, x, want.dtype).y
    plain = emulate(low, x, want.dtype).y
    np.testing.assert_array_equal(y[..., :oc].view(np.uint8), plain.view(np.uint8))
    untouched = np.full((), 0x5A, want.dtype)
    np.testing.assert_array_equal(y[..., oc:], np.broadcast_to(untouched, (*want.shape[:-1], GAP)))
