"""Builds ONNX models with seeded weights whose activations stay alive.

A deep network of random weights easily says the same to every input, and nothing could be learnt from quantizing it.
Four things prevent that. A value carries the mean and the variance that its elements are expected to have, so that
weights and batch norms are scaled to what really arrives (He et al. 2015 did so for ReLU alone). The weights of each
dense filter sum to zero, since ReLU's outputs share a positive mean, which would drown what differs between two
inputs. The last batch norm of a residual branch is scaled down, as trained ones are. And what goes into ReLU is lifted
by a standard deviation: ReLU at 0 would let half of the noise pass but only a third of the signal, layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
Batch = int | str
OPSET = 17
#: What is added before activations, in standard deviations.
LIFT = 1.0
#: How far scales of channels spread, as the standard deviation of their logarithm.
_SPREAD = 0.3


@dataclass(frozen=True)
class Value:
    """A tensor: its name, its shape without the batch, and the moments that its elements are expected to have."""

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    variance: float = 1.0
    #: Means of the channels, where they are known to differ.
    means: Array | None = None

    @property
    def channels(self) -> int:
        """Channels of an image, or features."""
        return self.shape[0]


def rectified(x: Value, name: str) -> Value:
    """What ReLU makes of normally distributed elements."""
    sigma = math.sqrt(x.variance)
    z = x.mean / sigma
    below = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    mean = x.mean * below + sigma * density
    power = (x.mean**2 + x.variance) * below + x.mean * sigma * density
    return Value(name, x.shape, mean, power - mean**2)


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """TensorFlow's padding `SAME`: the odd element goes to the end."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class Net:
    """A model under construction; every method adds nodes and returns the value they compute."""

    def __init__(self, name: str, batch: Batch = "N", seed: int = 0) -> None:
        self.name, self.batch = name, batch
        self.rng = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._constants: list[onnx.TensorProto] = []

    # Parts

    def input(self, name: str, shape: Sequence[int], dtype: int = TensorProto.FLOAT) -> Value:
        """Declare an input; its elements are taken to be normalised."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, [self.batch, *shape]))
        return Value(name, tuple(shape))

    def constant(self, array: Array, name: str | None = None) -> str:
        """Add a constant and return its name."""
        name = name or f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def op(self, kind: str, *inputs: str | Value, **attributes: Any) -> str:
        """Add a node with one output and return that one's name."""
        name = f"{kind.lower()}{len(self._nodes)}"
        names = [x.name if isinstance(x, Value) else x for x in inputs]
        self._nodes.append(helper.make_node(kind, names, [name], name=f"node_{name}", **attributes))
        return name

    def model(self, outputs: Mapping[str, Value]) -> onnx.ModelProto:
        """Return the finished model, checked."""
        names = {value.name: name for name, value in outputs.items()}
        for node in self._nodes:
            for values in (node.input, node.output):
                values[:] = [names.get(value, value) for value in values]
        infos = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [self.batch, *value.shape])
            for name, value in outputs.items()
        ]
        graph = helper.make_graph(self._nodes, self.name, self._inputs, infos, self._constants)
        # IR version 8 is what belongs to opset 17; a newer one would only shut out older readers.
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="vnnigen benchmarks"
        )
        onnx.checker.check_model(model)
        return model

    # Weights

    def normal(self, *shape: int) -> Array:
        """Draw normally distributed numbers."""
        return self.rng.standard_normal(shape, dtype=np.float32)

    def spread(self, n: int) -> Array:
        """Draw positive factors around 1, one for a channel."""
        return np.asarray(np.exp(_SPREAD * self.normal(n)))

    def filters(self, x: Value, outputs: int, *window: int, groups: int = 1) -> Array:
        """Draw weights [outputs, channels / groups, *window] that give unit variance."""
        w = self.normal(outputs, x.channels // groups, *window)
        if groups == 1:
            w -= w.mean(axis=tuple(range(1, w.ndim)), keepdims=True)
        w *= 1 / math.sqrt(w[0].size * x.variance)
        return w

    # Layers

    def conv(
        self, x: Value, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, dilation: int = 1,
        pads: tuple[int, int] | None = None, bias: bool = True, lift: float = LIFT,
    ) -> Value:  # fmt: skip
        """Convolve; `pads` are before and after, by default half the kernel's extent on both sides.

        `lift` is the mean of the bias: 0 where no activation follows.
        """
        half = dilation * (kernel // 2)
        before, after = pads if pads is not None else (half, half)
        weight = self.filters(x, outputs, kernel, kernel, groups=groups)
        operands = [x.name, self.constant(weight)]
        if bias:
            operands.append(self.constant(lift + 0.1 * self.normal(outputs)))
        name = self.op(
            "Conv", *operands, kernel_shape=[kernel] * 2, strides=[stride] * 2, group=groups,
            dilations=[dilation] * 2, pads=[before] * 2 + [after] * 2,
        )  # fmt: skip
        extent = (kernel - 1) * dilation + 1
        sizes = [(size + before + after - extent) // stride + 1 for size in x.shape[1:]]
        means = x.mean * weight.sum(axis=(1, 2, 3)) if groups > 1 else None
        return Value(name, (outputs, *sizes), lift if bias else 0.0, means=means)

    def norm(self, x: Value, gain: float = 1.0, lift: float = LIFT) -> Value:
        """Batch norm with running statistics that fit `x`; its output has the standard deviation `gain`.

        `lift` is its mean: 0 where no activation follows.
        """
        c = x.channels
        deviation = math.sqrt(x.variance)
        tensors = (
            gain * self.spread(c),
            gain * (lift + 0.2 * self.normal(c)),
            (x.mean if x.means is None else x.means) + 0.1 * deviation * self.normal(c),
            x.variance * self.spread(c) ** 2,
        )
        constants = [self.constant(tensor.astype(np.float32)) for tensor in tensors]
        name = self.op("BatchNormalization", x, *constants, epsilon=1e-5)
        return Value(name, x.shape, gain * lift, gain**2 * (math.exp(4 * _SPREAD**2) + 0.04))

    def relu(self, x: Value) -> Value:
        """ReLU."""
        return rectified(x, self.op("Relu", x))

    def relu6(self, x: Value) -> Value:
        """ReLU6, that is Clip."""
        limits = [self.constant(np.array(limit, np.float32)) for limit in (0, 6)]
        return rectified(x, self.op("Clip", x, *limits))

    def add(self, x: Value, y: Value) -> Value:
        """Sum of two tensors."""
        return Value(self.op("Add", x, y), x.shape, x.mean + y.mean, x.variance + y.variance)

    def concat(self, parts: Sequence[Value], axis: int = 1) -> Value:
        """Join along an axis (of the tensor with its batch)."""
        shape = list(parts[0].shape)
        shape[axis - 1] = sum(part.shape[axis - 1] for part in parts)
        mean = float(np.mean([part.mean for part in parts]))
        power = float(np.mean([part.variance + part.mean**2 for part in parts]))
        return Value(self.op("Concat", *parts, axis=axis), tuple(shape), mean, power - mean**2)

    def max_pool(
        self, x: Value, kernel: int, stride: int, *, pads: tuple[int, int] = (0, 0), ceil: bool = False
    ) -> Value:
        """Max pooling; `ceil` keeps a last window that is not whole."""
        name = self.op(
            "MaxPool", x, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pads[0]] * 2 + [pads[1]] * 2,
            ceil_mode=int(ceil),
        )  # fmt: skip
        spare = stride - 1 if ceil else 0
        sizes = [(size + sum(pads) - kernel + spare) // stride + 1 for size in x.shape[1:]]
        return replace(x, name=name, shape=(x.channels, *sizes))

    def global_pool(self, x: Value) -> Value:
        """Average over the image: [channels]."""
        pooled = self.op("GlobalAveragePool", x)
        # Neighbours are correlated: a window of four elements counts as one.
        independent = max(1.0, math.prod(x.shape[1:]) / 4)
        return Value(self.op("Flatten", pooled, axis=1), (x.channels,), x.mean, x.variance / independent)

    def flatten(self, x: Value) -> Value:
        """All of an image as features."""
        return replace(x, name=self.op("Flatten", x, axis=1), shape=(math.prod(x.shape),))

    def linear(self, x: Value, outputs: int, lift: float = 0.0) -> Value:
        """Fully connected layer; `lift` as in `conv`."""
        weight = self.constant(self.filters(x, outputs))
        bias = self.constant(lift + 0.1 * self.normal(outputs))
        return Value(self.op("Gemm", x, weight, bias, transB=1), (outputs,), lift)

    def reshape(self, x: Value, *shape: int) -> Value:
        """Reshape all but the batch; -1 is not needed, shapes are known."""
        name = self.op("Reshape", x, self.constant(np.array([0, *shape], np.int64)))
        return replace(x, name=name, shape=tuple(shape))

    def transpose(self, x: Value, *order: int) -> Value:
        """Permute all axes, the batch being axis 0."""
        shape = (0, *x.shape)
        return replace(x, name=self.op("Transpose", x, perm=list(order)), shape=tuple(shape[i] for i in order[1:]))

    def softmax(self, x: Value) -> Value:
        """Softmax over the last axis."""
        return replace(x, name=self.op("Softmax", x, axis=-1))

    def sigmoid(self, x: Value) -> Value:
        """Sigmoid."""
        return replace(x, name=self.op("Sigmoid", x))
