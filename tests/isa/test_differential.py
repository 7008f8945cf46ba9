"""Every instruction of the table, in every form, against the processor, bit for bit."""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np
import pytest

from tests.isa.differential_harness import (
    FLAG_BITS,
    Emulated,
    Processor,
    all_codes,
    comparable,
    describe,
    forms,
    instruction,
    random_state,
    required_features,
)
from vnnigen.isa.features import features
from vnnigen.isa.registry import MNEMONICS
from vnnigen.runtime import native

STATES_PER_FORM, STATES_PER_FLOAT_FORM = 4, 16
OF_CF = {"of", "cf"}

GROUPS = [
    (mnemonic, needs)
    for mnemonic, codes in all_codes().items()
    for needs in sorted({required_features(c) for c in codes}, key=sorted)
]


@cache
def processor() -> Processor:
    return Processor(wide={"avx512f", "avx512bw"} <= features())


@cache
def emulated() -> Emulated:
    return Emulated()


def test_every_instruction_has_forms() -> None:
    assert [m for m, codes in all_codes().items() if not codes] == []


@pytest.mark.parametrize(("mnemonic", "needs"), GROUPS, ids=lambda x: x if isinstance(x, str) else "+".join(sorted(x)))
def test_matches_the_processor(mnemonic: str, needs: frozenset[str]) -> None:
    if not native.is_x86():
        pytest.skip("not an x86-64 processor")
    if missing := (needs | {"avx"}) - features():
        pytest.skip(f"the processor lacks {', '.join(sorted(missing))}")
    insn = MNEMONICS[mnemonic]
    count = STATES_PER_FLOAT_FORM if "f4" in insn.lanes else STATES_PER_FORM
    rng = np.random.default_rng(zlib.crc32(f"{mnemonic} {sorted(needs)}".encode()))
    cases = [f for code in all_codes()[mnemonic] if required_features(code) == needs for f in forms(code)]
    instructions = [instruction(form, rng) for form in cases]
    loaded = processor().load(instructions)
    for form, ins, code in zip(cases, instructions, loaded, strict=True):
        states = [random_state(rng, insn) for _ in range(count)]
        expected = [processor().run(code, s) for s in states]
        for before, want, (got, undefined) in zip(states, expected, emulated().run(ins, states), strict=True):
            # Shift counts decide at run time whether OF and CF are defined; iced cannot know.
            known = {n for n in undefined if not ins.rflags_undefined & FLAG_BITS[n]}
            assert known <= (OF_CF if mnemonic in ("shl", "shr", "sar") else set()), f"{form}: {ins}: {known}"
            a, b = (comparable(x, undefined, processor().wide) for x in (want, got))
            assert np.array_equal(a, b), f"{form}: {ins}\n{describe(a, b, before)}"
