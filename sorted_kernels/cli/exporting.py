"""Writing a sub-model to one file, and proving that the file computes the same."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sorted_kernels.errors import OptionError, require
from sorted_kernels.inference.files import replacing
from sorted_kernels.models import export
from sorted_kernels.nn import active
from sorted_kernels.submodel import Submodel

TOLERANCE = 1e-5
SCRIPT = f'''"""Compares an exported program with the elastic model's outputs, by torch alone."""

import sys
from pathlib import Path

import torch

here = Path(__file__).parent
module = torch.export.load(str(here / "selected.pt2")).module()
case = torch.load(here / "selected_case.pt")
difference = (module(case["inputs"]) - case["outputs"]).abs().max().item()
single = (module(case["inputs"][:1]) - case["outputs"][:1]).abs().max().item()
assert "sorted_kernels" not in sys.modules
print(max(difference, single))
sys.exit(0 if difference <= {TOLERANCE} and single <= {TOLERANCE} else 1)
'''
"""Also run with one row alone: the batch axis is free."""


def write_program(model: nn.Module, submodel: Submodel, example: Tensor, path: Path) -> None:
    """Write a sub-model as a ``torch.export`` program with a free batch axis.

    Args:
        model: An elastic model.
        submodel: The sub-model to write.
        example: A batch of inputs.
        path: The file, by custom ``.pt2``.

    Raises:
        DimensionError: The sub-model does not fit the model.
        OptionError: ``torch.export`` cannot trace the model.
        CheckpointError: The path cannot be written.
    """
    module = export(model, submodel).cpu().eval()
    example = example.cpu()
    # torch.export takes a size of 1 for a constant.
    batch = example if len(example) > 1 else torch.cat([example, example])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch.export's own internals
            program = torch.export.export(
                module, (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
    except Exception as error:
        raise OptionError(f"torch.export cannot trace the model: {error}") from error
    with replacing(path) as temporary:
        torch.export.save(program, temporary)


def write_weights(model: nn.Module, submodel: Submodel, path: Path) -> None:
    """Write a sub-model's state_dict as safetensors.

    Raises:
        DimensionError: The sub-model does not fit the model.
        CheckpointError: The path cannot be written.
    """
    safetensors: Any = require("safetensors.torch", "train")
    module = export(model, submodel).cpu().eval()
    with replacing(path) as temporary:
        safetensors.save_model(module, str(temporary))


def prove(model: nn.Module, submodel: Submodel, inputs: Tensor, folder: Path) -> float:
    """Compare ``selected.pt2`` of a folder with the elastic model, in a process of its own.

    Leaves ``selected_case.pt`` (inputs and outputs) and ``check_selected.py``, which needs nothing
    but torch, in the folder.

    Args:
        model: The elastic model, on the CPU.
        submodel: The sub-model that was written.
        inputs: A batch of inputs.
        folder: Where ``selected.pt2`` lies.

    Returns:
        The largest absolute difference.

    Raises:
        RuntimeError: The program cannot be loaded, or computes something else.
    """
    model.eval()
    with active(model, submodel), torch.no_grad():
        outputs = model(inputs)
    torch.save({"inputs": inputs, "outputs": outputs}, folder / "selected_case.pt")
    script = folder / "check_selected.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed: {done.stdout}{done.stderr}")
    return float(done.stdout)
