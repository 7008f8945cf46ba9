"""Paired measurements against f32, against measured peaks and against peers; run as `python -m benchmarks.NAME`."""
