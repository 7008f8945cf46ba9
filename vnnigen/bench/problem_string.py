"""Problem strings in the notation of oneDNN's benchdnn, so that figures can be compared line by line.

A convolution is `[g#][mb#]ic#[ih#][iw#]oc#[oh#][ow#]kh#kw#[sh#][sw#][ph#][pw#][dh#][dw#][n"name"]`; a matrix
multiplication is `MxK:KxN[:MxN][n"name"]`. The rules are benchdnn's (tests/benchdnn/doc/driver_conv.md,
knobs_desc.md and driver_matmul.md of oneDNN):

* entries come in any order, a repeated entry overrides, one `_` may follow an entry, `n` takes the rest as
  the name;
* defaults: `g` 1, `mb` 2, strides 1, dilations 0 (0 is dense: benchdnn counts the holes, not the step);
* no output size: it is computed from symmetric padding (0 unless given); output size but no padding: the
  padding at the top is half of what is needed, rounded down, and the bottom takes the rest, whatever it is;
* only heights given: the widths are the same; only widths given: a 1-D problem, height 1.

Depths (`id`, `od`, `kd`, ...) that make a problem 3-D are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vnnigen.errors import ShapeError

_MAX_VALUE = 2**31 - 1
_ENTRY = re.compile(r"(mb|g|[io][cdhw]|[kspd][dhw])(-?\d*)")
_MATMUL = re.compile(r"(\d+(?:x\d+)*):(\d+(?:x\d+)*)(?::(\d+(?:x\d+)*))?_?(?:n(.*))?")


class ProblemStringError(ShapeError):
    """A problem string that cannot be read; the message names the position (first character is 1)."""

    def __init__(self, text: str, offset: int, reason: str) -> None:
        """Point at `offset` (from 0) of `text`."""
        super().__init__(f"problem {text!r}, character {offset + 1}: {reason}")


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution. `dilation` is the step between taps (1 is dense)."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    pad_before: int
    pad_after: int

    @property
    def valid_taps(self) -> int:
        """Pairs (output position, tap) that read the image and not the padding."""
        return sum(
            0 <= o * self.stride - self.pad_before + k * self.dilation < self.size
            for o in range(self.out)
            for k in range(self.kernel)
        )


@dataclass(frozen=True)
class ConvShape:
    """A 2-D convolution: `ic` and `oc` count all groups' channels."""

    mb: int
    g: int
    ic: int
    oc: int
    h: Axis
    w: Axis
    name: str = ""

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """Shape of the NHWC input."""
        return self.mb, self.h.size, self.w.size, self.ic

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        """Shape of the OIHW weights."""
        return self.oc, self.ic // self.g, self.h.kernel, self.w.kernel

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """Shape of the NHWC output."""
        return self.mb, self.h.out, self.w.out, self.oc

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Padding as `((top, bottom), (left, right))`."""
        return (self.h.pad_before, self.h.pad_after), (self.w.pad_before, self.w.pad_after)

    @property
    def ops(self) -> int:
        """Multiplications and additions of the convolution, taps on the padding included."""
        taps = self.h.out * self.h.kernel * self.w.out * self.w.kernel
        return 2 * self.mb * self.oc * (self.ic // self.g) * taps

    @property
    def ops_without_padding(self) -> int:
        """As `ops`, but without the taps that fall on the padding, which is how benchdnn counts."""
        return 2 * self.mb * self.oc * (self.ic // self.g) * self.h.valid_taps * self.w.valid_taps

    def __str__(self) -> str:
        """Return the problem in full benchdnn notation (parses back to an equal shape)."""
        entries = [f"g{self.g}mb{self.mb}ic{self.ic}ih{self.h.size}iw{self.w.size}"]
        entries.append(f"oc{self.oc}oh{self.h.out}ow{self.w.out}kh{self.h.kernel}kw{self.w.kernel}")
        entries.append(f"sh{self.h.stride}sw{self.w.stride}")
        entries.append(f"ph{self.h.pad_before}pw{self.w.pad_before}")
        entries.append(f"dh{self.h.dilation - 1}dw{self.w.dilation - 1}")
        if self.name:
            entries.append(f'n"{self.name}"')
        return "_".join(entries)


@dataclass(frozen=True)
class GemmShape:
    """A matrix multiplication of `[m, k]` by `[k, n]`."""

    m: int
    n: int
    k: int
    name: str = ""

    @property
    def ops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k

    def __str__(self) -> str:
        """Return the problem in benchdnn's notation."""
        return f"{self.m}x{self.k}:{self.k}x{self.n}" + (f'n"{self.name}"' if self.name else "")


def parse_conv(text: str) -> ConvShape:
    """Read a benchdnn convolution string.

    Raises ProblemStringError where the string is malformed, incomplete, 3-D or contradicts itself.
    """
    values, offsets, name = _scan(text)
    for key in ("g", "ic", "oc", "mb", "sh", "sw"):
        if values.get(key) == 0:
            raise ProblemStringError(text, offsets[key], f"{key!r} must be at least 1")
    for key in ("ic", "oc"):
        if key not in values:
            raise ProblemStringError(text, len(text), f"{key!r} is missing")
    g, ic, oc = values.get("g", 1), values["ic"], values["oc"]
    if ic % g or oc % g:
        raise ProblemStringError(text, offsets["g"], f"ic={ic} and oc={oc} must be multiples of g={g}")
    if _axis_given(values, "d"):
        offset = min(at for key, at in offsets.items() if key.endswith("d") and len(key) == 2)
        raise ProblemStringError(text, offset, "a depth makes this a 3-D problem; only 1-D and 2-D are supported")
    has_h, has_w = _axis_given(values, "h"), _axis_given(values, "w")
    if not has_h and not has_w:
        raise ProblemStringError(text, len(text), "no image and kernel size: 'ih' and 'kh' are missing")
    h = _axis(text, values, offsets, "h") if has_h else Axis(1, 1, 1, 1, 1, 0, 0)
    w = _axis(text, values, offsets, "w") if has_w else h
    return ConvShape(values.get("mb", 2), g, ic, oc, h, w, name)


def parse_gemm(text: str) -> GemmShape:
    """Read a benchdnn matmul string `MxK:KxN`, with an optional `:MxN` and name.

    Raises ProblemStringError where the string is malformed, batched or contradicts itself.
    """
    match = _MATMUL.fullmatch(text)
    if match is None:
        raise ProblemStringError(text, _first_bad(text), "expected 'MxK:KxN', such as '128x768:768x3072'")
    tensors: list[tuple[int, int]] = []
    for i, label in enumerate(("source", "weights", "destination"), start=1):
        if match[i] is None:
            continue
        dims = [_number(text, match.start(i), part) for part in match[i].split("x")]
        if len(dims) != 2:
            raise ProblemStringError(
                text, match.start(i), f"the {label} has {len(dims)} dimensions; only 2 are supported"
            )
        if 0 in dims:
            raise ProblemStringError(text, match.start(i), f"the {label} has a dimension of 0")
        tensors.append((dims[0], dims[1]))
    (m, k), (k2, n) = tensors[:2]
    if k != k2:
        raise ProblemStringError(text, match.start(2), f"the weights have {k2} rows, the source {k} columns")
    if len(tensors) == 3 and tensors[2] != (m, n):
        raise ProblemStringError(text, match.start(3), f"the destination must be {m}x{n}")
    return GemmShape(m, n, k, (match[4] or "").strip('"'))


def _scan(text: str) -> tuple[dict[str, int], dict[str, int], str]:
    """Split a convolution string into values and offsets by entry, and the name."""
    values: dict[str, int] = {}
    offsets: dict[str, int] = {}
    at = 0
    while at < len(text):
        if text[at] == "n":
            return values, offsets, text[at + 1 :].strip('"')
        match = _ENTRY.match(text, at)
        if match is None:
            raise ProblemStringError(text, at, f"{text[at:]!r} does not begin with an entry such as 'ic64' or 'kh3'")
        key, digits = match.groups()
        if not digits:
            raise ProblemStringError(text, match.end(), f"{key!r} needs a number")
        values[key] = _number(text, match.start(2), digits)
        offsets[key] = at
        at = match.end()
        if text[at : at + 1] == "_":
            at += 1
    return values, offsets, ""


def _number(text: str, offset: int, digits: str) -> int:
    value = -1 if digits.startswith("-") else int(digits)
    if value < 0:
        raise ProblemStringError(text, offset, "a number must not be negative")
    if value > _MAX_VALUE:
        raise ProblemStringError(text, offset, f"a number must be at most {_MAX_VALUE}")
    return value


def _axis_given(values: Mapping[str, int], axis: str) -> bool:
    """Whether the string speaks of an axis; values equal to the defaults do not count (benchdnn's rule)."""
    sized = any(values.get(prefix + axis) for prefix in "iokdp")
    return sized or values.get("s" + axis, 1) != 1


def _axis(text: str, values: Mapping[str, int], offsets: Mapping[str, int], axis: str) -> Axis:
    """Complete one axis: derive the output size or the padding from what is given."""
    for key in ("i" + axis, "k" + axis):
        if not values.get(key):
            raise ProblemStringError(text, offsets.get(key, len(text)), f"{key!r} is missing or 0")
    size, kernel = values["i" + axis], values["k" + axis]
    stride, dilation = values.get("s" + axis, 1), values.get("d" + axis, 0) + 1
    out, pad = values.get("o" + axis, 0), values.get("p" + axis)
    extent = (kernel - 1) * dilation + 1
    if not out:
        pad = pad or 0
        out = _truncating_div(size - extent + 2 * pad, stride) + 1
        if out <= 0:
            raise ProblemStringError(text, offsets["k" + axis], f"the kernel is larger than the padded {'i' + axis}")
    elif pad is None:
        pad = _truncating_div((out - 1) * stride - size + extent, 2)
    pad_after = (out - 1) * stride - size + extent - pad
    if pad < 0 or pad_after <= -stride:
        needed = (size + 2 * max(pad, 0) - extent) // stride + 1
        raise ProblemStringError(
            text, offsets["o" + axis], f"'o{axis}{out}' leaves a part of the image unused (expected {needed})"
        )
    return Axis(size, out, kernel, stride, dilation, pad, max(pad_after, 0))


def _truncating_div(a: int, b: int) -> int:
    """Divide as C does, towards zero, since benchdnn's rules are what its C++ computes."""
    return a // b if a >= 0 else -(-a // b)


def _first_bad(text: str) -> int:
    """Offset at which `text` stops looking like the beginning of a matmul string."""
    match = re.match(r"(?:\d+(?:x(?=\d)|:(?=\d))?)*", text)
    return match.end() if match else 0
