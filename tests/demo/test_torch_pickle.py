"""The checkpoint reader: what torch writes is read exactly, what torch does not write is refused."""

from __future__ import annotations

import collections
import io
import pickle
import random
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vnnigen.demo.torch_pickle import LEGACY_MAGIC, LEGACY_PROTOCOL, STORAGES, load_state_dict
from vnnigen.errors import ModelError

# --- a writer: pickles that name torch's globals, without torch ------------------------------------------


class Storage:
    """A flat array, pickled as torch pickles a storage: by persistent id."""

    def __init__(self, kind: str, values: np.ndarray, key: str, claimed: int | None = None) -> None:
        self.kind, self.values, self.key = kind, values, key
        self.claimed = values.size if claimed is None else claimed


class Tensor:
    def __init__(self, storage: Storage, offset: Any, size: Any, stride: Any, *, parameter: bool = False) -> None:
        self.args = (storage, offset, size, stride, False, collections.OrderedDict())
        self.parameter = parameter

    def __reduce__(self) -> Any:
        utils = sys.modules["torch._utils"]
        if self.parameter:
            return utils._rebuild_parameter, (Tensor(*self.args[:4]), True, collections.OrderedDict())
        return utils._rebuild_tensor_v2, self.args


@pytest.fixture(autouse=True)
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in (*STORAGES, "ComplexFloatStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *a: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


def dump(root: Any, protocol: int, legacy: bool) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            if not isinstance(item, Storage):
                return None
            kind = getattr(sys.modules["torch"], item.kind)
            view = (None,) if legacy else ()
            return ("storage", kind, item.key, "cpu", item.claimed, *view)

    stream = io.BytesIO()
    Pickler(stream, protocol).dump(root)
    return stream.getvalue()


def legacy_file(pickled: bytes, storages: list[Storage], *, little_endian: bool = True) -> bytes:
    info = {"protocol_version": LEGACY_PROTOCOL, "little_endian": little_endian, "type_sizes": {"int": 4}}
    head = [pickle.dumps(part, 2) for part in (LEGACY_MAGIC, LEGACY_PROTOCOL, info)]
    keys = pickle.dumps([s.key for s in storages], 2)
    tail = [struct.pack("<q", s.values.size) + s.values.tobytes() for s in storages]
    return b"".join([*head, pickled, keys, *tail])


def zip_file(pickled: bytes, storages: list[Storage], *, byteorder: bytes = b"little", method: int = 0) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/byteorder", byteorder)
        for s in storages:
            archive.writestr(f"model/data/{s.key}", s.values.tobytes())
    return stream.getvalue()


def save(path: Path, root: Any, storages: list[Storage], form: str) -> Path:
    legacy = form == "legacy"
    pickled = dump(root, 2, legacy)
    path.write_bytes((legacy_file if legacy else zip_file)(pickled, storages))
    return path


def floats(count: int, key: str = "0") -> Storage:
    return Storage("FloatStorage", np.arange(count, dtype="<f4"), key)


both_forms = pytest.mark.parametrize("form", ["legacy", "zip"])

# --- what torch writes -----------------------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("kind", STORAGES)
def test_reads_every_storage_type(tmp_path: Path, form: str, kind: str) -> None:
    values = np.array([1, 0, 1, 1, 0, 1], STORAGES[kind])
    storage = Storage(kind, values, "7")
    state = {"w": Tensor(storage, 0, (2, 3), (3, 1))}
    w = load_state_dict(save(tmp_path / "m", state, [storage], form))["w"]
    assert w.dtype == values.dtype
    np.testing.assert_array_equal(w, values.reshape(2, 3))
    assert not w.flags.writeable


@both_forms
def test_honours_offsets_sizes_and_strides_of_a_shared_storage(tmp_path: Path, form: str) -> None:
    storage, other = floats(24), Storage("LongStorage", np.array([9]), "x1")
    flat = storage.values
    state = collections.OrderedDict(
        transposed=Tensor(storage, 0, (4, 6), (1, 4)),
        sliced=Tensor(storage, 5, (3, 2), (6, 2)),
        expanded=Tensor(storage, 23, (5,), (0,)),
        empty=Tensor(storage, 24, (0, 3), (3, 1)),
        scalar=Tensor(other, 0, (), ()),
        parameter=Tensor(storage, 2, (3,), (1,), parameter=True),
    )
    got = load_state_dict(save(tmp_path / "m", state, [storage, other], form))
    assert list(got) == list(state)
    np.testing.assert_array_equal(got["transposed"], flat.reshape(6, 4).T)
    np.testing.assert_array_equal(got["sliced"], flat[5:].copy()[[[0, 2], [6, 8], [12, 14]]])
    np.testing.assert_array_equal(got["expanded"], np.full(5, 23))
    assert got["empty"].shape == (0, 3)
    assert got["scalar"].shape == ()
    assert got["scalar"] == 9
    np.testing.assert_array_equal(got["parameter"], [2, 3, 4])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_pickle_protocols_2_to_5(tmp_path: Path, protocol: int) -> None:
    state = collections.OrderedDict(w=Tensor(floats(3), 0, (3,), (1,)))
    state._metadata = collections.OrderedDict(version=1)  # type: ignore[attr-defined]  # as torch does: BUILD
    (tmp_path / "m").write_bytes(zip_file(dump(state, protocol, False), [floats(3)]))
    np.testing.assert_array_equal(load_state_dict(tmp_path / "m")["w"], [0, 1, 2])


# --- what it refuses -------------------------------------------------------------------------------------


class Call:
    """Pickles as a call, which the usual unpickler would perform."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@both_forms
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Call(exec, "import tests"), "builtins.exec|__builtin__.exec"),
        (Call(getattr, dict, "update"), "getattr"),
        (Call(__import__("os").system, "true"), "system"),
        (collections.Counter, "collections.Counter"),
        (pickle.loads, "loads"),
    ],
)
def test_names_the_refused_global(tmp_path: Path, form: str, value: Any, name: str) -> None:
    with pytest.raises(ModelError, match=f"refused the global .*({name})"):
        load_state_dict(save(tmp_path / "m", {"w": value}, [], form))


def proto2(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


FLOAT_STORAGE = b"ctorch\nFloatStorage\n"
KEY = b"X\x01\x00\x00\x00w"


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"(S'echo'\nios\nsystem\n.", "opcode STRING|opcode INST"),
        (proto2(b"(" + FLOAT_STORAGE + b"o"), "opcode OBJ"),
        (proto2(FLOAT_STORAGE + b")\x81"), "opcode NEWOBJ"),
        (proto2(b"\x82\x01"), "opcode EXT1"),
        (proto2(b"}2"), "opcode DUP"),
        (proto2(FLOAT_STORAGE + b"}b"), "set attributes"),
        (proto2(FLOAT_STORAGE + b")R"), "arguments of FloatStorage"),
        (proto2(b"ctorch._utils\n_rebuild_tensor_v2\n)R"), "arguments of _rebuild_tensor_v2"),
        (proto2(b"ccollections\nOrderedDict\n" + KEY + b"\x85R"), "arguments of OrderedDict"),
        (proto2(b"}}R"), "not a global"),
        (proto2(b")Q"), "persistent id"),
        (proto2(b"(" + KEY + b"NtQ"), "persistent id"),
        (proto2(b"]}" + KEY + b"K\x01s"), "not a tensor|not a mapping|list"),
        (proto2(b"]" + KEY + b"K\x01s"), "not a dict"),
        (proto2(b"}" + KEY + b"a"), "not a list"),
        (proto2(b"}(" + KEY + b"u"), "not a dict"),
        (proto2(b"}K\x01K\x01s"), "key that is not a string"),
        (proto2(b"})" + b"\x85" * 200_000 + b"K\x01s"), "key that is not a string"),
        (proto2(b"}(" + b"K\x01s"), "stack underflow"),
        (proto2(b"h\x05"), "KeyError"),
        (proto2(b"u"), "damaged"),
        (proto2(b""), "damaged"),
        (proto2(b"]"), "must be a mapping"),
        (proto2(b"}" + KEY + b"K\x01s"), "'w' is a int, not a tensor"),
        (proto2(b"}" + KEY + FLOAT_STORAGE + b"s"), "'w' is a Global, not a tensor"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", None),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "truncated"),
        (b"\x80\x02\x8a\xff1.", "truncated"),
    ],
)
def test_hostile_pickles(tmp_path: Path, pickled: bytes, message: str | None) -> None:
    (tmp_path / "m").write_bytes(zip_file(pickled, []))
    if message is None:  # a memo index of two thousand million is harmless here
        assert load_state_dict(tmp_path / "m") == {}
        return
    with pytest.raises(ModelError, match=message):
        load_state_dict(tmp_path / "m")


@both_forms
@pytest.mark.parametrize(
    ("offset", "size", "stride", "message"),
    [
        (0, (7,), (1,), "reaches element 6 of a storage of 6"),
        (1, (6,), (1,), "reaches element 6"),
        (0, (2, 3), (4, 1), "reaches element 6"),
        (6, (), (), "reaches element 6"),
        (-1, (2,), (1,), "not a reasonable integer"),
        (5, (2,), (-1,), "not a reasonable integer"),
        (0, (-2,), (1,), "not a reasonable integer"),
        (0, (2**50,), (0,), "not a reasonable integer"),
        (0, (2**30, 2**30), (0, 0), "has size"),
        (0, ("2",), (1,), "not a reasonable integer"),
        (0, (2.0,), (1,), "not a reasonable integer"),
        (True, (2,), (1,), "not a reasonable integer"),
        (0, (2, 3), (1,), "has size"),
        (0, (1,) * 33, (1,) * 33, "has size"),
        (0, 3, (1,), "arguments of _rebuild_tensor_v2"),
        ("0", (3,), (1,), "arguments of _rebuild_tensor_v2"),
    ],
)
def test_tensors_that_leave_their_storage(
    tmp_path: Path, form: str, offset: Any, size: Any, stride: Any, message: str
) -> None:
    storage = floats(6)
    with pytest.raises(ModelError, match=message):
        load_state_dict(save(tmp_path / "m", {"w": Tensor(storage, offset, size, stride)}, [storage], form))


@both_forms
def test_storages_that_are_missing_or_too_short(tmp_path: Path, form: str) -> None:
    state = {"w": Tensor(floats(6), 0, (6,), (1,))}
    with pytest.raises(ModelError, match="'w' needs storage '0', which the file does not hold"):
        load_state_dict(save(tmp_path / "m", state, [], form))
    with pytest.raises(ModelError, match="'w' needs 24 bytes of storage '0', the file holds 20"):
        load_state_dict(save(tmp_path / "m", state, [floats(5)], form))
    huge = Storage("FloatStorage", np.zeros(1, "<f4"), "0", claimed=2**60)
    with pytest.raises(ModelError, match="needs 4611686018427387904 bytes"):
        load_state_dict(save(tmp_path / "m", {"w": Tensor(huge, 0, (1,), (1,))}, [huge], form))


def test_refuses_storage_types_it_does_not_know(tmp_path: Path) -> None:
    storage = Storage("ComplexFloatStorage", np.zeros(2, "<c8"), "0")
    with pytest.raises(ModelError, match=r"refused the global 'torch\.ComplexFloatStorage'"):
        load_state_dict(save(tmp_path / "m", {"w": Tensor(storage, 0, (2,), (1,))}, [storage], "zip"))


def test_legacy_headers(tmp_path: Path) -> None:
    path = tmp_path / "m"
    good = legacy_file(dump({}, 2, True), [])
    magic, protocol = pickle.dumps(LEGACY_MAGIC, 2), pickle.dumps(LEGACY_PROTOCOL, 2)
    for data, message in (
        (good.replace(magic, pickle.dumps(5, 2)), "no magic number"),
        (good.replace(protocol, pickle.dumps(1002, 2), 1), "protocol is not 1001"),
        (legacy_file(dump({}, 2, True), [], little_endian=False), "little-endian"),
        (legacy_file(dump({}, 2, True), [floats(2)]), "storage '0' belongs to no tensor"),
        (b"", "truncated"),
        (b"not a pickle at all", "refused|damaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=message):
            load_state_dict(path)
    path.write_bytes(good)
    assert load_state_dict(path) == {}


def test_zip_containers(tmp_path: Path) -> None:
    path, pickled = tmp_path / "m", dump({}, 2, False)
    for data, message in (
        (zip_file(pickled, [], byteorder=b"big"), "little-endian"),
        (zip_file(b"}." * 500, [], method=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        (zip_file(pickled, []).replace(b"data.pkl", b"tata.pkl"), r"without one \*/data\.pkl"),
        (b"PK\x03\x04 and nothing more", "zip file"),
    ):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=message):
            load_state_dict(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read the checkpoint .*No such file"):
        load_state_dict(tmp_path / "nothing.pth")


@both_forms
def test_every_truncation_is_a_model_error(tmp_path: Path, form: str) -> None:
    storage = floats(5)
    path = save(tmp_path / "m", {"w": Tensor(storage, 0, (5,), (1,))}, [storage], form)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError):
            load_state_dict(path)


@both_forms
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, form: str) -> None:
    storage = floats(5)
    path = save(tmp_path / "m", {"w": Tensor(storage, 1, (2, 2), (2, 1))}, [storage], form)
    data, rng, refused = path.read_bytes(), random.Random(1), 0
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_state_dict(path)
        except ModelError:
            refused += 1
    assert refused > 1000
