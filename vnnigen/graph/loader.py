"""Read ONNX files that may be damaged or hostile: `load_onnx` gives a model with all tensors inside, or ModelError.

What is checked here is what costs memory or reaches outside: the size of files, the shape and length of every tensor,
and where external data lies. It may only lie in regular files below the model's folder: no absolute paths, no "..",
no symbolic links, and no hard links, since those may name any file of the disk (onnx's own loader does as much since
1.21).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from vnnigen.errors import MissingExtraError, ModelError
from vnnigen.graph.importer_branches import inline_branches
from vnnigen.graph.importer_values import check_texts, graph_texts, tensor_bytes

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

#: The oldest opset that is imported as it is; older models are converted first.
OLDEST_OPSET = 11
#: How deep sub-graphs may lie in each other.
MAX_DEPTH = 8


@dataclass(frozen=True)
class Limits:
    """How much a model may hold: bytes of the file, bytes of all tensors, number of nodes."""

    file_bytes: int = 2**31 - 1  # protobuf's own
    data_bytes: int = 8 << 30
    nodes: int = 200_000


DEFAULT_LIMITS = Limits()


def require_onnx() -> Any:
    """Import the onnx package with the parts that are used. MissingExtraError if it is not installed."""
    try:
        import onnx
        import onnx.checker
        import onnx.defs
        import onnx.helper
        import onnx.version_converter
    except ImportError:
        raise MissingExtraError("onnx", "onnx") from None
    return onnx


def load_onnx(
    source: str | os.PathLike[str] | bytes | ModelProto, *, folder: Path | None = None, limits: Limits = DEFAULT_LIMITS
) -> ModelProto:
    """Parse and check a model; opset 11 or newer, all tensors inside it.

    `source` is a file, the bytes of one, or a parsed model (which is not changed). External data is read from
    `folder`, by default that of the file; bytes and parsed models have none. Raises ModelError, naming the tensor or
    node and the reason, and MissingExtraError without the onnx package.
    """
    onnx = require_onnx()
    model: ModelProto
    if isinstance(source, onnx.ModelProto):
        model = source
    elif isinstance(source, bytes):
        model = _parse(onnx, source, "the model")
    else:
        path = Path(os.fspath(source))
        model = _parse(onnx, read_regular_file(path, limits.file_bytes), str(path))
        folder = path.parent if folder is None else folder
    try:
        _check_texts(model)
        loaded = inline_branches(_inside(model, folder, limits, owned=model is not source))
        opset = opsets(onnx, loaded)[""]
        return loaded if opset >= OLDEST_OPSET else _converted(onnx, loaded)
    except UnicodeDecodeError:
        raise ModelError("the model holds a name that is no UTF-8 text") from None


def opsets(onnx: Any, model: ModelProto) -> dict[str, int]:
    """The version of each operator set that the model imports. ModelError if newer than known or contradictory."""
    found: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if found.setdefault(domain, entry.version) != entry.version:
            raise ModelError(f"the model imports operator set {entry.domain!r} in two versions")
    newest = onnx.defs.onnx_opset_version()
    if "" not in found:
        raise ModelError("the model does not say which version of ONNX's operators it uses (opset_import)")
    if not 0 < found[""] <= newest:
        raise ModelError(
            f"the model uses opset {found['']}; this onnx package ({onnx.__version__}) knows 1 to {newest}"
        )
    return found


def read_regular_file(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes; ModelError otherwise."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # does not wait at a pipe
            size = _regular(file.fileno(), str(path)).st_size
            if size > most:
                raise ModelError(f"{path} has {size} bytes, more than the {most} that are allowed")
            return file.read(size)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None


def _regular(descriptor: int, what: str) -> os.stat_result:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{what} is not a regular file")
    return status


def _parse(onnx: Any, data: bytes, what: str) -> ModelProto:
    from google.protobuf.message import DecodeError

    try:
        model: ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelError(f"{what} is no ONNX model, or damaged: {error}") from None
    return model


def _converted(onnx: Any, model: ModelProto) -> ModelProto:
    """The model in the oldest opset that is imported as it is. The converter wants a valid model, so it is checked."""
    try:
        onnx.checker.check_model(model)
        converted: ModelProto = onnx.version_converter.convert_version(model, OLDEST_OPSET)
    except Exception as error:  # it raises what it likes: RuntimeError, IndexError, ValidationError, ...
        first = str(error).strip().split("\n")[0]
        raise ModelError(f"the model's opset is older than {OLDEST_OPSET}, and cannot be converted: {first}") from None
    for node in converted.graph.node:  # the converter leaves out that Resize meant this before 11 (as of onnx 1.23)
        if node.op_type == "Resize" and not any(a.name == "coordinate_transformation_mode" for a in node.attribute):
            made = onnx.helper.make_attribute
            node.attribute.append(made("coordinate_transformation_mode", "asymmetric"))
            node.attribute.append(made("nearest_mode", "floor"))
    return converted


def _check_texts(model: ModelProto) -> None:
    """ModelError for a name of the model's that is not UTF-8; sub-graphs are not looked at."""
    check_texts(entry.domain for entry in model.opset_import)
    check_texts(graph_texts(model.graph))


# Tensors, wherever they lie in a model.


def graph_tensors(graph: GraphProto, depth: int = 0) -> Iterator[tuple[str, TensorProto]]:
    """Every tensor of a graph and its sub-graphs, with words that name it. ModelError if nested too deeply."""
    if depth > MAX_DEPTH:
        raise ModelError(f"sub-graphs lie more than {MAX_DEPTH} deep in each other, at graph {graph.name!r}")
    for tensor in graph.initializer:
        yield f"initializer {tensor.name!r}", tensor
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise ModelError(f"initializer {name!r} is sparse, which is not supported")
    for node in graph.node:
        yield from _node_tensors(node, depth)


def _node_tensors(node: NodeProto, depth: int) -> Iterator[tuple[str, TensorProto]]:
    for attribute in node.attribute:
        what = f"attribute {attribute.name!r} of node {node.name or node.op_type!r}"
        if attribute.HasField("t"):
            yield what, attribute.t
        for tensor in attribute.tensors:
            yield what, tensor
        if attribute.HasField("g"):
            yield from graph_tensors(attribute.g, depth + 1)
        for inner in attribute.graphs:
            yield from graph_tensors(inner, depth + 1)


def _inside(model: ModelProto, folder: Path | None, limits: Limits, owned: bool) -> ModelProto:
    """The model with external data read into it (a copy if it is not `owned`), and its size checked."""
    if not model.HasField("graph"):
        raise ModelError("the model has no graph: the file is no ONNX model, or empty")
    if model.functions:
        raise ModelError(
            f"the model defines functions ({model.functions[0].name!r}); write them out first (onnx.inliner)"
        )
    if len(model.graph.node) > limits.nodes:
        raise ModelError(f"the graph has {len(model.graph.node)} nodes, more than the {limits.nodes} that are allowed")
    total, outside = 0, False
    for what, tensor in graph_tensors(model.graph):
        outside |= tensor.data_location == tensor.EXTERNAL
        if tensor.data_type in (0, 8):  # undefined, text: refused where they are used
            continue
        total += tensor_bytes(tensor, what)
        if total > limits.data_bytes:
            raise ModelError(f"tensors up to {what} take {total} bytes, more than the {limits.data_bytes} allowed")
    if not outside:
        return model
    if not owned:
        copy = type(model)()
        copy.CopyFrom(model)
        model = copy
    for what, tensor in graph_tensors(model.graph):
        if tensor.data_location == tensor.EXTERNAL:
            _read_external(tensor, what, folder)
    return model


def _read_external(tensor: TensorProto, what: str, folder: Path | None) -> None:
    """Move external data of a tensor into its raw_data."""
    entries = {e.key: e.value for e in tensor.external_data}
    if not all(isinstance(text, str) for entry in entries.items() for text in entry):
        raise ModelError(f"{what}: where its external data lies is no UTF-8 text")
    location = entries.get("location", "")
    if folder is None:
        raise ModelError(f"{what} lies in {location!r} outside of the model, and no folder to read it from is known")
    size = tensor_bytes(tensor, what)
    offset, length = (_number(entries, key, default, what) for key, default in (("offset", 0), ("length", size)))
    if length != size:
        raise ModelError(f"{what} has {length} bytes of data, but {size} by its shape {list(tensor.dims)}")
    with _open_below(folder, location, what) as file:
        status = _regular(file.fileno(), f"{what}: {location!r}")
        if status.st_nlink != 1:
            raise ModelError(f"{what}: {location!r} is a hard link, which is refused: it may be any file of the disk")
        if offset + length > status.st_size:
            raise ModelError(
                f"{what} ends at byte {offset + length} of {location!r}, which has {status.st_size} bytes only"
            )
        file.seek(offset)
        tensor.raw_data = file.read(length)
    if len(tensor.raw_data) != size:
        raise ModelError(f"{what}: {location!r} ended while it was read")
    tensor.data_location = tensor.DEFAULT
    del tensor.external_data[:]


def _number(entries: dict[str, str], key: str, default: int, what: str) -> int:
    text = entries.get(key, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise ModelError(f"{what}: {key} {text[:40]!r} of its external data is no length")
    return int(text)


def _open_below(folder: Path, location: str, what: str) -> BinaryIO:
    """Open a file below `folder` for reading, following no link on the way."""
    parts = PurePosixPath(location).parts
    bad = not parts or location.startswith(("/", "\\")) or ".." in parts or "\\" in location or "\0" in location
    if bad:
        raise ModelError(f"{what}: external data at {location!r} does not lie inside the model's folder")
    try:
        with ExitStack() as opened:
            directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, directory)
            for part in parts[:-1]:
                directory = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
                opened.callback(os.close, directory)
            return os.fdopen(os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory), "rb")
    except OSError as error:
        raise ModelError(f"{what}: cannot read {location!r} (links are not followed): {error.strerror}") from None
