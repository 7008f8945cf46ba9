"""Whole networks against the NumPy oracle: results, layouts, shapes, threads, errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.graph import models
from vnnigen.compiler import compile
from vnnigen.errors import DTypeError, ISAError, ModelError, ShapeError, VnnigenError
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.importer import import_model
from vnnigen.graph.ir import Graph
from vnnigen.graph.network import Network
from vnnigen.graph.passes import run_passes


def compiled(model: Any, **arguments: Any) -> tuple[Graph, Network]:
    graph = import_model(model)
    log = run_passes(graph)
    return graph, Network(graph, log=log, **arguments)


def as_tuple(y: Any) -> tuple[Any, ...]:
    return y if isinstance(y, tuple) else (y,)


def check(graph: Graph, net: Network, feeds: dict[str, Any], rtol: float = 1e-4) -> None:
    want = run_reference(graph, feeds)
    for name, y in zip(graph.outputs, as_tuple(net(feeds)), strict=True):
        assert y.dtype == want[name].dtype
        assert y.shape == want[name].shape
        np.testing.assert_allclose(y, want[name], rtol=rtol, atol=rtol * np.abs(want[name]).max(), err_msg=name)


@pytest.mark.parametrize("name", models.BUILDERS)
@pytest.mark.parametrize("isa", [None, "avx2", "reference"])
def test_networks_agree_with_the_oracle(name: str, isa: str | None) -> None:
    model = models.BUILDERS[name]()
    graph, net = compiled(model, isa=isa)
    check(graph, net, models.feeds(model))


@pytest.mark.parametrize("threads", [1, 2])
def test_plans_for_shapes_share_weights(threads: int) -> None:
    model = models.small_cnn()
    graph, net = compiled(model, threads=threads)
    for batch, size in ((1, 16), (3, 16), (2, 24), (1, 16)):
        check(graph, net, models.feeds(model, batch=batch, size=size))
    assert len(net._plans) == 3
    assert len(net._operators) == len({name for name, _ in net._operators})


def test_a_batch_of_none() -> None:
    model = models.small_cnn()
    _, net = compiled(model)
    assert net(models.feeds(model)["x"][:0]).shape == (0, 10)


@pytest.mark.parametrize("op", ["Add", "Concat"])
def test_what_is_quantized_is_cut_off(op: str) -> None:
    """Inputs beyond what their bytes hold, read by a node that takes them as they come, real or bytes."""
    net = models.Net("cut")
    x, y = (net.qdq(net.input(name, (2, 8, 5, 5)), scale) for name, scale in (("x", 0.011), ("y", 0.017)))
    model = net.model(net.qdq(net.op(op, x, y, **({"axis": 1} if op == "Concat" else {})), 0.031))
    graph = import_model(model)
    feeds = {name: 3 * value for name, value in models.feeds(model).items()}
    (want,) = run_reference(graph, feeds).values()
    assert 2 < want.max() < 7.2
    np.testing.assert_allclose(compile(model)(feeds), want, atol=0.0311)


def test_calls_from_many_threads() -> None:
    model = models.small_cnn()
    graph, net = compiled(model)
    given = [models.feeds(model, seed=i, batch=1 + i % 3) for i in range(24)]
    want = [run_reference(graph, f)[graph.outputs[0]] for f in given]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for y, w in zip(pool.map(net, given), want, strict=True):
                np.testing.assert_allclose(y, w, rtol=1e-4, atol=1e-5)


def test_results_stay_when_the_network_runs_again() -> None:
    model = models.small_cnn()
    _, net = compiled(model)
    first, second = models.feeds(model, seed=1), models.feeds(model, seed=2)
    y = net(first)
    kept = y.copy()
    net(second)
    np.testing.assert_array_equal(y, kept)
    np.testing.assert_array_equal(net(first), kept)


@pytest.mark.parametrize("order", ["nhwc", "fortran", "reversed", "sliced", "f64"])
def test_any_memory_order(order: str) -> None:
    model = models.small_cnn()
    _, net = compiled(model)
    x = models.feeds(model)["x"]
    want = net(x)
    other = {
        "nhwc": lambda: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        "fortran": lambda: np.asfortranarray(x),
        "reversed": lambda: x[..., ::-1].copy()[..., ::-1],
        "sliced": lambda: np.repeat(x, 2, axis=3)[..., ::2],
        "f64": lambda: x.astype(np.float64),
    }[order]()
    np.testing.assert_array_equal(net(other), want)


def test_inputs_by_position_and_by_name() -> None:
    model = models.bert_layer()
    _, net = compiled(model)
    f = models.feeds(model)
    want = net(f)
    for y in (net(f["tokens"], f["mask"]), net(f["tokens"], mask=f["mask"]), net(**f)):
        for a, b in zip(y, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda net, x: net(), ModelError, "'x' is missing"),
        (lambda net, x: net(x, x), ShapeError, "2 inputs"),
        (lambda net, x: net({"y": x}), ModelError, "no input 'y'"),
        (lambda net, x: net(x, x=x), ModelError, "twice"),
        (lambda net, x: net(x.tolist()), DTypeError, "NumPy array"),
        (lambda net, x: net(x.astype(np.int32)), DTypeError, "int32"),
        (lambda net, x: net(x[0]), ShapeError, "(batch, 3, 16, 16)"),
        (lambda net, x: net(x[:, :2]), ShapeError, "must have shape"),
    ],
)
def test_wrong_inputs(call: Any, error: type[Exception], words: str) -> None:
    model = models.small_cnn()
    _, net = compiled(model)
    with pytest.raises(error) as caught:
        call(net, models.feeds(model)["x"])
    assert words in str(caught.value)


def test_an_unknown_tier_is_refused() -> None:
    with pytest.raises(ISAError):
        compiled(models.small_cnn(), isa="sse9")


@pytest.mark.parametrize("threads", [0, -1, 1 << 20])
def test_a_wrong_number_of_threads_is_refused(threads: int) -> None:
    with pytest.raises(VnnigenError, match="threads"):
        compiled(models.small_cnn(), threads=threads)


def test_explain_and_profile() -> None:
    model = models.small_cnn()
    _, net = compiled(model)
    with pytest.raises(ShapeError, match="vary"):
        net.explain()
    x = models.feeds(model)["x"]
    net(x)
    explained = net.explain()
    if net.graph.nodes and explained.steps[0].tier != "numpy":
        assert not explained.numpy_steps
        assert explained.native_calls == 1
    assert explained.peak_memory == net.peak_memory > 0
    assert "Conv" in str(explained)
    profile = net.profile(x, runs=2)
    assert len(profile.layers) == len(explained.steps)
    assert all(layer.ms > 0 for layer in profile.layers)
    assert "% of peak" in str(profile) or explained.numpy_steps
    assert profile.to_dict()["threads"] >= 1


@pytest.mark.parametrize("name", ["small_cnn", "bert_layer", "detector_head"])
def test_results_do_not_depend_on_threads(name: str) -> None:
    model = models.BUILDERS[name]()
    graph = import_model(model)
    run_passes(graph)
    feeds = models.feeds(model, seed=3, batch=4, size=32, length=40)
    one, two = (as_tuple(Network(graph, threads=t)(feeds)) for t in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
