"""Element kernels: conversions, layout changes, pooling, concatenation, softmax. Bound by memory, not by arithmetic.

They share the epilogue of the multiplying kernels: a value is loaded and widened instead of accumulated, and from
there on it is an accumulator like any other.
"""
