"""Files that are damaged or hostile: a ModelError with the name of what is wrong, and nothing outside is read."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from tests.graph.models import Net, feeds, small_cnn  # noqa: E402
from tests.graph.roundtrip import run  # noqa: E402
from vnnigen.errors import MissingExtraError, ModelError  # noqa: E402
from vnnigen.graph.importer import import_model  # noqa: E402
from vnnigen.graph.importer_values import read_tensor  # noqa: E402
from vnnigen.graph.loader import Limits, load_onnx  # noqa: E402

VALUES = np.arange(6, dtype=np.float32)


def gemm(weights: Any) -> Any:
    """A model with one tensor of weights, [2, 3]."""
    net = Net("gemm")
    x = net.input("x", (1, 2))
    net.initializers.append(weights)
    return net.model(net.op("MatMul", x, weights.name), shape=(1, 3))


def external(location: str, **entries: str) -> Any:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def save(folder: Path, model: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_sources_are_equal(tmp_path: Path) -> None:
    """A path, its text, bytes and a parsed model give the same; the parsed one is not changed."""
    model = small_cnn()
    path = save(tmp_path, model)
    before = model.SerializeToString()
    for source in (path, str(path), path.read_bytes(), model):
        assert load_onnx(source).SerializeToString() == before
    assert model.SerializeToString() == before


def test_missing_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"vnnigen\[onnx\]"):
        import_model(b"")


def test_external_data(tmp_path: Path) -> None:
    """At an offset of a file in a folder below the model's, as onnx itself writes it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"junk" + VALUES.tobytes())
    path = save(tmp_path, gemm(external("data/w.bin", offset="4", length="24")))
    graph = import_model(path)
    np.testing.assert_array_equal(graph.array("w"), VALUES.reshape(2, 3))
    parsed = onnx.load(path, load_external_data=False)
    assert import_model(parsed, folder=tmp_path).constants.keys() == {"w"}
    assert parsed.graph.initializer[0].data_location == TensorProto.EXTERNAL
    with pytest.raises(ModelError, match=r"'w'.*no folder"):
        import_model(path.read_bytes())


def _hardlink(folder: Path) -> None:
    os.link(folder.parent / "secret", folder / "w.bin")


def _symlink(folder: Path) -> None:
    (folder / "w.bin").symlink_to(folder.parent / "secret")


def _symlinked_folder(folder: Path) -> None:
    (folder / "sub").symlink_to(folder.parent)


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "w.bin")


def _nothing(folder: Path) -> None: ...


def _good(folder: Path) -> None:
    (folder / "w.bin").write_bytes(VALUES.tobytes())


OUTSIDE: list[tuple[str, Callable[[Path], None], dict[str, str], str]] = [
    ("../secret", _nothing, {}, "inside the model's folder"),
    ("sub/../../secret", _nothing, {}, "inside the model's folder"),
    ("", _nothing, {}, "inside the model's folder"),
    ("..\\secret", _nothing, {}, "inside the model's folder"),
    ("/etc/hostname", _nothing, {}, "inside the model's folder"),
    ("w.bin", _symlink, {}, "links are not followed"),
    ("sub/secret", _symlinked_folder, {}, "links are not followed"),
    ("w.bin", _hardlink, {}, "hard link"),
    ("w.bin", _pipe, {}, "not a regular file"),
    (".", _nothing, {}, "inside the model's folder|cannot read|not a regular"),
    ("absent", _nothing, {}, "cannot read"),
    ("w\0.bin", _good, {}, "inside the model's folder"),
    ("w.bin", _good, {"offset": "4"}, "ends at byte 28"),
    ("w.bin", _good, {"offset": "999999999999"}, "ends at byte"),
    ("w.bin", _good, {"offset": "-4"}, "no length"),
    ("w.bin", _good, {"offset": "1" * 5000}, "no length"),
    ("w.bin", _good, {"length": "20"}, "20 bytes of data, but 24"),
    ("w.bin", _good, {"length": "x"}, "no length"),
]


@pytest.mark.parametrize(("location", "prepare", "entries", "why"), OUTSIDE)
def test_external_data_is_refused(
    tmp_path: Path, location: str, prepare: Callable[[Path], None], entries: dict[str, str], why: str
) -> None:
    (tmp_path / "secret").write_bytes(VALUES.tobytes())
    path = save(tmp_path / "model", gemm(external(location, **entries)))
    prepare(path.parent)
    with pytest.raises(ModelError, match=f"'w'.*({why})"):
        load_onnx(path)


def test_external_data_at_no_text(tmp_path: Path) -> None:
    """A place that is not UTF-8, which cannot be said through protobuf's own interface."""
    path = save(tmp_path, gemm(external("wXXXX.bin")))
    path.write_bytes(path.read_bytes().replace(b"wXXXX", b"w\xff\xfeX\xc0"))
    with pytest.raises(ModelError, match=r"'w'.*UTF-8"):
        load_onnx(path)


def raw(dims: list[int], data: bytes, kind: int = TensorProto.FLOAT) -> Any:
    return TensorProto(name="w", data_type=kind, dims=dims, raw_data=data)


BAD_TENSORS = [
    (raw([2, 3], VALUES.tobytes()[:-1]), "23 bytes of data, but 24"),
    (raw([2, 3], VALUES.tobytes() + b"x"), "25 bytes of data, but 24"),
    (raw([-2, -3], VALUES.tobytes()), "lengths must lie between"),
    (raw([2**62, 4], b""), "lengths must lie between"),
    (raw([2**31 - 1] * 2, b""), "more than"),
    (raw([1] * 40, b"\0\0\0\0"), "40 dimensions"),
    (raw([2, 3], b"", TensorProto.STRING), "element type 8"),
    (raw([2, 3], b"", 0), "element type 0"),
    (raw([2, 3], b"", 99), "element type 99"),
    (TensorProto(name="w", data_type=1, dims=[2, 3], float_data=[1.0] * 5), "5 elements, but 6"),
    (TensorProto(name="w", data_type=TensorProto.INT8, dims=[1], int32_data=[200]), "do not fit"),
    (TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=[1], int32_data=[-1]), "do not fit"),
    (raw([2, 3], np.array([1, np.nan] * 3, np.float32).tobytes()), "NaN"),
    (raw([2, 3], np.array([1, np.inf] * 3, np.float32).tobytes()), "infinity"),
    (raw([2, 3], np.array([1, 1e300] * 3).tobytes(), TensorProto.DOUBLE), "infinity"),
    (raw([2, 0], b""), "empty"),
    (TensorProto(name="w", data_type=1, dims=[6], segment=TensorProto.Segment(begin=0, end=1)), "segments"),
]


@pytest.mark.parametrize(("tensor", "why"), BAD_TENSORS)
def test_bad_tensors(tensor: Any, why: str) -> None:
    with pytest.raises(ModelError, match=f"'w'.*{why}"):
        import_model(gemm(tensor))


@pytest.mark.parametrize("kind", ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT8", "UINT8", "INT16", "UINT16", "INT32",
                                  "UINT32", "INT64", "UINT64", "BOOL"])  # fmt: skip
@pytest.mark.parametrize("stored_raw", [True, False])
def test_element_types(kind: str, stored_raw: bool) -> None:
    """Every type, in raw_data and in the typed fields; floats come as f32."""
    number = getattr(TensorProto, kind)
    dtype = helper.tensor_dtype_to_np_dtype(number)
    values = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    made = helper.make_tensor(
        "w", number, (2, 3), values.tobytes() if stored_raw else values.reshape(-1), raw=stored_raw
    )
    array = read_tensor(made, "w")
    floating = kind in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")
    assert array.dtype == (np.float32 if floating else dtype)
    np.testing.assert_array_equal(array, values.astype(array.dtype))
    assert not array.flags.writeable


def test_truncated_everywhere(tmp_path: Path) -> None:
    data = gemm(raw([2, 3], VALUES.tobytes())).SerializeToString()
    import_model(data)
    for length in range(len(data)):
        with contextlib.suppress(ModelError):
            import_model(data[:length]).check()
    with pytest.raises(ModelError):
        import_model(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\xff" * 100, b"not a model", bytes(range(256))])
def test_no_model(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        import_model(data)
    path = tmp_path / "no.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError):
        import_model(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        import_model(tmp_path / "absent.onnx")
    for name in (".", "pipe"):
        os.mkfifo(tmp_path / "pipe") if name == "pipe" else None
        with pytest.raises(ModelError, match=r"not a regular file|cannot read"):
            import_model(tmp_path / name)


def test_limits(tmp_path: Path) -> None:
    model = small_cnn()
    path = save(tmp_path, model)
    with pytest.raises(ModelError, match="more than the 100 that are allowed"):
        load_onnx(path, limits=Limits(file_bytes=100))
    with pytest.raises(ModelError, match="17 nodes, more than the 5"):
        load_onnx(path, limits=Limits(nodes=5))
    with pytest.raises(ModelError, match=r"initializer 'c\d+' take \d+ bytes, more than the 1000"):
        load_onnx(path, limits=Limits(data_bytes=1000))


def test_one_external_file_many_times(tmp_path: Path) -> None:
    """The bound is on what is read, not on what lies on the disk."""
    (tmp_path / "w.bin").write_bytes(b"\0" * 4096)
    net = Net("many")
    for i in range(100):
        tensor = external("w.bin")
        tensor.name, tensor.dims[:] = f"w{i}", [1024]
        net.initializers.append(tensor)
    net.input("x", (1,))
    path = save(tmp_path, net.model(net.op("Relu", "x")))
    with pytest.raises(ModelError, match="'w50'"):
        load_onnx(path, limits=Limits(data_bytes=50 * 4096 + 1))


@pytest.mark.parametrize(
    ("imports", "why"),
    [([("", 99)], "opset 99"), ([("", 0)], "opset 0"), ([("", -1)], "opset -1"), ([], "does not say"),
     ([("", 17), ("ai.onnx", 13)], "two versions"), ([("com.acme", 1)], "does not say")],
)  # fmt: skip
def test_opsets(imports: list[tuple[str, int]], why: str) -> None:
    model = small_cnn()
    del model.opset_import[:]
    model.opset_import.extend(onnx.OperatorSetIdProto(domain=d, version=v) for d, v in imports)
    with pytest.raises(ModelError, match=why):
        import_model(model)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_old_models_are_converted(mode: str) -> None:
    """Opset 9, with operators whose parameters moved, computes what it did (Resize of before 11 was asymmetric)."""
    net = Net("old", opset=9)
    x = net.op("Relu", net.conv(net.input("x", (1, 3, 4, 4)), 3, 4))
    sliced = net.op("Slice", x, axes=[2], starts=[1], ends=[3])
    clipped = net.op("Clip", net.op("Pad", sliced, pads=[0, 0, 1, 0, 0, 0, 1, 0]), min=0.0, max=0.5)
    sums = net.op("ReduceSum", net.op("Dropout", clipped, ratio=0.5), axes=[1], keepdims=1)
    model = net.model(net.op("Upsample", sums, net.const(np.array([1, 1, 3, 3], np.float32)), mode=mode))
    graph = import_model(model)
    assert {n.op for n in graph}.isdisjoint({"Upsample", "Dropout"})
    del model.graph.node[-1]
    model.graph.output[0].name = sums
    given = feeds(model)
    (before,) = ReferenceEvaluator(model).run(None, given)
    at = np.arange(12) / 3
    low = np.minimum(at.astype(int), 3)
    high, part = np.minimum(low + 1, 3), (at - low if mode == "linear" else np.zeros(12))
    rows = before[:, :, low] * (1 - part)[:, None] + before[:, :, high] * part[:, None]
    expected = rows[..., low] * (1 - part) + rows[..., high] * part
    np.testing.assert_allclose(run(graph, given)[0], expected, rtol=1e-4, atol=1e-5)


def test_old_and_broken() -> None:
    model = small_cnn(opset=9)
    model.graph.node[0].input[0] = "nobody"
    with pytest.raises(ModelError, match="older than 11, and cannot be converted"):
        import_model(model)


def test_functions_are_refused() -> None:
    model = small_cnn()
    model.functions.add(name="Mine", domain="local")
    with pytest.raises(ModelError, match=r"'Mine'.*inliner"):
        import_model(model)


def _field(number: int, data: bytes) -> bytes:
    """A message inside a message, as protobuf writes it."""
    length, size = b"", len(data)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


@pytest.mark.parametrize("depth", [1, 3, 12, 30, 5000])
def test_nested_graphs(depth: int) -> None:
    """Sub-graphs in sub-graphs end in an error, not in the interpreter's stack."""
    graph = b""
    for _ in range(depth):  # graph.node.attribute.g
        attribute = _field(1, b"then_branch") + bytes([0xA0, 1, onnx.AttributeProto.GRAPH]) + _field(6, graph)
        graph = _field(1, _field(2, b"y") + _field(4, b"If") + _field(5, attribute))
    head = _field(8, bytes([2 << 3, 17])) + _field(7, graph + _field(12, _field(1, b"y")))
    with pytest.raises(ModelError, match=r"sub-graph|no ONNX model|If"):
        import_model(bytes([1 << 3, 8]) + head)
