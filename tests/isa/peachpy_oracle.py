"""Run by the system's Python, which has Debian's python3-peachpy: reads instructions as JSON, writes bytes.

Input: a list of [mnemonic, operands, mask, zero]; an operand is a register's name, an integer, or
{base, index, scale, disp, bits, element} (element 0: no broadcast). Output: a list of hex strings, null where
PeachPy does not know the instruction or the form.
"""

import json
import sys

from peachpy import x86_64 as p
from peachpy.x86_64 import registers as r


def memory(m):
    """Return PeachPy's memory operand."""
    address = getattr(r, m["base"]) + m["disp"]
    if m["index"]:
        address = getattr(r, m["base"]) + getattr(r, m["index"]) * m["scale"] + m["disp"]
    if m["element"]:
        size = {4: p.dword, 8: p.qword}[m["element"] // 8]
        return getattr(size, f"to{m['bits'] // m['element']}")[address]
    sizes = {1: p.byte, 2: p.word, 4: p.dword, 8: p.qword, 16: p.oword, 32: p.hword, 64: p.zword}
    return sizes[m["bits"] // 8][address] if m["bits"] else [address]


def encode(mnemonic, operands, mask, zero):
    """Return the bytes of one instruction in hex, or None."""
    if not hasattr(p, mnemonic.upper()):
        return None
    values = []
    for o in operands:
        values.append(memory(o) if isinstance(o, dict) else o if isinstance(o, int) else getattr(r, o))
    if mask:
        k = getattr(r, mask)
        values[0] = values[0](k.z if zero else k)
    try:
        return bytes(getattr(p, mnemonic.upper())(*values).encode()).hex()
    except (SyntaxError, ValueError, TypeError):
        return None


json.dump([encode(*line) for line in json.load(sys.stdin)], sys.stdout)
