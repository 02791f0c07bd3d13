"""The op library: schemas are always defined here, in Python; compiled code only adds to them."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from sorted_kernels import env

NAMESPACE = "sorted_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
COMPILED = Path(__file__).parent.parent / "_kernels.so"


@functools.cache
def load_compiled() -> bool:
    """Load the compiled library once, if it was built; True when its kernels are registered."""
    if env.without_library() or not COMPILED.is_file():
        return False
    torch.ops.load_library(str(COMPILED))
    return True
