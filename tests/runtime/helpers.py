"""Small kernels for the runtime's tests: raw machine code and host callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from vnnigen.runtime import native

ffi: Any = native.ffi
lib: Any = native.lib

x86_only = pytest.mark.skipif(not native.is_x86(), reason="runs machine code for x86-64")

# mov rax,[rdi] ; mov [rax+rsi*8],rsi ; ret
STORE_INDEX = bytes.fromhex("488b07 488934f0 c3")
# mov rax,[rdi] ; stmxcsr [rax+rsi*4] ; ret
STORE_MXCSR = bytes.fromhex("488b07 0fae1cb0 c3")
# mov rax,[rdi] ; mov [rax+rsi*8],rdx ; ret
STORE_SCRATCH = bytes.fromhex("488b07 488914f0 c3")
# mov rax,[rdi] ; mov [rax+rsi*8],rdx ; mov rcx,[rdi+8] ; mov rdi,rdx ; mov al,7 ; rep stosb ; ret
FILL_SCRATCH = bytes.fromhex("488b07 488914f0 488b4f08 4889d7 b007 f3aa c3")
# mov eax,3 ; cvtsi2ss xmm1,eax ; mov eax,1 ; cvtsi2ss xmm0,eax ; divss xmm0,xmm1 ; ret
INEXACT = bytes.fromhex("b803000000 f30f2ac8 b801000000 f30f2ac0 f30f5ec1 c3")


@dataclass(frozen=True)
class RawCode:
    name: str
    data: bytes
    entry: int = 0
    listing: str = ""


@dataclass(frozen=True)
class Launch:
    fn: int | Callable[[Any, int, Any], None]  # an address or a host function
    count: int
    scratch_bytes: int = 0


class Kernel:
    """A vg_kernel and what it keeps alive."""

    def __init__(self, launches: Sequence[Launch], args: Sequence[int] = ()) -> None:
        self.k = ffi.new("vg_kernel *")
        self.k.n_launch = len(launches)
        self.callbacks = []
        for i, launch in enumerate(launches):
            fn = launch.fn
            if isinstance(fn, int):
                self.k.launch[i].fn = ffi.cast("vg_fn", fn)
            else:
                self.callbacks.append(ffi.callback("vg_fn", fn))
                self.k.launch[i].fn = self.callbacks[-1]
            self.k.launch[i].count = launch.count
            self.k.launch[i].scratch_bytes = launch.scratch_bytes
        self.k.n_args = max(2, len(args))
        for i, value in enumerate(args):
            self.k.args[i] = value

    def call(self, dyn: Sequence[int] = (), nthreads: int = 1) -> int:
        return int(lib.vg_call(self.k, len(dyn), ffi.new("int64_t[]", list(dyn)), nthreads))


def address(array: np.ndarray[Any, Any]) -> int:
    return int(array.ctypes.data)
