"""Small models of every kind that matters, as ModelProto: for tests of the importer, of passes and of plans.

All take a seed, and weights are scaled so that activations stay alive. `BUILDERS` lists them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper, shape_inference  # noqa: E402

Model = Any  # onnx.ModelProto


class Net:
    """Write nodes one after another; each method returns the name of its value."""

    def __init__(self, name: str, seed: int = 0, opset: int = 17) -> None:
        self.name, self.opset = name, opset
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.inputs: list[Any] = []

    def input(self, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def const(self, array: npt.ArrayLike, name: str | None = None) -> str:
        name = f"c{len(self.initializers)}" if name is None else name
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def weight(self, *shape: int, scale: float = 1.4) -> str:
        fan_in = int(np.prod(shape[1:])) or 1
        return self.const((self.rng.standard_normal(shape) * scale / np.sqrt(fan_in)).astype(np.float32))

    def vector(self, length: int, mean: float = 0.0, spread: float = 0.1) -> str:
        return self.const((mean + spread * self.rng.uniform(-1, 1, length)).astype(np.float32))

    def op(self, op: str, *inputs: str, n_out: int = 1, domain: str = "", **attrs: Any) -> Any:
        name = f"{op}_{len(self.nodes)}"
        outputs = [name if i == 0 else f"{name}_{i}" for i in range(n_out)]
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=f"n_{name}", domain=domain, **attrs))
        return outputs[0] if n_out == 1 else outputs

    def conv(self, x: str, cin: int, cout: int, k: int = 3, stride: int = 1, group: int = 1, bias: bool = True) -> str:
        inputs = [x, self.weight(cout, cin // group, k, k)] + ([self.vector(cout)] if bias else [])
        attrs = {"kernel_shape": [k, k], "strides": [stride] * 2, "pads": [k // 2] * 4, "group": group}
        return str(self.op("Conv", *inputs, **attrs))

    def bn(self, x: str, channels: int) -> str:
        scale, shift = self.vector(channels, 1.0), self.vector(channels)
        mean, variance = self.vector(channels), self.vector(channels, 1.0)
        return str(self.op("BatchNormalization", x, scale, shift, mean, variance, epsilon=1e-5))

    def layer_norm(self, x: str, width: int) -> str:
        return str(self.op("LayerNormalization", x, self.vector(width, 1.0), self.vector(width), axis=-1))

    def linear(self, x: str, cin: int, cout: int) -> str:
        """MatMul with a constant, plus a bias."""
        w = self.const((self.rng.standard_normal((cin, cout)) / np.sqrt(cin)).astype(np.float32))
        return str(self.op("Add", self.op("MatMul", x, w), self.vector(cout)))

    def qdq(self, x: str, scale: float, zero_point: int = 0, dtype: npt.DTypeLike = np.uint8) -> str:
        """QuantizeLinear and DequantizeLinear."""
        s, z = self.const(np.float32(scale)), self.const(np.array(zero_point, dtype))
        return str(self.op("DequantizeLinear", self.op("QuantizeLinear", x, s, z), s, z))

    def dq_weight(self, *shape: int, scale: npt.ArrayLike | None = None) -> str:
        """s8 weights, a scale per output channel."""
        made = np.full(shape[0], 1.4 / (73 * np.sqrt(np.prod(shape[1:])))) if scale is None else np.asarray(scale)
        w = self.const(self.rng.integers(-127, 128, shape).astype(np.int8))
        zeros = self.const(np.zeros(shape[0], np.int8))
        return str(self.op("DequantizeLinear", w, self.const(made.astype(np.float32)), zeros, axis=0))

    def model(
        self, *outputs: str, domains: Mapping[str, int] | None = None, shape: Sequence[int | str] | None = None
    ) -> Model:
        """The model; outputs are f32 and of inferred shapes unless `shape` says what cannot be inferred."""
        made = [helper.make_tensor_value_info(o, TensorProto.FLOAT, shape) for o in outputs]
        graph = helper.make_graph(self.nodes, self.name, self.inputs, made, self.initializers)
        versions = {"": self.opset, **(domains or {})}
        imports = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=min(8, onnx.IR_VERSION))
        if shape is not None:
            return model
        inferred = shape_inference.infer_shapes(model).graph.output
        for info, better in zip(model.graph.output, inferred, strict=True):  # the checker wants shapes of outputs
            info.CopyFrom(better)
        return model


def small_cnn(seed: int = 0, opset: int = 17, batch: int | str = "batch", size: int | str = 16) -> Model:
    """Conv + BN + Relu, a residual block, pooling, Flatten, Gemm: a classifier of 10 classes on 3 x size x size."""
    net = Net("small_cnn", seed, opset)
    x = net.input("x", (batch, 3, size, size))
    x = net.op("Relu", net.bn(net.conv(x, 3, 16, bias=False), 16))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = net.op("Relu", net.bn(net.conv(x, 16, 16, bias=False), 16))
    y = net.bn(net.conv(y, 16, 16, bias=False), 16)
    x = net.op("Relu", net.op("Add", y, x))
    y = net.op("Relu", net.bn(net.conv(x, 16, 32, k=1, stride=2, bias=False), 32))
    x = net.op("Flatten", net.op("GlobalAveragePool", y), axis=1)
    return net.model(net.op("Gemm", x, net.weight(10, 32), net.vector(10), transB=1))


def mobile_block(seed: int = 0, opset: int = 17, batch: int | str = 1) -> Model:
    """Inverted residuals: 1x1 expansion, depthwise 3x3, 1x1 projection; Relu6 and HardSwish; squeeze and excitation."""
    net = Net("mobile_block", seed, opset)
    low, high = net.const(np.float32(0)), net.const(np.float32(6))
    x = net.op("Clip", net.conv(net.input("x", (batch, 3, 16, 16)), 3, 16, stride=2), low, high)
    y = net.op("Clip", net.bn(net.conv(x, 16, 48, k=1, bias=False), 48), low, high)
    y = net.op("Clip", net.bn(net.conv(y, 48, 48, group=48, bias=False), 48), low, high)
    x = net.op("Add", net.bn(net.conv(y, 48, 16, k=1, bias=False), 16), x)
    y = net.conv(x, 16, 48, k=1)
    y = net.op("Mul", y, net.op("HardSigmoid", y, alpha=1 / 6, beta=0.5))
    y = net.conv(y, 48, 48, stride=2, group=48)
    gate = net.op("Relu", net.conv(net.op("GlobalAveragePool", y), 48, 16, k=1))
    y = net.op("Mul", y, net.op("Sigmoid", net.conv(gate, 16, 48, k=1)))
    y = net.op("ReduceMean", net.conv(y, 48, 24, k=1), *([net.ints(2, 3)] if opset >= 18 else []), keepdims=0,
               **({} if opset >= 18 else {"axes": [2, 3]}))  # fmt: skip
    return net.model(net.op("Softmax", net.op("Gemm", y, net.weight(24, 5), net.vector(5)), axis=-1))


def bert_layer(
    seed: int = 0, opset: int = 17, batch: int | str = "batch", length: int | str = "length", width: int = 32,
    heads: int = 2,
) -> Model:  # fmt: skip
    """Embeddings of tokens, one encoder layer as exporters write it (shape arithmetic, decomposed Gelu), a pooler."""
    net = Net("bert_layer", seed, opset)
    tokens = net.input("tokens", (batch, length), TensorProto.INT64)
    mask = net.input("mask", (batch, length), TensorProto.INT64)
    x = net.layer_norm(net.op("Gather", net.weight(50, width, scale=4.0), tokens, axis=0), width)
    fill = net.op(
        "Mul", net.op("Sub", net.const(np.float32(1)), net.op("Cast", mask, to=1)), net.const(np.float32(-1e4))
    )
    bias = net.op("Unsqueeze", fill, net.ints(1, 2)) if opset >= 13 else net.op("Unsqueeze", fill, axes=[1, 2])

    def split_heads(y: str, perm: Sequence[int]) -> str:
        shape = net.op("Shape", y)
        dims = []
        for axis in (0, 1):
            dim = net.op("Gather", shape, net.const(np.int64(axis)), axis=0)
            dims.append(net.op("Unsqueeze", dim, net.ints(0)) if opset >= 13 else net.op("Unsqueeze", dim, axes=[0]))
        new = net.op("Concat", *dims, net.ints(heads), net.ints(width // heads), axis=0)
        return str(net.op("Transpose", net.op("Reshape", y, new), perm=list(perm)))

    query = split_heads(net.linear(x, width, width), (0, 2, 1, 3))
    key = split_heads(net.linear(x, width, width), (0, 2, 3, 1))
    value = split_heads(net.linear(x, width, width), (0, 2, 1, 3))
    scores = net.op("Div", net.op("MatMul", query, key), net.const(np.float32(np.sqrt(width // heads))))
    weights = net.op("Softmax", net.op("Add", scores, bias), axis=-1)
    y = net.op("Transpose", net.op("MatMul", weights, value), perm=[0, 2, 1, 3])
    y = net.op("Reshape", y, net.ints(0, 0, width))
    x = net.layer_norm(net.op("Add", net.linear(y, width, width), x), width)
    y = net.linear(x, width, 4 * width)
    gate = net.op("Add", net.op("Erf", net.op("Div", y, net.const(np.float32(np.sqrt(2))))), net.const(np.float32(1)))
    y = net.op("Mul", net.op("Mul", y, gate), net.const(np.float32(0.5)))
    x = net.layer_norm(net.op("Add", net.linear(y, 4 * width, width), x), width)
    first = net.op("Gather", x, net.const(np.int64(0)), axis=1)
    return net.model(x, net.op("Tanh", net.linear(first, width, width)))


def detector_head(seed: int = 0, opset: int = 17, batch: int | str = 1) -> Model:
    """Two scales joined by Resize and Concat; boxes and scores by Transpose, Reshape, Concat, as SSD writes them."""
    net = Net("detector_head", seed, opset)
    x = net.op("Relu", net.conv(net.input("image", (batch, 3, 32, 32)), 3, 16, stride=2))
    small = net.op("LeakyRelu", net.conv(x, 16, 32, stride=2), alpha=0.1)
    scales = net.const(np.array([1, 1, 2, 2], np.float32))
    up = net.op("Resize", small, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric",
                nearest_mode="floor")  # fmt: skip
    large = net.op("Relu", net.conv(net.op("Concat", x, up, axis=1), 48, 16))
    found: dict[int, list[str]] = {4: [], 3: []}
    for feature, channels in ((large, 16), (small, 32)):
        for length, parts in found.items():
            y = net.op("Transpose", net.conv(feature, channels, 2 * length), perm=[0, 2, 3, 1])
            parts.append(net.op("Reshape", y, net.ints(0, -1, length)))
    boxes, scores = (net.op("Concat", *parts, axis=1) for parts in found.values())
    return net.model(boxes, net.op("Softmax", scores, axis=2))


def qdq_cnn(seed: int = 0, opset: int = 17, batch: int | str = 1) -> Model:
    """A quantized CNN in QDQ form: convs per channel with s32 bias, a residual sum, pooling, Gemm."""
    net = Net("qdq_cnn", seed, opset)

    def qconv(x: str, x_scale: float, cin: int, cout: int, stride: int = 1) -> str:
        w_scale = net.rng.uniform(0.8, 1.2, cout) * 1.4 / (73 * np.sqrt(cin * 9))
        bias = net.const(net.rng.integers(-200, 200, cout).astype(np.int32))
        b_scale = net.const((w_scale * x_scale).astype(np.float32))
        real = net.op("DequantizeLinear", bias, b_scale, net.const(np.zeros(cout, np.int32)), axis=0)
        return str(net.op("Conv", x, net.dq_weight(cout, cin, 3, 3, scale=w_scale), real, kernel_shape=[3, 3],
                          pads=[1, 1, 1, 1], strides=[stride, stride]))  # fmt: skip

    x = net.qdq(net.input("x", (batch, 3, 16, 16)), 0.03, 128)
    x = net.qdq(net.op("Relu", qconv(x, 0.03, 3, 16)), 0.02)
    y = net.qdq(qconv(x, 0.02, 16, 16), 0.04, 120)
    x = net.qdq(net.op("Relu", net.op("Add", y, x)), 0.03)
    x = net.qdq(net.op("Relu", qconv(x, 0.03, 16, 32, stride=2)), 0.02)
    x = net.qdq(net.op("GlobalAveragePool", x), 0.01)
    x = net.qdq(net.op("Flatten", x, axis=1), 0.01)
    return net.model(net.op("Gemm", x, net.dq_weight(10, 32), net.vector(10), transB=1))


def qoperator_cnn(seed: int = 0, opset: int = 17, batch: int | str = 1) -> Model:
    """The same kind of network in QOperator form: QLinearConv, com.microsoft's QLinearAdd and pool, QLinearMatMul."""
    net = Net("qoperator_cnn", seed, opset)

    def quantum(scale: float, zero_point: int = 0, dtype: npt.DTypeLike = np.uint8) -> tuple[str, str]:
        return net.const(np.float32(scale)), net.const(np.array(zero_point, dtype))

    def qconv(x: str, x_q: tuple[str, str], y_q: tuple[str, str], cin: int, cout: int) -> str:
        w = net.const(net.rng.integers(-127, 128, (cout, cin, 3, 3)).astype(np.int8))
        scale = net.rng.uniform(0.8, 1.2, cout) * 1.4 / (73 * np.sqrt(cin * 9))
        w_q = net.const(scale.astype(np.float32)), net.const(np.zeros(cout, np.int8))
        bias = net.const(net.rng.integers(-200, 200, cout).astype(np.int32))
        return str(net.op("QLinearConv", x, *x_q, w, *w_q, *y_q, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))

    first, second, third, last = quantum(0.03, 128), quantum(0.02), quantum(0.04, 120), quantum(0.05, 100)
    x = net.op("QuantizeLinear", net.input("x", (batch, 3, 16, 16)), *first)
    x = qconv(x, first, second, 3, 16)
    y = qconv(x, second, third, 16, 16)
    x = net.op("QLinearAdd", y, *third, x, *second, *third, domain="com.microsoft")
    x = net.op("QLinearGlobalAveragePool", x, *third, *second, domain="com.microsoft", channels_last=0)
    x = net.op("Reshape", x, net.ints(0, 16))
    w = net.const(net.rng.integers(-127, 128, (16, 10)).astype(np.int8))
    x = net.op("QLinearMatMul", x, *second, w, *quantum(0.01, 0, np.int8), *last)
    return net.model(net.op("DequantizeLinear", x, *last), domains={"com.microsoft": 1}, shape=(batch, 10))


#: Every builder; `BUILDERS[name](seed=..., opset=...)`.
BUILDERS: Mapping[str, Callable[..., Model]] = {
    f.__name__: f for f in (small_cnn, mobile_block, bert_layer, detector_head, qdq_cnn, qoperator_cnn)
}


def feeds(model: Model, seed: int = 0, **lengths: int) -> dict[str, npt.NDArray[Any]]:
    """Random inputs; symbolic lengths from `lengths`, else 2. Integers are 0 or 1."""
    rng = np.random.default_rng(seed)
    made: dict[str, npt.NDArray[Any]] = {}
    for info in model.graph.input:
        tensor = info.type.tensor_type
        shape = [d.dim_value or lengths.get(d.dim_param, 2) for d in tensor.shape.dim]
        if tensor.elem_type == TensorProto.FLOAT:
            made[info.name] = rng.standard_normal(shape).astype(np.float32)
        else:
            made[info.name] = rng.integers(0, 2, shape).astype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return made
