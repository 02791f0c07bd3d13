"""The tables of architectures, found by the name of a model's class or by its ``model_type``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sorted_kernels.errors import RuleError
from sorted_kernels.nn.axis import AxisSpec

Rules = Mapping[str, Mapping[str, AxisSpec]]


@dataclass(frozen=True)
class Form:
    """How a module class of a model's own library becomes a layer of ``sk.nn``.

    Attributes:
        elastic: The layer, which computes the same from the same parameters.
        attributes: From a module's path and the module: what the layer reads and the module has
            under another name, or not at all.
    """

    elastic: type[torch.nn.Module]
    attributes: Callable[[str, torch.nn.Module], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """What :func:`register_architecture` was told; its arguments have the same names."""

    name: str
    rules: Callable[[Any], Rules]
    heads: Callable[[Any], Rules]
    dimensions: Callable[[Any], Mapping[str, int]]
    configuration: Callable[[Any, dict[str, int]], dict[str, Any] | None] | None
    finish: Callable[[torch.nn.Module], None] | None = None
    forms: Mapping[str, Form] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()

    def rules_for(self, model: torch.nn.Module) -> dict[str, Mapping[str, AxisSpec]]:
        """The rules of the body and of the heads that match a module of this model."""
        prefix = getattr(model, "base_model_prefix", "")
        inside = f"{prefix}." if prefix and hasattr(model, prefix) else ""
        given = self.rules(_config(model))
        rules = {f"{inside}{pattern}": axes for pattern, axes in given.items()}
        heads = self.heads(_config(model))
        modules = list(model.named_modules())
        owners = [(path, module) for path, module in modules if module._parameters]
        return {
            **{pattern: axes for pattern, axes in rules.items() if _matches(pattern, modules)},
            **{pattern: axes for pattern, axes in heads.items() if _matches(pattern, owners)},
        }

    def dimensions_of(self, model: torch.nn.Module) -> dict[str, int]:
        """Full sizes of the dimensions that do not have them from their axes."""
        return dict(self.dimensions(_config(model)))


_TABLES: dict[str, Architecture] = {}


def register_architecture(
    *names: str,
    rules: Callable[[Any], Rules],
    heads: Rules | Callable[[Any], Rules] | None = None,
    dimensions: Callable[[Any], Mapping[str, int]] | None = None,
    configuration: Callable[[Any, dict[str, int]], dict[str, Any] | None] | None = None,
    finish: Callable[[torch.nn.Module], None] | None = None,
    forms: Mapping[str, Form] | None = None,
    fixed: tuple[str, ...] = (),
) -> None:
    """Add the table of an architecture, so that ``sk.elasticize(model)`` needs no rules for it.

    Functions of the table are given the model's ``config`` (the model itself where it has none).

    Args:
        *names: Names of model classes (subclasses are found too), or ``model_type`` of their
            configurations. A later table of the same name takes the place of an earlier one.
        rules: Gives rules as :func:`sk.elasticize <sorted_kernels.elasticize>` takes them. Paths
            start at the module that the model's ``base_model_prefix`` names, where there is one.
            One that matches nothing is passed over.
        heads: More rules, with paths from the model itself, for modules with parameters; or a
            function that gives them.
        dimensions: Gives the full size of dimensions whose axes differ in size.
        configuration: Gives, from the configuration and the size of every dimension, the fields
            that an exported sub-model has instead; None for a sub-model that no configuration
            describes. That one's export, or any without this function, is a copy of the model's
            modules, configuration and all; the former refuses ``save_pretrained``.
        finish: Called with the model once its modules are elastic, to tie what rules cannot.
        forms: Elastic forms of module classes that are not of ``torch.nn``, by class name.
        fixed: Paths (with wildcards) of modules whose parameters never change in size. All others
            that have parameters must be met by a rule.
    """
    for name in names:
        _TABLES[name] = Architecture(
            name=name,
            rules=rules,
            heads=heads if callable(heads) else (lambda config: heads or {}),
            dimensions=dimensions or (lambda config: {}),
            configuration=configuration,
            finish=finish,
            forms=forms or {},
            fixed=fixed,
        )


def architecture_of(model: torch.nn.Module) -> Architecture:
    """The table of a model: by its class, the classes that it derives from, or its model type.

    Raises:
        RuleError: There is none.
    """
    candidates = [kind.__name__ for kind in type(model).__mro__]
    candidates.append(getattr(_config(model), "model_type", None) or "")
    for name in candidates:
        if name in _TABLES:
            return _TABLES[name]
    raise RuleError(
        f"no rules were given, and {type(model).__name__} is not among the architectures known: "
        f"{', '.join(sorted(_TABLES))}; sk.models.register_architecture adds one"
    )


def _matches(pattern: str, modules: list[tuple[str, torch.nn.Module]]) -> bool:
    regex = path_regex(pattern)
    return any(regex.fullmatch(path) for path, _ in modules)


def path_regex(pattern: str) -> re.Pattern[str]:
    """A path with ``*`` (within one name) and ``**`` (any number of names)."""
    names = []
    for name in pattern.split("."):
        if name == "**":
            names.append(r"[^.]+(?:\.[^.]+)*")
        else:
            names.append(re.escape(name).replace(r"\*", "[^.]*"))
    return re.compile(r"\.".join(names))


def _config(model: torch.nn.Module) -> Any:
    return getattr(model, "config", model)
