"""Export of models that are built from a configuration: the same class with a smaller one."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import DimensionError
from sorted_kernels.models.architectures import Architecture
from sorted_kernels.nn.activation import dimensions
from sorted_kernels.nn.batch_norm import BatchNorm
from sorted_kernels.nn.layers import ElasticModule
from sorted_kernels.nn.module_list import DepthContainer
from sorted_kernels.nn.parameters import parts_of
from sorted_kernels.submodel import Submodel


def build_smaller(
    model: torch.nn.Module, table: Architecture, submodel: Submodel
) -> torch.nn.Module | None:
    """A new model of the same class whose configuration has the sub-model's sizes.

    None where the table says that no configuration has them.

    Args:
        model: The elastic model, with the sub-model active.
        table: Its architecture, which has a ``configuration``.
        submodel: The sub-model.

    Raises:
        DimensionError: The configuration cannot say these sizes.
    """
    config: Any = model.config
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    sizes = _sizes(model, submodel)
    try:
        smaller = _configuration(config, table, sizes)
        if smaller is None:
            return None
        with _without_initialization(), torch.device(device):
            fresh = type(model)(smaller)
    except Exception as error:  # configurations' own errors have no common class
        raise DimensionError(f"{type(config).__name__} cannot say {submodel}: {error}") from error
    _drop_missing_modules(fresh, model)
    try:
        _give_parameters(fresh, model)
    except RuntimeError as error:  # of load_state_dict: another size than the active block
        raise DimensionError(f"{type(config).__name__} cannot say {submodel}: {error}") from error
    return fresh


def refuse_saving(described: str, *_args: Any, **_options: Any) -> None:
    """In the place of ``save_pretrained`` of a model that its configuration does not describe."""
    raise DimensionError(
        f"{described}, so save_pretrained would write what from_pretrained cannot load; "
        "torch.save(model), its state_dict or torch.export keep it"
    )


def _sizes(model: torch.nn.Module, submodel: Submodel) -> dict[str, int]:
    """One size for each dimension of the model; configurations have no other."""
    sizes: dict[str, int] = {}
    for name, full in dimensions(model).items():
        size = submodel.get(name, full)
        if isinstance(size, tuple):
            if len(set(size)) > 1:
                raise DimensionError(
                    f"{type(model.config).__name__} cannot say {submodel}: it has one {name} for "
                    "all layers"
                )
            size = size[0]
        sizes[name] = size
    return sizes


def _configuration(config: Any, table: Architecture, sizes: dict[str, int]) -> Any:
    assert table.configuration is not None
    changed = table.configuration(config, sizes)
    if changed is None:
        return None
    smaller = type(config).from_dict({**config.to_dict(), **changed})
    if hasattr(config, "_attn_implementation"):  # not among the fields that are saved
        smaller._attn_implementation = config._attn_implementation
    return smaller


@contextlib.contextmanager
def _without_initialization() -> Iterator[None]:
    """Parameters that are replaced anyway are not filled with random numbers first."""
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


def _drop_missing_modules(fresh: torch.nn.Module, model: torch.nn.Module) -> None:
    """Take out optional parts that the model was made without (a pooler, say)."""
    for path, module in list(fresh.named_modules()):
        with contextlib.suppress(AttributeError):  # below a part that was taken out
            source = model.get_submodule(path)
            for name in list(module._modules):
                if source._modules.get(name, module) is None:
                    setattr(module, name, None)


def _give_parameters(fresh: torch.nn.Module, model: torch.nn.Module) -> None:
    """Put the active blocks into a model of the sub-model's size; shared ones stay shared."""
    state, sources = _active_state(model)
    fresh.load_state_dict(state, strict=True, assign=True)
    shared: dict[int, torch.nn.Parameter] = {}
    for path, module in fresh.named_modules():
        source_module = model.get_submodule(path)
        module.training = source_module.training
        for name, param in module._parameters.items():
            source = sources.get(f"{path}.{name}" if path else name)
            if param is not None and source is not None:
                kept = shared.setdefault(id(source), param)
                module._parameters[name] = kept.requires_grad_(source.requires_grad)
        cut = source_module.active_shapes() if isinstance(source_module, ElasticModule) else ()
        for name, buffer in module._buffers.items():
            source = None if name in cut else source_module._buffers.get(name)
            if buffer is not None and source is not None and buffer.shape == source.shape:
                module._buffers[name] = source.detach().clone()
    if getattr(model, "generation_config", None) is not None:
        fresh.generation_config = copy.deepcopy(model.generation_config)


def _active_state(model: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The sub-model's state_dict, as copies, and which parameter each entry was cut from."""
    state: dict[str, Tensor] = {}
    sources: dict[str, Tensor] = {}
    skipped = tuple(_inactive_paths(model))
    for path, module in model.named_modules(remove_duplicate=False):
        inside = f"{path}." if path else ""
        if inside.startswith(skipped):
            continue
        elastic = module if isinstance(module, ElasticModule) else None
        shapes = elastic.active_shapes() if elastic is not None else {}
        parts = parts_of(module)
        stored = {**module._parameters, **module._buffers}
        if elastic is not None:  # a batch norm may have them from a set of the sub-model's own
            stored.update(elastic.sources())
        for name, value in stored.items():
            if value is None or name in module._non_persistent_buffers_set:
                continue
            if elastic is not None and name in shapes:
                state[inside + name] = elastic.active_block(name)
            elif parts is not None and name in parts.parts:
                part = parts.view(name, value.detach())
                state[inside + name] = part.clone(memory_format=torch.contiguous_format)
            else:
                state[inside + name] = value.detach().clone()
            sources[inside + name] = value
    return state, sources


def _inactive_paths(model: torch.nn.Module) -> Iterator[str]:
    """Beginnings of paths that the sub-model lacks: blocks, and sets within batch norms."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BatchNorm):
            yield from (f"{path}.{name}." for name in module._modules)
        if isinstance(module, DepthContainer):
            for name in list(module._modules)[len(module.active_blocks()) :]:
                yield f"{path}.{name}." if path else f"{name}."
