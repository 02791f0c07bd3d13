"""Elastic axes of parameters that a module uses by itself, under its own class.

While the module's forward runs, the names of such parameters give the active part.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import StrideError
from sorted_kernels.nn.axis import AxisSpec, ElasticAxis
from sorted_kernels.ops.gradient import in_place_allowed, slot_of
from sorted_kernels.ops.prefix import matrix_of, run_prefix

PARTS = "_elastic_parameters"
"""Attribute under which a module keeps its :class:`ParameterParts`."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")
_NAME = re.compile(r"(\w+)\[(0|-1)\]")


def parameter_axis(module: torch.nn.Module, name: str) -> tuple[str, int] | None:
    """Of an axis' name like ``"weight[0]"`` or ``"token[-1]"``: the parameter and its axis."""
    found = _NAME.fullmatch(name)
    if found is None or module._parameters.get(found[1]) is None:
        return None
    return found[1], int(found[2])


class ParameterParts:
    """Which parameters of a module are elastic along which axis; also its forward hooks."""

    def __init__(self, module: torch.nn.Module, specs: Mapping[str, AxisSpec], grad_mode: str):
        self.grad_mode = grad_mode
        self.axes: dict[str, ElasticAxis] = {}
        self.parts: dict[str, tuple[int, ElasticAxis]] = {}
        for label, spec in specs.items():
            found = parameter_axis(module, label)
            assert found is not None  # the caller has looked
            name, number = found
            param: Any = module._parameters[name]
            if not param.is_contiguous():
                raise StrideError(f"{name} has strides {param.stride()}; it must be contiguous")
            self.axes[label] = ElasticAxis(spec, param.shape[number])
            self.parts[name] = number, self.axes[label]
            slot_of(param, matrix_of(param, number))

    def attach(self, module: torch.nn.Module) -> None:
        """Make the module use the active parts from now on."""
        module.__dict__["axes"] = self.axes
        module.__dict__[PARTS] = self
        for hooks in _HOOKS:  # new dictionaries: whoever undoes this has kept the old ones
            module.__dict__[hooks] = collections.OrderedDict(module.__dict__[hooks])
        module.register_forward_pre_hook(_show, prepend=True)
        module.register_forward_hook(_hide, always_call=True)

    def view(self, name: str, tensor: Tensor) -> Tensor:
        """What the active part of a parameter is of a tensor of its shape, as a view."""
        number, axis = self.parts[name]
        return tensor.narrow(number, 0, axis.active)


def parts_of(module: torch.nn.Module) -> ParameterParts | None:
    """The elastic parameters of a module that is not a layer of ours; None where there are none."""
    return module.__dict__.get(PARTS)


def _show(module: torch.nn.Module, _args: Any) -> None:
    parts = module.__dict__[PARTS]
    for name, (number, axis) in parts.parts.items():
        param: Any = module._parameters[name]
        slot = None
        if param.requires_grad and param.is_leaf:
            slot = slot_of(param, matrix_of(param, number))
        dense = parts.grad_mode == "dense" or not in_place_allowed(slot, param)
        module.__dict__[name] = run_prefix(param, number, axis.size(), slot, dense)


def _hide(module: torch.nn.Module, _args: Any, _output: Any) -> None:
    for name in module.__dict__[PARTS].parts:
        module.__dict__.pop(name, None)


def detach_parts(module: torch.nn.Module) -> None:
    """Make a module keep nothing but the active parts of its elastic parameters."""
    parts = module.__dict__.pop(PARTS, None)
    if parts is None:
        return
    module.__dict__.pop("axes")
    for name in parts.parts:
        param: Any = module._parameters[name]
        part = parts.view(name, param.detach()).clone(memory_format=torch.contiguous_format)
        module._parameters[name] = torch.nn.Parameter(part, param.requires_grad)
    for hooks, hook in (("_forward_pre_hooks", _show), ("_forward_hooks", _hide)):
        kept: Any = module.__dict__[hooks]
        for number in [number for number, found in kept.items() if found is hook]:
            del kept[number]
            module._forward_hooks_always_called.pop(number, None)
