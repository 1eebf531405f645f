"""Benchmarks: time and memory of inference and training. The comparison of methods is in `comparison`."""
