"""Calibration samples in files."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vnnigen
from tests.graph.pass_helpers import Build
from vnnigen.errors import QuantizationError
from vnnigen.graph.ir import TensorType
from vnnigen.quant import SampleFiles

IMAGE = {"x": TensorType("f32", ("n", 3, 4, 5))}
FIXED = {"x": TensorType("f32", (2, 3, 4, 5))}
TWO = {"a": TensorType("s64", ("n", 7)), "b": TensorType("f32", ("n", 2))}
RNG = np.random.default_rng(0)
TEN = RNG.standard_normal((10, 3, 4, 5)).astype(np.float32)


def shapes(path: Path, inputs: dict[str, TensorType] = IMAGE) -> list[Any]:
    files = SampleFiles(path, inputs)
    found = [{k: v.shape for k, v in sample.items()} for sample in files]
    assert len(files) == len(found)
    return [f["x"] if list(f) == ["x"] else f for f in found]


@pytest.mark.parametrize("how", ["npy", "npz", "packed", "fortran"])
@pytest.mark.parametrize(
    ("values", "inputs", "expected"),
    [
        (TEN, IMAGE, [(1, 3, 4, 5)] * 10),
        (TEN, FIXED, [(2, 3, 4, 5)] * 5),
        (TEN[:, None], IMAGE, [(1, 3, 4, 5)] * 10),
        (TEN[0], IMAGE, [(1, 3, 4, 5)]),
    ],
    ids=["rows", "batches", "stack", "one"],
)
def test_forms(tmp_path: Path, how: str, values: Any, inputs: dict[str, TensorType], expected: list[Any]) -> None:
    values = np.asfortranarray(values) if how == "fortran" else values
    path = tmp_path / ("a.npy" if how == "npy" else "a.npz")
    if how == "npy":
        np.save(path, values)
    else:
        (np.savez_compressed if how == "packed" else np.savez)(path, x=values)
    assert shapes(path, inputs) == expected
    files = SampleFiles(path, inputs)
    for _ in range(2):  # a second pass reads the same
        np.testing.assert_array_equal(np.concatenate([s["x"] for s in files]).ravel(), values.ravel())


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", TEN[:2])
    np.savez(tmp_path / "a.npz", any=TEN[2:3])
    np.save(tmp_path / "c.npy", TEN[5])
    (tmp_path / "readme.txt").write_text("not a sample")
    found = np.concatenate([s["x"] for s in SampleFiles(tmp_path, IMAGE)])
    np.testing.assert_array_equal(found, TEN[[2, 0, 1, 5]])


def test_several_inputs_and_types(tmp_path: Path) -> None:
    a, b = RNG.integers(0, 9, (6, 7)).astype(np.int32), RNG.standard_normal((6, 2))
    np.savez(tmp_path / "s.npz", a=a, b=b)
    found = list(SampleFiles(tmp_path / "s.npz", TWO))
    assert [(s["a"].dtype, s["b"].dtype) for s in found] == [(np.int64, np.float32)] * 6
    np.testing.assert_array_equal(np.concatenate([s["a"] for s in found]), a)


def save(path: Path, values: Any) -> Path:
    np.save(path, values)
    return path


def cut(path: Path, keep: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def archive(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


BAD: dict[str, tuple[Any, dict[str, TensorType], str]] = {
    "missing": (lambda p: p / "no.npz", IMAGE, "does not exist"),
    "another kind": (lambda p: Path(__file__), IMAGE, "no .npy or .npz file"),
    "empty folder": (lambda p: p, IMAGE, "has no .npy or .npz files"),
    "empty": (lambda p: save(p / "a.npy", TEN[:0]), IMAGE, "empty"),
    "objects": (lambda p: save(p / "a.npy", np.array([{}], object)), IMAGE, "Python objects"),
    "objects in an archive": (lambda p: archive(p / "a.npz", x=np.array([{}], object)), IMAGE, "Python objects"),
    "cut off": (lambda p: cut(save(p / "a.npy", TEN), 0.5), IMAGE, "a.npy"),
    "cut header": (lambda p: cut(save(p / "a.npy", TEN), 0.01), IMAGE, "a.npy"),
    "cut archive": (lambda p: cut(archive(p / "a.npz", x=TEN), 0.5), IMAGE, "a.npz"),
    "other names": (lambda p: archive(p / "a.npz", a=TEN, c=TEN), TWO, r"\['a', 'c'\]"),
    "one of two": (lambda p: save(p / "a.npy", TEN), TWO, "inputs"),
    "numbers differ": (lambda p: archive(p / "a.npz", a=TEN[:3, 0, 0], b=TEN[:4, 0, 0]), TWO, "different numbers"),
    "no multiple": (lambda p: save(p / "a.npy", TEN[:3]), FIXED, "no multiple"),
}


@pytest.mark.parametrize(("make", "inputs", "message"), BAD.values(), ids=BAD)
def test_bad_files(tmp_path: Path, make: Any, inputs: dict[str, TensorType], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        list(SampleFiles(make(tmp_path), inputs))


def test_a_file_that_ends_early_in_an_archive(tmp_path: Path) -> None:
    """The archive is whole, the array in it is not."""
    import io
    import zipfile

    buffer = io.BytesIO()
    np.save(buffer, TEN)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("x.npy", buffer.getvalue()[:-100])
    with pytest.raises(QuantizationError, match="ends before"):
        list(SampleFiles(tmp_path / "a.npz", IMAGE))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_memory_does_not_grow_with_samples(tmp_path: Path, suffix: str) -> None:
    big = np.zeros((400, 3, 64, 64), np.float32)  # 20 MB
    path = tmp_path / f"a{suffix}"
    np.save(path, big) if suffix == ".npy" else np.savez(path, x=big)
    inputs = {"x": TensorType("f32", ("n", 3, 64, 64))}
    del big
    tracemalloc.start()
    for _ in SampleFiles(path, inputs):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_compile_takes_a_path(tmp_path: Path) -> None:
    b = Build()
    graph = b.graph(b.op("Relu", b.conv(b.input("n", 3, 4, 5), 3, 8, k=3, pad=1)))
    np.save(tmp_path / "cal.npy", TEN)
    by_path = vnnigen.compile(graph, "int8", calibration=tmp_path / "cal.npy")
    by_hand = vnnigen.compile(graph, "int8", calibration=[TEN[i : i + 1] for i in range(10)])
    np.testing.assert_array_equal(by_path(TEN[:1]), by_hand(TEN[:1]))
    for bad, message in ((TEN[:, :2], "does not fit"), (TEN * np.nan, "NaN"), (TEN.astype(complex), "must be float32")):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(QuantizationError, match=message):
            vnnigen.compile(graph, "int8", calibration=str(tmp_path / "bad.npy"))
