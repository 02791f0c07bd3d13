"""Batch norm over channels that follow a dimension, and whose statistics it uses.

The layer's own parameters and statistics are ``torch.nn``'s, and all sub-models share them. It may
have further sets: one for each of a list of widths (``switch``), and running statistics measured
for one sub-model each (``recalibrated``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import DimensionError, ShapeError
from sorted_kernels.nn.axis import AxisSpec, ElasticAxis, Following
from sorted_kernels.nn.layers import ElasticModule, check_width
from sorted_kernels.ops.batch_norm import (
    batch_norm_on_blocks,
    check_batch_norm,
    check_several,
    run_batch_norm,
)

AFFINE = ("weight", "bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
SWITCH, RECALIBRATED = "switch", "recalibrated"


class BatchNormSet(ElasticModule):
    """Running statistics, and maybe affine parameters, of one size of a batch norm.

    Args:
        layer: Whose first channels the values are copied from.
        channels: The size.
        names: Which parameters and buffers it has.
    """

    OP = "batch_norm"
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, layer: BatchNorm, channels: int, names: Iterable[str]) -> None:
        super().__init__()
        for name in names:
            source, copied = getattr(layer, name), None
            if source is not None:
                copied = source.detach()[(slice(channels),) * source.dim()].clone()
            if name in STATISTICS:
                self.register_buffer(name, copied)
            elif copied is None:
                self.register_parameter(name, None)
            else:
                self.register_parameter(name, torch.nn.Parameter(copied, source.requires_grad))
        self.make_elastic(layer.grad_mode)

    def reset(self) -> None:
        """Start the statistics anew."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()


class BatchNorm(ElasticModule):
    """What :class:`BatchNorm1d` and :class:`BatchNorm2d` share, which is all but the input's rank.

    Args:
        num_features: C, the stored channels.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None: their mean over all batches
            (those of any width count).
        affine: Whether there are scale and shift.
        track_running_stats: Whether there are running statistics.
        device: As in torch.
        dtype: As in torch.
        dim: Dimension of the channels.
        grad_mode: See :meth:`ElasticModule.make_elastic`.

    Shape:
        (N, active channels, ...) -> the same.
    """

    OP = "batch_norm"
    AXES = ("features",)
    STOCK: type[torch.nn.BatchNorm1d] | type[torch.nn.BatchNorm2d]
    features_axis: ElasticAxis
    weight: Any
    bias: Any
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    eps: float
    momentum: float | None
    affine: bool
    num_features: int
    track_running_stats: bool

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dim: AxisSpec = None,
        grad_mode: str = "inplace",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.make_elastic(grad_mode, features=ElasticAxis(dim, num_features))

    def make_elastic(self, grad_mode: str = "inplace", **axes: ElasticAxis) -> None:
        """Give the module its axis; it has no set but its own."""
        super().make_elastic(grad_mode, **axes)
        self.following = Following()
        self.listed: tuple[int, ...] = ()  # channel counts that have a set of their own
        self.calibrating = False
        self._note_sets()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the active channels, with the batch's statistics or the running ones."""
        self._check_input_dim(x)
        check_width(x, self.features_axis, type(self).__name__, 1)
        owner, kept = self.in_force() if self.has_sets else (self, self)
        training = self.training or self.calibrating
        means, variances, count = kept.running_mean, kept.running_var, kept.num_batches_tracked
        with_batch = training or means is None
        if with_batch:
            check_several(x)
        if training and not self.track_running_stats:
            means = variances = None
        factor = 0.0
        if training and means is not None and count is not None:
            momentum = None if self.calibrating else self.momentum
            factor = 1 / (float(count) + 1) if momentum is None else momentum
        y = self._normalise(x, owner, means, variances, with_batch, factor)
        if training and self.track_running_stats and count is not None:
            count.add_(1)
        return y

    def _normalise(
        self,
        x: Tensor,
        owner: Any,
        means: Tensor | None,
        variances: Tensor | None,
        with_batch: bool,
        factor: float,
    ) -> Tensor:
        options = means, variances, with_batch, factor, self.eps
        blocks = owner._plain_blocks(self.features_axis.active)
        if blocks is not None:
            try:
                return batch_norm_on_blocks(x, blocks, *options)
            except RuntimeError:
                check_batch_norm(x, owner.weight, owner.bias, *options[:3])
                raise
        weight, bias = owner.weight, owner.bias
        return run_batch_norm(x, weight, bias, *options, *owner._gradient_path(weight, bias))

    def _check_input_dim(self, input: Tensor) -> None:
        raise NotImplementedError

    def in_force(self) -> tuple[Any, Any]:
        """Who has the affine parameters and who the statistics of the active sub-model.

        Statistics measured for a sub-model serve its evaluation; training moves those that the
        policy says.

        Raises:
            DimensionError: The policy has no set for the active channels.
        """
        owner: Any = self
        active = self.features_axis.active
        if self.listed:
            if active not in self.listed:
                raise DimensionError(
                    f"{type(self).__name__} has {active} of {self.num_features} channels active; "
                    f"its switchable sets are for {', '.join(map(str, self.listed))}"
                )
            owner = self.sets(SWITCH).get(str(active), self)  # the full size has the layer's own
        if self.training and not self.calibrating:
            return owner, owner
        return owner, self.sets(RECALIBRATED).get(self.following.key, owner)

    def sources(self) -> dict[str, Tensor]:
        """The parameters and statistics in force when the active sub-model is evaluated."""
        training, self.training = self.training, False
        try:
            owner, kept = self.in_force()
        finally:
            self.training = training
        found = {name: getattr(owner, name) for name in AFFINE}
        found |= {name: getattr(kept, name) for name in STATISTICS}
        return {name: value for name, value in found.items() if value is not None}

    def active_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight, bias and running statistics (c,)."""
        c = (self.features_axis.active,)
        names = (*AFFINE, "running_mean", "running_var")
        return {**dict.fromkeys(names, c), "num_batches_tracked": ()}

    def stock(self) -> torch.nn.Module:
        """The ``torch.nn`` module of the active channels."""
        made = self.STOCK(
            self.features_axis.active, self.eps, self.momentum, self.affine,
            self.track_running_stats, device="meta",
        )  # fmt: skip
        if self.affine and self.bias is None:
            made.register_parameter("bias", None)
        return made

    def sets(self, name: str) -> Mapping[str, Any]:
        """The sets of one kind: ``"switch"`` by channel count, ``"recalibrated"`` by sub-model."""
        held = self._modules.get(name)
        return {} if held is None else held._modules

    def _note_sets(self) -> None:
        self.has_sets = bool(self.listed or self.sets(RECALIBRATED))

    def hold(self, name: str, sets: Mapping[str, BatchNormSet]) -> None:
        """Replace all sets of one kind."""
        self._modules.pop(name, None)
        if sets:
            held = torch.nn.ModuleDict(sets)
            self.add_module(name, held.train(self.training))
        self._note_sets()

    def list_widths(self, counts: Iterable[int]) -> None:
        """Have a set for each of these channel counts, or only the layer's own for none."""
        self.listed = tuple(sorted(set(counts)))
        names = (*AFFINE, *STATISTICS)
        below = [count for count in self.listed if count < self.num_features]
        self.hold(SWITCH, {str(count): BatchNormSet(self, count, names) for count in below})
        self.hold(RECALIBRATED, {})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any
    ) -> None:
        try:
            self.adopt(self.recalibrated_in(state_dict, prefix))
        except ShapeError as error:
            lists[-1].append(str(error))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def recalibrated_in(self, state: Mapping[str, Any], prefix: str) -> dict[str, int]:
        """The sub-models that a state has measured statistics of this layer for, and their sizes.

        Raises:
            ShapeError: A size that the layer does not have.
        """
        start, end = f"{prefix}{RECALIBRATED}.", f".{STATISTICS[0]}"
        found = {
            name.removeprefix(start).removesuffix(end): value.numel()
            for name, value in state.items()
            if name.startswith(start) and name.endswith(end)
        }
        if found and self.running_mean is None:
            raise ShapeError(f"{prefix[:-1]!r} has no running statistics, the state has")
        for key, size in found.items():
            if not 1 <= size <= self.num_features:
                raise ShapeError(
                    f"{start}{key} has {size} channels; allowed are 1 to {self.num_features}"
                )
        return found

    def adopt(self, sizes: Mapping[str, int]) -> None:
        """Hold measured statistics for these sub-models and no others, for values to be loaded."""
        held = self.sets(RECALIBRATED)
        if {key: one.running_mean.numel() for key, one in held.items()} != dict(sizes):
            made = {key: BatchNormSet(self, c, STATISTICS) for key, c in sizes.items()}
            self.hold(RECALIBRATED, made)


class BatchNorm1d(BatchNorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``, x (N, c) or (N, c, L); arguments are :class:`BatchNorm`'s."""

    STOCK = torch.nn.BatchNorm1d

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 3):
            raise ShapeError(f"BatchNorm1d got x of shape {tuple(input.shape)}; 2 or 3 axes wanted")


class BatchNorm2d(BatchNorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, x (N, c, H, W); arguments are :class:`BatchNorm`'s."""

    STOCK = torch.nn.BatchNorm2d

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ShapeError(f"BatchNorm2d got x of shape {tuple(input.shape)}; 4 axes wanted")
