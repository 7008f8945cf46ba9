"""One kernel over a batch: the same product of matrices at many addresses.

A table says how far each matrix' operands lie from the first one's, so that broadcast operands and views with any
distance between matrices need no copies.  A step begins by moving its argument block to its matrix; what follows is the
code of a single product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vnnigen.isa.assembler import Code, Mem
from vnnigen.kernels.amx import AmxKey, AmxNest
from vnnigen.kernels.blocking import Blocking
from vnnigen.kernels.emit_common import div_const
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ARG_SRC, ARG_TENSORS, ARG_WEIGHTS
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.nest import LoopNest, Nest, NestKey
from vnnigen.kernels.pack_kernel import ARG_B_TABLE

Reg = Any
#: Argument slot of the table: for every matrix ENTRY distances in bytes (s64), one for each of the first slots.
ARG_TABLE = ARG_B_TABLE + 1
ENTRY = ARG_CONSTS + 1


@dataclass(frozen=True)
class BatchedKey:
    """Key of `batches` products, each of them what `one` computes; `one` must be the first launch."""

    one: NestKey
    batches: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"{self.one.name}-batched"

    @property
    def tier(self) -> TierCode:
        """The tier it is generated for."""
        return self.one.tier

    @property
    def blocking(self) -> Blocking:
        """The blocking of each product."""
        return self.one.blocking

    @property
    def steps(self) -> int:
        """Steps of the parallel grid."""
        return self.batches * self.one.steps

    @property
    def scratch(self) -> int:
        """Bytes of scratch a step needs."""
        return self.one.scratch

    @property
    def tile_config(self) -> bytes | None:
        """The AMX tile configuration."""
        return self.one.tile_config

    def build(self, features: frozenset[str] | None) -> Code:
        """Generate the code."""
        nest: _Batched
        if isinstance(self.one, AmxKey):
            nest = _BatchedAmx(self.one, features)
        else:
            nest = _BatchedNest(self.one, features)
        nest.all_steps = self.steps
        return nest.build()


class _Batched(LoopNest):
    """Moves the arguments to the step's matrix before the step is located within it."""

    all_steps: int

    def _locate(self, args: Reg, weights: Reg, col: Reg, consts: Reg) -> None:
        a, key = self.a, self.key
        tensors = sum(step.tensor is not None for step in key.spec.steps)
        index = a.load_argument("index")
        own = a.stack(8 * ENTRY)
        with a.scope(), a.section("move the arguments to the matrix"):
            entry, tmp = a.gpr("entry"), a.gpr("tmp")
            if key.steps > 1:
                div_const(a, entry, index, key.steps, self.all_steps)
                a.imul(tmp, entry, -key.steps)
                a.add(index, tmp)
            else:
                a.mov(entry, index)
                a.mov(index, 0)
            a.imul(entry, entry, 8 * ENTRY)
            a.add(entry, Mem(args, 8 * ARG_TABLE))
            for slot in (ARG_SRC, ARG_DST, *range(ARG_TENSORS, ARG_TENSORS + tensors)):
                a.mov(tmp, Mem(args, 8 * slot))
                a.add(tmp, Mem(entry, 8 * slot))
                a.mov(own + 8 * slot, tmp)
            a.add(weights, Mem(entry, 8 * ARG_WEIGHTS))
            a.add(consts, Mem(entry, 8 * ARG_CONSTS))
            a.lea(args, own)
        super()._locate(args, weights, col, consts)


class _BatchedNest(_Batched, Nest):
    """Products on vector registers."""


class _BatchedAmx(_Batched, AmxNest):
    """Products on tiles."""
