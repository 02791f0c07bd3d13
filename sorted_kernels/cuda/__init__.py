"""Compiled CUDA twins of :mod:`sorted_kernels.reference`. Importing them needs no GPU."""
