"""One model in the forms of every operator set computes the same; sets that nobody knows are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx.reference import ReferenceEvaluator  # noqa: E402

from tests.graph.models import Net, feeds, small_cnn  # noqa: E402
from vnnigen.compiler import compile  # noqa: E402
from vnnigen.errors import ModelError, VnnigenError  # noqa: E402

NEWEST = onnx.defs.onnx_opset_version()
OPSETS = [*range(7, 14), 17, 18, 21, NEWEST]


class Versioned(Net):
    """Operators whose parameters moved from attributes to inputs."""

    def moved(self, op: str, x: str, since: int, **values: Any) -> str:
        """`values` are attributes, from opset `since` on inputs in this order."""
        if self.opset < since:
            return str(self.op(op, x, **values))
        made = [np.array(v, np.float32 if isinstance(v, float) else np.int64) for v in values.values()]
        return str(self.op(op, x, *map(self.const, made)))

    def doubled(self, x: str) -> str:
        """Twice as high and wide, by repetition."""
        scales = np.array([1, 1, 2, 2], np.float32)
        if self.opset < 9:
            return str(self.op("Upsample", x, mode="nearest", scales=scales.tolist()))
        if self.opset < 11:
            return str(self.op("Upsample" if self.opset < 10 else "Resize", x, self.const(scales), mode="nearest"))
        attrs = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        # Its region may be left out since 13; before, it is an empty tensor.
        region = "" if self.opset >= 13 else self.const(np.zeros(0, np.float32))
        return str(self.op("Resize", x, region, self.const(scales), mode="nearest", **attrs))


def model(opset: int) -> Any:
    net = Versioned("versioned", seed=1, opset=opset)
    x = net.op("Relu", net.bn(net.conv(net.input("x", (2, 3, 8, 8)), 3, 8), 8))
    x = net.moved("Clip", net.conv(x, 8, 8), 11, min=-0.5, max=1.5)
    x = net.op("MaxPool", net.moved("Pad", x, 11, pads=[0, 0, 1, 1, 0, 0, 0, 2]), kernel_shape=[2, 2], strides=[2, 2])
    x = net.moved("Dropout", net.doubled(x), 12, ratio=0.5)
    if opset < 10:
        x = net.op("Slice", x, axes=[2], starts=[1], ends=[7])
    else:
        x = net.op("Slice", x, net.ints(1), net.ints(7), net.ints(2))
    first, second = _split(net, x)
    rows = net.moved("Squeeze", net.moved("Unsqueeze", first, 13, axes=[4]), 13, axes=[4])
    mean = net.moved("ReduceMean", rows, 18, axes=[2, 3])
    total = net.moved("ReduceSum", second, 13, axes=[2, 3])
    x = net.op("Flatten", net.op("Concat", mean, total, axis=1), axis=1)
    return net.model(net.op("Softmax", net.op("Gemm", x, net.weight(5, 8), net.vector(5), transB=1), axis=1))


def _split(net: Versioned, x: str) -> Any:
    if net.opset < 13:
        return net.op("Split", x, n_out=2, axis=1, split=[6, 2])
    return net.op("Split", x, net.ints(6, 2), n_out=2, axis=1)


def expected(given: dict[str, Any]) -> Any:
    return ReferenceEvaluator(model(17)).run(None, given)[0]


@pytest.mark.parametrize("opset", OPSETS)
def test_every_operator_set_computes_the_same(opset: int) -> None:
    made = model(opset)
    given = feeds(made)
    assert made.opset_import[0].version == opset
    onnx.checker.check_model(made)
    np.testing.assert_allclose(compile(made)(given), expected(given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", range(1, 7))
def test_ancient_operator_sets_compute_the_same_or_are_refused(opset: int) -> None:
    """The converter knows some of them only."""
    net = Net("ancient", opset=opset)
    made = net.model(net.op("Relu", net.conv(net.input("x", (1, 3, 8, 8)), 3, 4)), shape=(1, 4, 8, 8))
    given = feeds(made)
    try:
        got = compile(made)(given)
    except VnnigenError as error:
        assert "opset is older than 11, and cannot be converted" in str(error)  # noqa: PT017
        return
    made.opset_import[0].version = 17
    np.testing.assert_allclose(got, ReferenceEvaluator(made).run(None, given)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [0, -3, NEWEST + 1, 2**40])
def test_operator_sets_that_nobody_knows(opset: int) -> None:
    made = small_cnn()
    made.opset_import[0].version = opset
    with pytest.raises(ModelError, match=rf"opset {opset}.*knows 1 to {NEWEST}"):
        compile(made)


def test_unknown_domains() -> None:
    """An import alone does no harm; a node of the domain does."""
    made = small_cnn()
    made.opset_import.add(domain="com.acme", version=3)
    x = feeds(made)["x"]
    np.testing.assert_array_equal(compile(made)(x), compile(small_cnn())(x))
    made.graph.node[2].domain = "com.acme"
    with pytest.raises(ModelError, match=rf"{made.graph.node[2].name!r}.*'com\.acme' is not known"):
        compile(made)
