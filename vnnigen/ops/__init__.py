"""The operators users call: convolution and GEMM, prepared once or called directly."""
