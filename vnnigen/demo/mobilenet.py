"""MobileNetV2 as an ONNX model, from torchvision's state dict: what a user would have exported.

Batch norms are nodes of their own, since folding them is vnnigen's business. Nodes have the names of the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vnnigen.errors import MissingExtraError, ModelError
from vnnigen.quant import QuantConfig

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[Any]
Shape = tuple[int, ...]

BN_EPSILON = 1e-5  # torch's default, which torchvision's MobileNetV2 keeps
CLASSES = 1000
OPSET, IR_VERSION = 17, 8

# Sandler et al. 2018, table 2: expansion, output channels, repeats, stride of the first repeat.
BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
#: The layers whose rounding errors the others blow up most. In f32 they cost a third more time, and the logits' SQNR is
#: 3 dB better.
SENSITIVE = ("features.0.0", "features.1.conv.0.0", "features.1.conv.1", "features.2.conv.0.0")
MIXED = QuantConfig(overrides=dict.fromkeys(SENSITIVE, "f32"))


def mobilenet_v2(state: Mapping[str, Array], batch: int | str = "N") -> ModelProto:
    """Build the model, input [batch, 3, 224, 224], from torchvision's parameter names.

    Raises ModelError when a parameter is missing, has another shape or is not finite, MissingExtraError without the
    onnx package.
    """
    net = _Builder(state, batch)
    x = net.normed("features.0.0", "features.0.1", "image", (32, 3, 3, 3), stride=2)
    channels, feature = 32, 1
    for expansion, out, repeats, first_stride in BLOCKS:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            x = net.block(f"features.{feature}.conv", x, channels, out, expansion, stride)
            channels, feature = out, feature + 1
    x = net.normed(f"features.{feature}.0", f"features.{feature}.1", x, (1280, channels, 1, 1))
    return net.finish(x)


class _Builder:
    """The model under construction."""

    def __init__(self, state: Mapping[str, Array], batch: int | str) -> None:
        try:
            import onnx
        except ImportError:
            raise MissingExtraError("onnx", "onnx") from None
        self.onnx, self.state, self.batch = onnx, state, batch
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        bounds = (("zero", 0.0), ("six", 6.0))
        self.constants += [onnx.numpy_helper.from_array(np.float32(v), name) for name, v in bounds]

    def parameter(self, name: str, shape: Shape) -> str:
        """Add a parameter of the state dict as a constant."""
        value = self.state.get(name)
        if value is None:
            raise ModelError(f"the state dict has no {name!r}; is it torchvision's MobileNetV2?")
        if value.shape != shape:
            raise ModelError(f"{name!r} has shape {value.shape}, MobileNetV2 has {shape}")
        if value.dtype.kind != "f" or not np.isfinite(value).all():
            raise ModelError(f"{name!r} must hold finite floating-point numbers")
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
        return name

    def op(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; its result has its name."""
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def normed(
        self, conv: str, norm: str, x: str, shape: Shape, *, stride: int = 1, groups: int = 1, relu6: bool = True
    ) -> str:
        """Add a convolution with weights of `shape`, its batch norm, and ReLU6."""
        weight = self.parameter(f"{conv}.weight", shape)
        pads, strides = [shape[2] // 2] * 4, [stride] * 2
        y = self.op("Conv", conv, x, weight, kernel_shape=shape[2:], strides=strides, pads=pads, group=groups)
        parts = ("weight", "bias", "running_mean", "running_var")
        four = [self.parameter(f"{norm}.{part}", shape[:1]) for part in parts]
        y = self.op("BatchNormalization", norm, y, *four, epsilon=BN_EPSILON)
        return self.op("Clip", f"{norm}.relu6", y, "zero", "six") if relu6 else y

    def block(self, prefix: str, x: str, channels: int, out: int, expansion: int, stride: int) -> str:
        """Add an inverted residual block: expand, convolve each channel, project, and add."""
        wide, part, y = channels * expansion, 0, x
        if expansion > 1:
            y = self.normed(f"{prefix}.0.0", f"{prefix}.0.1", y, (wide, channels, 1, 1))
            part = 1
        names = f"{prefix}.{part}.0", f"{prefix}.{part}.1"
        y = self.normed(*names, y, (wide, 1, 3, 3), stride=stride, groups=wide)
        names = f"{prefix}.{part + 1}", f"{prefix}.{part + 2}"
        y = self.normed(*names, y, (out, wide, 1, 1), relu6=False)
        return self.op("Add", f"{prefix}.add", x, y) if stride == 1 and channels == out else y

    def finish(self, x: str) -> ModelProto:
        """Add the classifier and return the model."""
        helper, float_type = self.onnx.helper, self.onnx.TensorProto.FLOAT
        x = self.op("Flatten", "flatten", self.op("GlobalAveragePool", "pool", x))
        weight = self.parameter("classifier.1.weight", (CLASSES, 1280))
        self.op("Gemm", "logits", x, weight, self.parameter("classifier.1.bias", (CLASSES,)), transB=1)
        image = helper.make_tensor_value_info("image", float_type, [self.batch, 3, 224, 224])
        logits = helper.make_tensor_value_info("logits", float_type, [self.batch, CLASSES])
        graph = helper.make_graph(self.nodes, "mobilenet_v2", [image], [logits], self.constants)
        opset = [helper.make_opsetid("", OPSET)]
        model: ModelProto = helper.make_model(
            graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="vnnigen"
        )
        return model
