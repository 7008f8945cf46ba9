"""Compiled networks in one file: what `Network.save` writes and `vnnigen.load` reads.

    bytes 0..7    magic, the last byte being the version of the format
    bytes 8..39   SHA-256 of everything that follows
    bytes 40..47  length of the header, little-endian
    header        JSON: the graph, its arrays by number
    arrays        each at a multiple of 64 bytes after the header

Weights lie as the graph has them, quantized ones as bytes; they are packed for the tier of the machine that loads them.
A file is data: nothing in it is executed, and every field is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vnnigen.errors import ModelError
from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import (
    Array,
    Attr,
    Constant,
    ElemType,
    Fused,
    Graph,
    Node,
    Precision,
    QWeight,
    TensorType,
    ValueQuant,
)

MAGIC, VERSION = b"vnnigen", 1
_HEADER_AT = len(MAGIC) + 1 + 32 + 8
_ALIGN = 64


def save_graph(graph: Graph, path: str | os.PathLike[str], log: tuple[str, ...] = ()) -> None:
    """Write `graph` to `path`, replacing a file that is there at once or not at all. OSError as for any file."""
    arrays: list[Array] = []
    header = json.dumps({"graph": _graph_out(graph, arrays), "log": list(log), "arrays": _directory(arrays)}).encode()
    parts = [len(header).to_bytes(8, "little"), header]
    at = len(header)
    for array in arrays:
        pad = -at % _ALIGN
        parts += [b"\0" * pad, array.tobytes()]
        at += pad + array.nbytes
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + bytes([VERSION]) + digest.digest())
            file.writelines(parts)
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_graph(path: str | os.PathLike[str]) -> tuple[Graph, tuple[str, ...]]:
    """Read a graph and its log. ModelError for a file that is none, damaged, or of another version."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    if not data.startswith(MAGIC):
        raise ModelError(f"{path} is no compiled network; compile an ONNX model with vnnigen.compile(...).save(path)")
    version = data[len(MAGIC) : len(MAGIC) + 1]
    if version != bytes([VERSION]):
        raise ModelError(f"{path} has format version {list(version)}; this vnnigen reads {VERSION}: compile it again")
    body = memoryview(data)[len(MAGIC) + 33 :]
    if hashlib.sha256(body).digest() != data[len(MAGIC) + 1 : len(MAGIC) + 33]:
        raise ModelError(f"{path} is truncated or damaged (its checksum does not match); copy or compile it again")
    try:
        return _parse(data)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError(f"{path} does not hold what a compiled network must ({error!r}); compile it again") from None


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _directory(arrays: list[Array]) -> list[Any]:
    """Type, shape and place (after the header, before alignment of the header's end) of each array."""
    return [[array.dtype.str, list(array.shape)] for array in arrays]


def _parse(data: bytes) -> tuple[Graph, tuple[str, ...]]:
    length = int.from_bytes(data[_HEADER_AT - 8 : _HEADER_AT], "little")
    if length > len(data) - _HEADER_AT:
        raise ValueError("header is longer than the file")
    header = json.loads(data[_HEADER_AT : _HEADER_AT + length])
    arrays, at = [], length
    for dtype, shape in header["arrays"]:
        kind = np.dtype(str(dtype))
        if kind.hasobject or any(not isinstance(n, int) or n < 0 for n in shape):
            raise ValueError(f"an array of type {dtype} and shape {shape}")
        at += -at % _ALIGN
        count = 1
        for n in shape:
            count *= n
        if at + count * kind.itemsize > len(data) - _HEADER_AT:
            raise ValueError("an array reaches beyond the file")
        arrays.append(np.frombuffer(data, kind, count, _HEADER_AT + at).reshape(shape))
        at += count * kind.itemsize
    graph = _graph_in(header["graph"], lambda i: arrays[int(i)])
    graph.check()
    return graph, tuple(map(str, header["log"]))


# --- the graph as JSON -------------------------------------------------------------------------------------------


def _graph_out(graph: Graph, arrays: list[Array]) -> dict[str, Any]:
    def put(array: Any) -> int:
        arrays.append(np.ascontiguousarray(array).reshape(np.shape(array)))
        return len(arrays) - 1

    def constant(value: Constant) -> Any:
        if isinstance(value, QWeight):
            parts = [put(value.values), put(value.scale), put(value.zero_point)]
            return {"q": parts, "axis": value.axis}
        return put(value)

    return {
        "name": graph.name,
        "inputs": {name: _type_out(kind) for name, kind in graph.inputs.items()},
        "outputs": list(graph.outputs),
        "nodes": [_node_out(node, put) for node in graph.nodes],
        "constants": {name: constant(value) for name, value in graph.constants.items()},
        "types": {name: _type_out(kind) for name, kind in graph.types.items()},
        "quant": {name: [q.dtype, q.scale, q.zero_point] for name, q in graph.quant.items()},
        "notes": list(graph.notes),
    }


def _type_out(kind: TensorType) -> list[Any]:
    return [kind.dtype, None if kind.shape is None else list(kind.shape)]


def _node_out(node: Node, put: Callable[[Any], int]) -> dict[str, Any]:
    return {
        "name": node.name, "op": node.op, "in": list(node.inputs), "out": list(node.outputs), "domain": node.domain,
        "precision": node.precision, "attrs": {key: _attr_out(value, put) for key, value in node.attrs.items()},
        "fused": [[f.op, {k: _attr_out(v, put) for k, v in f.attrs.items()}, f.operand] for f in node.fused],
    }  # fmt: skip


def _attr_out(value: Attr, put: Callable[[Any], int]) -> list[Any]:
    """A tagged value: JSON alone would not tell 1 from 1.0, nor know infinity."""
    if isinstance(value, np.ndarray):
        return ["array", put(value)]
    if isinstance(value, tuple):
        return ["tuple", [_attr_out(item, put) for item in value]]
    if isinstance(value, str):
        return ["str", value]
    if isinstance(value, (bool, int, np.integer)):
        return ["int", int(value)]
    return ["float", float(value).hex()]


def _graph_in(raw: Mapping[str, Any], get: Callable[[Any], Array]) -> Graph:
    def constant(value: Any) -> Constant:
        if not isinstance(value, dict):
            return get(value)
        values, scale, zero_point = (get(i) for i in value["q"])
        wanted = (np.int8, np.float32, np.int32)
        if any(a.dtype != t for a, t in zip((values, scale, zero_point), wanted, strict=True)):
            raise ValueError("quantized weights of other types")
        axis = value["axis"]
        return QWeight(
            values.astype(np.int8, copy=False), scale.astype(np.float32, copy=False),
            zero_point.astype(np.int32, copy=False), None if axis is None else int(axis),
        )  # fmt: skip

    return Graph(
        str(raw["name"]),
        {str(name): _type_in(kind) for name, kind in raw["inputs"].items()},
        tuple(map(str, raw["outputs"])),
        [_node_in(node, get) for node in raw["nodes"]],
        {str(name): constant(value) for name, value in raw["constants"].items()},
        {str(name): _type_in(kind) for name, kind in raw["types"].items()},
        {str(name): _quant_in(*q) for name, q in raw["quant"].items()},
        list(map(str, raw["notes"])),
    )


def _type_in(raw: Any) -> TensorType:
    dtype, shape = raw
    if dtype not in get_args(ElemType):
        raise ValueError(f"a value of type {dtype!r}")
    numpy_dtype(dtype)
    if shape is not None and any(not isinstance(d, (int, str)) or (isinstance(d, int) and d < 0) for d in shape):
        raise ValueError(f"a shape {shape!r}")
    return TensorType(dtype, None if shape is None else tuple(shape))


def _quant_in(dtype: Any, scale: Any, zero_point: Any) -> ValueQuant:
    if dtype not in ("u8", "s8") or not np.isfinite(scale) or scale <= 0:
        raise ValueError(f"a quantization {dtype!r}, {scale!r}")
    return ValueQuant(dtype, float(scale), int(zero_point))


def _node_in(raw: Mapping[str, Any], get: Callable[[Any], Array]) -> Node:
    if raw["precision"] not in get_args(Precision):
        raise ValueError(f"a precision {raw['precision']!r}")
    fused = tuple(
        Fused(str(op), {k: _attr_in(v, get) for k, v in attrs.items()}, None if operand is None else int(operand))
        for op, attrs, operand in raw["fused"]
    )
    return Node(
        str(raw["name"]), str(raw["op"]), tuple(map(str, raw["in"])), tuple(map(str, raw["out"])),
        {str(key): _attr_in(value, get) for key, value in raw["attrs"].items()}, fused, raw["precision"],
        str(raw["domain"]),
    )  # fmt: skip


def _attr_in(raw: Any, get: Callable[[Any], Array]) -> Any:
    kind, value = raw
    readers: dict[str, Callable[[Any], Any]] = {
        "array": get, "tuple": lambda items: tuple(_attr_in(item, get) for item in items), "str": str, "int": int,
        "float": float.fromhex,
    }  # fmt: skip
    return readers[kind](value)
