"""The process-wide random generators: torch's (CPU, CUDA), NumPy's and Python's."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


def snapshot() -> dict[str, Any]:
    """The state of every global generator, as tensors, numbers and tuples."""
    kind, words, position, has_gauss, cached = numpy.random.get_state()  # type: ignore[misc]
    version, python_words, python_gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": (str(kind), _pack(words), int(position), int(has_gauss), float(cached)),
        "python": (version, _pack(python_words), python_gauss),
    }


def restore(state: dict[str, Any]) -> None:
    """Put every global generator back to a :func:`snapshot`.

    CUDA states are restored only where the number of devices is the same.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, words, *rest = state["numpy"]
    numpy.random.set_state((kind, words.numpy().astype("uint32"), *rest))
    version, python_words, gauss = state["python"]
    random.setstate((version, tuple(python_words.tolist()), gauss))


def _pack(words: Any) -> torch.Tensor:
    return torch.tensor([int(word) for word in words], dtype=torch.int64)
