"""Reading a torch checkpoint without torch, and without trusting it.

A checkpoint is a pickle, and a pickle is a program. Python's own unpickler runs that program with real
Python objects; filtering its globals (`Unpickler.find_class`) leaves opcodes such as BUILD and INST and the
memo's allocation in the hands of the file. State dicts need some thirty opcodes and six kinds of global, so
this module interprets exactly those and refuses everything else by name. `pickletools.genops` of the
standard library decodes the opcodes; no object of the file's choosing is ever called.

Both containers that torch has used are read:

* legacy (torch < 1.6): five pickles one after the other (magic number, protocol version, system info, the
  object, the list of storage keys), then for each key its element count (int64) and its raw bytes;
* zip (torch >= 1.6): `<name>/data.pkl`, with each storage in `<name>/data/<key>`, uncompressed.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from vnnigen.errors import ModelError

Array = NDArray[Any]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}


def load_state_dict(path: str | Path) -> dict[str, Array]:
    """Read a torch state dict: parameter name -> read-only NumPy array of the tensor's shape and dtype.

    Raises `ModelError` when the file is missing, truncated, not a checkpoint, holds anything but a mapping
    of names to tensors, or asks for a global or an opcode that state dicts do not need.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read the checkpoint {str(path)!r}: {error.strerror}") from error
    try:
        root, storages = _read_zip(data) if data[:2] == b"PK" else _read_legacy(data)
        if not isinstance(root, dict):
            raise ModelError(f"a state dict must be a mapping, this is a {type(root).__name__}")
        return {key: _materialise(key, value, storages) for key, value in root.items()}
    except ModelError as error:
        raise ModelError(f"checkpoint {str(path)!r}: {error}") from error


# ---------------------------------------------------------------------------------------------------------
# The pickle machine


@dataclass(frozen=True)
class _Global:
    """A global of the allow list, as inert data."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """What a persistent id says about a storage; the bytes come later."""

    key: str
    dtype: np.dtype[Any]
    numel: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage, in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


ALLOWED_GLOBALS = frozenset(
    {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
    | {f"torch {name}" for name in STORAGES}
)

_MARK = object()


@dataclass
class _Machine:
    """The pickle virtual machine, restricted to what state dicts consist of."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, _Storage] = field(default_factory=dict)

    def run(self, stream: io.BytesIO) -> Any:
        """Interpret one pickle from `stream`, leaving the stream just after its STOP."""
        try:
            for opcode, arg, _ in pickletools.genops(stream):
                if opcode.name == "STOP":
                    return self.stack.pop()
                action = _OPCODES.get(opcode.name)
                if action is None:
                    raise ModelError(f"refused the pickle opcode {opcode.name}, which state dicts do not use")
                action(self, arg)
        except ModelError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ModelError(f"damaged or truncated pickle ({type(error).__name__}: {error})") from error
        raise ModelError("truncated pickle: no STOP")

    def pop_mark(self) -> list[Any]:
        """Pop everything above the topmost mark, and the mark."""
        at = max(i for i, item in enumerate(self.stack) if item is _MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def pop(self, count: int) -> list[Any]:
        """Pop `count` values, the deepest first."""
        if len(self.stack) < count or any(item is _MARK for item in self.stack[-count:]):
            raise ModelError("damaged pickle: stack underflow")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ModelError("damaged pickle: items set on something that is not a dict")
        if not all(isinstance(key, str) for key in pairs[::2]):  # and so nothing deeply nested is ever hashed
            raise ModelError("refused a key that is not a string")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ModelError("damaged pickle: values appended to something that is not a list")
        self.stack[-1].extend(items)

    def push_global(self, name: str) -> None:
        if name not in ALLOWED_GLOBALS:
            raise ModelError(f"refused the global {'.'.join(name.split(' ', 1))!r}; only tensors are allowed")
        self.stack.append(_Global(name))

    def reduce(self) -> None:
        function, args = self.pop(2)
        if not isinstance(function, _Global) or not isinstance(args, tuple):
            raise ModelError("damaged pickle: a call of something that is not a global")
        match function.name.split(" ")[1], args:
            case "OrderedDict", ():
                self.stack.append({})
            case "_rebuild_tensor_v2", (_Storage() as storage, int(offset), tuple(size), tuple(stride), *_):
                self.stack.append(_Tensor(storage, offset, size, stride))
            case "_rebuild_parameter", (_Tensor() as tensor, *_):
                self.stack.append(tensor)
            case name, _:
                raise ModelError(f"refused the arguments of {name}")

    def build(self) -> None:
        # OrderedDict's attributes: torch keeps `_metadata` (module versions) there. Not needed, so dropped.
        target, _ = self.pop(2)
        if not isinstance(target, dict):
            raise ModelError("refused to set attributes on something that is not an OrderedDict")
        self.stack.append(target)

    def push_storage(self) -> None:
        match self.pop(1)[0]:
            case ("storage", _Global(name), str(key), str(), int(numel), *view) if view in ([], [None]):
                dtype = STORAGES.get(name.removeprefix("torch "))
                if dtype is not None and numel >= 0:
                    self.storages[key] = _Storage(key, np.dtype(dtype), numel)
                    self.stack.append(self.storages[key])
                    return
        raise ModelError("refused a persistent id that does not describe a storage")


def _push(make: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, arg: machine.stack.append(make(arg))


def _push_tuple(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(tuple(machine.pop(count)))


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


_LITERAL = _push(lambda arg: arg)
_OPCODES: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": _push(lambda _: _MARK),
    "NONE": _push(lambda _: None),
    "NEWTRUE": _push(lambda _: True),
    "NEWFALSE": _push(lambda _: False),
    "EMPTY_DICT": _push(lambda _: {}),
    "EMPTY_LIST": _push(lambda _: []),
    "EMPTY_TUPLE": _push(lambda _: ()),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), _LITERAL),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": _push_tuple(1),
    "TUPLE2": _push_tuple(2),
    "TUPLE3": _push_tuple(3),
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda m, _: _put(m, len(m.memo)),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "SETITEM": lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "APPEND": lambda m, _: m.append(m.pop(1)),
    "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "GLOBAL": lambda m, name: m.push_global(name),
    "STACK_GLOBAL": lambda m, _: m.push_global(" ".join(m.pop(2))),
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.push_storage(),
}


# ---------------------------------------------------------------------------------------------------------
# Containers: both return the unpickled object and the bytes of each storage key

_Bytes = dict[str, memoryview]


def _read_legacy(data: bytes) -> tuple[Any, _Bytes]:
    stream = io.BytesIO(data)
    if _Machine().run(stream) != LEGACY_MAGIC:
        raise ModelError("not a torch checkpoint (no magic number)")
    if _Machine().run(stream) != LEGACY_PROTOCOL:
        raise ModelError(f"the torch serialization protocol is not {LEGACY_PROTOCOL}")
    info = _Machine().run(stream)
    if not isinstance(info, dict) or info.get("little_endian") is not True:
        raise ModelError("the checkpoint was not written on a little-endian machine")
    machine = _Machine()
    root = machine.run(stream)
    keys = _Machine().run(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ModelError("damaged list of storage keys")
    # The byte stream counts elements; what an element is, only the pickle has told.
    item_sizes = {key: storage.dtype.itemsize for key, storage in machine.storages.items()}
    view, at, storages = memoryview(data), stream.tell(), {}
    for key in keys:
        if key not in item_sizes:
            raise ModelError(f"storage {key!r} belongs to no tensor")
        if at + 8 > len(data):
            raise ModelError(f"truncated file: no length of storage {key!r}")
        (numel,) = struct.unpack_from("<q", data, at)
        end = at + 8 + numel * item_sizes[key]
        if numel < 0 or end > len(data):
            raise ModelError(f"truncated file: storage {key!r} of {numel} elements ends beyond the file")
        storages[key] = view[at + 8 : end]
        at = end
    return root, storages


def _read_zip(data: bytes) -> tuple[Any, _Bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            packed = [i.filename for i in infos.values() if i.compress_type != zipfile.ZIP_STORED or i.flag_bits & 1]
            if packed:
                raise ModelError(f"entry {packed[0]!r} is compressed or encrypted; torch never does that")
            if sum(info.file_size for info in infos.values()) > len(data):
                raise ModelError("damaged zip file: its entries add up to more than the file")
            roots = [name for name in infos if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(roots) != 1:
                raise ModelError("not a torch checkpoint: a zip file without one */data.pkl")
            base = roots[0].removesuffix("data.pkl")
            if f"{base}byteorder" in infos and archive.read(f"{base}byteorder") != b"little":
                raise ModelError("the checkpoint was not written on a little-endian machine")
            root = _Machine().run(io.BytesIO(archive.read(roots[0])))
            prefix = f"{base}data/"
            keys = [name.removeprefix(prefix) for name in infos if name.startswith(prefix)]
            return root, {key: memoryview(archive.read(prefix + key)) for key in keys}
    except ModelError:
        raise
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error, ValueError) as error:
        raise ModelError(f"damaged or truncated zip file: {error}") from error


# ---------------------------------------------------------------------------------------------------------
# Tensors


def _materialise(key: str, value: Any, storages: _Bytes) -> Array:
    """Make `value` a strided read-only view of its storage, after checking that it lies inside."""
    if not isinstance(value, _Tensor):
        raise _refuse(key, f"is a {type(value).__name__.strip('_')}, not a tensor")
    storage = value.storage
    raw = storages.get(storage.key)
    if raw is None:
        raise _refuse(key, f"needs storage {storage.key!r}, which the file does not hold")
    needed = storage.numel * storage.dtype.itemsize
    if len(raw) < needed:
        raise _refuse(key, f"needs {needed} bytes of storage {storage.key!r}, the file holds {len(raw)}")
    if not all(type(i) is int and 0 <= i < 2**40 for i in (value.offset, *value.size, *value.stride)):
        raise _refuse(key, "has an offset, size or stride that is not a reasonable integer")
    if len(value.size) != len(value.stride) or len(value.size) > 32 or math.prod(value.size) >= 2**40:
        raise _refuse(key, f"has size {value.size} and stride {value.stride}")
    if 0 in value.size:
        return np.empty(value.size, storage.dtype)
    last = value.offset + sum((n - 1) * s for n, s in zip(value.size, value.stride, strict=True))
    if last >= storage.numel:
        raise _refuse(key, f"reaches element {last} of a storage of {storage.numel}")
    flat = np.frombuffer(raw, storage.dtype, storage.numel)
    strides = tuple(s * storage.dtype.itemsize for s in value.stride)
    return as_strided(flat[value.offset :], value.size, strides, writeable=False)


def _refuse(key: str, why: str) -> ModelError:
    return ModelError(f"tensor {key!r} {why}")
