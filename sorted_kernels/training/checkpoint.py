"""Checkpoints: a directory a step, written whole or not at all, and checked before it is used.

``step-000123/`` holds ``tensors.safetensors``, ``state.json`` and ``SHA256SUMS`` (of the other two,
in the format of ``sha256sum -c``). It is written beside its place under a temporary name, flushed
to the disk and renamed, so that a directory with a step's name is always complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sorted_kernels.errors import CheckpointError, ShapeError, require
from sorted_kernels.nn.activation import dimensions
from sorted_kernels.nn.batch_norm_policy import (
    adopt_recalibrated,
    describe_policy,
    is_recalibrated,
    recalibrated_in,
)
from sorted_kernels.training import random_state
from sorted_kernels.training.serialize import Encoder, decode

FORMAT, VERSION = "sorted_kernels.checkpoint", 1
_TENSORS, _STATE, _SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"
_STEP = re.compile(r"step-(\d{6,})")
_TEMPORARY = ".tmp-"
_PARTS = ("model", "optimizer", "scheduler", "objective", "random_state", "extra")


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load_checkpoint` returns beside what it restored.

    Attributes:
        step: Optimizer steps done.
        random_state: The global generators, for :func:`random_state.restore`.
        extra: What the writer gave as ``extra``.
    """

    step: int
    random_state: dict[str, Any]
    extra: dict[str, Any]


def save_checkpoint(
    directory: str | os.PathLike[str],
    step: int,
    *,
    model: nn.Module,
    optimizer: Any = None,
    scheduler: Any = None,
    objective: Any = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write ``directory/step-<step>/`` atomically, then delete all but the newest ``keep``.

    Args:
        directory: Where checkpoints lie; made if it is not there.
        step: Optimizer steps done.
        model: Its ``state_dict`` is written; tied weights once.
        optimizer: Anything with ``state_dict`` and ``param_groups``.
        scheduler: Anything with ``state_dict``.
        objective: Anything; its ``state_dict`` is written if it has one.
        extra: More to keep: tensors, numbers, strings, lists, tuples, mappings.
        keep: How many checkpoints to keep, at least 1.

    Returns:
        The path of the new checkpoint.

    Raises:
        CheckpointError: The directory cannot be written, it has this step already, or a state
            holds what a checkpoint cannot.
    """
    if keep < 1:
        raise CheckpointError(f"keep is {keep!r}; allowed are integers of at least 1")
    directory = prepare_directory(directory)
    target = directory / f"step-{step:06d}"
    if target.exists():
        raise CheckpointError(f"{target} is there already; a checkpoint is never overwritten")
    encoder = Encoder()
    parts = {
        "model": dict(model.state_dict()),
        "optimizer": _component(optimizer),
        "scheduler": _component(scheduler),
        "objective": _component(objective),
        "random_state": random_state.snapshot(),
        "extra": dict(extra or {}),
    }  # alive until the tensors are written: the encoder knows them by their address
    if optimizer is not None:
        parts["optimizer"]["shapes"] = _group_shapes(optimizer)
    state = {name: encoder.encode(parts[name], name) for name in _PARTS}
    head = {
        "format": FORMAT, "version": VERSION, "step": step, "dimensions": dimensions(model),
        "batch_norm": describe_policy(model),
    }  # fmt: skip
    try:
        _write(directory, target, encoder.tensors, {**head, **state})
        _prune(directory, keep)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    return target


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Any = None,
    scheduler: Any = None,
    objective: Any = None,
) -> Checkpoint:
    """Check a checkpoint whole, then restore what is given, the model's weights last.

    The global generators are not touched.

    Args:
        path: A checkpoint, or a directory of them (the latest is taken).
        model: Model of the same names, shapes, dtypes, dimensions and batch-norm policy. Sub-models
            have recalibrated statistics afterwards if they have some in the checkpoint.
        optimizer: Optimizer of the same class over the same parameters.
        scheduler: Scheduler of the same class.
        objective: Objective of the same class.

    Raises:
        CheckpointError: It is missing, truncated, corrupt, of another program or version, or does
            not fit what is given. No weight has changed then.
    """
    path = Path(path)
    path = latest_checkpoint(path) or path
    state = _read(path)
    where = path / _STATE
    _check_model(model, state, where)
    optimizer_state = _checked_state(state, "optimizer", optimizer, where)
    scheduler_state = _checked_state(state, "scheduler", scheduler, where)
    objective_state = _checked_state(state, "objective", objective, where)
    if optimizer is not None:
        if state["optimizer"]["shapes"] != _group_shapes(optimizer):
            raise CheckpointError(
                f"{where}: the optimizer's parameter groups are not the checkpoint's; they have "
                f"{[len(group) for group in state['optimizer']['shapes']]} parameters there, "
                f"{[len(group['params']) for group in optimizer.param_groups]} here, "
                "in the same order with the same shapes"
            )
        optimizer.load_state_dict(optimizer_state)
    if scheduler is not None:
        scheduler.load_state_dict(scheduler_state)
    if objective_state is not None:
        objective.load_state_dict(objective_state)
    adopt_recalibrated(model, state["model"])
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(state["model"][name])
    return Checkpoint(state["step"], state["random_state"], state["extra"])


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint with the highest step, or None; leftovers of killed writers are not seen."""
    found = _steps(Path(directory))
    return found[-1] if found else None


def prepare_directory(directory: str | os.PathLike[str]) -> Path:
    """Make the directory, and see that a checkpoint could be written into it.

    Raises:
        CheckpointError: It cannot be made or written.
        DependencyError: safetensors is not installed.
    """
    require("safetensors.torch", "train")
    directory = Path(directory)
    probe = directory / f"{_TEMPORARY}probe-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.mkdir(exist_ok=True)
        probe.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint directory {str(directory)!r} cannot be written: {error}"
        ) from error
    return directory


def _steps(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    named = [(_STEP.fullmatch(path.name), path) for path in directory.iterdir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def _component(component: Any) -> dict[str, Any]:
    """Class and state of an optimizer, scheduler or objective; empty where there is none."""
    if component is None or not hasattr(component, "state_dict"):
        return {}
    return {"class": type(component).__qualname__, "state": component.state_dict()}


def _group_shapes(optimizer: Any) -> list[list[list[int]]]:
    return [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]


def _write(
    directory: Path, target: Path, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    from safetensors.torch import save_file

    for leftover in directory.glob(f"{_TEMPORARY}*"):  # of writers and deletions that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = directory / f"{_TEMPORARY}{target.name}"
    temporary.mkdir()
    save_file(tensors, temporary / _TENSORS, metadata={"format": FORMAT})
    (temporary / _STATE).write_text(json.dumps(state), encoding="utf-8")
    sums = "".join(f"{_sha256(temporary / name)}  {name}\n" for name in (_TENSORS, _STATE))
    (temporary / _SUMS).write_text(sums, encoding="utf-8")
    for name in (_TENSORS, _STATE, _SUMS):
        _flush(temporary / name)
    _flush(temporary)
    os.rename(temporary, target)
    _flush(directory)


def _prune(directory: Path, keep: int) -> None:
    for path in _steps(directory)[:-keep]:
        doomed = directory / f"{_TEMPORARY}delete-{path.name}"
        os.rename(path, doomed)  # a kill while deleting must not leave half a checkpoint
        shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """The decoded state of a checkpoint, after seeing that its files are whole."""
    require("safetensors.torch", "train")
    from safetensors.torch import load_file

    try:
        lines = (path / _SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for name in (_TENSORS, _STATE):
            if sums.get(name) != _sha256(path / name):
                raise CheckpointError(
                    f"{path / name} is truncated or corrupt: its SHA-256 is not the one in {_SUMS}"
                )
        encoded = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if not isinstance(encoded, dict) or encoded.get("format") != FORMAT:
            raise CheckpointError(f"{path / _STATE} is not of this library: no format {FORMAT!r}")
        if encoded.get("version") != VERSION:
            raise CheckpointError(
                f"{path / _STATE} has format version {encoded.get('version')!r}; "
                f"this release reads {VERSION}"
            )
        for part in ("step", "dimensions", *_PARTS):
            if part not in encoded:
                raise CheckpointError(f"{path / _STATE} has no entry {part!r}")
        return decode(encoded, load_file(path / _TENSORS))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a checkpoint: {error.filename} is missing") from error
    except CheckpointError:
        raise
    except Exception as error:  # safetensors raises its own type, json and the codec ValueErrors
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _check_model(model: nn.Module, state: dict[str, Any], where: Path) -> None:
    """See that dimensions, batch-norm policy, names, shapes and dtypes are the model's."""
    if state["dimensions"] != dimensions(model):
        raise CheckpointError(
            f"{where}: the checkpoint's model has dimensions {state['dimensions']}, "
            f"this one {dimensions(model)}"
        )
    policy = state.get("batch_norm", {})
    if policy != describe_policy(model):
        raise CheckpointError(
            f"{where}: the checkpoint's batch norms have sets for {policy or 'no channel counts'}, "
            f"this model's for {describe_policy(model) or 'none'}; give it the same policy with "
            "sk.nn.set_batch_norm_policy"
        )
    try:
        recalibrated_in(model, state["model"])
    except ShapeError as error:
        raise CheckpointError(f"{where}: {error}") from error
    own, saved = (
        {name: tensor for name, tensor in tensors.items() if not is_recalibrated(name)}
        for tensors in (model.state_dict(), state["model"])
    )
    if own.keys() != saved.keys():
        raise CheckpointError(
            f"{where} is of another model: it lacks {_few(own.keys() - saved.keys())} "
            f"and has {_few(saved.keys() - own.keys())} besides"
        )
    for name, tensor in own.items():
        mine, theirs = (tuple(tensor.shape), tensor.dtype), None
        if isinstance(saved[name], Tensor):
            theirs = (tuple(saved[name].shape), saved[name].dtype)
        if mine != theirs:
            raise CheckpointError(
                f"{where}: {name!r} has shape and dtype {theirs} in {_TENSORS}, {mine} in the model"
            )


def _few(names: set[str]) -> str:
    listed = sorted(names)
    return f"{listed[:3]}{' and more' if len(listed) > 3 else ''}" if listed else "nothing"


def _checked_state(state: dict[str, Any], name: str, component: Any, where: Path) -> Any:
    """The saved state of a component, None where neither side has one."""
    given = _class_of(component)
    saved = state[name].get("class")
    if component is None:
        return None
    if given != saved:
        raise CheckpointError(f"{where}: its {name} is {saved}, but {given} was given")
    return state[name].get("state")


def _class_of(component: Any) -> str | None:
    return type(component).__qualname__ if hasattr(component, "state_dict") else None
