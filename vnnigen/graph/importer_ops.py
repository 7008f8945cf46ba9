"""ONNX's operators, opset 11 and newer, in the newest form.

`ONNX_OPERATORS` is the list of operators that are imported. One whose meaning has not changed since opset 11 has no
normaliser; to add such a one, add its name. Else add a function that emits what it means in the newest opset; ONNX's
own `docs/Changelog.md` says what changed when. What differs most: parameters that were attributes are inputs since 13
(Squeeze, Unsqueeze, ReduceSum, Split) and 18 (the other reductions).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from vnnigen.graph.attributes import int_attr, node_error, str_attr
from vnnigen.graph.importer_builder import Builder, Normaliser, optional, without
from vnnigen.graph.importer_quant import QUANTIZED_OPERATORS
from vnnigen.graph.importer_values import computed_number
from vnnigen.graph.ir import Node

# Text, sequences, sub-graphs, random numbers, training, signal processing are not among them.
_UNCHANGED = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BitShift BitwiseAnd BitwiseNot
    BitwiseOr BitwiseXor Ceil Celu CenterCropPad Clip Col2Im Compress Concat ConstantOfShape Conv
    ConvInteger ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace Det Div DynamicQuantizeLinear Einsum Elu Equal
    Erf Exp Expand Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LRN LSTM
    LayerNormalization LeakyRelu Less LessOrEqual Log LpNormalization LpPool MatMul MatMulInteger Max MaxPool
    MaxRoiPool MaxUnpool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or
    PRelu Pad Pow RMSNormalization RNN Range Reciprocal Relu Reshape ReverseSequence RotaryEmbedding Round STFT
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softplus Softsign SpaceToDepth Sqrt
    Sub Sum SwiGLU Swish Tan Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unique Where Xor
"""
#: Why some are not: said when a model has one.
NOT_SUPPORTED: Mapping[str, str] = {
    "If": "which branch is taken is not known: its condition must be a constant",
    **dict.fromkeys(("Loop", "Scan", "SequenceMap"), "sub-graphs that are repeated are not supported"),
    **dict.fromkeys(
        ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        "random numbers are not supported",
    ),
}


def attribute_to_input(key: str, since: int, index: int = 1) -> Normaliser:
    """Integers that became input `index` in opset `since`."""

    def normalise(b: Builder, node: Node) -> None:
        values = node.attrs.get(key)
        if b.version >= since or values is None:
            b.add(node)
            return
        inputs = (*node.inputs, *[""] * (index - len(node.inputs)))
        made = b.constant(np.array(values, np.int64), f"{node.name}_{key}")
        b.add(replace(node, inputs=(*inputs[:index], made), attrs=without(node, key)))

    return normalise


def split(b: Builder, node: Node) -> None:
    """Equal parts have been said by `num_outputs` since 18; before by nothing."""
    if b.version >= 18 and "num_outputs" in node.attrs and node.attrs["num_outputs"] != len(node.outputs):
        raise node_error(node, f"has {len(node.outputs)} outputs, but num_outputs is {node.attrs['num_outputs']}")
    if optional(node, 1) or "split" in node.attrs:
        attribute_to_input("split", 13)(b, node)
    else:
        b.add(replace(node, attrs={**node.attrs, "num_outputs": len(node.outputs)}))


def softmax(b: Builder, node: Node) -> None:
    """Before 13 everything from `axis` (default 1) on was one row; since, `axis` (default -1) alone is."""
    axis = int_attr(node, "axis", -1 if b.version >= 13 else 1)
    if b.version >= 13 or axis == -1:
        b.add(replace(node, attrs={**node.attrs, "axis": axis}))
        return
    shape = b.emit(node, "Shape", node.inputs)
    rows = b.emit(node, "Flatten", node.inputs, {"axis": axis})
    done = b.emit(node, node.op, [rows], {"axis": -1})
    b.emit(node, "Reshape", [done, shape], output=node.output)


def batch_normalization(b: Builder, node: Node) -> None:
    """Inference only: one output."""
    if int_attr(node, "training_mode", 0):
        raise node_error(node, "normalises with the batch's own statistics (training_mode), which is not supported")
    if "spatial" in node.attrs and not node.attrs["spatial"]:
        raise node_error(node, "normalises each pixel alone (spatial = 0), which is not supported")
    kept = {key: value for key, value in node.attrs.items() if key == "epsilon"}
    b.add(replace(node, outputs=node.outputs[:1], attrs=kept))


def dropout(b: Builder, node: Node) -> None:
    """Inference: the identity, with a mask that says so if anyone reads it."""
    if optional(node, 2) and b.small(node, 2, "training_mode").any():
        raise node_error(node, "drops values (training_mode), which is not supported")
    b.emit(node, "Identity", node.inputs[:1], output=node.outputs[0])
    if len(node.outputs) > 1 and node.outputs[1] in b.read:
        true = b.constant(np.array([True]), f"{node.name}_kept")
        b.emit(node, "Expand", [true, b.emit(node, "Shape", node.inputs[:1])], output=node.outputs[1])


def resize(b: Builder, node: Node) -> None:
    """Region, scales and sizes that are empty are left out."""
    if str_attr(node, "coordinate_transformation_mode", "") == "tf_half_pixel_for_nn":
        raise node_error(node, "coordinate_transformation_mode tf_half_pixel_for_nn is not supported")
    empty = {n for n in node.inputs[1:] if n in b.constants and b.constants[n].size == 0}
    b.add(replace(node, inputs=tuple("" if n in empty else n for n in node.inputs)))


def cast(key: str) -> Normaliser:
    """A type among the attributes: all floats are f32 here."""

    def normalise(b: Builder, node: Node) -> None:
        kind = int_attr(node, key, 0)
        made = computed_number(kind, f"node {node.name!r} ({node.op}): attribute {key!r}") if kind else 0
        # What these two say is about types of 8 bits only.
        kept = without(node, key, "saturate", "round_mode")
        b.add(replace(node, attrs={**kept, **({key: made} if made else {})}))

    return normalise


def cast_like(b: Builder, node: Node) -> None:
    """Its type is that of a value, so it needs no change but for attributes about types of 8 bits."""
    b.add(replace(node, attrs={}))


def grid_sample(b: Builder, node: Node) -> None:
    """Modes got new names in 20."""
    names = {"bilinear": "linear", "bicubic": "cubic"}
    mode = str_attr(node, "mode", "linear")
    b.add(replace(node, attrs={**node.attrs, "mode": names.get(mode, mode)}))


def roi_align(b: Builder, node: Node) -> None:
    """Before 16 there was but one coordinate transformation, not the default of now."""
    old = {"coordinate_transformation_mode": "output_half_pixel"} if b.version < 16 else {}
    b.add(replace(node, attrs={**node.attrs, **old}))


def group_normalization(b: Builder, node: Node) -> None:
    """Before 21, scale and bias belonged to groups, which does not say how many channels there are."""
    if b.version < 21:
        raise node_error(
            node, "GroupNormalization of opsets 18 to 20 is deprecated by ONNX; export with opset 21 or newer"
        )
    b.add(node)


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
#: Operators of ONNX's own domain. None: the newest form is that of opset 11.
ONNX_OPERATORS: Mapping[str, Normaliser | None] = {
    **dict.fromkeys(_UNCHANGED.split()),
    **{f"Reduce{name}": attribute_to_input("axes", 18) for name in _REDUCTIONS},
    "ReduceSum": attribute_to_input("axes", 13),
    "Squeeze": attribute_to_input("axes", 13),
    "Unsqueeze": attribute_to_input("axes", 13),
    "Split": split,
    "Softmax": softmax,
    "LogSoftmax": softmax,
    "Hardmax": softmax,
    "BatchNormalization": batch_normalization,
    "Dropout": dropout,
    "Resize": resize,
    "Cast": cast("to"),
    "CastLike": cast_like,
    "EyeLike": cast("dtype"),
    "QuantizeLinear": cast("output_dtype"),
    "DequantizeLinear": cast("output_dtype"),
    "GridSample": grid_sample,
    "RoiAlign": roi_align,
    "GroupNormalization": group_normalization,
    **QUANTIZED_OPERATORS,
}
#: Outputs after the first that are dropped when nobody reads them, so that these nodes have one output.
SIDE_OUTPUTS = ("Attention", "LayerNormalization", "MaxPool", "RMSNormalization")
