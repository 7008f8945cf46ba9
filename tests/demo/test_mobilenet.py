"""MobileNetV2: its architecture, what it sees on the photos, and what int8 leaves of that."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import vnnigen
from vnnigen import ModelError, Network
from vnnigen.demo.comparison import Accuracy, compare
from vnnigen.demo.mobilenet import BN_EPSILON, MIXED, SENSITIVE, mobilenet_v2
from vnnigen.demo.photos import Photo, crops, split
from vnnigen.demo.report import batched
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.importer import import_model
from vnnigen.graph.ir import Graph


@pytest.fixture(scope="module")
def graph(model: Any) -> Graph:
    return import_model(model)


@pytest.fixture(scope="module")
def f32(model: Any) -> Network:
    return vnnigen.compile(model)


def logits_of_photos(network: Network, photos: list[Photo]) -> Any:
    return network(np.ascontiguousarray(np.concatenate([p.pixels for p in photos]).transpose(0, 3, 1, 2)))


def test_architecture(graph: Graph) -> None:
    counts = Counter(node.op for node in graph)
    assert (counts["Conv"], counts["BatchNormalization"], counts["Clip"], counts["Add"]) == (52, 52, 35, 10)
    assert set(SENSITIVE) < {node.name for node in graph}
    assert graph.inputs["image"].shape == ("N", 3, 224, 224)


def test_work_is_the_published_300_million_multiply_adds(f32: Network) -> None:
    f32(np.zeros((1, 3, 224, 224), np.float32))
    macs = sum(step.macs for step in f32.explain().steps)
    if vnnigen.tiers()[0] != "reference":
        assert round(macs / 1e6) == 301  # Sandler et al. 2018, table 4: 300M


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("features.0.0.weight", None, "has no 'features.0.0.weight'"),
        ("features.17.conv.3.running_var", None, "has no 'features.17.conv.3.running_var'"),
        ("features.2.conv.0.0.weight", np.zeros((96, 16, 3, 3), np.float32), r"\(96, 16, 3, 3\), MobileNetV2 has"),
        ("classifier.1.bias", np.full(1000, np.nan, np.float32), "finite"),
        ("features.0.1.bias", np.zeros(32, np.int64), "floating-point"),
    ],
)
def test_state_dicts_that_do_not_fit(state: dict[str, Any], name: str, change: Any, message: str) -> None:
    changed = {k: v for k, v in state.items() if k != name} | ({} if change is None else {name: change})
    with pytest.raises(ModelError, match=message):
        mobilenet_v2(changed)


def test_f32_is_what_the_model_says(graph: Graph, f32: Network, all_photos: list[Photo]) -> None:
    """The compiled network, batch norms folded, against the model node by node in NumPy."""
    batch_norm = next(node for node in graph if node.op == "BatchNormalization")
    assert batch_norm.attrs["epsilon"] == pytest.approx(BN_EPSILON)
    image = np.ascontiguousarray(all_photos[3].pixels.transpose(0, 3, 1, 2))
    (want,) = run_reference(replace(graph), {"image": image}).values()
    np.testing.assert_allclose(f32(image), want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_f32_recognises_the_photos(f32: Network, all_photos: list[Photo]) -> None:
    found = Accuracy.of(logits_of_photos(f32, all_photos), np.array([p.label for p in all_photos]))
    assert len(all_photos) == 20
    assert found.top1 >= 17
    assert found.top5 == 20


def test_int8_is_as_good(model: Any, f32: Network, all_photos: list[Photo]) -> None:
    """The issue of int8: same counts on the photos, the same class on 98 % of crops; calibrated on other photos."""
    seen, held_out = split(all_photos)
    labels = np.array([p.label for p in held_out])
    int8 = vnnigen.compile(model, "int8", calibration=crops(seen, 100, seed=0), config=MIXED)
    a, b = (Accuracy.of(logits_of_photos(network, held_out), labels) for network in (f32, int8))
    assert a == b
    drawn = 600
    found = compare("crops", f32, int8, batched(crops(held_out, drawn, seed=1)), np.resize(labels, drawn), rounds=1)
    assert found.images == drawn
    assert found.agreement >= 0.98
    assert found.lost <= 0.01
    assert found.sqnr_db > 23
    counts = Counter(node.precision for node in int8.graph if node.op in ("Conv", "Linear"))
    assert counts == {"int8": 49, "f32": 4}
    int8(np.zeros((1, 3, 224, 224), np.float32))
    if vnnigen.tiers()[0] != "reference":
        assert not int8.explain().numpy_steps
        assert int8.explain().native_calls == 1
