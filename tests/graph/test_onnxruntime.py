"""Models that come quantized compute what ONNX Runtime does: each layer on the same inputs to one quantum.

Weights stay within 7 bits: ONNX Runtime's u8 x s8 kernels saturate sums of two products on processors without VNNI,
and so would not be an oracle there. Integers in s32 are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vnnigen.compiler import compile

onnx = pytest.importorskip("onnx")
try:
    import onnxruntime
except ImportError as error:
    pytest.skip(f"needs onnxruntime to compare with, which cannot be imported: {error}", allow_module_level=True)
from onnx import TensorProto, helper  # noqa: E402

from tests.graph.models import Net  # noqa: E402

Array = npt.NDArray[Any]
U8, S8 = np.dtype(np.uint8), np.dtype(np.int8)
MS = "com.microsoft"
KINDS = {U8: TensorProto.UINT8, S8: TensorProto.INT8}
#: Scales whose ratios make few ties of rounding.
X_SCALE, Y_SCALE, Z_SCALE = 0.0301, 0.0417, 0.0193
#: Element types of activations and weights that ONNX Runtime multiplies.
TYPES = [(U8, S8), (U8, U8), (S8, S8)]


def theirs(model: Any, feeds: dict[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def ours(model: Any, feeds: dict[str, Array]) -> list[Array]:
    y = compile(model)(feeds)
    return list(y) if isinstance(y, tuple) else [y]


class Quantized(Net):
    """Layers on bytes, or between QuantizeLinear and DequantizeLinear."""

    def __init__(self, x: np.dtype[Any] = U8, w: np.dtype[Any] = S8, per_channel: bool = False, seed: int = 0) -> None:
        super().__init__("quantized", seed)
        self.kind, self.weight_kind, self.per_channel = x, w, per_channel
        self.quantum = 1.0

    def step(self, scale: float, middle: int = 0) -> tuple[str, str]:
        """Scale and zero point of an activation, `middle` from the middle of its bytes."""
        zero_point = middle + (128 if self.kind == U8 else 0)
        return self.const(np.float32(scale)), self.const(np.array(zero_point, self.kind))

    def real(self, *shape: int | str) -> str:
        return self.input("x", shape)

    def bytes_in(self, name: str, *shape: int) -> str:
        return self.input(name, shape, KINDS[self.kind])

    def weights(self, *shape: int, axis: int = 0) -> tuple[str, str, str]:
        """Values of 7 bits, scale and zero point; per channel, zero points stay in the middle (as s8 needs)."""
        middle = 128 if self.weight_kind == U8 else 0
        values = self.const((self.rng.integers(-64, 64, shape) + middle).astype(self.weight_kind))
        n = (shape[axis],) if self.per_channel else ()
        fan_in = np.prod(shape) / shape[axis]
        scale = self.rng.uniform(0.6, 1.4, n) / (37 * np.sqrt(fan_in))
        return (
            values,
            self.const(scale.astype(np.float32)),
            self.const(np.full(n, middle + (0 if self.per_channel else 3), self.weight_kind)),
        )

    def bias(self, n: int, x_scale: float, w_scale: str) -> tuple[str, str]:
        """A bias in s32 and its scale."""
        index = int(w_scale[1:])
        scale = onnx.numpy_helper.to_array(self.initializers[index]).reshape(-1) * np.float32(x_scale)
        return self.const(self.rng.integers(-300, 300, n).astype(np.int32)), self.const(
            scale if self.per_channel else scale.reshape(())
        )

    def q(self, x: str, step: tuple[str, str]) -> str:
        return str(self.op("QuantizeLinear", x, *step))

    def dq(self, x: str, step: Sequence[str], axis: int | None = None) -> str:
        return str(self.op("DequantizeLinear", x, *step, **({} if axis is None else {"axis": axis})))

    def both(self, x: str, step: tuple[str, str]) -> str:
        return self.dq(self.q(x, step), step)

    def real_out(self, x: str, scale: float = Y_SCALE, middle: int = 0) -> Any:
        """The model of a value, quantized and dequantized: its quantum is `scale`."""
        self.quantum = scale
        return self.done(self.both(x, self.step(scale, middle)), kind=TensorProto.FLOAT)

    def done(self, *outputs: str, kind: int | None = None) -> Any:
        model = self.model(*outputs, domains={MS: 1}, shape=())
        for info in model.graph.output:
            info.type.tensor_type.ClearField("shape")
            info.type.tensor_type.elem_type = KINDS[self.kind] if kind is None else kind
        return model

    def feeds(self) -> dict[str, Array]:
        """Real numbers about the range of 0.03 times a byte, or bytes."""
        made: dict[str, Array] = {}
        for info in self.inputs:
            tensor = info.type.tensor_type
            shape = [d.dim_value for d in tensor.shape.dim]
            if tensor.elem_type == TensorProto.FLOAT:
                made[info.name] = self.rng.normal(0, 1.6, shape).astype(np.float32)
            else:
                bounds = np.iinfo(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
                made[info.name] = self.rng.integers(bounds.min, bounds.max + 1, shape).astype(bounds.dtype)
        return made


def check(net: Quantized, model: Any) -> None:
    """At most one quantum apart, and seldom that: it is a tie of rounding."""
    feeds = net.feeds()
    for got, want in zip(ours(model, feeds), theirs(model, feeds), strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        difference = np.abs(got.astype(np.float64) - want.astype(np.float64)) / net.quantum
        assert len(np.unique(want)) > 8, "a test that has something to say"
        assert difference.max() <= 1.001
        assert (difference > 0.01).mean() <= 0.02


# QDQ: real numbers in and out.


def qdq_conv(net: Quantized, cout: int = 20, *, group: int = 1, relu: bool = False, **attrs: Any) -> Any:
    step = net.step(X_SCALE, 5)
    x = net.both(net.real(2, 16, 9, 11), step)
    w, scale, zero_point = net.weights(cout, 16 // group, 3, 3)
    bias, b_scale = net.bias(cout, X_SCALE, scale)
    y = net.op(
        "Conv", x, net.dq(w, (scale, zero_point), 0), net.dq(bias, (b_scale,), 0), kernel_shape=[3, 3], group=group,
        **{"pads": [1] * 4, **attrs},
    )  # fmt: skip
    y = net.op("Relu", y) if relu else y
    return net.real_out(y, Y_SCALE, -7)


def qdq_matmul(net: Quantized, *, gemm: bool = False) -> Any:
    x = net.both(net.real(*((6, 48) if gemm else (2, 7, 48))), net.step(X_SCALE))
    w, scale, zero_point = net.weights(48, 24, axis=1)
    bias, b_scale = net.bias(24, X_SCALE, scale)
    real = net.dq(w, (scale, zero_point), 1)
    if gemm:
        y = net.op("Gemm", x, real, net.dq(bias, (b_scale,), 0))
    else:
        y = net.op("MatMul", x, real)
    return net.real_out(y)


def qdq_gemm(net: Quantized) -> Any:
    return qdq_matmul(net, gemm=True)


QDQ_LAYERS: dict[str, Callable[[Quantized], Any]] = {
    "conv": qdq_conv,
    "conv_relu": lambda net: qdq_conv(net, relu=True),
    "conv_strides": lambda net: qdq_conv(net, strides=[2, 2], pads=[0, 1, 2, 1]),
    "conv_dilations": lambda net: qdq_conv(net, dilations=[2, 2], pads=[2] * 4),
    "conv_groups": lambda net: qdq_conv(net, 24, group=4),
    "depthwise": lambda net: qdq_conv(net, 16, group=16),
    "matmul": qdq_matmul,
    "gemm": qdq_gemm,
}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("x", "w"), TYPES, ids=str)
@pytest.mark.parametrize("layer", QDQ_LAYERS)
def test_qdq_layers(layer: str, x: np.dtype[Any], w: np.dtype[Any], per_channel: bool) -> None:
    net = Quantized(x, w, per_channel)
    check(net, QDQ_LAYERS[layer](net))


def _two(net: Quantized) -> tuple[str, str]:
    x = net.both(net.real(2, 16, 9, 11), net.step(X_SCALE))
    y = net.both(net.input("y", (2, 16, 9, 11)), net.step(Z_SCALE, 9))
    return x, y


def _one(net: Quantized, op: str, *inputs: str, same: bool = False, **attrs: Any) -> Any:
    """One operator; `same`: of one scale, as pooling has."""
    x = net.both(net.real(2, 16, 9, 11), net.step(X_SCALE))
    y = net.op(op, x, *inputs, **attrs)
    return net.real_out(y, X_SCALE) if same else net.real_out(y, Y_SCALE, 3)


def softmax(net: Quantized) -> Any:
    return net.real_out(net.op("Softmax", net.both(net.real(2, 16, 9, 11), net.step(X_SCALE)), axis=-1), 1 / 256, -128)


QDQ_ELEMENTS: dict[str, Callable[[Quantized], Any]] = {
    "add": lambda net: net.real_out(net.op("Add", *_two(net)), Y_SCALE, 4),
    "mul": lambda net: net.real_out(net.op("Mul", *_two(net))),
    "concat": lambda net: net.real_out(net.op("Concat", *_two(net), axis=1)),
    "max_pool": lambda net: _one(net, "MaxPool", same=True, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
    "average_pool": lambda net: _one(net, "AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
    "global_average_pool": lambda net: _one(net, "GlobalAveragePool"),
    "relu": lambda net: _one(net, "Relu"),
    "leaky_relu": lambda net: _one(net, "LeakyRelu", alpha=0.1),
    "sigmoid": lambda net: _one(net, "Sigmoid"),
    "hard_swish": lambda net: _one(net, "HardSwish"),
    "clip": lambda net: _one(net, "Clip", net.const(np.float32(-1)), net.const(np.float32(2))),
    "softmax": softmax,
    "transpose": lambda net: _one(net, "Transpose", same=True, perm=[0, 2, 3, 1]),
    "reshape": lambda net: _one(net, "Reshape", net.ints(0, -1), same=True),
    "resize": lambda net: _one(net, "Resize", "", net.const(np.array([1, 1, 2, 2], np.float32)), same=True),
}


@pytest.mark.parametrize("x", [U8, S8], ids=str)
@pytest.mark.parametrize("layer", QDQ_ELEMENTS)
def test_qdq_elements(layer: str, x: np.dtype[Any]) -> None:
    net = Quantized(x)
    check(net, QDQ_ELEMENTS[layer](net))


# QOperator: bytes in and out.


def qlinear_conv(net: Quantized, cout: int = 20, *, group: int = 1, bias: bool = True, **attrs: Any) -> Any:
    x = net.bytes_in("x", 2, 16, 9, 11)
    w = net.weights(cout, 16 // group, 3, 3)
    added = [net.bias(cout, X_SCALE, w[1])[0]] if bias else []
    inputs = [x, *net.step(X_SCALE, 5), *w, *net.step(Y_SCALE, -7), *added]
    return net.done(net.op("QLinearConv", *inputs, kernel_shape=[3, 3], group=group, **{"pads": [1] * 4, **attrs}))


def qlinear_matmul(net: Quantized, *batch: int) -> Any:
    x = net.bytes_in("x", *batch, 7, 48)
    return net.done(net.op("QLinearMatMul", x, *net.step(X_SCALE), *net.weights(48, 24, axis=1), *net.step(Y_SCALE, 9)))


def qgemm(net: Quantized) -> Any:
    x = net.bytes_in("x", 7, 48)
    w = net.weights(24, 48)
    bias = net.bias(24, X_SCALE, w[1])[0]
    return net.done(net.op("QGemm", x, *net.step(X_SCALE), *w, bias, *net.step(Y_SCALE), domain=MS, transB=1))


QOPERATOR_LAYERS: dict[str, Callable[[Quantized], Any]] = {
    "conv": qlinear_conv,
    "conv_without_bias": lambda net: qlinear_conv(net, bias=False),
    "conv_strides": lambda net: qlinear_conv(net, strides=[2, 2], pads=[0, 1, 2, 1]),
    "conv_groups": lambda net: qlinear_conv(net, 24, group=4),
    "depthwise": lambda net: qlinear_conv(net, 16, group=16),
    "matmul": qlinear_matmul,
    "matmul_of_3": lambda net: qlinear_matmul(net, 3),
    "gemm": qgemm,
}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("x", "w"), TYPES, ids=str)
@pytest.mark.parametrize("layer", QOPERATOR_LAYERS)
def test_qoperator_layers(layer: str, x: np.dtype[Any], w: np.dtype[Any], per_channel: bool) -> None:
    net = Quantized(x, w, per_channel)
    check(net, QOPERATOR_LAYERS[layer](net))


def _unary(net: Quantized, op: str, **attrs: Any) -> Any:
    x = net.bytes_in("x", 2, 16, 9, 11)
    return net.done(net.op(op, x, *net.step(X_SCALE), *net.step(Y_SCALE, 3), domain=MS, **attrs))


def _binary(net: Quantized, op: str) -> Any:
    x, y = net.bytes_in("x", 2, 16, 9, 11), net.bytes_in("y", 2, 16, 9, 11)
    return net.done(net.op(op, x, *net.step(X_SCALE), y, *net.step(Z_SCALE, 9), *net.step(0.0613), domain=MS))


def _concat(net: Quantized) -> Any:
    x, y = net.bytes_in("x", 2, 16, 9, 11), net.bytes_in("y", 2, 8, 9, 11)
    steps = [net.step(Y_SCALE), net.step(X_SCALE), net.step(Z_SCALE, 9)]
    return net.done(net.op("QLinearConcat", *steps[0], x, *steps[1], y, *steps[2], domain=MS, axis=1))


QOPERATOR_ELEMENTS: dict[str, Callable[[Quantized], Any]] = {
    "add": lambda net: _binary(net, "QLinearAdd"),
    "mul": lambda net: _binary(net, "QLinearMul"),
    "concat": _concat,
    "global_average_pool": lambda net: _unary(net, "QLinearGlobalAveragePool"),
    "average_pool": lambda net: _unary(net, "QLinearAveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
    "leaky_relu": lambda net: _unary(net, "QLinearLeakyRelu", alpha=0.1),
    "sigmoid": lambda net: _unary(net, "QLinearSigmoid"),
}


@pytest.mark.parametrize("x", [U8, S8], ids=str)
@pytest.mark.parametrize("layer", QOPERATOR_ELEMENTS)
def test_qoperator_elements(layer: str, x: np.dtype[Any]) -> None:
    net = Quantized(x)
    check(net, QOPERATOR_ELEMENTS[layer](net))


# Integers, and scales that are found at run time.


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(
    ("op", "x", "w"), [("ConvInteger", U8, S8), ("ConvInteger", U8, U8), *(("MatMulInteger", *both) for both in TYPES)]
)  # ONNX Runtime has no ConvInteger of s8
def test_integers(op: str, x: np.dtype[Any], w: np.dtype[Any], zero_points: bool) -> None:
    """Sums in s32 are exact."""
    net = Quantized(x, w)
    conv = op == "ConvInteger"
    name = net.bytes_in("x", *((2, 16, 9, 11) if conv else (3, 7, 48)))
    values, _, zero_point = net.weights(*((20, 16, 3, 3) if conv else (48, 24)))
    more = [net.step(1.0, 6)[1], zero_point] if zero_points else []
    y = net.op(op, name, values, *more, **({"pads": [1] * 4} if conv else {}))
    model, feeds = net.done(y, kind=TensorProto.INT32), net.feeds()
    np.testing.assert_array_equal(ours(model, feeds)[0], theirs(model, feeds)[0])


def test_dynamic_quantize_linear() -> None:
    net = Quantized()
    outputs = net.op("DynamicQuantizeLinear", net.real(3, 64), n_out=3)
    model, feeds = net.done(*outputs), net.feeds()
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.FLOAT
    got, want = ours(model, feeds), theirs(model, feeds)
    np.testing.assert_allclose(got[0].astype(int), want[0].astype(int), atol=1)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
    assert got[2] == want[2]


def dynamic_matmul(net: Quantized) -> Any:
    """As exporters write it, in ONNX's own operators."""
    x, x_scale, x_zero = net.op("DynamicQuantizeLinear", net.real(6, 48), n_out=3)
    w, scale, zero_point = net.weights(48, 24, axis=1)
    y = net.op("Cast", net.op("MatMulInteger", x, w, x_zero, zero_point), to=TensorProto.FLOAT)
    y = net.op("Mul", y, net.op("Mul", x_scale, scale))
    return net.done(net.op("Add", y, net.vector(24)), kind=1)


def dynamic_conv(net: Quantized) -> Any:
    x, x_scale, x_zero = net.op("DynamicQuantizeLinear", net.real(2, 16, 9, 11), n_out=3)
    w, scale, zero_point = net.weights(20, 16, 3, 3)
    y = net.op("Cast", net.op("ConvInteger", x, w, x_zero, zero_point, pads=[1] * 4), to=TensorProto.FLOAT)
    return net.done(net.op("Mul", y, net.op("Mul", x_scale, scale)), kind=1)


def contrib_dynamic_matmul(net: Quantized) -> Any:
    x = net.real(6, 48)
    w, scale, zero_point = net.weights(48, 24, axis=1)
    return net.done(net.op("DynamicQuantizeMatMul", x, w, scale, zero_point, net.vector(24), domain=MS), kind=1)


def contrib_integer_to_float(net: Quantized) -> Any:
    x, x_scale, x_zero = net.op("DynamicQuantizeLinear", net.real(6, 48), n_out=3)
    w, scale, zero_point = net.weights(48, 24, axis=1)
    return net.done(net.op("MatMulIntegerToFloat", x, w, x_scale, scale, x_zero, zero_point, domain=MS), kind=1)


MATMULS = (dynamic_matmul, contrib_dynamic_matmul, contrib_integer_to_float)
DYNAMIC_LAYERS = [(dynamic_conv, False), *((layer, per_channel) for layer in MATMULS for per_channel in (False, True))]


@pytest.mark.parametrize(("layer", "per_channel"), DYNAMIC_LAYERS)
@pytest.mark.parametrize("w", [S8, U8], ids=str)
def test_dynamic_layers(layer: Callable[[Quantized], Any], w: np.dtype[Any], per_channel: bool) -> None:
    """One quantum of the activation times the largest weight would be 0.02; sums are exact, so nearly all are equal."""
    net = Quantized(U8, w, per_channel)
    model, net.quantum = layer(net), 0.02
    check(net, model)


# Networks, as ONNX Runtime's quantizer makes them.


def cnn() -> Any:
    """A classifier of 10 classes in f32, with what quantizers treat in ways of their own."""
    net = Net("cnn", seed=3, opset=17)
    x = net.op("Relu", net.bn(net.conv(net.input("x", ("batch", 3, 20, 20)), 3, 16, bias=False), 16))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    y = net.op("Relu", net.conv(x, 16, 16))
    x = net.op("Relu", net.op("Add", net.conv(y, 16, 16), x))
    y = net.op("Clip", net.conv(x, 16, 16, group=16), net.const(np.float32(0)), net.const(np.float32(6)))
    x = net.op("Concat", net.conv(y, 16, 24, k=1), net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4), axis=1)
    x = net.op("Relu", net.conv(x, 40, 32, stride=2))
    x = net.op("Flatten", net.op("GlobalAveragePool", x), axis=1)
    return net.model(net.op("Gemm", x, net.weight(10, 32), net.vector(10), transB=1))


IMAGES = np.random.default_rng(5).normal(0, 1, (96, 3, 20, 20)).astype(np.float32)
IMAGES += np.random.default_rng(6).normal(0, 1, (96, 3, 1, 1)).astype(np.float32)  # images that differ as wholes


class Calibration:
    """ONNX Runtime's interface of samples."""

    def __init__(self) -> None:
        self.left = [{"x": IMAGES[i : i + 16]} for i in range(0, 48, 16)]

    def get_next(self) -> dict[str, Array] | None:
        return self.left.pop() if self.left else None


def same_answers(model: Any, layers: int) -> None:
    """The same classes, but where the runner-up is as close as the results are; logits to a quantum per layer."""
    got, want = compile(model)(IMAGES), theirs(model, {"x": IMAGES})[0]
    quantum = float(want.max() - want.min()) / 255
    difference = np.abs(got - want)
    assert difference.max() <= layers * quantum
    assert difference.mean() <= quantum
    best = np.sort(want, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * quantum
    assert clear.mean() > 0.8
    assert len(np.unique(want.argmax(1))) > 2
    np.testing.assert_array_equal(got.argmax(1)[clear], want.argmax(1)[clear])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kinds", TYPES, ids=str)
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_static_quantization(
    form: str, kinds: tuple[np.dtype[Any], np.dtype[Any]], per_channel: bool, tmp_path: Path
) -> None:
    from onnxruntime import quantization

    source, target = tmp_path / "f32.onnx", tmp_path / "int8.onnx"
    onnx.save(cnn(), source)
    x, w = (quantization.QuantType.QUInt8 if kind == U8 else quantization.QuantType.QInt8 for kind in kinds)
    quantization.quantize_static(
        source, target, Calibration(), quant_format=quantization.QuantFormat[form], per_channel=per_channel,
        reduce_range=True, activation_type=x, weight_type=w,
    )  # fmt: skip
    same_answers(onnx.load(target), layers=8)
    net = compile(onnx.load(target))
    net(IMAGES[:1])
    assert not [step for step in net.explain().steps if step.reason.startswith("no kernel")]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("w", [S8, U8], ids=str)
def test_dynamic_quantization(w: np.dtype[Any], per_channel: bool, tmp_path: Path) -> None:
    """Scales come from the data, so both find the same, but for ties in the first layer."""
    from onnxruntime import quantization

    source, target = tmp_path / "f32.onnx", tmp_path / "int8.onnx"
    onnx.save(cnn(), source)
    kind = quantization.QuantType.QUInt8 if w == U8 else quantization.QuantType.QInt8
    quantization.quantize_dynamic(source, target, per_channel=per_channel, reduce_range=True, weight_type=kind)
    same_answers(onnx.load(target), layers=8)
