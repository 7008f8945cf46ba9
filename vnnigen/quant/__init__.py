"""Quantization of networks: observers, calibration, the int8 policy, and models that come quantized already.

`calibrate` observes the values of an f32 graph on samples, `quantize` turns what was seen into annotations of the graph
(`Graph.quant`, `Node.precision`, `QWeight`), `absorb_qdq` makes the same annotations of QuantizeLinear and
DequantizeLinear nodes, and `simulate` computes an annotated graph in NumPy, as the oracle of tests.
"""

from vnnigen.quant.absorb_qdq import absorb_activations, absorb_qdq, absorb_weights
from vnnigen.quant.calibrate import Calibration, calibrate
from vnnigen.quant.policy import Decision, Policy, decide
from vnnigen.quant.quantize import quantize, quantize_with_report
from vnnigen.quant.samples import SampleFiles
from vnnigen.quant.scheme import QuantConfig
from vnnigen.quant.simulate import simulate

__all__ = [
    "Calibration", "Decision", "Policy", "QuantConfig", "SampleFiles", "absorb_activations", "absorb_qdq",
    "absorb_weights", "calibrate", "decide", "quantize", "quantize_with_report", "simulate",
]  # fmt: skip
