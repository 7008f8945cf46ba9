"""Concatenation: producers write straight into their slices where they can, the rest is copied."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np

from vnnigen.graph.ir import Node
from vnnigen.graph.lower.context import Lowering, concat_axis, converter, lowers
from vnnigen.graph.storage import KERNEL_TYPES, Place, Storage, common_pitch
from vnnigen.kernels.types import DType


@lowers("Concat")
def concat(ctx: Lowering, node: Node) -> str | None:
    """The result's place may be there already, and most of it filled."""
    if node.fused:
        return "concatenation has no post-ops"
    if node.output not in ctx.places:
        assigned = ctx.assignment.values[node.output]
        if assigned.dtype not in KERNEL_TYPES:
            return "no kernel for this type"
        ctx.result(node, pitched=True)
    whole = ctx.places[node.output]
    axis = concat_axis(node, len(whole.shape))
    start = 0
    for name in node.inputs:
        length = ctx.shape(name)[axis]
        part = whole.slice(axis, start, length)
        start += length
        if length and ctx.value(name) != part:
            _fill(ctx, node, name, part)
    return None


def _fill(ctx: Lowering, node: Node, name: str, part: Place) -> None:
    """Convert or copy a value into a slice."""
    layout = ctx.assignment.values[node.output].layout
    place = ctx.value(name)
    if place.layout is None or not place.lies(layout):
        place = ctx.take(name, Storage(place.dtype, place.quant, layout))
    view = part.channels_last() if layout == "nhwc" else part
    source = place.channels_last() if layout == "nhwc" else place
    # Rows are what lies without gaps in the slice.
    run, axes = 1, len(view.shape)
    while axes and (view.shape[axes - 1] == 1 or view.strides[axes - 1] == run * view.itemsize):
        run *= view.shape[axes - 1]
        axes -= 1
    rows = view.shape[:axes]
    pitch = common_pitch(rows, view.strides[:axes])
    if pitch is None or pitch % view.itemsize or (place.dtype, place.quant) == (part.dtype, part.quant):
        ctx.copy_into(name, place, part)
        return
    count = int(np.prod(rows))
    shape = (count, run)
    x = replace(source, shape=shape, strides=(run * source.itemsize, source.itemsize))
    y = replace(part, shape=shape, strides=(pitch if count > 1 else run * part.itemsize, part.itemsize))
    op = converter(place.dtype, place.quant, Storage(part.dtype, part.quant), None, ctx.tiers.element)
    steps = op.native_pitched(shape, cast("DType", place.dtype), y.strides[0] // y.itemsize)
    ctx.native(node, steps, [x], y)
