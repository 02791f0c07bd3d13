"""Choosing the active sub-model of a model: a few integers change, and no weight is touched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from sorted_kernels.errors import DimensionError
from sorted_kernels.nn.axis import ElasticAxis, Following
from sorted_kernels.nn.module_list import DepthContainer
from sorted_kernels.submodel import Submodel

PLAN = "_elastic_plan"
"""Attribute under which a module keeps its :class:`Plan`."""
DECLARED = "_elastic_dimensions"
"""Attribute under which ``elasticize`` keeps full sizes that it was given."""

Setting = list[tuple[ElasticAxis, int, torch.Tensor]]
"""Axes of a dimension, and the size and probe of each."""
_last_applied: dict[str, Setting] = {}


class Plan:
    """The elastic axes below a module, by dimension, and what each sub-model sets them to.

    Args:
        model: The module to look through.

    Raises:
        DimensionError: Two declarations of a dimension's full size differ, or none was made and
            its axes' full sizes differ.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        named: dict[str, list[tuple[str, ElasticAxis]]] = {}
        declared: dict[str, int] = {}
        self.lists: dict[str, DepthContainer] = {}
        self.following: list[Following] = []
        self._places: dict[str, list[tuple[str, int] | None]] = {}
        """For each axis of a dimension, the list of elastic depth and the block that it is in."""
        for path, module in model.named_modules():
            axes = getattr(module, "axes", None)
            if _is_elastic_list(module):
                self.lists[path] = module  # type: ignore[assignment]
            follower = module.__dict__.get("following")
            if isinstance(follower, Following):
                self.following.append(follower)
            for name, axis in axes.items() if isinstance(axes, dict) else ():
                if axis.dimension is not None:
                    label = f"{path}.{name}" if path else name
                    named.setdefault(axis.dimension, []).append((label, axis))
                    place = _place(self.lists, path)
                    self._places.setdefault(axis.dimension, []).append(place)
            for name, full in _declared_by(module).items():
                if declared.setdefault(name, full) != full:
                    raise DimensionError(
                        f"dimension {name!r} is declared as {declared[name]} and, by "
                        f"{path or 'the model'}, as {full}"
                    )
        self.axes = {name: [axis for _, axis in pairs] for name, pairs in named.items()}
        self.full = {name: declared.get(name) or _agreed(name, pairs)
                     for name, pairs in named.items()}  # fmt: skip
        self.current = Submodel(**self._counts_now()) if self.full else None
        self._settings: dict[Submodel, dict[str, Setting]] = {}
        self._keys: dict[Submodel, str] = {}
        self._by_size: dict[tuple[str, Any], Setting] = {}
        self._applied: dict[str, Setting] = {}

    def places(self, name: str) -> list[tuple[str, int] | None]:
        """For each axis of a dimension, its list of elastic depth and its block there."""
        return self._places[name]

    def _counts_now(self) -> dict[str, int]:
        """The count of each dimension that its axes show: not full where a part was activated."""
        return {
            name: next(
                (
                    count
                    for count in range(full, 0, -1)
                    if all(axis.active == axis.scaled(count, full) for axis in self.axes[name])
                ),
                full,
            )
            for name, full in self.full.items()
        }

    def apply(self, submodel: Submodel) -> None:
        """Set every axis; what a sub-model sets is worked out once.

        Where this plan was also the last of all to be applied, no axis has changed since, and only
        those of the dimensions that change are set.
        """
        global _last_applied
        settings = self._settings.get(submodel)
        if settings is None:
            settings = self._settings[submodel] = self._work_out(submodel)
        before = self._applied if self._applied is _last_applied else {}
        self._applied = _last_applied = {}  # until all is done
        for name, setting in settings.items():
            if before.get(name) is not setting:
                for axis, size, probe in setting:
                    axis.active = size
                    axis.probe = probe
        if self.following:
            key = self._keys[submodel]
            for follower in self.following:
                follower.key = key
        self.current = submodel
        self._applied = _last_applied = settings

    def _work_out(self, submodel: Submodel) -> dict[str, Setting]:
        for name, size in submodel.items():
            if name not in self.full:
                raise DimensionError(
                    f"dimension {name!r} is unknown here; the model has {list(self.full)}"
                )
            if (max(size) if isinstance(size, tuple) else size) > self.full[name]:
                raise DimensionError(f"{name}={size} is not in 1..{self.full[name]}")
            if isinstance(size, tuple):
                self._check_blocks(name, size, submodel)
        self._keys[submodel] = Following.key_of(submodel, self.full)
        return {
            name: self._setting(name, submodel.get(name, full)) for name, full in self.full.items()
        }

    def _check_blocks(self, name: str, sizes: tuple[int, ...], submodel: Submodel) -> None:
        """A dimension with one size a block lies in one list, as many blocks deep."""
        lists = {place and place[0] for place in self._places[name]}
        path = next(iter(lists))
        if len(lists) > 1 or path is None:
            raise DimensionError(
                f"{name}={sizes} gives one size a block, but not all axes of {name!r} lie in the "
                "blocks of one list with elastic depth; give one size"
            )
        depth = self.lists[path].depth_axis
        assert depth is not None and depth.dimension is not None
        full = self.full[depth.dimension]
        blocks = depth.scaled(submodel.get(depth.dimension, full), full)
        if len(sizes) != blocks:
            raise DimensionError(
                f"{name}={sizes} has {len(sizes)} sizes; {path!r} has {blocks} active blocks, and "
                "each has one"
            )

    def _setting(self, name: str, count: int | tuple[int, ...]) -> Setting:
        """What a count of a dimension sets its axes to; the same list each time."""
        setting = self._by_size.get((name, count))
        if setting is None:
            setting, full = [], self.full[name]
            for axis, place in zip(self.axes[name], self._places[name], strict=True):
                if not isinstance(count, tuple):
                    size = axis.scaled(count, full)
                else:  # blocks past the active ones are not run
                    assert place is not None
                    size = axis.scaled(count[place[1]] if place[1] < len(count) else full, full)
                setting.append((axis, size, axis.probe_of(size)))
            self._by_size[name, count] = setting
        return setting


def _place(lists: dict[str, DepthContainer], path: str) -> tuple[str, int] | None:
    """The outermost of the lists that a module is in, and the number of its block."""
    for list_path, blocks in lists.items():
        prefix = f"{list_path}." if list_path else ""
        if path.startswith(prefix) and path != list_path:
            block = path.removeprefix(prefix).partition(".")[0]
            return list_path, list(blocks._modules).index(block)
    return None


def _declared_by(module: torch.nn.Module) -> dict[str, int]:
    own: Any = getattr(module, "dimensions", None)
    declared = dict(own) if isinstance(own, dict) else {}
    return {**declared, **module.__dict__.get(DECLARED, {})}


def _agreed(name: str, pairs: list[tuple[str, ElasticAxis]]) -> int:
    sizes = {axis.full for _, axis in pairs}
    if len(sizes) > 1:
        listed = ", ".join(f"{label} has {axis.full}" for label, axis in pairs[:6])
        raise DimensionError(
            f"the axes of dimension {name!r} disagree on its full size ({listed}); declare it, "
            f"e.g. dimensions={{{name!r}: {max(sizes)}}}, and each axis follows in proportion"
        )
    return sizes.pop()


def plan_of(model: torch.nn.Module) -> Plan:
    """The model's plan, worked out on first use."""
    plan = model.__dict__.get(PLAN)
    if plan is None:
        plan = model.__dict__[PLAN] = Plan(model)
    return plan


def forget_plan(model: torch.nn.Module) -> None:
    """Have plans worked out anew, after layers were swapped."""
    for module in model.modules():
        module.__dict__.pop(PLAN, None)


def dimensions(model: torch.nn.Module) -> dict[str, int]:
    """Full size of each elastic dimension of a model."""
    return dict(plan_of(model).full)


def depth_lists(model: torch.nn.Module) -> dict[str, DepthContainer]:
    """The lists of a model whose depth is elastic, by path."""
    found: dict[str, Any] = {path: model.get_submodule(path) for path in plan_of(model).lists}
    return {path: blocks for path, blocks in found.items() if _is_elastic_list(blocks)}


def _is_elastic_list(module: torch.nn.Module) -> bool:
    axis = module.depth_axis if isinstance(module, DepthContainer) else None
    return axis is not None and axis.dimension is not None


def current(model: torch.nn.Module) -> Submodel:
    """The sub-model that is active now.

    Raises:
        DimensionError: The model has no elastic dimension.
    """
    plan = plan_of(model)
    if plan.current is None:
        raise DimensionError(
            f"{type(model).__name__} has no elastic dimension; use sk.elasticize or sk.nn layers"
        )
    return plan.current


def activate(model: torch.nn.Module, submodel: Submodel) -> None:
    """Make a sub-model the active one, until the next call.

    Costs microseconds and touches no weight. Dimensions that the sub-model does not name are at
    their full size. Layers added to the model after its first activation are not seen.

    Args:
        model: A model made elastic, or any module of ``sk.nn``.
        submodel: Counts out of each dimension's full size.

    Raises:
        DimensionError: An unknown dimension, or a size above its full one.
    """
    plan_of(model).apply(submodel)


@contextlib.contextmanager
def active(model: torch.nn.Module, submodel: Submodel) -> Iterator[torch.nn.Module]:
    """Activate a sub-model within a ``with`` block, and what was active before it afterwards."""
    before = current(model)
    activate(model, submodel)
    try:
        yield model
    finally:
        activate(model, before)
