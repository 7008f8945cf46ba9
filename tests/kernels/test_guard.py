"""Kernels between guard pages, with poisoned registers; see `guarded`."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vnnigen as v
from tests.kernels.cases import TIERS
from tests.kernels.guarded import Caller, Raw
from vnnigen.runtime import codemem, native

ROOT = Path(__file__).parents[2]
HERE = [
    pytest.param(t, marks=pytest.mark.skipif(t not in v.tiers(), reason=f"no {t} here"))
    for t in ("amx_int8", "amx_bf16", *TIERS)
]


@pytest.mark.parametrize("tier", HERE)
def test_no_operand_is_left_and_the_machine_is_as_before(tier: str) -> None:
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.kernels.guarded", tier]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{tier}: {last}\n{done.stderr[-3000:]}"
    assert last == ["done"]


def test_the_guards_bite() -> None:
    program = (
        "import numpy as np, ctypes, sys\n"
        "from tests.kernels.guarded import guarded\n"
        "a = guarded(np.zeros(5, np.uint8), sys.argv[1])\n"
        "ctypes.c_char.from_address(a.ctypes.data + int(sys.argv[2])).value\n"
    )
    for place, offset, dies in (
        ("end", 4, False), ("end", 5, True), ("start", 0, False), ("start", -1, True),
    ):  # fmt: skip
        done = subprocess.run([sys.executable, "-c", program, place, str(offset)], cwd=ROOT, check=False)
        assert done.returncode == (-signal.SIGSEGV if dies else 0), (place, offset)


# vzeroupper ; ret
CLEAN = "c5f877 c3"


@pytest.mark.skipif("avx2" not in v.tiers(), reason="no avx2 here")
@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (CLEAN, None),
        ("c3", "VZEROUPPER is missing"),
        ("31db" + CLEAN, "callee-saved"),  # xor ebx,ebx
        ("4531ff" + CLEAN, "callee-saved"),  # xor r15d,r15d
        # push 0x7f80 ; ldmxcsr [rsp] ; pop rax
        ("68807f0000 0fae1424 58" + CLEAN, "MXCSR"),
    ],
)
def test_the_trampoline_notices(code: str, complaint: str | None) -> None:
    kernel = codemem.load(Raw("kernel", bytes.fromhex(code)))
    call, scratch = Caller(), np.zeros(64, np.uint8)
    mxcsr = native.lib.vg_get_mxcsr()
    try:
        if complaint is None:
            call(kernel.address, 0, 0, scratch.ctypes.data)
        else:
            with pytest.raises(AssertionError, match=complaint):
                call(kernel.address, 0, 0, scratch.ctypes.data)
    finally:
        native.lib.vg_set_mxcsr(mxcsr)
