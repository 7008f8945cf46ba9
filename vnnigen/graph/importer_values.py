"""What ONNX files hold besides nodes: tensors, types and attributes, as arrays and types of the graph.

Nothing here trusts the file: a tensor's data must have exactly the length that its shape says, and lengths are bounded
before memory is taken. Enumerations are those of onnx.proto (TensorProto.DataType, AttributeProto.AttributeType).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vnnigen.errors import ModelError
from vnnigen.graph.dtypes import NUMPY_DTYPES, ONNX_TYPES
from vnnigen.graph.ir import Array, Attr, Dim, ElemType, TensorType

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, TensorProto, ValueInfoProto

#: All floating-point types are computed as f32.
FLOATS = ("f32", "f16", "f64", "bf16")
#: onnx.proto: which field holds the elements of each type if raw_data does not.
TYPED_FIELDS: Mapping[ElemType, str] = {
    "f32": "float_data", "f64": "double_data", "s64": "int64_data", "u32": "uint64_data", "u64": "uint64_data",
    **dict.fromkeys(("u8", "s8", "u16", "s16", "s32", "bool", "f16", "bf16"), "int32_data"),
}  # fmt: skip
MAX_RANK = 16
MAX_DIM = 2**31 - 1


def element_type(number: int, what: str) -> ElemType:
    """The element type with a number of TensorProto.DataType. ModelError, beginning with `what`, if not supported."""
    if number not in ONNX_TYPES:
        known = ", ".join(ONNX_TYPES.values())
        raise ModelError(f"{what} has element type {number} of ONNX, which is not supported; supported are {known}")
    return ONNX_TYPES[number]


def computed_type(kind: ElemType) -> ElemType:
    """The type a value is computed in: f32 for every float."""
    return "f32" if kind in FLOATS else kind


def computed_number(number: int, what: str) -> int:
    """The same for a number of TensorProto.DataType."""
    return 1 if element_type(number, what) in FLOATS else number


def checked_shape(dims: tuple[int, ...], what: str) -> tuple[int, ...]:
    """`dims` if they can be a tensor's; ModelError on negative or huge ones."""
    if len(dims) > MAX_RANK:
        raise ModelError(f"{what} has {len(dims)} dimensions, more than {MAX_RANK}")
    if any(d < 0 or d > MAX_DIM for d in dims):
        raise ModelError(f"{what} has shape {dims}: lengths must lie between 0 and {MAX_DIM}")
    return dims


def tensor_bytes(tensor: TensorProto, what: str) -> int:
    """Bytes of the elements, by shape and type, as raw_data would hold them. ModelError if either is not possible."""
    shape = checked_shape(tuple(tensor.dims), what)
    kind = element_type(tensor.data_type, what)
    return math.prod(shape) * NUMPY_DTYPES[kind].itemsize


def read_tensor(tensor: TensorProto, what: str) -> Array:
    """The tensor as an array, floats as f32; read-only.

    Raises ModelError where data and shape disagree, the type is not supported, or a float is NaN (an f16 or f64 that
    is too large for f32 becomes infinite; who may be infinite is for the importer to say).
    """
    if tensor.data_location == tensor.EXTERNAL:
        raise ModelError(f"{what} lies outside of the model, and no folder to read it from is known")
    if tensor.HasField("segment"):
        raise ModelError(f"{what} is stored in segments, which is not supported")
    kind = element_type(tensor.data_type, what)
    array = _raw(tensor, kind, what) if tensor.HasField("raw_data") else _typed(tensor, kind, what)
    if kind in FLOATS:
        with np.errstate(over="ignore", invalid="ignore"):
            array = array.astype(np.float32, copy=False)
        if np.isnan(np.min(array, initial=0)):
            raise ModelError(f"{what} contains NaN")
    array.flags.writeable = False
    return array


def _raw(tensor: TensorProto, kind: ElemType, what: str) -> Array:
    expected, raw = tensor_bytes(tensor, what), tensor.raw_data
    if len(raw) != expected:
        raise ModelError(
            f"{what} has {len(raw)} bytes of data, but {expected} by its shape {list(tensor.dims)} ({kind})"
        )
    flat: Array = np.frombuffer(raw, np.uint8 if kind == "bool" else NUMPY_DTYPES[kind])
    if kind == "bool":  # any byte but 0 and 1 is no bool of NumPy's
        flat = flat != 0
    return flat.reshape(tuple(tensor.dims))


def _typed(tensor: TensorProto, kind: ElemType, what: str) -> Array:
    shape = checked_shape(tuple(tensor.dims), what)
    items = getattr(tensor, TYPED_FIELDS[kind])
    if len(items) != math.prod(shape):
        raise ModelError(f"{what} has {len(items)} elements, but {math.prod(shape)} by its shape {list(shape)}")
    if kind in ("f16", "bf16"):  # bit patterns, by onnx.proto
        bits: Array = _narrowed(np.array(items, np.int64), np.uint16, what).view(NUMPY_DTYPES[kind])
        return bits.reshape(shape)
    wide: npt.DTypeLike = {"f32": np.float32, "f64": np.float64, "u64": np.uint64, "u32": np.uint64}.get(kind, np.int64)
    array: Array = np.array(items, wide)
    array = array != 0 if kind == "bool" else _narrowed(array, NUMPY_DTYPES[kind], what)
    return array.reshape(shape)


def _narrowed(array: Array, dtype: npt.DTypeLike, what: str) -> Array:
    """`array` as `dtype`; ModelError unless it holds every value."""
    narrow: Array = array.astype(dtype, copy=False)
    if narrow.dtype.kind in "iu" and not np.array_equal(narrow, array):
        raise ModelError(f"{what} holds integers that do not fit its type {np.dtype(dtype)}")
    return narrow


def read_type(info: ValueInfoProto, what: str) -> TensorType:
    """The declared type of a graph input: unknown lengths become names, floats f32.

    Raises ModelError for what is no tensor, and for lengths that are negative (except -1) or huge.
    """
    if info.type.WhichOneof("value") != "tensor_type":
        raise ModelError(f"{what} is no tensor ({info.type.WhichOneof('value') or 'it has no type'})")
    tensor = info.type.tensor_type
    kind = computed_type(element_type(tensor.elem_type, what))
    if not tensor.HasField("shape"):
        return TensorType(kind, None)
    if len(tensor.shape.dim) > MAX_RANK:
        raise ModelError(f"{what} has {len(tensor.shape.dim)} dimensions, more than {MAX_RANK}")
    dims: list[Dim] = []
    for axis, dim in enumerate(tensor.shape.dim):
        # Exporters write -1 or "?", too, where they know no length.
        if dim.HasField("dim_value") and dim.dim_value != -1:
            if not 0 <= dim.dim_value <= MAX_DIM:
                raise ModelError(f"{what} has length {dim.dim_value} in dimension {axis}; 0 to {MAX_DIM} are possible")
            dims.append(dim.dim_value)
        else:
            dims.append(dim.dim_param if dim.dim_param not in ("", "?") else f"{info.name}.{axis}")
    return TensorType(kind, tuple(dims))


def graph_texts(graph: GraphProto) -> Iterator[str]:
    """Every text of a graph that means something to the importer, without those of sub-graphs."""
    yield graph.name
    yield from (tensor.name for tensor in graph.initializer)
    for info in (*graph.input, *graph.output):
        yield info.name
        yield from (dim.dim_param for dim in info.type.tensor_type.shape.dim)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def check_texts(texts: Iterable[str]) -> None:
    """ModelError for a name that is not UTF-8, which protobuf gives as bytes (or raises UnicodeDecodeError)."""
    for text in texts:
        if not isinstance(text, str):
            raise ModelError(f"the model holds a name that is no UTF-8 text: {text!r}")


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ModelError(f"{what} is no UTF-8 text") from None


# AttributeProto.AttributeType: how to read each. Graphs (5, 10), sparse tensors, types: no reader.
_READERS: Mapping[int, Callable[[AttributeProto, str], Attr]] = {
    1: lambda a, what: float(a.f),
    2: lambda a, what: int(a.i),
    3: lambda a, what: _text(a.s, what),
    4: lambda a, what: read_tensor(a.t, what),
    6: lambda a, what: tuple(float(f) for f in a.floats),
    7: lambda a, what: tuple(int(i) for i in a.ints),
    8: lambda a, what: tuple(_text(s, what) for s in a.strings),
}


def read_attribute(attribute: AttributeProto, what: str) -> Attr:
    """The value of an attribute. ModelError for sub-graphs, sparse tensors and types."""
    reader = _READERS.get(attribute.type)
    if reader is None:
        kinds = {5: "a sub-graph", 10: "sub-graphs", 11: "a sparse tensor", 12: "sparse tensors"}
        raise ModelError(f"{what} is {kinds.get(attribute.type, f'of kind {attribute.type}')}, which is not supported")
    return reader(attribute, what)
