"""QOperator forms and com.microsoft's fused operators, written out as ONNX's own, against their formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnx")
from onnx import helper, numpy_helper

from tests.graph.models import Net
from tests.graph.roundtrip import run
from vnnigen.graph.importer import import_model
from vnnigen.graph.importer_contrib import CONTRIB_OPERATORS
from vnnigen.graph.ir import Graph

MS = "com.microsoft"
RNG = np.random.default_rng(7)
F32 = npt.NDArray[np.float32]


def real(*shape: int) -> F32:
    return RNG.standard_normal(shape).astype(np.float32)


def softmax(x: F32) -> F32:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def computed(net: Net, outputs: list[str], given: dict[str, Any]) -> tuple[Graph, list[Any]]:
    graph = import_model(net.model(*outputs, domains={MS: 1}, shape=()))
    return graph, run(graph, given)


# Quantized operators against their formula.


def q(x: Any, scale: Any, zero_point: Any, dtype: Any = np.uint8) -> Any:
    info = np.iinfo(dtype)
    return np.clip(np.rint(x / scale) + zero_point, info.min, info.max).astype(dtype)


def dq(x: Any, scale: Any, zero_point: Any) -> Any:
    return (x.astype(np.int32) - np.asarray(zero_point, np.int32)) * np.float32(scale)


def _quantized(
    net: Net, x: Any, scale: Any, zero_point: Any, fed: dict[str, Any] | None = None
) -> tuple[str, str, str]:
    """Values, scale and zero point as constants, or the values as an input."""
    if fed is None:
        name = net.const(x)
    else:
        name = net.input(f"x{len(fed)}", x.shape, helper.np_dtype_to_tensor_dtype(x.dtype))
        fed[name] = x
    return name, net.const(np.asarray(scale, np.float32)), net.const(np.asarray(zero_point, x.dtype))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("one_dimension", [True, False])
def test_qlinear_conv(per_channel: bool, one_dimension: bool) -> None:
    """With an s32 bias in units of x_scale * w_scale; scales of one element may have any rank."""
    net, fed = Net("qconv"), dict[str, Any]()
    x, w = RNG.integers(0, 256, (1, 3, 5, 5), np.uint8), RNG.integers(-127, 128, (4, 3, 1, 1), np.int8)
    ws = RNG.uniform(0.01, 0.02, 4).astype(np.float32) if per_channel else np.float32(0.015)
    wrap = (lambda v: [v]) if one_dimension else (lambda v: v)
    bias = RNG.integers(-900, 900, 4).astype(np.int32)
    y_scale, y_zp = net.const(np.float32(0.05)), net.const(np.uint8(100))
    y = net.op("QLinearConv", *_quantized(net, x, wrap(0.02), wrap(128), fed),
               *_quantized(net, w, ws if per_channel else wrap(ws), np.zeros(4) if per_channel else wrap(0)),
               y_scale, y_zp, net.const(bias))  # fmt: skip
    graph, got = computed(net, [y], fed)
    assert [node.op for node in graph] == ["DequantizeLinear"] * 3 + ["Conv", "QuantizeLinear"]
    column = np.reshape(ws, (-1, 1))
    sums = np.einsum("oc,nchw->nohw", dq(w, 1, 0)[..., 0, 0], dq(x, 1, 128))
    expected = q((sums + bias[:, None, None]) * np.float32(0.02) * column[..., None], 0.05, 100)
    assert np.abs(got[0].astype(int) - expected).max() <= 1
    assert got[0].std() > 5


def _binary(op: str, f: Callable[[Any, Any], Any]) -> Any:
    def case(net: Net, fed: dict[str, Any]) -> tuple[str, Any]:
        a, b = (RNG.integers(0, 256, (2, 8), np.uint8) for _ in range(2))
        out = net.const(np.float32(0.02)), net.const(np.uint8(120))
        y = net.op(op, *_quantized(net, a, 0.01, 100, fed), *_quantized(net, b, 0.02, 90, fed), *out, domain=MS)
        return y, q(f(dq(a, 0.01, 100), dq(b, 0.02, 90)), 0.02, 120)

    return case


def _unary(op: str, f: Callable[[Any], Any], **attrs: Any) -> Any:
    def case(net: Net, fed: dict[str, Any]) -> tuple[str, Any]:
        x = RNG.integers(0, 256, (1, 3, 4, 4), np.uint8)
        out = net.const(np.float32(0.01)), net.const(np.uint8(60))
        y = net.op(op, *_quantized(net, x, 0.01, 100, fed), *out, domain=MS, **attrs)
        return y, q(f(dq(x, 0.01, 100)), 0.01, 60)

    return case


def _concat(net: Net, fed: dict[str, Any]) -> tuple[str, Any]:
    a, b = (RNG.integers(0, 256, (2, 3), np.uint8) for _ in range(2))
    out = net.const(np.float32(0.02)), net.const(np.uint8(120))
    y = net.op("QLinearConcat", *out, *_quantized(net, a, 0.01, 100, fed), *_quantized(net, b, 0.02, 90, fed), axis=1,
               domain=MS)  # fmt: skip
    return y, q(np.concatenate([dq(a, 0.01, 100), dq(b, 0.02, 90)], 1), 0.02, 120)


def _matmul_operands(net: Net, fed: dict[str, Any]) -> tuple[list[str], list[str], Any]:
    a, b = RNG.integers(0, 256, (3, 8), np.uint8), RNG.integers(-127, 128, (8, 5), np.int8)
    scale = RNG.uniform(0.01, 0.02, 5).astype(np.float32)
    left, right = _quantized(net, a, 0.01, 100, fed), _quantized(net, b, scale, np.zeros(5))
    return list(left), list(right), dq(a, 0.01, 100) @ dq(b, scale, 0)


def _matmul(net: Net, fed: dict[str, Any]) -> tuple[str, Any]:
    left, right, value = _matmul_operands(net, fed)
    y = net.op("QLinearMatMul", *left, *right, net.const(np.float32(0.05)), net.const(np.uint8(120)))
    return y, q(value, 0.05, 120)


def _gemm(quantized: bool) -> Any:
    def case(net: Net, fed: dict[str, Any]) -> tuple[str, Any]:
        left, right, value = _matmul_operands(net, fed)
        scale = numpy_helper.to_array(next(t for t in net.initializers if t.name == right[1]))
        bias = RNG.integers(-900, 900, 5).astype(np.int32)
        out = [net.const(np.float32(0.05)), net.const(np.uint8(120))] if quantized else []
        y = net.op("QGemm", *left, *right, net.const(bias), *out, alpha=0.5, transA=0, transB=0, domain=MS)
        value = 0.5 * (value + bias * np.float32(0.01) * scale)
        return y, q(value, 0.05, 120) if quantized else value

    return case


def _to_float(net: Net, fed: dict[str, Any]) -> tuple[str, Any]:
    left, right, value = _matmul_operands(net, fed)
    bias = real(5)
    y = net.op(
        "MatMulIntegerToFloat", left[0], right[0], left[1], right[1], left[2], right[2], net.const(bias), domain=MS
    )
    return y, value + bias


def _dynamic(net: Net, fed: dict[str, Any]) -> tuple[str, Any]:
    x, b = real(3, 8), RNG.integers(-127, 128, (8, 5), np.int8)
    fed["x"] = x
    y = net.op("DynamicQuantizeMatMul", net.input("x", x.shape), *_quantized(net, b, 0.01, 3), domain=MS)
    scale = (max(x.max(), 0) - min(x.min(), 0)) / np.float32(255)
    zero_point = np.clip(np.rint(-min(x.min(), 0) / scale), 0, 255)
    return y, dq(q(x, scale, zero_point), scale, zero_point) @ dq(b, 0.01, 3)


QUANTIZED = {
    "QLinearAdd": _binary("QLinearAdd", np.add),
    "QLinearMul": _binary("QLinearMul", np.multiply),
    "QLinearConcat": _concat,
    "QLinearGlobalAveragePool": _unary("QLinearGlobalAveragePool", lambda x: x.mean((2, 3), keepdims=True),
                                       channels_last=0),
    "QLinearAveragePool": _unary("QLinearAveragePool", lambda x: x.reshape(1, 3, 2, 2, 2, 2).mean((3, 5)),
                                 kernel_shape=[2, 2], strides=[2, 2]),
    "QLinearLeakyRelu": _unary("QLinearLeakyRelu", lambda x: np.where(x < 0, 0.1 * x, x), alpha=0.1),
    "QLinearSigmoid": _unary("QLinearSigmoid", lambda x: 1 / (1 + np.exp(-x))),
    "QLinearSoftmax": _unary("QLinearSoftmax", softmax, axis=-1, opset=13),
    "QLinearMatMul": _matmul,
    "QGemm": _gemm(True),
    "QGemm to f32": _gemm(False),
    "MatMulIntegerToFloat": _to_float,
    "DynamicQuantizeMatMul": _dynamic,
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_operators(name: str) -> None:
    net, fed = Net("quantized"), dict[str, Any]()
    y, expected = QUANTIZED[name](net, fed)
    graph, (got,) = computed(net, [y], fed)
    assert all(node.domain == "" for node in graph)
    assert got.dtype == expected.dtype or expected.dtype.kind == "f"
    step = 1 if got.dtype.kind in "ui" else 1e-4
    assert np.abs(got.astype(np.float64) - expected).max() <= step


# Fused operators of com.microsoft.


def _erf_gelu(x: F32) -> Any:
    from math import erf

    return x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2


def _tanh_gelu(x: F32) -> Any:
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def _normalised(x: F32) -> F32:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


A, B, C = real(2, 4, 6), real(6), real(2, 6, 4)
G = real(4, 6)
FUSED: list[tuple[str, list[F32], dict[str, Any], Any]] = [
    ("Gelu", [A], {}, _erf_gelu(A)),
    ("BiasGelu", [A, B], {}, _erf_gelu(A + B)),
    ("FastGelu", [A], {}, _tanh_gelu(A)),
    ("FastGelu", [A, B], {}, _tanh_gelu(A + B)),
    ("QuickGelu", [A], {"alpha": 1.5}, A / (1 + np.exp(-1.5 * A))),
    ("SkipLayerNormalization", [A, A[::-1].copy(), B, B], {"epsilon": 1e-5}, _normalised(A + A[::-1]) * B + B),
    ("SkipLayerNormalization", [A, A[::-1].copy(), B, B, B], {"epsilon": 1e-5}, _normalised(A + A[::-1] + B) * B + B),
    ("FusedMatMul", [A, C], {"alpha": 0.5}, 0.5 * A @ C),
    ("FusedMatMul", [A, A], {"transB": 1}, A @ A.swapaxes(1, 2)),
    ("FusedMatMul", [A, A], {"transA": 1, "alpha": 2.0}, 2 * A.swapaxes(1, 2) @ A),
    ("FusedGemm", [G, real(6, 4)], {"activation": "Relu"}, None),
    ("FusedGemm", [G, real(6, 4)], {"activation": "LeakyRelu", "activation_alpha": 0.25}, None),
    ("FusedConv", [A[None], real(3, 2, 1, 1)], {"activation": "Relu"}, None),
    ("FusedConv", [A[None], real(3, 2, 1, 1), real(3), real(1, 3, 4, 6)],
     {"activation": "Clip", "activation_params": [-0.5, 0.75]}, None),
]  # fmt: skip


@pytest.mark.parametrize(("op", "values", "attrs", "expected"), FUSED)
def test_fused_operators(op: str, values: list[F32], attrs: dict[str, Any], expected: Any) -> None:
    net = Net("fused", opset=20)
    inputs = [net.input("x", values[0].shape), *map(net.const, values[1:])]
    graph, (got,) = computed(net, [net.op(op, *inputs, domain=MS, **attrs)], {"x": values[0]})
    if expected is None:
        y = values[0] @ values[1] if op == "FusedGemm" else np.einsum("oc,nchw->nohw", values[1][..., 0, 0], values[0])
        y = y + values[2][:, None, None] + values[3] if len(values) > 2 else y
        low = {"Relu": np.maximum(y, 0), "LeakyRelu": np.where(y < 0, y / 4, y), "Clip": y.clip(-0.5, 0.75)}
        expected = low[attrs["activation"]]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert all(node.domain == "" for node in graph)


def test_skip_layer_normalization_gives_the_sum() -> None:
    net = Net("skip", opset=20)
    x, w = net.input("x", A.shape), net.const(B)
    outputs = net.op("SkipLayerNormalization", x, x, w, n_out=4, domain=MS)
    _, (got, total) = computed(net, [outputs[0], outputs[3]], {"x": A})
    np.testing.assert_allclose(total, A + A, rtol=1e-6)
    np.testing.assert_allclose(got, _normalised(A + A) * B, rtol=1e-2, atol=1e-3)


def test_every_operator_is_tested() -> None:
    tested = {name.split()[0] for name in QUANTIZED} | {op for op, *_ in FUSED}
    alike = {"QLinearConv", "QuantizeLinear", "DequantizeLinear", "TransposeMatMul"}
    assert set(CONTRIB_OPERATORS) <= tested | alike
