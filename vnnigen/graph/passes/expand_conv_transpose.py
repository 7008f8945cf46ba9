"""A transposed convolution becomes a convolution that makes all pixels of a block at once, and DepthToSpace.

With stride s, the result's pixels whose index is r modulo s depend on every s-th tap from tap r on: each such *phase*
is an ordinary convolution with a kernel of ceil(k / s) taps, flipped, and the s * s phases are its output channels
(Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?").  Interleaving them is DepthToSpace;
a Slice cuts what the padding says off.  So it has kernels in every precision, without multiplications by zeros but for
those of a kernel whose size is no multiple of the stride.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vnnigen.graph.attributes import int_attr, ints_attr
from vnnigen.graph.infer import infer
from vnnigen.graph.ir import Attr, Dim, Graph, Node, TensorType
from vnnigen.graph.passes.edit import F64, Edit, dims, f32_constant
from vnnigen.graph.windows import transposed

#: Stands for a length that is not known: padding does not depend on it.
_ANY = 1 << 12
_END = np.iinfo(np.int64).max


class _Axis(NamedTuple):
    """One dimension: padding of the convolution, and what is cut off the interleaved phases."""

    pads: tuple[int, int]
    cut: tuple[int, int]


def expand_conv_transpose(graph: Graph) -> int:
    """Expand two-dimensional ConvTranspose nodes of one stride and no dilation."""
    edit = Edit(graph)
    for node in edit:
        if node.op == "ConvTranspose":
            _expand(edit, node)
    count = edit.finish()
    if count:
        infer(graph)
    return count


def _expand(edit: Edit, node: Node) -> None:
    graph = edit.graph
    weights, image = f32_constant(graph, node.inputs[1]), dims(graph, node.inputs[0])
    if weights is None or weights.ndim != 4 or image is None or len(image) != 4 or node.inputs[0] in graph.quant:
        return
    strides = ints_attr(node, "strides", (1, 1))
    axes = None if len(set(strides)) > 1 else _axes(node, weights.shape[2:], image[2:], strides[0])
    groups, s = int_attr(node, "group", 1), strides[0]
    vectors = [f32_constant(graph, name) if name else np.zeros(1) for name in node.inputs[2:]]
    channels = groups * weights.shape[1]
    if axes is None or any(v is None or v.shape not in ((1,), (channels,)) for v in vectors):
        return
    # One group has its channels together in each phase (mode DCR), so that they are moved in runs.
    by_phase = groups == 1
    phases = _phases(weights, groups, s, by_phase)
    names = [edit.constant(f"{node.inputs[1]}_phases", phases)]
    for name, vector in zip(node.inputs[2:], vectors, strict=True):
        assert vector is not None
        spread = np.resize(vector, channels)
        spread = np.tile(spread, s * s) if by_phase else np.repeat(spread, s * s)
        names.append(edit.constant(f"{name}_phases", spread) if name else "")
    attrs: dict[str, Attr] = {"group": groups, "pads": tuple(a.pads[side] for side in (0, 1) for a in axes)}
    conv = replace(node, op="Conv", inputs=(node.inputs[0], *names), attrs=attrs)
    edit.put(node, *_interleaved(edit, conv, axes, s, "DCR" if by_phase else "CRD"))


def _axes(node: Node, kernel: tuple[int, ...], spatial: tuple[Dim, ...], s: int) -> list[_Axis] | None:
    """The geometry of each dimension, None where this is no way to compute it."""
    sizes = tuple(n if isinstance(n, int) else _ANY for n in spatial)
    if any(d != 1 for d in ints_attr(node, "dilations", ())):
        return None
    if "output_shape" in node.attrs and not all(isinstance(n, int) for n in spatial):
        return None
    t = transposed(node, kernel, sizes, ("", ""))
    axes = []
    for k, n, begin, size in zip(kernel, sizes, t.begin, t.size, strict=True):
        taps = -(-k // s)
        assert isinstance(size, int)
        cut = [begin, (n + taps - 1) * s - begin - size]
        if min(cut) < 0:
            return None
        whole = [min(c // s, taps - 1) for c in cut]  # blocks that need not be computed
        axes.append(_Axis((taps - 1 - whole[0], taps - 1 - whole[1]), (cut[0] - whole[0] * s, cut[1] - whole[1] * s)))
    return axes


def _phases(weights: F64, groups: int, s: int, by_phase: bool) -> F64:
    """Weights [groups * inputs, outputs, kh, kw] as those of the convolution, [phases and outputs, inputs, h, w]."""
    inputs, outputs, *kernel = weights.shape
    inputs //= groups
    taps = [-(-k // s) for k in kernel]
    padded = np.zeros((groups, inputs, outputs, taps[0] * s, taps[1] * s))
    padded[..., : kernel[0], : kernel[1]] = weights.reshape(groups, inputs, outputs, *kernel)
    split = padded.reshape(groups, inputs, outputs, taps[0], s, taps[1], s)[..., ::-1, :, ::-1, :]
    order = (4, 6, 0, 2, 1, 3, 5) if by_phase else (0, 2, 4, 6, 1, 3, 5)
    return np.ascontiguousarray(split.transpose(order)).reshape(groups * outputs * s * s, inputs, *taps)


def _interleaved(edit: Edit, conv: Node, axes: list[_Axis], s: int, mode: str) -> list[Node]:
    """The convolution and what follows it; the last makes what `conv` is said to make."""
    steps = [conv]
    if s > 1:
        steps.append(Node(conv.name, "DepthToSpace", (), (), {"blocksize": s, "mode": mode}))
    if any(n for a in axes for n in a.cut):
        starts = [a.cut[0] for a in axes]
        ends = [-a.cut[1] if a.cut[1] else _END for a in axes]
        parts = [_integers(edit, f"{conv.name}_{what}", v) for what, v in
                 (("starts", starts), ("ends", ends), ("axes", [2, 3]))]  # fmt: skip
        steps.append(Node(conv.name, "Slice", ("", *parts), ()))
    nodes: list[Node] = []
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        output = conv.output if last else edit.new_name(f"{conv.output}_{step.op}")
        inputs = step.inputs if i == 0 else (nodes[-1].output, *step.inputs[1:])
        name = conv.name if i == 0 else edit.new_name(f"{conv.name}_{step.op}")
        nodes.append(replace(step, name=name, inputs=inputs, outputs=(output,)))
    return nodes


def _integers(edit: Edit, wish: str, values: list[int]) -> str:
    name = edit.new_name(wish)
    edit.graph.constants[name] = array = np.array(values, np.int64)
    edit.graph.types[name] = TensorType("s64", array.shape)
    return name
