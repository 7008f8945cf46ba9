"""Calibration samples in files: read one after another, so that memory does not grow with their number."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from vnnigen.errors import QuantizationError
from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Array, TensorType

#: What a file that is cut short, no archive, or no array makes NumPy and zipfile raise.
_DAMAGED = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class _Stored:
    """An array in a file: what its header says, and how to read parts of it from front to back."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    open: Callable[[ExitStack], Callable[[int], Array]]


class SampleFiles:
    """The samples of a path, as `vnnigen.compile` takes them: iterate over it, and again; `len()` counts them.

    `path` is a `.npy` file, for networks with one input; a `.npz` file with an array for each input, by name (with one
    input the name does not matter); or a folder of such files, read in the order of their names. Along its first
    dimension, an array holds samples: it has the input's number of dimensions, the first one being any length (for
    an input of fixed batch: a multiple of it), or one more, each part being a whole input. An array with one
    dimension less is a single sample without batch. f64 and f16 become f32, as does what fits without loss.

    Raises QuantizationError, naming the file, for one that is damaged, holds Python objects, or does not fit.
    """

    def __init__(self, path: str | os.PathLike[str], inputs: Mapping[str, TensorType]) -> None:
        """Look at the headers of all files."""
        self.path, self.inputs = Path(path), dict(inputs)
        if self.path.is_dir():
            files = sorted(p for p in self.path.iterdir() if p.suffix in (".npy", ".npz"))
            if not files:
                raise QuantizationError(f"{self.path} has no .npy or .npz files to calibrate on")
        elif self.path.suffix in (".npy", ".npz") and self.path.exists():
            files = [self.path]
        else:
            what = "is no .npy or .npz file and no folder" if self.path.exists() else "does not exist"
            raise QuantizationError(f"calibration data: {self.path} {what}")
        self._files = [(file, _arrays(file, self.inputs)) for file in files]
        self._counts = [_count(file, arrays, self.inputs) for file, arrays in self._files]

    def __len__(self) -> int:
        """The number of samples."""
        return sum(self._counts)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        """Read the samples, one at a time."""
        for (file, arrays), count in zip(self._files, self._counts, strict=True):
            with ExitStack() as stack:
                try:
                    parts = {name: stored.open(stack) for name, stored in arrays.items()}
                    for _ in range(count):
                        yield {name: self._one(name, arrays[name], read) for name, read in parts.items()}
                except _DAMAGED as error:
                    if isinstance(error, QuantizationError):
                        raise
                    raise QuantizationError(f"{file}: {error}") from None

    def _one(self, name: str, stored: _Stored, read: Callable[[int], Array]) -> Array:
        """The next sample of an input, as the network wants it."""
        kind = self.inputs[name]
        batch, form = _form(stored.shape, kind)
        values = read(batch if form == "rows" else stored.shape[0] if form == "whole" else 1)
        if form == "stack":
            values = values[0]
        elif form == "whole" and kind.shape is not None and values.ndim < len(kind.shape):
            values = values[None]
        wanted = numpy_dtype(kind.dtype)
        small = wanted == np.float32 and values.dtype in (np.float64, np.float16)
        fits = small or np.can_cast(values.dtype, wanted, "safe")
        return values.astype(wanted) if fits else values  # calibration says what is wrong with it


def _form(shape: tuple[int, ...], kind: TensorType) -> tuple[int, str]:
    """How many rows of an array are a sample, and whether it is "rows", a "stack" of inputs, or one "whole" input."""
    rank = None if kind.shape is None else len(kind.shape)
    if kind.shape and len(shape) == rank:
        first = kind.shape[0]
        return (first if isinstance(first, int) else 1), "rows"
    return 1, "stack" if rank is not None and len(shape) == rank + 1 else "whole"


def _count(file: Path, arrays: Mapping[str, _Stored], inputs: Mapping[str, TensorType]) -> int:
    """How many samples a file has. QuantizationError if its arrays have different numbers, or none."""
    counts = {}
    for name, stored in arrays.items():
        batch, form = _form(stored.shape, inputs[name])
        length = stored.shape[0] if stored.shape else 1
        if form == "rows" and (batch < 1 or length % batch):
            raise QuantizationError(f"{file}: {name!r} has {length} rows, no multiple of the input's batch of {batch}")
        counts[name] = 1 if form == "whole" else length // (batch if form == "rows" else 1)
    if len(set(counts.values())) > 1:
        raise QuantizationError(f"{file}: its arrays have different numbers of samples: {counts}")
    if not (number := next(iter(counts.values()))) or any(0 in stored.shape for stored in arrays.values()):
        raise QuantizationError(f"{file}: it is empty, of shape {next(iter(arrays.values())).shape}")
    return number


def _arrays(file: Path, inputs: Mapping[str, TensorType]) -> dict[str, _Stored]:
    """The arrays of a file by input."""
    try:
        if file.suffix == ".npy":
            found = {file.stem: _npy(file)}
        else:
            with zipfile.ZipFile(file) as archive:
                found = {name.removesuffix(".npy"): _member(file, name) for name in archive.namelist()}
    except _DAMAGED as error:
        raise QuantizationError(f"{file}: {error}") from None
    for name, stored in found.items():
        if stored.dtype.hasobject:
            raise QuantizationError(f"{file}: {name!r} holds Python objects, which are not read")
    if len(inputs) == 1 and len(found) == 1:
        return dict(zip(inputs, found.values(), strict=True))
    if set(found) != set(inputs):
        raise QuantizationError(f"{file} has the arrays {sorted(found)}; the network has the inputs {sorted(inputs)}")
    return found


def _npy(file: Path) -> _Stored:
    """A .npy file, mapped into memory."""
    with open(file, "rb") as stream:
        shape, _, dtype = _header(stream)
    return _Stored(shape, dtype, lambda _: _in_order(np.load(file, mmap_mode="r", allow_pickle=False)))


def _member(file: Path, name: str) -> _Stored:
    """An array of a .npz file, which is read (and unpacked, if it is packed) as far as it is asked for."""
    with zipfile.ZipFile(file) as archive, archive.open(name) as stream:
        shape, fortran, dtype = _header(stream)

    def start(stack: ExitStack) -> Callable[[int], Array]:
        stream = stack.enter_context(stack.enter_context(zipfile.ZipFile(file)).open(name))
        if fortran:
            return _in_order(np.lib.format.read_array(stream, allow_pickle=False))
        _header(stream)

        def read(rows: int) -> Array:
            part = (rows, *shape[1:]) if shape else ()
            size = prod(part) * dtype.itemsize
            data = stream.read(size)
            if len(data) != size:
                raise ValueError(f"{name} ends before its last element")
            return np.frombuffer(data, dtype).reshape(part)

        return read

    return _Stored(shape, dtype, start)


def _in_order(array: Array) -> Callable[[int], Array]:
    """Read an array from front to back."""
    at = 0

    def read(rows: int) -> Array:
        nonlocal at
        at += rows
        return np.array(array[at - rows : at]) if array.ndim else np.array(array)

    return read


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first dimension is innermost, and type; the stream is at the first element then."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the .npy format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype


__all__ = ["SampleFiles"]
