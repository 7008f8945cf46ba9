"""Inputs of varying shapes: a plan for each, compiled once, kept while it is among those used last."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import numpy as np
import pytest

from tests.graph import models
from vnnigen.compiler import compile
from vnnigen.errors import ModelError
from vnnigen.graph import network
from vnnigen.graph.ir import Array
from vnnigen.graph.network import Network
from vnnigen.graph.plan import Plan
from vnnigen.graph.recent import RecentCache


def recognizer() -> Any:
    """As text recognizers are: images of any width become a sequence of as many steps."""
    net = models.Net("recognizer")
    x = net.input("x", ("batch", 3, 16, "width"))
    x = net.op("Relu", net.conv(x, 3, 16, stride=2))
    x = net.op("HardSwish", net.conv(x, 16, 16, group=16))
    x = net.op("MaxPool", x, kernel_shape=[8, 1], strides=[8, 1])
    x = net.op("Transpose", net.op("Squeeze", x, net.ints(2)), perm=[0, 2, 1])
    return net.model(net.op("Softmax", net.linear(net.layer_norm(x, 16), 16, 12), axis=-1))


def static(model: Any, feeds: dict[str, Array]) -> Any:
    """The model, written for these shapes alone."""
    made = type(model)()
    made.CopyFrom(model)
    for info in made.graph.input:
        for dim, n in zip(info.type.tensor_type.shape.dim, feeds[info.name].shape, strict=True):
            dim.dim_value = n
    for info in made.graph.output:
        info.type.tensor_type.ClearField("shape")
    return made


def results(y: Any) -> Sequence[Array]:
    return y if isinstance(y, tuple) else (y,)


SHAPES: dict[str, tuple[Any, list[dict[str, int]]]] = {
    "batch": (models.small_cnn, [{"batch": n} for n in (1, 4, 2, 7, 1)]),
    "size": (lambda: models.small_cnn(size="size"), [{"size": n, "batch": b} for n, b in ((16, 1), (24, 2), (9, 1))]),
    "width": (recognizer, [{"width": n, "batch": b} for n, b in ((32, 1), (100, 1), (37, 3), (32, 1))]),
    "length": (models.bert_layer, [{"length": n, "batch": b} for n, b in ((5, 1), (17, 2), (5, 1), (64, 1))]),
    "quantized": (lambda: models.qdq_cnn(batch="batch"), [{"batch": n} for n in (1, 3, 2, 1)]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_one_network_computes_what_one_for_each_shape_does(name: str) -> None:
    build, shapes = SHAPES[name]
    model = build()
    net = compile(model)
    for seed, lengths in enumerate(shapes):
        feeds = models.feeds(model, seed=seed, **lengths)
        for got, want in zip(results(net(feeds)), results(compile(static(model, feeds))(feeds)), strict=True):
            np.testing.assert_array_equal(got, want)
    assert len(net._plans) == len({str(sorted(lengths.items())) for lengths in shapes})


def test_int8_of_varying_shapes() -> None:
    model = models.small_cnn()
    net = compile(model, "int8", calibration=[models.feeds(model, seed=i, batch=4) for i in range(4)])
    for batch in (1, 5, 2, 1):
        x = models.feeds(model, seed=batch, batch=batch)["x"]
        np.testing.assert_array_equal(net(x), np.concatenate([net(x[i : i + 1]) for i in range(batch)]))


def test_lengths_of_one_name_must_agree() -> None:
    model = models.bert_layer()
    feeds = models.feeds(model, batch=2, length=8)
    with pytest.raises(ModelError, match="length"):
        compile(model)({**feeds, "mask": feeds["mask"][:, :5]})


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often graphs are lowered, by the shape of their first input."""
    count: Counter[str] = Counter()
    lower = network.lower

    def counted(graph: Any, *arguments: Any) -> Any:
        count[str(next(iter(graph.inputs.values())).shape)] += 1
        return lower(graph, *arguments)

    monkeypatch.setattr(network, "lower", counted)
    return count


def images(batch: int, seed: int = 0) -> Array:
    return models.feeds(models.small_cnn(), seed=seed, batch=batch)["x"]


def test_a_shape_that_was_seen_is_not_compiled_again(compilations: Counter[str]) -> None:
    net = compile(models.small_cnn())
    for _ in range(3):
        for batch in (1, 2, 3):
            net(images(batch))
    assert sorted(compilations.values()) == [1, 1, 1]
    net(np.ascontiguousarray(images(2).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2))  # another order: another plan
    assert sum(compilations.values()) == 4


def test_plans_are_bounded(compilations: Counter[str]) -> None:
    """The oldest goes, and its memory with it; it comes back when its shape does."""
    net = compile(models.small_cnn())
    last = network.MAX_PLANS + 5
    kept: list[weakref.ref[Plan]] = []
    for batch in range(1, last):
        net(images(batch))
        assert net._last is not None
        kept.append(weakref.ref(net._last))
        net(images(1))  # used between, so never the oldest
    assert len(net._plans) == network.MAX_PLANS
    alive = [ref() is not None for ref in kept]
    assert alive == [True, *[False] * (last - 1 - network.MAX_PLANS), *[True] * (network.MAX_PLANS - 1)]
    assert set(compilations.values()) == {1}
    want = compile(models.small_cnn())(images(2))
    np.testing.assert_array_equal(net(images(2)), want)
    assert len(net._plans) == network.MAX_PLANS
    assert compilations["(2, 3, 16, 16)"] == 3


def few_plans(monkeypatch: pytest.MonkeyPatch, most: int) -> Network:
    monkeypatch.setattr(network, "MAX_PLANS", most)
    return compile(models.small_cnn(), threads=1)


@pytest.mark.parametrize("most", [1, 3])
def test_eviction_under_threads(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Plans come and go while others run."""
    net = few_plans(monkeypatch, most)
    given = [images(batch, seed) for batch in range(1, 7) for seed in range(4)]
    want = [compile(models.small_cnn())(x) for x in given]

    def calls(seed: int) -> None:
        order = list(range(len(given))) * 3
        Random(seed).shuffle(order)
        for i in order:
            np.testing.assert_array_equal(net(given[i]), want[i])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(calls, range(8)))
    assert len(net._plans) <= most


def test_a_plan_that_runs_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread is about to run a plan when others push it out; it runs all the same, and then it is gone."""
    net = few_plans(monkeypatch, 1)
    want = net(images(1))
    reached, go_on = threading.Event(), threading.Event()
    run = Plan.run
    held: list[weakref.ref[Plan]] = []

    def late(plan: Plan, inputs: Sequence[Array], *arguments: Any) -> list[Array]:
        if len(inputs[0]) == 1:
            held.append(weakref.ref(plan))
            reached.set()
            assert go_on.wait(60)
        return run(plan, inputs, *arguments)

    monkeypatch.setattr(Plan, "run", late)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(net, images(1))
        assert reached.wait(60)
        for batch in (2, 3):
            net(images(batch))
        assert held[0]() is not None
        go_on.set()
        np.testing.assert_array_equal(answer.result(), want)
    assert len(net._plans) == 1
    assert held[0]() is None


# The cache itself.


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    cache: RecentCache[str, int] = RecentCache(2)
    made: list[str] = []

    def get(key: str) -> int:
        return cache.get(key, lambda: made.append(key) or len(made))  # type: ignore[func-returns-value]

    assert [get(key) for key in "abacab"] == [1, 2, 1, 3, 1, 4]
    assert made == ["a", "b", "c", "b"]
    assert len(cache) == 2
    assert "a" in cache
    assert "c" not in cache


def test_what_fails_is_not_kept() -> None:
    cache: RecentCache[str, int] = RecentCache(1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.get("a", lambda: 1 // 0)
    assert len(cache) == 0
    assert cache.get("a", lambda: 5) == 5


def test_values_in_the_making_do_not_count() -> None:
    """Two threads wait for one that is slow; meanwhile others come and go, and it is made but once."""
    cache: RecentCache[str, str] = RecentCache(1)
    started, finish, count = threading.Event(), threading.Event(), Counter[str]()

    def slow() -> str:
        count["slow"] += 1
        started.set()
        assert finish.wait(60)
        return "slow"

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(cache.get, "slow", slow) for _ in range(2)]
        assert started.wait(60)
        for key in "abc":
            assert cache.get(key, lambda key=key: key) == key  # type: ignore[misc]
        finish.set()
        assert [f.result() for f in both] == ["slow", "slow"]
    assert count["slow"] == 1
    assert len(cache) == 1
