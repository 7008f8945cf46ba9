"""Models become graphs of the newest operators that compute the same; what cannot be imported is named."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from tests.graph.models import BUILDERS, Net, feeds, small_cnn  # noqa: E402
from tests.graph.roundtrip import run  # noqa: E402
from vnnigen.errors import ModelError  # noqa: E402
from vnnigen.graph.importer import import_model  # noqa: E402
from vnnigen.graph.importer_ops import NOT_SUPPORTED, ONNX_OPERATORS  # noqa: E402
from vnnigen.graph.ir import Graph, TensorType  # noqa: E402
from vnnigen.graph.loader import OLDEST_OPSET  # noqa: E402

NEWEST = onnx.defs.onnx_opset_version()
MS = "com.microsoft"
RNG = np.random.default_rng(7)
F32 = npt.NDArray[np.float32]


def real(*shape: int) -> F32:
    return RNG.standard_normal(shape).astype(np.float32)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph]


def computed(net: Net, outputs: list[str], given: dict[str, Any]) -> tuple[Graph, list[Any]]:
    graph = import_model(net.model(*outputs, domains={MS: 1}, shape=()))
    return graph, run(graph, given)


# Whole models.


@pytest.mark.parametrize("opset", [14, 17, 18, 21, NEWEST])
@pytest.mark.parametrize("name", BUILDERS)
def test_models_compute_the_same(name: str, opset: int) -> None:
    """What is imported computes what the model does, by onnx.reference (whose QDQ operators begin with
    19, and whose BatchNormalization of before 14 is that of training)."""
    model = BUILDERS[name](opset=opset)
    graph = import_model(model)
    assert graph.check() is None
    assert graph.outputs == tuple(o.name for o in model.graph.output)
    assert list(graph.inputs) == [i.name for i in model.graph.input]
    assert all(node.domain == "" and node.op in ONNX_OPERATORS for node in graph)
    given = feeds(model, length=5)
    got = run(graph, given)
    assert all(value.std() > 1e-3 for value in got)
    if name == "qoperator_cnn" or (name == "qdq_cnn" and opset < 19):
        return
    for a, b in zip(got, ReferenceEvaluator(model).run(None, given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["small_cnn", "mobile_block", "bert_layer", "detector_head"])
def test_every_opset_is_the_same_graph(name: str) -> None:
    """The seed makes the weights, so all opsets compute the same; 11 has the most to normalise."""
    given = feeds(BUILDERS[name](opset=17), length=5)
    wanted = run(import_model(BUILDERS[name](opset=17)), given)
    for opset in range(11, NEWEST + 1):
        for a, b in zip(run(import_model(BUILDERS[name](opset=opset)), given), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_types_and_names() -> None:
    net = Net("types")
    x = net.input("x", ("n", 3, -1, "?"))
    ids = net.input("ids", (2,), TensorProto.INT64)
    net.inputs.append(helper.make_tensor_value_info("any", TensorProto.FLOAT16, None))
    net.nodes.append(helper.make_node("Relu", [x], ["a"], name="twice"))
    net.nodes.append(helper.make_node("Relu", ["any"], ["b"], name="twice"))
    net.nodes.append(helper.make_node("Cast", [ids], ["c"], to=TensorProto.FLOAT16))
    graph = import_model(net.model("a", "b", "c", shape=()))
    assert graph.inputs == {
        "x": TensorType("f32", ("n", 3, "x.2", "x.3")), "ids": TensorType("s64", (2,)), "any": TensorType("f32", None),
    }  # fmt: skip
    assert [n.name for n in graph] == ["twice", "twice_1", "Cast_2"]
    assert graph.nodes[2].attrs == {"to": TensorProto.FLOAT}
    assert graph.notes == ["input 'any' is f16 in the model, f32 here"]


def test_half_precision_weights() -> None:
    """Weights of all floating-point types are f32; constants within nodes, too."""
    net = Net("half")
    x = net.input("x", (2, 2), TensorProto.FLOAT16)
    w = net.const(np.eye(2, dtype=np.float16))
    fill = numpy_helper.from_array(np.array([3], np.float16))
    y = net.op("Add", net.op("MatMul", x, w), net.op("ConstantOfShape", net.ints(2, 2), value=fill))
    graph = import_model(net.model(net.op("Cast", y, to=TensorProto.DOUBLE), shape=()))
    assert graph.array(w).dtype == np.float32  # type: ignore[union-attr]
    np.testing.assert_array_equal(run(graph, {"x": np.ones((2, 2), np.float32)})[0], np.full((2, 2), 4, np.float32))


def test_initializers_that_are_inputs_too() -> None:
    """IR version 3 lists them; they are constants."""
    model = small_cnn()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert list(import_model(model).inputs) == ["x"]


def test_order_and_dead_ends() -> None:
    """Nodes in any order are sorted; what no output needs is dropped."""
    model = small_cnn()
    wanted = import_model(model)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.node.append(helper.make_node("Relu", ["x"], ["nobody"], name="dead"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3), "unread"))
    graph = import_model(model)
    assert {n.name for n in graph} == {n.name for n in wanted}
    assert graph.constants.keys() == wanted.constants.keys()


@pytest.mark.parametrize(
    ("attrs", "value"),
    [
        ({"value": numpy_helper.from_array(np.array([[1, 2]], np.int32))}, np.array([[1, 2]], np.int32)),
        ({"value_float": 1.5}, np.float32(1.5)),
        ({"value_floats": [1.5, 2.5]}, np.array([1.5, 2.5], np.float32)),
        ({"value_int": 3}, np.int64(3)),
        ({"value_ints": [3, 4]}, np.array([3, 4], np.int64)),
    ],
)
def test_constant_nodes(attrs: dict[str, Any], value: Any) -> None:
    net = Net("constant")
    c = net.op("Constant", **attrs)
    graph = import_model(net.model(net.op("Identity", c), shape=()))
    made = graph.array("Constant_0")
    assert made is not None
    assert made.dtype == value.dtype
    np.testing.assert_array_equal(made, value)
    assert ops(graph) == ["Identity"]


# Operators in their old forms: (opset, how to write it, expected operators, function that it computes).

X = real(2, 3, 4, 6)


def _old(op: str, *more: Callable[[Net], str], n_out: int = 1, **attrs: Any) -> Callable[[Net, str], list[str]]:
    def write(net: Net, x: str) -> list[str]:
        made = net.op(op, x, *(m(net) for m in more), n_out=n_out, **attrs)
        return [made] if n_out == 1 else made

    return write


def softmax(x: F32, axis: int) -> F32:
    rows = x.reshape(*x.shape[:axis], -1)
    e = np.exp(rows - rows.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True)).reshape(x.shape)


OLD_FORMS: list[tuple[int, Callable[[Net, str], list[str]], set[str], list[Any]]] = [
    (12, _old("Squeeze", axes=[0]), {"Squeeze"}, [X[0]]),
    (11, _old("Unsqueeze", axes=[0, 2]), {"Unsqueeze"}, [X[None, :, None]]),
    (12, _old("ReduceSum", axes=[1, 2], keepdims=0), {"ReduceSum"}, [X.sum((1, 2))]),
    (12, _old("ReduceSum"), {"ReduceSum"}, [X.sum(keepdims=True)]),
    (17, _old("ReduceMean", axes=[2, 3], keepdims=1), {"ReduceMean"}, [X.mean((2, 3), keepdims=True)]),
    (13, _old("ReduceMax", axes=[-1], keepdims=0), {"ReduceMax"}, [X.max(-1)]),
    (12, _old("Split", axis=3, n_out=2, split=[2, 4]), {"Split"}, [X[..., :2], X[..., 2:]]),
    (12, _old("Split", axis=3, n_out=2), {"Split"}, [X[..., :3], X[..., 3:]]),
    (17, _old("Split", axis=2, n_out=2), {"Split"}, [X[:, :, :2], X[:, :, 2:]]),
    (18, _old("Split", axis=2, n_out=2, num_outputs=2), {"Split"}, [X[:, :, :2], X[:, :, 2:]]),
    (12, _old("Softmax"), {"Shape", "Flatten", "Softmax", "Reshape"}, [softmax(X, 1)]),
    (11, _old("Softmax", axis=2), {"Shape", "Flatten", "Softmax", "Reshape"}, [softmax(X, 2)]),
    (12, _old("LogSoftmax", axis=3), {"Shape", "Flatten", "LogSoftmax", "Reshape"}, [np.log(softmax(X, 3))]),
    (12, _old("Softmax", axis=-1), {"Softmax"}, [softmax(X, 3)]),
    (13, _old("Softmax"), {"Softmax"}, [softmax(X, 3)]),
    (11, _old("Dropout", ratio=0.7), {"Identity"}, [X]),
    (13, _old("Dropout", n_out=2), {"Identity", "Shape", "Expand"}, [X, np.ones(X.shape, np.bool_)]),
    (13, _old("Dropout", lambda n: n.const(np.float32(0.5)), lambda n: n.const(np.array(False))), {"Identity"}, [X]),
    (13, _old("Clip", lambda n: "", lambda n: n.const(np.float32(0.5))), {"Clip"}, [X.clip(max=0.5)]),
    (11, _old("Resize", lambda n: n.const(np.zeros(0, np.float32)),
              lambda n: n.const(np.array([1, 1, 2, 2], np.float32)), mode="nearest",
              coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
     {"Resize"}, [X.repeat(2, 2).repeat(2, 3)]),
    (14, _old("MaxPool", n_out=1, kernel_shape=[2, 2], strides=[2, 2]),
     {"MaxPool"}, [X.reshape(2, 3, 2, 2, 3, 2).max((3, 5))]),
    (22, _old("Cast", to=TensorProto.FLOAT16), {"Cast"}, [X]),
]  # fmt: skip


@pytest.mark.parametrize(("opset", "write", "expected", "values"), OLD_FORMS)
def test_old_forms(opset: int, write: Any, expected: set[str], values: list[Any]) -> None:
    given = X[:1] if expected == {"Squeeze"} else X
    net = Net("old", opset=opset)
    outputs = write(net, net.input("x", given.shape))
    graph, got = computed(net, outputs, {"x": given})
    assert set(ops(graph)) == expected
    for a, b in zip(got, values, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert a.shape == b.shape
    for node in graph:
        schema = onnx.defs.get_schema(node.op, NEWEST)
        assert set(node.attrs) <= set(schema.attributes)


@pytest.mark.parametrize("opset", [11, 14, 15])
def test_batch_normalization_has_one_output(opset: int) -> None:
    net = Net("bn", opset=opset)
    c = [net.vector(3, 1.0) for _ in range(4)]
    x = net.input("x", X.shape)
    y = net.op("BatchNormalization", x, *c, epsilon=1e-3, momentum=0.5)
    graph, got = computed(net, [y], {"x": X})
    assert graph.nodes[0].attrs == {"epsilon": pytest.approx(1e-3)}
    scale, bias, mean, variance = (graph.array(n)[:, None, None] for n in c)  # type: ignore[index]
    np.testing.assert_allclose(got[0], (X - mean) / np.sqrt(variance + 1e-3) * scale + bias, rtol=1e-4, atol=1e-5)


def test_layer_normalization_of_before_17() -> None:
    net = Net("ln", opset=13)
    graph, got = computed(net, [net.layer_norm(net.input("x", X.shape), 6)], {"x": X})
    assert ops(graph) == ["LayerNormalization"]
    assert got[0].mean() == pytest.approx(0, abs=0.1)


# What is refused, and with which words.


def _node(op: str, *inputs: str, outputs: int = 1, opset: int = 17, **attrs: Any) -> Callable[[], Any]:
    def build() -> Any:
        net = Net("bad", opset=opset)
        net.input("x", (2, 3, 4, 4))
        made = net.op(op, *inputs, n_out=outputs, **attrs)
        return net.model(*([made] if outputs == 1 else made), domains={MS: 1, "com.acme": 1}, shape=())

    return build


def _changed(change: Callable[[Any], Any]) -> Callable[[], Any]:
    def build() -> Any:
        model = small_cnn()
        change(model.graph)
        return model

    return build


def _dims(*dims: int) -> Callable[[Any], Any]:
    def change(graph: Any) -> None:
        graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, dims))

    return change


def _cycle(graph: Any) -> None:
    graph.node[0].input[0] = graph.node[4].output[0]


def _branch(op: str, output: str = "r", reads: str = "x", value: str = "t") -> Any:
    """A branch that computes `value` from what it reads, and adds a number of its own to it."""
    own = numpy_helper.from_array(np.float32(10.0), "own")
    nodes = [helper.make_node(op, [reads], [value], name="n_t"), helper.make_node("Add", [value, "own"], ["r"])]
    return helper.make_graph(nodes, op, [], [helper.make_empty_tensor_value_info(output)], [own])


def _chosen(condition: bool, then_branch: Any, else_branch: Any, node: bool = False) -> Any:
    """A model of one If, whose condition is an initializer or a node; x is read after it, too."""
    net = Net("chosen")
    x = net.input("x", X.shape)
    value = numpy_helper.from_array(np.array([condition]))
    c = net.op("Constant", value=value) if node else net.const(np.array([condition]))
    y = net.op("If", c, then_branch=then_branch, else_branch=else_branch)
    return net.model(net.op("Mul", y, x), shape=X.shape)


@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize("node", [True, False])
def test_branches_of_constant_conditions(condition: bool, node: bool) -> None:
    graph = import_model(_chosen(condition, _branch("Relu"), _branch("Neg"), node))
    assert "If" not in ops(graph)
    np.testing.assert_allclose(run(graph, {"x": X})[0], ((X.clip(0) if condition else -X) + 10) * X, rtol=1e-6)


def test_branches_in_branches() -> None:
    """Both name values "r" and "own"; the inner reads a value of the outer, and its condition is outside."""
    outer = _branch("Neg")
    inner = helper.make_node("If", ["c0"], ["inner"], name="n_If_0")
    for key in ("then_branch", "else_branch"):
        inner.attribute.append(helper.make_attribute(key, _branch("Relu", reads="t", value="u")))
    outer.node.append(inner)
    outer.node.append(helper.make_node("Sum", ["inner", "r", "x"], ["all"]))
    outer.output[0].name = "all"
    graph = import_model(_chosen(True, outer, _branch("Relu")))
    np.testing.assert_allclose(run(graph, {"x": X})[0], ((-X).clip(0) + 10 + -X + 10 + X) * X, rtol=1e-5)


def test_a_branch_may_give_what_it_does_not_make() -> None:
    """A value of the graph around it, or a constant."""
    graph = import_model(_chosen(True, _branch("Neg", "x"), _branch("Neg", "own")))
    np.testing.assert_array_equal(run(graph, {"x": X})[0], X * X)
    graph = import_model(_chosen(False, _branch("Neg", "x"), _branch("Neg", "own")))
    np.testing.assert_array_equal(run(graph, {"x": X})[0], X * 10)


def _wrong_branch() -> Any:
    branch = _branch("Neg")
    branch.input.add(name="y")
    return _chosen(True, branch, branch)


def _many_names() -> Any:
    """Nodes of one name, many of them: in time that is linear in their number."""
    net = Net("many")
    x = net.input("x", (1,))
    for i in range(30_000):
        net.nodes.append(helper.make_node("Relu", [x], [f"y{i}"], name="same"))
    return net.model("y0", shape=(1,))


def test_many_nodes_of_one_name() -> None:
    start = time.process_time()
    import_model(_many_names())
    assert time.process_time() - start < 20  # 2 s; 45 s if each name were looked for from the first


def _branches() -> Any:
    net = Net("branches")
    net.input("c", (1,), TensorProto.BOOL)
    leaf = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"])], "leaf", [], [helper.make_empty_tensor_value_info("r")]
    )
    return net.model(net.op("If", "c", then_branch=leaf, else_branch=leaf), shape=())


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (_node("Frobnicate", "x"), r"'n_Frobnicate_0' \(Frobnicate\): this operator is not supported"),
    (_node("Relu", "x", domain="com.acme"), "'com.acme' is not known"),
    (_node("Frobnicate", "x", domain=MS), "Frobnicate.*not supported"),
    (_node("RandomNormalLike", "x"), "random numbers"),
    (_node("Swish", "x", opset=17), "'n_Swish_0'"),
    (_branches, r"'n_If_0' \(If\).*condition must be a constant"),
    (_wrong_branch, r"'n_If_0' \(If\): its then_branch has 1 inputs and 1 outputs"),
    (lambda: _chosen(True, _branch("Frobnicate"), _branch("Neg")), r"'n_If_0/n_t' \(Frobnicate\)"),
    (lambda: _chosen(True, _branch("Neg", reads="nobody"), _branch("Neg")), r"'n_If_0/n_t'.*'nobody'"),
    (_node("Relu"), "'n_Relu_0'"),
    (_node("Relu", "x", "x"), "'n_Relu_0'"),
    (_node("Relu", "x", alpha=1.0), "'n_Relu_0'.*alpha"),
    (_node("Concat", "x", axis=1.5), "'n_Concat_0'.*axis"),
    (_node("Cast", "x", to=TensorProto.STRING), "'n_Cast_0'.*element type 8"),
    (_node("Cast", "x", to=TensorProto.FLOAT8E4M3FN, opset=19), "'n_Cast_0'.*element type 17"),
    (_node("Split", "x", outputs=2, num_outputs=3, opset=18), "'n_Split_0'.*2 outputs"),
    (_node("QLinearAdd", "x", "x", domain=MS), "'n_QLinearAdd_0'.*has 2 inputs, needs 7"),
    (_node("FusedConv", "x", "x", activation="Frob", domain=MS), "'n_FusedConv_0'.*Frob"),
    (_node("Gelu", "", domain=MS), "'n_Gelu_0'.*needs 1"),
    (_changed(_cycle), r"'n_Conv_0'.*cycle"),
    (_changed(lambda g: g.initializer.pop(0)), r"reads \['c0'\], which nothing makes"),
    (_changed(lambda g: g.initializer.append(g.initializer[0])), "two initializers are named 'c0'"),
    (_changed(lambda g: g.input.append(g.input[0])), "two inputs are named 'x'"),
    (_changed(lambda g: g.output.append(g.output[0])), "of one name"),
    (_changed(lambda g: g.node.append(g.node[0])), "which is made already"),
    (_changed(lambda g: g.ClearField("output")), "no outputs"),
    (_changed(lambda g: g.ClearField("node")), "has no nodes"),
    (_changed(lambda g: g.output[0].CopyFrom(helper.make_empty_tensor_value_info("z"))), "'z' is made by no node"),
    (_changed(lambda g: setattr(g.node[0], "domain", "com.acme")), "'com.acme' is not known"),
    (_changed(lambda g: g.node[0].attribute.append(g.node[0].attribute[0])), "two attributes|twice|duplicate"),
    (_changed(lambda g: g.sparse_initializer.add()), "sparse"),
    (_changed(_dims(1, -3, 4, 4)), "'x' has length -3"),
    (_changed(_dims(1, 2**40, 4, 4)), "'x' has length 1099511627776"),
    (_changed(_dims(*[1] * 30)), "'x' has 30 dimensions"),
    (_changed(lambda g: g.input[0].ClearField("type")), "'x' is no tensor"),
    (_changed(lambda g: g.input[0].type.tensor_type.ClearField("elem_type")), "'x' has element type 0"),
]


@pytest.mark.parametrize(("build", "words"), REFUSED)
def test_refused(build: Callable[[], Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        import_model(build())


def test_empty_graph() -> None:
    net = Net("empty")
    net.input("x", (1,))
    with pytest.raises(ModelError, match="has no nodes"):
        import_model(net.model("x", shape=(1,)))


def test_masks_may_be_infinite() -> None:
    """But weights may not (see test_loader)."""
    net = Net("mask")
    graph = import_model(net.model(net.op("Add", net.input("x", (2,)), net.const(np.array([0, -np.inf], np.float32)))))
    assert ops(graph) == ["Add"]


@pytest.mark.parametrize("name", [b"n_Conv_0", b"c0", b"Conv_0", b"batch", b"small_cnn", b"Relu", b"strides", b"x"])
def test_names_that_are_no_text(name: bytes) -> None:
    data = small_cnn().SerializeToString()
    data = data.replace(bytes([len(name)]) + name, bytes([len(name)]) + b"\xff" * len(name))
    with pytest.raises(ModelError, match="UTF-8"):
        import_model(data)


def test_tables_are_of_operators() -> None:
    """Every operator in the table is ONNX's; none is both listed and refused."""
    known = {s.name for s in onnx.defs.get_all_schemas() if s.domain == ""}
    assert set(ONNX_OPERATORS) <= known or NEWEST < 28
    assert not set(ONNX_OPERATORS) & set(NOT_SUPPORTED)


@pytest.mark.parametrize("op", [op for op in ONNX_OPERATORS if onnx.defs.has(op, NEWEST)])
def test_operators_that_changed_are_normalised(op: str) -> None:
    """An attribute that is gone, or has another default, since the oldest opset needs a normaliser."""
    newest = onnx.defs.get_schema(op, NEWEST).attributes
    for opset in range(OLDEST_OPSET, NEWEST):
        if not onnx.defs.has(op, opset):
            continue
        for name, old in onnx.defs.get_schema(op, opset).attributes.items():
            same = name in newest and old.default_value == newest[name].default_value
            assert same or ONNX_OPERATORS[op] is not None, f"attribute {name!r} of opset {opset}"


@pytest.mark.parametrize("version", [0, -1, -(2**62)])
def test_a_version_of_the_format_that_never_was_is_refused(version: int) -> None:
    model = BUILDERS["small_cnn"]()
    model.ir_version = version
    with pytest.raises(ModelError, match="ir_version"):
        import_model(model)
