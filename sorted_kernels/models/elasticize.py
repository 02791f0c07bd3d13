"""Make the axes of an existing model elastic: its modules become ours, its parameters stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sorted_kernels import nn
from sorted_kernels.errors import RuleError
from sorted_kernels.models.architectures import Architecture, Form, architecture_of
from sorted_kernels.models.architectures.attention import register_attention
from sorted_kernels.models.architectures.registry import Rules, path_regex
from sorted_kernels.nn.activation import DECLARED, PLAN, Plan, forget_plan
from sorted_kernels.nn.axis import AttributeAxis, AxisSpec, ElasticAxis
from sorted_kernels.nn.conv import conv_axes
from sorted_kernels.nn.layers import ElasticModule
from sorted_kernels.nn.parameters import ParameterParts, parameter_axis, parts_of

ARCHITECTURE = "_elastic_architecture"
"""Attribute under which a model made elastic by a table keeps the table's name."""
_ELASTIC: dict[type, type] = {
    torch.nn.Linear: nn.Linear,
    torch.nn.Conv2d: nn.Conv2d,
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.RMSNorm: nn.RMSNorm,
    torch.nn.Embedding: nn.Embedding,
    torch.nn.BatchNorm1d: nn.BatchNorm1d,
    torch.nn.BatchNorm2d: nn.BatchNorm2d,
    torch.nn.GroupNorm: nn.GroupNorm,
    torch.nn.InstanceNorm2d: nn.InstanceNorm2d,
    torch.nn.ModuleList: nn.ModuleList,
    torch.nn.Sequential: nn.Sequential,
}
PLAIN = {elastic: plain for plain, elastic in _ELASTIC.items()}


def elasticize(
    model: torch.nn.Module,
    rules: Rules | None = None,
    *,
    dimensions: Mapping[str, int] | None = None,
    grad_mode: str = "inplace",
) -> torch.nn.Module:
    """Tie axes of a model's modules to named dimensions, in place.

    Parameters stay the same objects, state_dict keys and the model's class stay. Matched modules
    change their class to the one of ``sk.nn`` with the same name.

    Args:
        model: Any module made of linear, convolution, norm and embedding modules and module lists.
        rules: Module path to axes, as in ``{"blocks": {"depth": "depth"}, "blocks.*.fc1":
            {"out": "ffn"}}``. ``*`` stands for one name in the path, ``**`` for any number. Axes
            are ``in`` and ``out`` of a linear or convolution (one of the two is enough where it
            has groups), ``kernel_size`` of a convolution, ``features`` of a norm or embedding,
            ``depth`` of a module list or sequential; of any other module, the names of integer
            attributes that it computes with, or parameters that it uses by itself, with their
            first or last axis (``"weight[0]"``, ``"token[-1]"``). A value is a dimension's name,
            ``(name, multiple_of)``, or ``(name, sizes)`` with a size for each count. None for a
            model with a table of its architecture: the classes of ``transformers`` that
            ``sk.models.architectures`` has, and what ``sk.models.register_architecture`` added.
        dimensions: Full size of dimensions whose axes differ in size (``{"width": 8}``): an axis
            then follows in proportion. Also read from the model's own ``dimensions``.
        grad_mode: ``"inplace"`` or ``"dense"``, as for the layers of ``sk.nn``.

    Returns:
        The model.

    Raises:
        RuleError: A rule that matches nothing, names an unknown axis, contradicts another, or
            meets a module that has no elastic form; axes of one dimension or of one shared
            parameter that disagree; no rules for a model without a table, or one that has modules
            which its table does not mention. The model is then unchanged.
    """
    table = None
    if rules is None:
        table = architecture_of(model)
        rules = table.rules_for(model)
        dimensions = {**table.dimensions_of(model), **(dimensions or {})}
    forms = table.forms if table else {}
    matched = _match(model, rules, forms)
    before = {name: (type(module), dict(module.__dict__)) for name, (module, _) in matched.items()}
    marks = {DECLARED, PLAN, ARCHITECTURE}
    kept = [
        (module, {name: value for name, value in module.__dict__.items() if name in marks})
        for module in model.modules()
    ]
    try:
        for path, (module, axes) in matched.items():
            _swap(path, module, axes, grad_mode, forms)
        if table is not None and table.finish is not None:
            table.finish(model)
        if dimensions is not None:
            model.__dict__[DECLARED] = dict(dimensions)
        forget_plan(model)
        plan = Plan(model)
        unknown = set(dimensions or {}) - set(plan.full)
        if unknown:
            raise RuleError(f"dimensions {sorted(unknown)} are declared, but no rule names them")
        _check_shared(model)
        if table is not None:
            _check_complete(model, table)
            model.__dict__[ARCHITECTURE] = table.name
            register_attention()
    except Exception as error:
        for name, (module, _) in matched.items():
            kind, state = before[name]
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(state)
        for module, state in kept:
            for name in marks:
                module.__dict__.pop(name, None)
            module.__dict__.update(state)
        if isinstance(error, RuleError):
            raise
        raise RuleError(str(error)) from error
    return model


def _match(
    model: torch.nn.Module, rules: Rules, forms: Mapping[str, Form]
) -> dict[str, tuple[torch.nn.Module, dict[str, AxisSpec]]]:
    """Find each rule's modules and merge the axes that rules give to one module."""
    if not rules:
        raise RuleError("no rules were given: elasticize would change nothing")
    matched: dict[str, tuple[torch.nn.Module, dict[str, AxisSpec]]] = {}
    for pattern, axes in rules.items():
        regex = path_regex(pattern)
        found = [(name, m) for name, m in model.named_modules() if regex.fullmatch(name)]
        if not found:
            near = [name for name, m in model.named_modules() if type(m) in _ELASTIC][:8]
            raise RuleError(f"rule {pattern!r} matches no module; there are {', '.join(near)}, ...")
        for name, module in found:
            _check_rule(name, module, pattern, axes, forms)
            merged = matched.setdefault(name, (module, {}))[1]
            for axis, spec in axes.items():
                if merged.setdefault(axis, spec) != spec:
                    raise RuleError(
                        f"rule {pattern!r} ties {name}.{axis} to {spec!r}, "
                        f"another rule to {merged[axis]!r}"
                    )
    return matched


def _check_rule(
    name: str,
    module: torch.nn.Module,
    pattern: str,
    axes: Mapping[str, AxisSpec],
    forms: Mapping[str, Form],
) -> None:
    target = _target(module, forms)
    if all(parameter_axis(module, axis) for axis in axes):
        return
    if target is None and all(_is_size(module, axis) for axis in axes):
        return
    if target is None:
        known = ", ".join(f"torch.nn.{kind.__name__}" for kind in _ELASTIC)
        raise RuleError(
            f"rule {pattern!r} matches {name}, a {type(module).__name__}, which has no elastic "
            f"form; there are forms for {known}"
        )
    allowed: tuple[str, ...] = target.AXES  # type: ignore[attr-defined]
    for axis in axes:
        if axis not in allowed:
            raise RuleError(
                f"rule {pattern!r} names axis {axis!r} of {name}, a {type(module).__name__}; "
                f"allowed are {', '.join(allowed)}"
            )
    if isinstance(module, torch.nn.Embedding):
        options = (module.max_norm, module.scale_grad_by_freq or None, module.sparse or None)
        if any(option is not None for option in options):
            raise RuleError(f"{name} uses max_norm, scale_grad_by_freq or sparse: not elastic")


def _target(module: torch.nn.Module, forms: Mapping[str, Form]) -> type | None:
    """The class that a module gets; None where it keeps its own."""
    form = forms.get(type(module).__name__)
    return form.elastic if form is not None else _ELASTIC.get(type(module))


def _is_size(module: torch.nn.Module, name: str) -> bool:
    """Whether a module keeps a size under this name."""
    value = module.__dict__.get(name)
    return isinstance(value, int) and not isinstance(value, bool)


def _swap(
    path: str,
    module: torch.nn.Module,
    specs: Mapping[str, AxisSpec],
    grad_mode: str,
    forms: Mapping[str, Form],
) -> None:
    target = _target(module, forms)
    if all(parameter_axis(module, name) for name in specs):
        ParameterParts(module, specs, grad_mode).attach(module)
        return
    if target is None:
        module.__dict__["axes"] = {
            name: AttributeAxis(spec, module, name) for name, spec in specs.items()
        }
        return
    if type(module).__name__ in forms:
        module.__dict__.update(forms[type(module).__name__].attributes(path, module))
    module.__class__ = target  # before its axes: a form may keep its sizes in its own way
    axes = _axes(module, specs)
    elastic: Any = module
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        elastic.make_elastic(**axes)
    else:
        elastic.make_elastic(grad_mode, **axes)


def _axes(module: torch.nn.Module, specs: Mapping[str, AxisSpec]) -> dict[str, ElasticAxis]:
    if isinstance(module, torch.nn.Conv2d):
        return conv_axes(module, specs)
    return {n: ElasticAxis(specs.get(n), size) for n, size in _full_sizes(module).items()}


def _full_sizes(module: torch.nn.Module) -> dict[str, int]:
    if isinstance(module, nn.Conv1D):
        return {"in": module.nx, "out": module.nf // module.parts}
    if isinstance(module, torch.nn.Linear):
        return {"in": module.in_features, "out": module.out_features}
    if isinstance(module, torch.nn.Embedding):
        return {"features": module.embedding_dim}
    if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)):
        return {"depth": len(module)}
    if isinstance(module, torch.nn.GroupNorm):
        return {"features": module.num_channels}
    if isinstance(module, torch.nn.modules.batchnorm._NormBase):
        return {"features": module.num_features}
    return {"features": nn.layers.one_axis(module)}


def _check_complete(model: torch.nn.Module, table: Architecture) -> None:
    """No module with parameters is left that the table says nothing about."""
    fixed = [path_regex(pattern) for pattern in table.fixed]
    for path, module in model.named_modules():
        parts = parts_of(module)
        met = parts.parts if parts else {}
        stored = module._parameters.items()
        own = [name for name, param in stored if param is not None and name not in met]
        if not own or isinstance(module, ElasticModule):
            continue
        if not any(regex.fullmatch(path) for regex in fixed):
            raise RuleError(
                f"{path or 'the model'}, a {type(module).__name__}, has parameters "
                f"({', '.join(own)}) that the table of {table.name!r} does not mention; "
                "sk.elasticize(model, rules) names axes by hand"
            )


def _check_shared(model: torch.nn.Module) -> None:
    """A parameter that two modules share is cut the same way by both."""
    seen: dict[int, tuple[str, tuple[Any, ...]]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if not isinstance(module, ElasticModule) or weight is None or weight.dim() not in (2, 4):
            continue
        axes = module.axes
        rows, taps = axes.get("out"), axes.get("kernel_size")
        cols = axes.get("in") or axes["features"]
        cut = tuple(
            (axis.dimension, axis.sizes or axis.multiple_of)
            if axis is not None and axis.dimension
            else None
            for axis in (rows, cols, taps)
        )
        other, first = seen.setdefault(id(weight), (path, cut))
        if first != cut:
            raise RuleError(
                f"{path} and {other} share a weight, but cut it differently: {cut} and {first}"
            )
