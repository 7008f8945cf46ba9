"""Low-precision deep-learning inference on x86 CPUs: a JIT kernel generator and what stands on it."""
