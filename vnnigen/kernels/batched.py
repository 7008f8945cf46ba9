"""One kernel over a batch: the same product of matrices at many addresses, and, fused with it, the packing of b.

A table says how far each matrix' operands lie from the first one's, so that broadcast operands and views with any
distance between matrices need no copies.  A step begins by moving its argument block to its matrix; what follows is the
code of a single product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vnnigen.isa.assembler import Code, Mem
from vnnigen.kernels.amx_key import AmxKey
from vnnigen.kernels.amx_nest import AmxNest
from vnnigen.kernels.blocking import Blocking
from vnnigen.kernels.emit_common import counted, div_const
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ARG_SRC, ARG_TENSORS, ARG_WEIGHTS
from vnnigen.kernels.mac import TierCode
from vnnigen.kernels.nest import LoopNest, Nest, NestKey
from vnnigen.kernels.pack_kernel import ARG_B, ARG_B_TABLE, ARG_PACK, STARTS, PackCode, PackKey

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
        nest.batch = self
        return nest.build()


@dataclass(frozen=True)
class FusedKey(BatchedKey):
    """Key of a kernel whose steps pack b into their own scratch, and multiply: `one` must have one step.

    What a thread packs stays in its caches: on two cores a fifth faster than two launches, after which half of the
    packed data is in the other core's cache (measured on 12 products of 128x64x128).
    """

    pack: PackKey

    @property
    def packed_at(self) -> int:
        """Offset in scratch of packed b."""
        return -(-self.one.scratch // 64) * 64

    @property
    def consts_at(self) -> int:
        """Offset in scratch of the constant block, where packing writes into it."""
        return self.packed_at + self.pack.stride

    @property
    def scratch(self) -> int:
        """Bytes of scratch a step needs."""
        return self.consts_at + self.pack.consts_stride


class _Batched(LoopNest):
    """Moves the arguments to the step's matrix before the step is located within it."""

    batch: BatchedKey

    def _locate(self, args: Reg, weights: Reg, col: Reg, consts: Reg) -> None:
        a, key, fused = self.a, self.key, isinstance(self.batch, FusedKey)
        tensors = sum(step.tensor is not None for step in key.spec.steps)
        index = a.load_argument("index")
        own = a.stack(8 * ENTRY)
        if isinstance(self.batch, FusedKey):
            with a.scope(), a.section("pack"):
                self._pack(self.batch, args, weights, consts, [col, self.first_src, self.first_off])
        with a.scope(), a.section("move the arguments to the matrix"):
            entry, tmp = a.gpr("entry"), a.gpr("tmp")
            if key.steps > 1:
                div_const(a, entry, index, key.steps, self.batch.steps)
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
            if not fused:
                a.add(weights, Mem(entry, 8 * ARG_WEIGHTS))
                a.add(consts, Mem(entry, 8 * ARG_CONSTS))
            a.lea(args, own)
        super()._locate(args, weights, col, consts)

    def _pack(self, batch: FusedKey, args: Reg, weights: Reg, consts: Reg, unused: list[Reg]) -> None:
        """Pack the matrix of b into scratch; `unused` registers hold nothing yet."""
        a, pack = self.a, batch.pack
        scratch, index = a.load_argument("scratch"), a.load_argument("index")
        free = [*unused, weights]
        code = PackCode(a, pack, lambda name: free.pop() if free else a.gpr(name))
        if pack.init is not None:
            # `consts` is where kernels' own constants are; packing writes into a copy of them.
            a.lea(code.to, Mem(scratch, batch.consts_at))
            vector = a.vec(self.key.tier.bits, "constants")
            with counted(a, code.count, pack.consts_stride // self.key.tier.vector_bytes):
                a.vmovups(vector, Mem(consts))
                a.vmovups(Mem(code.to), vector)
                a.add(consts, self.key.tier.vector_bytes)
                a.add(code.to, self.key.tier.vector_bytes)
            a.lea(consts, Mem(scratch, batch.consts_at))
            a.lea(code.init, Mem(consts, pack.init))
        a.mov(code.at, Mem(args, 8 * ARG_B_TABLE))
        a.mov(code.src, Mem(args, 8 * ARG_B))
        a.add(code.src, Mem(code.at, index=index, scale=8))
        a.lea(code.dst, Mem(scratch, batch.packed_at))
        a.mov(code.consts, Mem(args, 8 * ARG_PACK))
        a.lea(code.start, Mem(code.consts, STARTS))
        code.prepare()
        code.groups(None, pack.groups, 1)
        a.lea(weights, Mem(scratch, batch.packed_at))


class _BatchedNest(_Batched, Nest):
    """Products on vector registers."""


class _BatchedAmx(_Batched, AmxNest):
    """Products on tiles."""
