"""What is computed: problem, blocking, microkernel, epilogue; packing; NumPy references."""
