"""What `explain` prints, for every way to multiply."""

from __future__ import annotations

import numpy as np
import pytest

import vnnigen as v
from vnnigen.kernels import mac
from vnnigen.ops.explanation import CHAINS
from vnnigen.runtime.dispatch import candidates


def test_every_multiply_step_has_words() -> None:
    steps = [m for m in vars(mac).values() if isinstance(m, mac.Mac)]
    assert set(CHAINS) == {m.name for m in [*steps, *mac.AMX.values()]}


@pytest.mark.parametrize("isa", [t for t in v.tiers() if not t.startswith("amx")])
@pytest.mark.parametrize("kind", ["int8", "bf16", "f32"])
def test_explanations_print(kind: str, isa: str) -> None:
    b = np.ones((16, 8), np.int8 if kind == "int8" else np.float32)
    make = {"int8": lambda: v.GemmInt8(b, out_dtype=np.int32, isa=isa), "bf16": lambda: v.GemmBf16(b, isa=isa),
            "f32": lambda: v.GemmF32(b, isa=isa)}[kind]  # fmt: skip
    if isa not in candidates(kind):
        with pytest.raises(v.ISAError, match="not implemented here"):
            make()
        return
    op = make()
    text = str(op.explain((4, 16), np.uint8 if kind == "int8" else None))
    assert isa in text
    assert "candidates" in text
    assert "taken" in text
