"""Measurement: problem strings, paired timing, peak throughput of instructions."""
