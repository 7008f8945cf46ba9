"""Low-precision deep-learning inference on x86 CPUs: a JIT kernel generator and what stands on it."""

from __future__ import annotations

from typing import Any

from vnnigen.compiler import compile, load
from vnnigen.errors import (
    AssemblerError,
    BuildError,
    DTypeError,
    EmulatorError,
    ISAError,
    MissingExtraError,
    ModelError,
    QuantizationError,
    ShapeError,
    VnnigenError,
)
from vnnigen.graph.network import Network
from vnnigen.isa.features import features
from vnnigen.isa.tiers import max_isa, set_max_isa, tiers
from vnnigen.kernels.post_ops import (
    GELU,
    Binary,
    Clip,
    HardSwish,
    LeakyReLU,
    Linear,
    PostOp,
    ReLU,
    Sigmoid,
    SiLU,
    Sum,
    Tanh,
)
from vnnigen.kernels.qparams import QParams, choose_qparams, dequantize, quantize
from vnnigen.ops.bf16 import Conv2dBf16, GemmBf16, conv_bf16, gemm_bf16
from vnnigen.ops.broadcast import BinaryOp, binary
from vnnigen.ops.conv import Conv2dF32, Conv2dInt8, conv_f32, conv_int8
from vnnigen.ops.element import (
    Concat,
    Convert,
    Softmax,
    SumTensors,
    add,
    concat,
    convert,
    eltwise,
    softmax,
    sum_tensors,
)
from vnnigen.ops.explanation import Explanation
from vnnigen.ops.gather import Gather, gather
from vnnigen.ops.gemm import GemmF32, GemmInt8, gemm_f32, gemm_int8
from vnnigen.ops.layernorm import LayerNorm, layer_norm
from vnnigen.ops.matmul import MatMulBf16, MatMulF32, MatMulInt8, matmul_bf16, matmul_f32, matmul_int8
from vnnigen.ops.operator import Operator
from vnnigen.ops.pool import AvgPool2d, MaxPool2d, avg_pool2d, global_avg_pool2d, max_pool2d
from vnnigen.ops.reduce import Reduce, reduce
from vnnigen.quant import QuantConfig, SampleFiles
from vnnigen.runtime.threads import num_threads, set_num_threads

__version__ = "0.1.0"


def explain(operator: Operator, x_shape: tuple[int, ...] | None = None, x_dtype: Any = None) -> Explanation:
    """How `operator` computes an input of shape `x_shape` (NHWC or [m, k]; default: that of its last call).

    Shows tier, kernel name, blocking, chain per block of columns, required features, code size and generation
    time, and every candidate with the reason why it was not taken. Print it, or use `to_dict()`, `listing()`.
    """
    return operator.explain(x_shape, x_dtype)


__all__ = [
    "GELU",
    "AssemblerError",
    "AvgPool2d",
    "Binary",
    "BinaryOp",
    "BuildError",
    "Clip",
    "Concat",
    "Conv2dBf16",
    "Conv2dF32",
    "Conv2dInt8",
    "Convert",
    "DTypeError",
    "EmulatorError",
    "Explanation",
    "Gather",
    "GemmBf16",
    "GemmF32",
    "GemmInt8",
    "HardSwish",
    "ISAError",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "MatMulBf16",
    "MatMulF32",
    "MatMulInt8",
    "MaxPool2d",
    "MissingExtraError",
    "ModelError",
    "Network",
    "Operator",
    "PostOp",
    "QParams",
    "QuantConfig",
    "QuantizationError",
    "ReLU",
    "Reduce",
    "SampleFiles",
    "ShapeError",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Sum",
    "SumTensors",
    "Tanh",
    "VnnigenError",
    "add",
    "avg_pool2d",
    "binary",
    "choose_qparams",
    "compile",
    "concat",
    "conv_bf16",
    "conv_f32",
    "conv_int8",
    "convert",
    "dequantize",
    "eltwise",
    "explain",
    "features",
    "gather",
    "gemm_bf16",
    "gemm_f32",
    "gemm_int8",
    "global_avg_pool2d",
    "layer_norm",
    "load",
    "matmul_bf16",
    "matmul_f32",
    "matmul_int8",
    "max_isa",
    "max_pool2d",
    "num_threads",
    "quantize",
    "reduce",
    "set_max_isa",
    "set_num_threads",
    "softmax",
    "sum_tensors",
    "tiers",
]
