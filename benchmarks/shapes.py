"""The shapes that `benchmarks.kernels` measures: what networks compute, layer by layer, each distinct shape once.

Convolutions come out of small walks over the published architectures, so that a table can be checked against a
paper and not against another table. Images are those of the papers: 224x224, SSD-MobileNet 300x300.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from vnnigen.bench.problem_string import ConvShape, GemmShape, parse_conv

#: Rows that a recommendation model scores, and tokens of BERT, for a batch of one.
CANDIDATES = 128
SEQUENCE = 128
_RELU6 = "clip:0:6"


@dataclass(frozen=True)
class Item:
    """A shape to measure: where it comes from, and the post-ops that stand behind it there."""

    suite: str
    name: str
    shape: ConvShape | GemmShape
    post_ops: str = ""

    @property
    def batch(self) -> int:
        """Images of a convolution; 1 for a matrix product, whose rows say it all."""
        return self.shape.mb if isinstance(self.shape, ConvShape) else 1


def _conv(image: int, ic: int, oc: int, kernel: int, stride: int = 1, groups: int = 1, same: bool = False) -> ConvShape:
    """Return a square convolution padded by half a kernel, or as TensorFlow's SAME (the smaller half first)."""
    out = -(-image // stride)
    before = kernel // 2
    if same:
        before = max((out - 1) * stride + kernel - image, 0) // 2
    return parse_conv(f"g{groups}mb1ic{ic}ih{image}oc{oc}oh{out}kh{kernel}sh{stride}ph{before}")


Layers = Iterator[tuple[ConvShape, str]]


def _resnet50() -> Layers:
    """He et al., table 1, with the stride in the 3x3 (version 1.5). The stem is 7x7 with stride 2."""
    yield _conv(224, 3, 64, 7, 2), "relu"
    image, channels = 56, 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            stride = 2 if block == 0 and width > 64 else 1
            yield _conv(image, channels, width, 1), "relu"
            yield _conv(image, width, width, 3, stride), "relu"
            yield _conv(image // stride, width, 4 * width, 1), "relu"
            if block == 0:
                yield _conv(image, channels, 4 * width, 1, stride), ""
            image //= stride
            channels = 4 * width


#: MobileNetV2: expansion, output channels, repeats, stride of the first.
_BOTTLENECKS = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip
#: MobileNetV1: output channels and stride of each separable block.
_SEPARABLE = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1),
)  # fmt: skip


def _mobilenet_v2() -> Layers:
    """Sandler et al., table 2."""
    yield _conv(224, 3, 32, 3, 2), _RELU6
    image, channels = 112, 32
    for expand, width, blocks, first in _BOTTLENECKS:
        for block in range(blocks):
            inner, stride = expand * channels, first if block == 0 else 1
            if expand > 1:
                yield _conv(image, channels, inner, 1), _RELU6
            yield _conv(image, inner, inner, 3, stride, inner), _RELU6
            image //= stride
            yield _conv(image, inner, width, 1), ""
            channels = width
    yield _conv(image, channels, 1280, 1), _RELU6


def _vgg19() -> Layers:
    """Simonyan and Zisserman, table 1, column E."""
    image, channels = 224, 3
    for width, convs in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(convs):
            yield _conv(image, channels, width, 3), "relu"
            channels = width
        image //= 2


def _ssd_mobilenet() -> Layers:
    """MobileNetV1 at 300x300 with SSD's extra layers and 1x1 box predictors: 91 classes, 3 or 6 boxes a cell."""
    yield _conv(300, 3, 32, 3, 2, same=True), _RELU6
    image, channels = 150, 32
    for width, stride in _SEPARABLE:
        yield _conv(image, channels, channels, 3, stride, channels, same=True), _RELU6
        image = -(-image // stride)
        yield _conv(image, channels, width, 1), _RELU6
        channels = width
    cells = [(19, 512, 3), (image, channels, 6)]
    for squeeze, width in ((256, 512), (128, 256), (128, 256), (64, 128)):
        yield _conv(image, channels, squeeze, 1), _RELU6
        yield _conv(image, squeeze, width, 3, 2, same=True), _RELU6
        image, channels = -(-image // 2), width
        cells.append((image, width, 6))
    for size, width, boxes in cells:
        yield _conv(size, width, 4 * boxes, 1), ""
        yield _conv(size, width, 91 * boxes, 1), ""


def _describe(s: ConvShape) -> str:
    """Name a convolution as people do: kernel, channels, image, stride."""
    stride = f"/{s.h.stride}" if s.h.stride > 1 else ""
    kernel = f"{s.h.kernel}x{s.h.kernel}{stride}"
    if s.g > 1:
        return f"dw {kernel} {s.ic} {s.h.size}x{s.w.size}"
    return f"{kernel} {s.ic}->{s.oc} {s.h.size}x{s.w.size}"


def _convolutions(suite: str, walk: Callable[[], Layers]) -> Callable[[Sequence[int]], list[Item]]:
    """Return the distinct convolutions of a walk, in its order, for batches."""

    def items(batches: Sequence[int]) -> list[Item]:
        distinct: dict[ConvShape, str] = {}
        for s, ops in walk():
            distinct.setdefault(s, ops)
        return [
            Item(suite, _describe(s) + (f" mb{mb}" if mb > 1 else ""), replace(s, mb=mb), ops)
            for mb in batches
            for s, ops in distinct.items()
        ]

    return items


def _linears(suite: str, rows: int, layers: Sequence[tuple[int, int, str]]) -> Callable[[Sequence[int]], list[Item]]:
    """Return linear layers of (inputs, outputs, post-ops), applied to `rows` rows an element of the batch."""

    def items(batches: Sequence[int]) -> list[Item]:
        found = []
        for mb in batches:
            m = rows * mb
            found += [Item(suite, f"{m}x{n}x{k}", GemmShape(m, n, k), ops) for k, n, ops in layers]
        return found

    return items


def _gemms(suite: str, sizes: Sequence[tuple[int, int, int]]) -> Callable[[Sequence[int]], list[Item]]:
    """Return matrix products of (m, n, k), whatever the batch."""

    def items(_batches: Sequence[int]) -> list[Item]:
        names = [f"{m}^3" if m == n == k else f"{m}x{n}x{k}" for m, n, k in sizes]
        return [Item(suite, name, GemmShape(*mnk), "relu") for name, mnk in zip(names, sizes, strict=True)]

    return items


#: Devlin et al., base: query, key, value and output share a shape; the first feed-forward layer has GELU.
_BERT = ((768, 768, ""), (768, 3072, "gelu"), (3072, 768, ""))
#: Naumov et al. as in MLPerf (Criteo Terabyte): bottom 13-512-256-128, top 479-1024-1024-512-256-1.
_DLRM = (
    (13, 512, "relu"), (512, 256, "relu"), (256, 128, "relu"), (479, 1024, "relu"), (1024, 1024, "relu"),
    (1024, 512, "relu"), (256, 1, ""),
)  # fmt: skip
#: Cheng et al.: 13 numbers and 26 embeddings of 32, then 1024-512-256-1.
_WIDE_DEEP = ((845, 1024, "relu"), (1024, 512, "relu"), (512, 256, "relu"), (256, 1, ""))
#: A vector by BERT's, ResNet-50's and VGG's matrices, and a square one.
_GEMV = ((1, 768, 768), (1, 3072, 768), (1, 1000, 2048), (1, 4096, 4096), (1, 4096, 25088))

SUITES: dict[str, Callable[[Sequence[int]], list[Item]]] = {
    "resnet50": _convolutions("resnet50", _resnet50),
    "mobilenet": _convolutions("mobilenet", _mobilenet_v2),
    "vgg": _convolutions("vgg", _vgg19),
    "ssd": _convolutions("ssd", _ssd_mobilenet),
    "bert": _linears("bert", SEQUENCE, _BERT),
    "dlrm": _linears("dlrm", CANDIDATES, _DLRM),
    "widedeep": _linears("widedeep", CANDIDATES, _WIDE_DEEP),
    "cubes": _gemms("cubes", [(n, n, n) for n in (64, 128, 256, 512, 1024, 2048, 4096)]),
    "gemv": _gemms("gemv", _GEMV),
}


def items_of(suites: Sequence[str], batches: Sequence[int]) -> list[Item]:
    """Return the items of suites, each distinct shape once, at the first suite that has it."""
    found: dict[ConvShape | GemmShape, Item] = {}
    for suite in suites:
        for item in SUITES[suite](batches):
            found.setdefault(item.shape, item)
    return list(found.values())


#: One or two of every kind of work, for a first look.
_QUICK = (
    "7x7/2 3->64 224x224", "3x3 64->64 56x56", "3x3 128->128 28x28", "3x3 256->256 14x14", "3x3 512->512 7x7",
    "1x1 64->256 56x56", "1x1 256->64 56x56", "1x1 2048->512 7x7", "3x3/2 256->256 28x28", "dw 3x3 144 56x56",
    "dw 3x3/2 96 112x112", "1x1 16->96 112x112", "3x3 64->64 224x224", "128x768x768", "128x3072x768", "64^3", "1024^3",
    "128x1024x479", "1x4096x4096",
)  # fmt: skip


def quick(items: Sequence[Item]) -> list[Item]:
    """Keep the sample of shapes that `--quick` measures."""
    return [item for item in items if item.name in _QUICK]
