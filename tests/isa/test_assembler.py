"""The assembler's surface: registers, structure, constants, errors."""

from __future__ import annotations

import numpy as np
from iced_x86 import Decoder

from vnnigen.isa.assembler import Arg, Assembler, Code, Mem

AVX2 = frozenset({"avx", "avx2", "fma", "bmi1", "bmi2"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
VNNI = AVX512 | {"avx512_vnni"}


def texts(code: Code) -> list[str]:
    return [str(i) for i in Decoder(64, code.data[code.entry :], ip=code.entry)]


def test_small_function_encodes_to_the_expected_instructions() -> None:
    a = Assembler("f", args=(Arg("p", "ptr"), Arg("n", "i64")), features=VNNI)
    p, n = a.load_argument("p"), a.load_argument("n")
    acc = a.zmm("acc")
    one = a.const(np.full(16, 1, np.int32))
    a.vpxord(acc, acc, acc)
    with a.loop(n):
        a.vpdpbusd(acc, acc, Mem(p, 4, bcast=True))
        a.add(p, 64)
    a.vpaddd(acc, acc, one)
    a.vmovdqu32(Mem(p), acc)
    a.ret()
    code = a.finalize().encode()
    assert code.entry == 64
    assert code.data[:64] == np.full(16, 1, np.int32).tobytes()
    assert code.features == {"avx", "avx512f", "avx512_vnni"}
    assert texts(code) == [
        "vpxord zmm0,zmm0,zmm0",
        "vpdpbusd zmm0,zmm0,dword bcst [rdi+4]",
        "add rdi,40h",
        "dec rsi",
        "jne short 0000000000000046h",
        "vpaddd zmm0,zmm0,[0]",
        "vmovdqu32 [rdi],zmm0",
        "vzeroupper",
        "ret",
    ]
