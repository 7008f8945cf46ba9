"""Files of compiled networks: what is loaded computes the same bits, and damage is told, never computed with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx")

import vnnigen
from tests.graph.models import BUILDERS, feeds
from vnnigen.errors import ModelError
from vnnigen.graph.format import load_graph


def outputs(net: vnnigen.Network, x: dict[str, Any]) -> tuple[Any, ...]:
    y = net(**x)
    return y if isinstance(y, tuple) else (y,)


def compiled(name: str, precision: Any) -> tuple[vnnigen.Network, dict[str, Any]]:
    model = BUILDERS[name]()
    x = feeds(model)
    return vnnigen.compile(model, precision, calibration=[x]), x


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_round_trip(tmp_path: Path, name: str, precision: str) -> None:
    net, x = compiled(name, precision)
    net.save(tmp_path / "net.vnni")
    loaded = vnnigen.load(tmp_path / "net.vnni")
    assert loaded.inputs == net.inputs
    assert loaded.log == net.log
    for ours, theirs in zip(outputs(loaded, x), outputs(net, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_lengths_that_vary_stay_so(tmp_path: Path) -> None:
    model = BUILDERS["small_cnn"](batch="N")
    net = vnnigen.compile(model, "int8", calibration=[feeds(model, N=2)])
    net.save(tmp_path / "net.vnni")
    loaded = vnnigen.load(tmp_path / "net.vnni")
    for n in (1, 3):
        x = feeds(model, N=n)
        np.testing.assert_array_equal(outputs(loaded, x)[0], outputs(net, x)[0])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("format") / "net.vnni"
    compiled("small_cnn", "int8")[0].save(path)
    return path.read_bytes()


@settings(max_examples=200, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, data: bytes, at: float, bit: int) -> None:
    damaged = bytearray(data)
    damaged[int(at * len(data))] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / "net.vnni"
    path.write_bytes(bytes(damaged))
    with pytest.raises(ModelError, match=r"net\.vnni"):
        load_graph(path)


@pytest.mark.parametrize("length", [0, 5, 8, 30, 48, 1000, -1])
def test_truncation(tmp_path: Path, data: bytes, length: int) -> None:
    path = tmp_path / "net.vnni"
    path.write_bytes(data[:length])
    with pytest.raises(ModelError):
        load_graph(path)


def test_another_version_says_what_to_do(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "net.vnni"
    path.write_bytes(data[:7] + b"\x63" + data[8:])
    with pytest.raises(ModelError, match=r"version .99.*compile it again"):
        load_graph(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        vnnigen.load(tmp_path / "none.vnni")
    with pytest.raises(ModelError):
        vnnigen.load(tmp_path)
