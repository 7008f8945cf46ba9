"""Sums, means and largest elements along axes."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from vnnigen.graph.attributes import axes_of, int_attr
from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Node
from vnnigen.graph.lower.broadcast import TYPES
from vnnigen.graph.lower.context import Lowering, lowers
from vnnigen.graph.lower.post_ops import output_arguments
from vnnigen.graph.storage import Place, Storage
from vnnigen.kernels.element.reduce import ReduceFn
from vnnigen.kernels.types import DType
from vnnigen.ops.pool import AvgPool2d
from vnnigen.ops.reduce import Reduce

FUNCTIONS: dict[str, ReduceFn] = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max"}


@lowers(*FUNCTIONS)
def reduce(ctx: Lowering, node: Node) -> str | None:
    """Along neighbouring axes, or over the pixels of images."""
    shape = ctx.shape(node.inputs[0])
    given = ctx.constant(node.inputs[1]) if node.inputs[1:] and node.inputs[1] else np.empty(0, np.int64)
    if given is None:
        return "its axes are not constant"
    if node.fused or ctx.graph.types[node.output].dtype != "f32":
        return "no kernel for this type, or with steps behind it"
    axes = sorted(axes_of(node, tuple(int(a) for a in given), len(shape)))
    if not axes and int_attr(node, "noop_with_empty_axes", 0):
        return "no axes"
    axes = axes or list(range(len(shape)))
    if axes != list(range(axes[0], axes[0] + len(axes))):
        return "its axes are no neighbours"
    place = ctx.value(node.inputs[0])
    if len(shape) == 4 and axes == [2, 3] and place.layout == "nhwc":
        return _pixels(ctx, node, place)
    x = ctx.take(node.inputs[0], Storage("f32"))
    op = ctx.operator(node, tuple(axes), lambda: Reduce(FUNCTIONS[node.op], axes, isa=ctx.tiers.element))
    steps = op.native([x.shape], ["f32"])
    out = ctx.result(node, storage=Storage("f32"))
    seen = out.reshape(steps[0].y_shape)
    assert seen is not None
    ctx.native(node, steps, [x], seen)
    return None


def _pixels(ctx: Lowering, node: Node, place: Place) -> str | None:
    """Over all pixels of images that lie channels last: global pooling, of integers too."""
    if node.op != "ReduceMean" or place.dtype not in TYPES:
        place = ctx.take(node.inputs[0], Storage("f32", None, "nhwc"))
    assigned = ctx.assignment.values[node.output]
    q: dict[str, Any] = {}
    if place.quant is not None:
        q |= {"x_scale": place.quant.scale, "x_zero_point": place.quant.zero_point}

    def make() -> Reduce | AvgPool2d:
        if node.op != "ReduceMean":
            return Reduce(FUNCTIONS[node.op], (1, 2), isa=ctx.tiers.element)
        dtype = numpy_dtype(assigned.dtype)
        return AvgPool2d(None, **q, **output_arguments(assigned), out_dtype=dtype, isa=ctx.tiers.element)

    op = ctx.operator(node, (place.dtype, place.quant, assigned), make)
    image = place.channels_last()
    steps = op.native([image.shape], [cast("DType", place.dtype)])
    out = ctx.result(node)
    # With or without their dimensions, there is one element per image and channel.
    seen = out.reshape(steps[0].y_shape)
    if seen is None:
        return "its result lies with gaps"
    ctx.native(node, steps, [image], seen)
    return None
