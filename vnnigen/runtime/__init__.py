"""How it runs: CPUID, code memory, dispatch, kernel cache, thread pool."""
