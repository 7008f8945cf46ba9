"""Image classifiers: ResNet, SqueezeNet, VGG and MobileNetV2, with seeded weights."""

from __future__ import annotations

import onnx

from benchmarks.models.net import LIFT, Batch, Net, Value
from vnnigen.demo.mobilenet import BLOCKS

CLASSES = 1000
IMAGE = (3, 224, 224)
RESNETS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
#: Channels of VGG-16 and VGG-19 by stage; a pooling of 2 x 2 follows each.
VGGS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_VGG_WIDTHS = (64, 128, 256, 512, 512)
#: Squeeze channels of SqueezeNet 1.0's fire modules; each expands to four times as many twice.
_FIRES = ((16, 16, 32), (32, 48, 48, 64), (64,))


def resnet(depth: int, batch: Batch = "N") -> onnx.ModelProto:
    """ResNet v1.5 (He et al. 2015; the stride is in the 3 x 3 convolution) of depth 50 or 101."""
    net = Net(f"resnet{depth}", batch, seed=depth)
    *_, features = resnet_stages(net, net.input("image", IMAGE), depth)
    return net.model({"logits": net.linear(net.global_pool(features), CLASSES)})


def resnet_stages(net: Net, x: Value, depth: int) -> list[Value]:
    """The outputs of the four stages, at strides 4 to 32."""
    x = net.relu(net.norm(net.conv(x, 64, 7, 2, bias=False)))
    x = net.max_pool(x, 3, 2, pads=(1, 1))
    stages = []
    for stage, repeats in enumerate(RESNETS[depth]):
        for repeat in range(repeats):
            x = _bottleneck(net, x, 64 << stage, 2 if stage and not repeat else 1)
        stages.append(x)
    return stages


def _bottleneck(net: Net, x: Value, width: int, stride: int) -> Value:
    y = net.relu(net.norm(net.conv(x, width, bias=False)))
    y = net.relu(net.norm(net.conv(y, width, 3, stride, bias=False)))
    y = net.norm(net.conv(y, 4 * width, bias=False), gain=0.4, lift=0)
    if x.shape != y.shape:
        x = net.norm(net.conv(x, 4 * width, 1, stride, bias=False))
    return net.relu(net.add(y, x))


def squeezenet(batch: Batch = "N") -> onnx.ModelProto:
    """SqueezeNet 1.0 (Iandola et al. 2016), as torchvision has it."""
    net = Net("squeezenet", batch, seed=3)
    x = net.relu(net.conv(net.input("image", IMAGE), 96, 7, 2, pads=(0, 0)))
    for group in _FIRES:
        x = net.max_pool(x, 3, 2, ceil=True)
        for squeeze in group:
            s = net.relu(net.conv(x, squeeze))
            x = net.concat([net.relu(net.conv(s, 4 * squeeze, kernel)) for kernel in (1, 3)])
    x = net.relu(net.conv(x, CLASSES))
    return net.model({"logits": net.global_pool(x)})


def vgg(depth: int = 19, batch: Batch = "N") -> onnx.ModelProto:
    """VGG-16 or VGG-19 (Simonyan and Zisserman 2014) without batch norm."""
    net = Net(f"vgg{depth}", batch, seed=depth)
    x = net.input("image", IMAGE)
    for width, repeats in zip(_VGG_WIDTHS, VGGS[depth], strict=True):
        for _ in range(repeats):
            x = net.relu(net.conv(x, width, 3))
        x = net.max_pool(x, 2, 2)
    x = net.flatten(x)
    for _ in range(2):
        x = net.relu(net.linear(x, 4096, LIFT))
    return net.model({"logits": net.linear(x, CLASSES)})


def mobilenet_v2(batch: Batch = "N") -> onnx.ModelProto:
    """MobileNetV2 (Sandler et al. 2018) with batch norms."""
    net = Net("mobilenet_v2", batch, seed=5)
    x = net.relu6(net.norm(net.conv(net.input("image", IMAGE), 32, 3, 2, bias=False)))
    for expansion, outputs, repeats, first_stride in BLOCKS:
        for repeat in range(repeats):
            x = _inverted_residual(net, x, expansion, outputs, 1 if repeat else first_stride)
    x = net.relu6(net.norm(net.conv(x, 1280, bias=False)))
    return net.model({"logits": net.linear(net.global_pool(x), CLASSES)})


def _inverted_residual(net: Net, x: Value, expansion: int, outputs: int, stride: int) -> Value:
    wide, y = x.channels * expansion, x
    if expansion > 1:
        y = net.relu6(net.norm(net.conv(y, wide, bias=False)))
    y = net.relu6(net.norm(net.conv(y, wide, 3, stride, groups=wide, bias=False)))
    y = net.norm(net.conv(y, outputs, bias=False), lift=0)
    return net.add(y, x) if y.shape == x.shape else y
