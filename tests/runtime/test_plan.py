"""The native walk over a network's steps: operands are resolved, ranges respected, nonsense refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vnnigen
from vnnigen.errors import VnnigenError
from vnnigen.kernels.layout import ARG_DST, ARG_SRC
from vnnigen.runtime import native


class Chain:
    """Squares by `eltwise`-like steps: two GEMMs after each other through an arena."""

    def __init__(self) -> None:
        self.ops = [vnnigen.GemmF32(np.eye(16, dtype=np.float32) * k) for k in (2, 3)]
        for op in self.ops:
            op(np.zeros((8, 16), np.float32))
        self.arena = np.zeros(1 << 14, np.uint8)
        steps: Any = native.ffi.new("vg_step[]", 2)
        self.keep: list[Any] = [steps]
        for i, op in enumerate(self.ops):
            assert op._last is not None
            assert op._last.bound is not None
            # x (base 1) -> arena + 1024 (base 0) -> y (base 2)
            places = [(ARG_SRC, (1, 0)[i], (0, 1024)[i]), (ARG_DST, (0, 2)[i], (1024, 0)[i])]
            operands = native.ffi.new("vg_operand[]", places)
            steps[i] = (op._last.bound.descriptor, operands, len(places), 2)
            self.keep.append(operands)
        self.plan = native.ffi.new("vg_plan *", (steps, 2, 3))

    def run(self, x: Any, first: int = 0, last: int = 2, threads: int = 2, ns: Any = native.ffi.NULL) -> Any:
        y = np.zeros((8, 16), np.float32)
        pointers = [native.ffi.from_buffer(a) for a in (self.arena, x, y)]
        bases = native.ffi.new("void *[]", pointers)
        native.check(native.lib.vg_plan_run(self.plan, first, last, bases, threads, ns))
        return y


HERE = vnnigen.GemmF32(np.eye(2, dtype=np.float32)).isa
needs_x86 = pytest.mark.skipif(HERE == "reference", reason="no kernels here")


@needs_x86
@pytest.mark.parametrize("threads", [1, 2])
def test_steps_run_in_order_through_the_arena(threads: int) -> None:
    chain = Chain()
    assert native.lib.vg_plan_check(chain.plan) == native.lib.VG_OK
    x = np.arange(128, dtype=np.float32).reshape(8, 16)
    np.testing.assert_array_equal(chain.run(x, threads=threads), 6 * x)


@needs_x86
def test_part_of_a_plan_and_times_of_steps() -> None:
    chain = Chain()
    ns = native.ffi.new("uint64_t[]", 2)
    x = np.ones((8, 16), np.float32)
    assert not chain.run(x, 0, 1, ns=ns).any()
    assert ns[0] > 0
    assert ns[1] == 0
    np.testing.assert_array_equal(chain.run(x, 1, 2, ns=ns), 6 * x)  # what the first step left in the arena
    assert ns[1] > 0


@needs_x86
@pytest.mark.parametrize(("field", "value"), [("slot", 64), ("slot", -1), ("base", 3), ("base", -1)])
def test_operands_out_of_range_are_refused(field: str, value: int) -> None:
    chain = Chain()
    setattr(chain.keep[1][0], field, value)
    assert native.lib.vg_plan_check(chain.plan) == native.lib.VG_BAD_CALL


@needs_x86
def test_a_range_outside_the_plan_is_refused() -> None:
    with pytest.raises(VnnigenError):
        Chain().run(np.ones((8, 16), np.float32), 0, 3)
