"""Damaged real models: `import_model` gives a graph that checks, or a VnnigenError; in bounded time and memory.

Runs for VNNIGEN_FUZZ_SECONDS (default: 60 where CI is set, else 15). `python -m pytest tests/graph/test_import_fuzz.py`
with a large number hunts.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.graph.models import BUILDERS, Model, Net  # noqa: E402
from tests.graph.mutate import damage_fields, damaged_bytes  # noqa: E402
from vnnigen.errors import VnnigenError  # noqa: E402
from vnnigen.graph.importer import import_model  # noqa: E402

SECONDS = float(os.environ.get("VNNIGEN_FUZZ_SECONDS", "60" if os.environ.get("CI") else "15"))
#: Most that one import may take beyond what the process has, and of processor time: the models are of 100 KB.
MEMORY, CPU_SECONDS = 1 << 30, 10.0
FOLDER = Path(tempfile.mkdtemp(prefix="vnnigen-fuzz-"))


def old_model() -> Model:
    """One that goes through the version converter."""
    net = Net("old", opset=9)
    x = net.op("Relu", net.bn(net.conv(net.input("x", (1, 3, 8, 8)), 3, 4), 4))
    x = net.op("Upsample", x, net.const(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    x = net.op("Dropout", net.op("Slice", x, axes=[2], starts=[0], ends=[4]), ratio=0.5)
    return net.model(net.op("Softmax", net.op("Reshape", x, net.ints(1, -1))))


def branching() -> Model:
    """One with sub-graphs of which one is taken; others come from here by exchange of nodes."""
    net = Net("branching")
    x = net.input("x", (2, 3))
    info = onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, (2, 3))
    branch = onnx.helper.make_graph([onnx.helper.make_node("Relu", [x], ["r"])], "branch", [], [info])
    y = net.op("If", net.const(np.array(True)), then_branch=branch, else_branch=branch)
    return net.model(net.op("Clip", net.op("Split", y, n_out=2, axis=0)[0], net.const(np.float32(0))))


def external() -> Model:
    """One whose weights lie in a file in FOLDER."""
    net = Net("external")
    for name, offset in (("a", "0"), ("b", "36")):
        tensor = onnx.TensorProto(name=name, data_type=1, dims=[3, 3], data_location=1)
        for key, value in (("location", "w.bin"), ("offset", offset), ("length", "36")):
            tensor.external_data.add(key=key, value=value)
        net.initializers.append(tensor)
    return net.model(net.op("MatMul", net.op("MatMul", net.input("x", (2, 3)), "a"), "b"), shape=(2, 3))


MODELS = [*(build() for build in BUILDERS.values()), *(build(opset=11) for build in list(BUILDERS.values())[:4]),
          old_model(), external(), branching()]  # fmt: skip
FILES = [model.SerializeToString() for model in MODELS]


@pytest.fixture(autouse=True, scope="module")
def _external_data() -> Iterator[None]:
    (FOLDER / "w.bin").write_bytes(np.ones(18, np.float32).tobytes())
    yield
    shutil.rmtree(FOLDER)


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """A limit on address space, so that a tensor of absurd size is a MemoryError, which nobody expects."""
    if sys.platform != "linux":
        yield
        return
    import resource

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def imported(source: bytes | Model) -> bool:
    """Import; whether it gave a graph."""
    start = time.process_time()
    try:
        graph = import_model(source, folder=FOLDER)
    except VnnigenError:
        return False
    finally:
        assert time.process_time() - start < CPU_SECONDS
    graph.check()
    names = [name for node in graph for name in (node.name, node.op, *node.inputs, *node.outputs, *node.attrs)]
    assert all(isinstance(name, str) for name in (*names, *graph.inputs, *graph.outputs, *graph.constants))
    return True


def rounds(test: object) -> int:
    """Repeat a Hypothesis test, which draws anew each time, for half of the time."""
    assert callable(test)
    end, count = time.monotonic() + SECONDS / 2, 0
    while count == 0 or time.monotonic() < end:
        test()
        count += 1
    return count


#: Hypothesis would draw the same in each round where CI is set.
FUZZ = settings(max_examples=300, deadline=None, derandomize=False, database=None,
                suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
DAMAGE = given(which=st.sampled_from(range(len(MODELS))), rng=st.randoms(use_true_random=True))


def test_undamaged() -> None:
    assert [imported(model) for model in MODELS] == [True] * len(MODELS)


def test_damaged_bytes() -> None:
    good = []

    @FUZZ
    @DAMAGE
    def damage(which: int, rng: Random) -> None:
        good.append(imported(damaged_bytes(rng, FILES[which])))

    rounds(damage)
    assert any(good)
    assert not all(good)


def test_damaged_fields() -> None:
    good = []

    @FUZZ
    @DAMAGE
    def damage(which: int, rng: Random) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(MODELS[which])
        damage_fields(rng, model)
        good.append(imported(model))
        good.append(imported(model.SerializeToString()))

    rounds(damage)
    assert any(good)
    assert not all(good)
