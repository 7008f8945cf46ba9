"""The networks that are measured, built as ONNX models: `build(name)`; `python -m benchmarks.models NAME -o FILE`.

Needs the extra `onnx`. Seeded networks have the published topology and random weights, which suffices for speed; the
trained ones also tell whether low precision keeps its answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from benchmarks.models import classifiers, detectors, others, samples, trained
from benchmarks.models.net import Batch
from vnnigen.errors import ModelError


@dataclass(frozen=True)
class Model:
    """A network: its title, its builder, its inputs, and the batch at which throughput is measured."""

    title: str
    builder: Callable[[Batch], onnx.ModelProto]
    sampler: samples.Sampler
    throughput_batch: int = 16
    #: Not a network of images: quantizers treat text encoders in a way of their own.
    transformer: bool = False


_IMAGES = samples.clouds(224)
_SSD_IMAGES = samples.clouds(300)

MODELS: dict[str, Model] = {
    "resnet50": Model("ResNet-50 v1.5", lambda b: classifiers.resnet(50, b), _IMAGES),
    "resnet101": Model("ResNet-101 v1.5", lambda b: classifiers.resnet(101, b), _IMAGES),
    "squeezenet": Model("SqueezeNet 1.0", classifiers.squeezenet, _IMAGES),
    "vgg19": Model("VGG-19", lambda b: classifiers.vgg(19, b), _IMAGES),
    "mobilenet_v2": Model("MobileNetV2, trained", trained.mobilenet_v2_trained, samples.photo_images),
    "mobilenet_v2_seeded": Model("MobileNetV2, seeded", classifiers.mobilenet_v2, _IMAGES),
    "open_nsfw": Model("open-nsfw, trained", trained.open_nsfw, samples.photo_bytes),
    "text_direction": Model("PP-OCR text direction, trained", trained.text_direction, samples.text_lines),
    "retinanet": Model("RetinaNet ResNet-50-FPN 512", detectors.retinanet, samples.clouds(512)),
    "ssd_vgg16": Model("SSD-VGG16 300", detectors.ssd_vgg16, _SSD_IMAGES),
    "ssd_mobilenet": Model("SSD-MobileNet v1 300", detectors.ssd_mobilenet, _SSD_IMAGES),
    "wide_deep": Model("Wide & Deep", others.wide_deep, samples.columns, throughput_batch=512),
    "bert": Model("BERT-base, 128 tokens", others.bert, samples.tokens, transformer=True),
}


def build(name: str, batch: Batch = "N") -> onnx.ModelProto:
    """Build a network of MODELS with a symbolic or a fixed batch; ModelError for a name that is not there."""
    if name not in MODELS:
        raise ModelError(f"no network {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name].builder(batch)
