"""Make the axes of an existing model elastic: its modules become ours, its parameters stay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from sorted_kernels import nn
from sorted_kernels.errors import RuleError
from sorted_kernels.nn.activation import DECLARED, PLAN, Plan, forget_plan
from sorted_kernels.nn.axis import AxisSpec, ElasticAxis
from sorted_kernels.nn.conv import conv_axes

Rules = Mapping[str, Mapping[str, AxisSpec]]

_ELASTIC: dict[type, type] = {
    torch.nn.Linear: nn.Linear,
    torch.nn.Conv2d: nn.Conv2d,
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.RMSNorm: nn.RMSNorm,
    torch.nn.Embedding: nn.Embedding,
    torch.nn.ModuleList: nn.ModuleList,
    torch.nn.Sequential: nn.Sequential,
}
PLAIN = {elastic: plain for plain, elastic in _ELASTIC.items()}


def elasticize(
    model: torch.nn.Module,
    rules: Rules,
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
            ``depth`` of a module list or sequential. A value is a dimension's name or ``(name,
            multiple_of)``.
        dimensions: Full size of dimensions whose axes differ in size (``{"width": 8}``): an axis
            then follows in proportion. Also read from the model's own ``dimensions``.
        grad_mode: ``"inplace"`` or ``"dense"``, as for the layers of ``sk.nn``.

    Returns:
        The model.

    Raises:
        RuleError: A rule that matches nothing, names an unknown axis, contradicts another, or
            meets a module that has no elastic form; axes of one dimension or of one shared
            parameter that disagree. The model is then unchanged.
    """
    matched = _match(model, rules)
    before = {name: (type(module), dict(module.__dict__)) for name, (module, _) in matched.items()}
    marks = {DECLARED, PLAN}
    kept = [
        (module, {name: value for name, value in module.__dict__.items() if name in marks})
        for module in model.modules()
    ]
    try:
        for module, axes in matched.values():
            _swap(module, axes, grad_mode)
        if dimensions is not None:
            model.__dict__[DECLARED] = dict(dimensions)
        forget_plan(model)
        plan = Plan(model)
        unknown = set(dimensions or {}) - set(plan.full)
        if unknown:
            raise RuleError(f"dimensions {sorted(unknown)} are declared, but no rule names them")
        _check_shared(model)
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
    model: torch.nn.Module, rules: Rules
) -> dict[str, tuple[torch.nn.Module, dict[str, AxisSpec]]]:
    """Find each rule's modules and merge the axes that rules give to one module."""
    if not rules:
        raise RuleError("no rules were given: elasticize would change nothing")
    matched: dict[str, tuple[torch.nn.Module, dict[str, AxisSpec]]] = {}
    for pattern, axes in rules.items():
        regex = _regex(pattern)
        found = [(name, m) for name, m in model.named_modules() if regex.fullmatch(name)]
        if not found:
            near = [name for name, m in model.named_modules() if type(m) in _ELASTIC][:8]
            raise RuleError(f"rule {pattern!r} matches no module; there are {', '.join(near)}, ...")
        for name, module in found:
            _check_rule(name, module, pattern, axes)
            merged = matched.setdefault(name, (module, {}))[1]
            for axis, spec in axes.items():
                if merged.setdefault(axis, spec) != spec:
                    raise RuleError(
                        f"rule {pattern!r} ties {name}.{axis} to {spec!r}, "
                        f"another rule to {merged[axis]!r}"
                    )
    return matched


def _regex(pattern: str) -> re.Pattern[str]:
    names = []
    for name in pattern.split("."):
        if name == "**":
            names.append(r"[^.]+(?:\.[^.]+)*")
        else:
            names.append(re.escape(name).replace(r"\*", "[^.]*"))
    return re.compile(r"\.".join(names))


def _check_rule(
    name: str, module: torch.nn.Module, pattern: str, axes: Mapping[str, AxisSpec]
) -> None:
    target = _ELASTIC.get(type(module))
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


def _swap(module: torch.nn.Module, specs: Mapping[str, AxisSpec], grad_mode: str) -> None:
    axes = _axes(module, specs)
    module.__class__ = _ELASTIC[type(module)]
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
    if isinstance(module, torch.nn.Linear):
        return {"in": module.in_features, "out": module.out_features}
    if isinstance(module, torch.nn.Embedding):
        return {"features": module.embedding_dim}
    if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)):
        return {"depth": len(module)}
    return {"features": nn.layers.one_axis(module)}


def _check_shared(model: torch.nn.Module) -> None:
    """A parameter that two modules share is cut the same way by both."""
    seen: dict[int, tuple[str, tuple[AxisSpec, ...]]] = {}
    for path, module in model.named_modules():
        axes = getattr(module, "axes", None)
        if not isinstance(axes, dict):
            continue
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() not in (2, 4):
            continue
        rows, taps = axes.get("out"), axes.get("kernel_size")
        cols = axes.get("in") or axes["features"]
        cut = tuple(
            (axis.dimension, axis.multiple_of) if axis is not None and axis.dimension else None
            for axis in (rows, cols, taps)
        )
        other, first = seen.setdefault(id(weight), (path, cut))
        if first != cut:
            raise RuleError(
                f"{path} and {other} share a weight, but cut it differently: {cut} and {first}"
            )
