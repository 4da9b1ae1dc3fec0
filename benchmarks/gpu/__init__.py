"""Checks on a real GPU: the parts behind `benchmarks.gpu_parts` and `benchmarks.gpu_check`."""
