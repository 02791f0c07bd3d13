"""Benchmarks: every kernel and training step against named PyTorch baselines, in one process."""
