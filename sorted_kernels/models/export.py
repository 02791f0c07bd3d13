"""Stand-alone models and costs of a sub-model."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.models.architectures import architecture_of
from sorted_kernels.models.configured import build_smaller, refuse_saving
from sorted_kernels.models.elasticize import ARCHITECTURE, PLAIN
from sorted_kernels.nn.activation import DECLARED, active, forget_plan
from sorted_kernels.nn.attention import PROJECTIONS, MultiheadAttention
from sorted_kernels.nn.axis import forget_attributes
from sorted_kernels.nn.batch_norm import BatchNorm
from sorted_kernels.nn.layers import ElasticModule
from sorted_kernels.nn.module_list import DepthContainer
from sorted_kernels.nn.parameters import detach_parts, parts_of
from sorted_kernels.ops.backend import reference_only
from sorted_kernels.submodel import Submodel


def export(model: torch.nn.Module, submodel: Submodel) -> torch.nn.Module:
    """A stand-alone model of one sub-model's size.

    Every elastic module becomes the ``torch.nn`` module that it was made from, with contiguous
    copies of the active slices; inactive blocks are gone; everything else is a deep copy. The
    class of the model and parameters that modules share stay as they were. A model that the table
    of its architecture made elastic gets a configuration of the sub-model's sizes, so that
    ``save_pretrained`` writes an ordinary, smaller checkpoint.

    Args:
        model: An elastic model.
        submodel: The sub-model to cut out.

    Raises:
        DimensionError: The sub-model does not fit the model, or the model's configuration cannot
            describe it.
    """
    table = architecture_of(model) if ARCHITECTURE in model.__dict__ else None
    if table is not None and table.configuration is not None:
        with active(model, submodel):
            smaller = build_smaller(model, table, submodel)
        if smaller is not None:
            return smaller
    with active(model, submodel):
        memo: dict[int, Any] = {}
        shared: dict[tuple[int, torch.Size], torch.nn.Parameter] = {}
        for module in active_modules(model):
            if isinstance(module, ElasticModule):
                memo[id(module)] = _plain_layer(module, shared, memo)
        for module in active_modules(model):
            if isinstance(module, MultiheadAttention):
                parts = {name: memo[id(module.get_submodule(name))] for name in PROJECTIONS}
                memo[id(module)] = module.plain(parts)
        # Innermost lists first: copying an outer one then finds the inner ones done.
        lists = [m for m in active_modules(model) if isinstance(m, DepthContainer)]
        blocks: DepthContainer
        for blocks in reversed(lists):
            plain = memo[id(blocks)] = PLAIN[type(blocks)]().train(blocks.training)
            for name, block in zip(blocks._modules, blocks.active_blocks(), strict=False):
                plain.add_module(name, copy.deepcopy(block, memo))
        exported = copy.deepcopy(model, memo)
        for module in exported.modules():
            detach_parts(module)
            forget_attributes(module)
            for mark in (DECLARED, ARCHITECTURE):
                module.__dict__.pop(mark, None)
    forget_plan(exported)
    if table is not None and table.configuration is not None:
        described = f"{type(model.config).__name__} cannot say {submodel}"
        exported.__dict__["save_pretrained"] = functools.partial(refuse_saving, described)
    return exported


def _plain_layer(
    module: ElasticModule,
    shared: dict[tuple[int, torch.Size], torch.nn.Parameter],
    memo: dict[int, Any],
) -> torch.nn.Module:
    layer, sources = module.plain(), module.sources()
    for name, param in list(layer._parameters.items()):
        source = sources.get(name)
        if param is not None and source is not None:
            kept = shared.setdefault((id(source), param.shape), param)
            setattr(layer, name, kept)
            if kept.shape == source.shape:  # a module that is not elastic may share it, too
                memo[id(source)] = kept
    return layer


def active_modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Every module that the active sub-model has, outer before inner, each once."""
    seen: dict[int, torch.nn.Module] = {}

    def visit(current: torch.nn.Module) -> None:
        if id(current) in seen:
            return
        seen[id(current)] = current
        inner = current.children()
        if isinstance(current, DepthContainer):
            inner = iter(current.active_blocks())
        elif isinstance(current, BatchNorm):  # inside are the sets of all sub-models
            inner = iter(())
        for child in inner:
            visit(child)

    visit(module)
    return list(seen.values())


def count_parameters(model: torch.nn.Module, submodel: Submodel) -> int:
    """Parameters of a sub-model; one that modules share counts once."""
    counts: dict[int, int] = {}
    with active(model, submodel):
        for module in active_modules(model):
            shapes: dict[str, tuple[int, ...]] = {}
            tensors: Mapping[str, Tensor | None] = module._parameters
            if isinstance(module, ElasticModule):
                shapes, tensors = module.active_shapes(), module.sources()
            parts = parts_of(module)
            for name, param in tensors.items():
                if not isinstance(param, torch.nn.Parameter):
                    continue
                if parts is not None and name in parts.parts:
                    counts[id(param)] = parts.view(name, param).numel()
                else:
                    counts[id(param)] = torch.Size(shapes.get(name, param.shape)).numel()
    return sum(counts.values())


def count_flops(
    model: torch.nn.Module,
    submodel: Submodel,
    input_shape: tuple[int, ...] | Tensor | Mapping[str, Any],
) -> int:
    """Floating-point operations of one forward; a multiply-add counts 2.

    Matrix products, convolutions and attention are counted, as by
    ``torch.utils.flop_counter``; element-wise work is not. Runs on fake tensors, so nothing is
    computed, unless the model looks at values to decide what to do.

    Args:
        model: An elastic model.
        submodel: The sub-model to count.
        input_shape: Shape of the input, batch axis included (float32 then), or an example input: a
            tensor (``input_ids``, say), or a mapping of keyword arguments.
    """
    # Imported here: the counter brings Triton along, which takes a second.
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def count(mode: contextlib.AbstractContextManager[Any]) -> int:
        counter = FlopCounterMode(display=False)
        products = sdpa_kernel(SDPBackend.MATH)  # attention as two products: fused are not known
        context = active(model, submodel), reference_only(), torch.no_grad(), mode, products
        with contextlib.ExitStack() as stack:
            for each in (*context, counter):
                stack.enter_context(each)
            if isinstance(input_shape, Mapping):
                model(**{name: value.to(device) for name, value in input_shape.items()})
            elif isinstance(input_shape, Tensor):
                model(input_shape.to(device))
            else:
                model(torch.empty(input_shape, device=device))
        return counter.get_total_flops()

    try:
        return count(FakeTensorMode(allow_non_fake_inputs=True))
    except DataDependentOutputException:
        return count(contextlib.nullcontext())
