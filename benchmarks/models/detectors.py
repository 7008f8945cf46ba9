"""Detectors: SSD on MobileNet v1 and on VGG-16, and RetinaNet, with seeded weights.

They end in the boxes' offsets and the classes' scores of all anchors, as published figures have it; choosing boxes
afterwards is not a matter of low precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from benchmarks.models.classifiers import resnet_stages
from benchmarks.models.net import LIFT, Batch, Net, Value, rectified, same_padding

#: MobileNet v1 after its first convolution: output channels and stride of each separable convolution.
_MOBILENET_V1 = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1),
)  # fmt: skip


def ssd_mobilenet(batch: Batch = "N") -> onnx.ModelProto:
    """SSD-MobileNet v1 at 300 x 300 for COCO, as TensorFlow's detection API has it: 1917 anchors, 91 classes."""
    net = Net("ssd_mobilenet", batch, seed=7)
    x = _same(net, net.input("image", (3, 300, 300)), 32, 3, 2)
    sources = []
    for i, (outputs, stride) in enumerate(_MOBILENET_V1):
        x = _same(net, _same(net, x, x.channels, 3, stride, groups=x.channels), outputs)
        if i in (10, 12):
            sources.append(x)
    for outputs in (512, 256, 256, 128):
        x = _same(net, _same(net, x, outputs // 2), outputs, 3, 2)
        sources.append(x)
    boxes, scores = _predict(net, sources, (3, 6, 6, 6, 6, 6), 91, kernel=1)
    return net.model({"boxes": boxes, "scores": net.sigmoid(scores)})


def _same(net: Net, x: Value, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> Value:
    pads = same_padding(x.shape[1], kernel, stride)
    return net.relu6(net.norm(net.conv(x, outputs, kernel, stride, groups=groups, pads=pads, bias=False)))


def ssd_vgg16(batch: Batch = "N") -> onnx.ModelProto:
    """SSD300 on VGG-16 (Liu et al. 2016) for VOC: 8732 anchors, 21 classes."""
    net = Net("ssd_vgg16", batch, seed=8)
    x, sources = net.input("image", (3, 300, 300)), []
    for stage, (width, repeats) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for _ in range(repeats):
            x = net.relu(net.conv(x, width, 3))
        if stage == 3:
            sources.append(_l2_norm(net, x, 20.0))
        x = net.max_pool(x, 2, 2, ceil=True) if stage < 4 else net.max_pool(x, 3, 1, pads=(1, 1))
    x = net.relu(net.conv(x, 1024, 3, dilation=6))
    x = net.relu(net.conv(x, 1024))
    sources.append(x)
    for squeeze, outputs, stride, pads in ((256, 512, 2, 1), (128, 256, 2, 1), (128, 256, 1, 0), (128, 256, 1, 0)):
        x = net.relu(net.conv(net.relu(net.conv(x, squeeze)), outputs, 3, stride, pads=(pads, pads)))
        sources.append(x)
    boxes, scores = _predict(net, sources, (4, 6, 6, 6, 4, 4), 21, kernel=3)
    return net.model({"boxes": boxes, "scores": net.softmax(scores)})


def _l2_norm(net: Net, x: Value, scale: float) -> Value:
    """Divide each pixel by its length over channels, then scale (ParseNet; SSD's section 3.1)."""
    squares = net.op("ReduceSum", net.op("Mul", x, x), net.constant(np.array([1], np.int64)), keepdims=1)
    unit = net.op("Div", x, net.op("Sqrt", squares))
    factor = net.constant(np.full((1, x.channels, 1, 1), scale, np.float32))
    shrink = scale**2 / x.channels / (x.variance + x.mean**2)
    return Value(net.op("Mul", unit, factor), x.shape, x.mean * shrink**0.5, x.variance * shrink)


def _predict(
    net: Net, sources: Sequence[Value], anchors: Sequence[int], classes: int, kernel: int
) -> tuple[Value, Value]:
    """Boxes [anchors, 4] and scores [anchors, classes] of all sources."""
    heads = [
        [
            _rows(net, net.conv(x, count * width, kernel, lift=0), width)
            for x, count in zip(sources, anchors, strict=True)
        ]
        for width in (4, classes)
    ]
    boxes, scores = (net.concat(parts) for parts in heads)
    return boxes, scores


def _rows(net: Net, x: Value, width: int) -> Value:
    """A head's output [anchors * width, h, w] as one row for each anchor."""
    c, h, w = x.shape
    return net.reshape(net.transpose(x, 0, 2, 3, 1), h * w * c // width, width)


def retinanet(batch: Batch = "N", size: int = 512) -> onnx.ModelProto:
    """RetinaNet (Lin et al. 2017) on ResNet-50 and a feature pyramid, 512 x 512: 49104 anchors, 80 classes."""
    net = Net("retinanet", batch, seed=9)
    levels = _pyramid(net, resnet_stages(net, net.input("image", (3, size, size)), 50)[1:])
    outputs = {}
    for name, width in (("boxes", 4), ("scores", 80)):
        head = _SharedHead(net, 9 * width)
        outputs[name] = net.concat([_rows(net, head(x), width) for x in levels])
    outputs["scores"] = net.sigmoid(outputs["scores"])
    return net.model(outputs)


def _pyramid(net: Net, stages: Sequence[Value], width: int = 256) -> list[Value]:
    """Feature pyramid P3 to P7 of the stages C3 to C5."""
    merged = [net.conv(stages[-1], width, lift=0)]
    for stage in reversed(stages[:-1]):
        lateral = net.conv(stage, width, lift=0)
        scales = net.constant(np.array([1, 1, 2, 2], np.float32))
        up = net.op(
            "Resize", merged[0], "", scales, mode="nearest", nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )  # fmt: skip
        merged.insert(0, net.add(lateral, Value(up, lateral.shape, merged[0].mean, merged[0].variance)))
    levels = [net.conv(x, width, 3, lift=0) for x in merged]
    p6 = net.conv(stages[-1], width, 3, 2, lift=0)
    return [*levels, p6, net.conv(net.relu(p6), width, 3, 2, lift=0)]


class _SharedHead:
    """Four convolutions and a prediction whose weights all levels of the pyramid share."""

    def __init__(self, net: Net, outputs: int, width: int = 256) -> None:
        self.net = net
        x = Value("", (width, 0, 0))
        layers = []
        for channels in (*[width] * 4, outputs):
            weight = net.constant(net.filters(x, channels, 3, 3))
            layers.append((weight, net.constant((LIFT if channels == width else 0.0) + 0.1 * net.normal(channels))))
            x = rectified(Value("", (width, 0, 0), LIFT), "")
        self.layers, self.outputs = layers, outputs

    def __call__(self, x: Value) -> Value:
        name = x.name
        for i, constants in enumerate(self.layers):
            name = self.net.op("Conv", name, *constants, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
            if i < len(self.layers) - 1:
                name = self.net.op("Relu", name)
        return Value(name, (self.outputs, *x.shape[1:]))
