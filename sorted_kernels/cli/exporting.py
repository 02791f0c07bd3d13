"""Writing a sub-model to one file, and proving that the file computes the same."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from sorted_kernels.errors import CheckpointError, require
from sorted_kernels.inference.files import replacing
from sorted_kernels.models import export
from sorted_kernels.submodel import Submodel

CHECK = """\
import sys
import torch

program, cases = sys.argv[1:]
module = torch.export.load(program).module()
inputs, expected = torch.load(cases)
print((module(inputs) - expected).abs().max().item())
assert not any(name.startswith("sorted_kernels") for name in sys.modules)
"""
"""A program that imports torch alone: loads an exported file and compares its outputs."""


def write_program(
    model: torch.nn.Module, submodel: Submodel, example: torch.Tensor, path: Path
) -> torch.nn.Module:
    """Write a sub-model as a ``torch.export`` program with a free batch axis.

    Returns:
        The stand-alone module that was written.

    Raises:
        CheckpointError: The path cannot be written.
    """
    module = export(model, submodel).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    with replacing(path) as temporary:
        torch.export.save(program, temporary)
    return module


def write_weights(model: torch.nn.Module, submodel: Submodel, path: Path) -> torch.nn.Module:
    """Write a sub-model's state_dict as safetensors; returns the stand-alone module."""
    safetensors = require("safetensors.torch", "train")
    module = export(model, submodel).eval()
    with replacing(path) as temporary:
        safetensors.save_model(module, str(temporary))  # type: ignore[attr-defined]
    return module


def largest_difference(program: Path, inputs: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference between a file's outputs and the expected ones.

    The file is loaded by another process, whose program imports torch alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        cases = Path(folder, "cases.pt")
        torch.save((inputs, expected), cases)
        command = [sys.executable, "-c", CHECK, str(program.resolve()), str(cases)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckpointError(f"{program} could not be loaded by torch alone:\n{done.stderr}")
    return float(done.stdout)
