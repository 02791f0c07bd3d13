"""Random ragged products for the compiled GEMM, and what they are, in float64 NumPy."""

from __future__ import annotations

import random

import numpy as np

MODES = ("forward", "dgrad", "wgrad")


def random_runs(rng: random.Random, rows: int, size: int, most: int = 6):
    """Up to ``most`` (rows, m, k) triples, sorted largest first; sizes up to ``size``."""
    count = rng.randint(1, most)
    ms = sorted((rng.randint(1, size) for _ in range(count)), reverse=True)
    ks = sorted((rng.randint(1, size) for _ in range(count)), reverse=True)
    # Equal sizes in one axis, which a staircase may have, do not come up often by themselves.
    if rng.random() < 0.2:
        ms = [ms[0]] * count
    if rng.random() < 0.2:
        ks = [ks[0]] * count
    return [(rng.randint(1, max(1, rows // count)), m, k) for m, k in zip(ms, ks, strict=True)]


def row_sizes(runs):
    """Arrays of each row's m and k."""
    rows = [count for count, _, _ in runs]
    return np.repeat([m for _, m, _ in runs], rows), np.repeat([k for _, _, k in runs], rows)


def active(mode, runs):
    """How much of the reduction each output element takes: (rows, columns) of counts."""
    m, k = row_sizes(runs)
    if mode == "wgrad":
        uses_m = m[:, None] > np.arange(m[0])
        uses_k = k[:, None] > np.arange(k[0])
        return uses_m.T.astype(int) @ uses_k.astype(int)
    cols, reds = (m, k) if mode == "forward" else (k, m)
    return (np.arange(cols[0]) < cols[:, None]) * reds[:, None]


def masked(values, sizes):
    """Rows cut to their sizes: zeros beyond, whatever was there."""
    return np.where(np.arange(values.shape[1]) < sizes[:, None], values, 0.0)


def exact(mode, x, weight, dy, runs):
    """The product in float64, from float64 operands of the largest row's sizes."""
    m, k = row_sizes(runs)
    x, dy = masked(x, k), masked(dy, m)
    if mode == "forward":
        return masked(x @ weight.T, m)
    return masked(dy @ weight, k) if mode == "dgrad" else dy.T @ x
