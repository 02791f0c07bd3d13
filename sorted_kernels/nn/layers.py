"""Layers whose parameters are read, and given gradients, only up to their active sizes.

Each is a subclass of the ``torch.nn`` module that it replaces, with the same parameters and
state_dict; only ``forward`` and the axes are new.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from sorted_kernels.errors import OptionError, ShapeError
from sorted_kernels.nn.axis import AxisSpec, ElasticAxis
from sorted_kernels.ops.blocks import BlockCache, Blocks
from sorted_kernels.ops.checks import active_block
from sorted_kernels.ops.gradient import GradientSlot, in_place_allowed, slot_of
from sorted_kernels.ops.layer_norm import check_norm, layer_norm_on_blocks, run_layer_norm
from sorted_kernels.ops.linear import check_linear, linear_of_rows, linear_on_blocks, run_linear
from sorted_kernels.ops.ragged_norm import run_ragged_norm
from sorted_kernels.ops.rms_norm import check_rms_norm, rms_norm_on_blocks, run_rms_norm
from sorted_kernels.reference.linear import ACTIVATIONS
from sorted_kernels.row_widths import RowWidths

GRAD_MODES = ("inplace", "dense")


def _relu_hook(_module: Any, _args: Any, y: Tensor) -> Tensor:
    return F.relu(y)


def _gelu_hook(_module: Any, _args: Any, y: Tensor) -> Tensor:
    return F.gelu(y)


def _silu_hook(_module: Any, _args: Any, y: Tensor) -> Tensor:
    return F.silu(y)


_ACTIVATION_HOOKS = {"relu": _relu_hook, "gelu": _gelu_hook, "silu": _silu_hook}


def check_activation(activation: str | None) -> str:
    """The name of a fused activation."""
    if activation is not None and activation not in ACTIVATIONS:
        raise OptionError(f"activation={activation!r}; allowed are {', '.join(ACTIVATIONS)}")
    return activation or "none"


def with_activation(layer: torch.nn.Module, activation: str) -> torch.nn.Module:
    """A plain layer that applies an activation to its output, as a fused one does."""
    if activation != "none":
        layer.register_forward_hook(_ACTIVATION_HOOKS[activation])
    return layer


class ElasticModule(torch.nn.Module):
    """What all elastic layers share: named axes and the choice of the gradient path."""

    OP: str  # of layers that can run on plain blocks
    BIAS = True  # whether there is such a parameter, be it None
    axes: dict[str, ElasticAxis]
    grad_mode: str
    _slots: dict[str, GradientSlot]
    _blocks: BlockCache

    def make_elastic(self, grad_mode: str = "inplace", **axes: ElasticAxis) -> None:
        """Give a module its axes (the constructor and ``elasticize`` call this).

        Args:
            grad_mode: ``"inplace"`` writes gradients straight into ``param.grad[:m, :k]``;
                ``"dense"`` leaves full-size gradients to autograd (hooks see them, and they can be
                differentiated again). Parameters with hooks take the dense path by themselves.
            **axes: One axis for each name in the class' ``AXES``.

        Raises:
            OptionError: An unknown ``grad_mode``.
        """
        if grad_mode not in GRAD_MODES:
            raise OptionError(f"grad_mode={grad_mode!r}; allowed are {', '.join(GRAD_MODES)}")
        self.grad_mode, self.axes = grad_mode, axes
        for name, axis in axes.items():
            setattr(self, f"{name}_axis", axis)
        self._slots = {
            name: slot_of(param, self.slot_matrix(name))
            for name, param in self._parameters.items()
            if param is not None
        }
        self._blocks = BlockCache()

    def _plain_blocks(self, *sizes: int) -> Blocks | None:
        """The active blocks for plain PyTorch; None where it is not what runs here."""
        if is_compiling() or self.grad_mode != "inplace":
            return None
        parameters = self._parameters
        try:
            weight, bias = parameters["weight"], parameters["bias"] if self.BIAS else None
        except KeyError:  # computed from others by a parametrization
            return None
        blocks = self._blocks.get(sizes)
        if blocks is not None and blocks.current(weight, bias):
            return blocks
        return self._blocks.find(self.OP, weight, bias, sizes)

    def _gradient_path(
        self, weight: Tensor | None, bias: Tensor | None = None
    ) -> tuple[GradientSlot | None, GradientSlot | None, bool]:
        """Slots of the parameters that train, and whether gradients go the dense way."""
        weight_slot = bias_slot = None
        dense = self.grad_mode == "dense"
        if weight is not None and weight.requires_grad:
            if weight.is_leaf:
                weight_slot = self._slot("weight", weight)
            dense = dense or not in_place_allowed(weight_slot, weight)
        if bias is not None and bias.requires_grad:
            if bias.is_leaf:
                bias_slot = self._slot("bias", bias)
            dense = dense or not in_place_allowed(bias_slot, bias)
        return weight_slot, bias_slot, dense or (weight_slot is None and bias_slot is None)

    def _slot(self, name: str, param: Tensor) -> GradientSlot:
        slot = self._slots.get(name)
        if slot is None or slot.param() is not param:  # the parameter was replaced
            slot = self._slots[name] = slot_of(param, self.slot_matrix(name))
        return slot

    def slot_matrix(self, name: str) -> tuple[int, int] | None:
        """The matrix that a parameter's gradient is kept as; None for its own axes."""
        return None

    def active_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the active block of each parameter."""
        raise NotImplementedError

    def stock(self) -> torch.nn.Module:
        """The ``torch.nn`` module of the active size, on the meta device."""
        raise NotImplementedError

    def sources(self) -> dict[str, Tensor]:
        """The parameters and buffers whose blocks the active sub-model uses."""
        found = {name: getattr(self, name) for name in self.active_shapes()}
        return {name: source for name, source in found.items() if source is not None}

    def active_view(self, name: str, tensor: Tensor) -> Tensor:
        """What the active block of a parameter is of a tensor of its shape, as a view."""
        return active_block(tensor, self.active_shapes()[name])

    def active_block(self, name: str) -> Tensor:
        """A contiguous copy of the active block of a parameter or buffer."""
        block = self.active_view(name, self.sources()[name].detach())
        return block.clone(memory_format=torch.contiguous_format)

    def plain(self) -> torch.nn.Module:
        """A stand-alone ``torch.nn`` module of the active size with contiguous copies."""
        layer = self.stock()
        for name, source in self.sources().items():
            copied = self.active_block(name)
            if name not in layer._buffers:
                copied = torch.nn.Parameter(copied, source.requires_grad)
            setattr(layer, name, copied)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """The stock description and the axes that can change."""
        moving = [f"{name}=({axis})" for name, axis in self.axes.items() if axis.dimension]
        return ", ".join([super().extra_repr(), *moving])


class Linear(ElasticModule, torch.nn.Linear):
    """``torch.nn.Linear`` whose features follow named dimensions.

    Args:
        in_features: K, the stored input features.
        out_features: M, the stored output features.
        bias: Whether there is a bias.
        device: As in torch.
        dtype: As in torch.
        in_dim: Dimension of the input features: a name, ``(name, multiple_of)`` or None.
        out_dim: Dimension of the output features.
        activation: None, ``"relu"``, ``"gelu"`` or ``"silu"``, fused into the layer.
        grad_mode: See :meth:`ElasticModule.make_elastic`.

    Shape:
        (..., active in_features) -> (..., active out_features).
    """

    OP = "linear"
    AXES = ("in", "out")
    in_axis: ElasticAxis
    out_axis: ElasticAxis
    activation = "none"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        in_dim: AxisSpec = None,
        out_dim: AxisSpec = None,
        activation: str | None = None,
        grad_mode: str = "inplace",
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = check_activation(activation)
        axes = {"in": ElasticAxis(in_dim, in_features), "out": ElasticAxis(out_dim, out_features)}
        self.make_elastic(grad_mode, **axes)

    def forward(self, x: Tensor, widths: RowWidths | None = None) -> Tensor:
        """Apply the active block; or, to each row of a ragged batch x (N, k), its own block."""
        if widths is not None:
            weight, bias = self.weight, self.bias
            paths = self._gradient_path(weight, bias)
            return linear_of_rows(x, weight, bias, widths, self.activation, *paths)
        blocks = self._plain_blocks(self.out_axis.active, self.in_axis.active)
        if blocks is not None:
            try:
                return linear_on_blocks(x, blocks, self.activation)
            except RuntimeError:
                self._check(x)
                raise
        check_width(x, self.in_axis, "Linear")
        weight, bias = self.weight, self.bias
        return run_linear(
            x, weight, bias, self.out_axis.size(), self.activation,
            *self._gradient_path(weight, bias),
        )  # fmt: skip

    def _check(self, x: Tensor) -> None:
        """Say what was wrong with an input that PyTorch did not take."""
        check_width(x, self.in_axis, "Linear")
        check_linear(x, self.weight, self.bias, self.out_axis.active, self.activation)

    def active_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight (m, k), bias (m,)."""
        m, k = self.out_axis.active, self.in_axis.active
        return {"weight": (m, k), "bias": (m,)}

    def stock(self) -> torch.nn.Module:
        """A ``torch.nn.Linear`` of the active size, with the fused activation if there is one."""
        layer = torch.nn.Linear(
            self.in_axis.active, self.out_axis.active, self.bias is not None, device="meta"
        )
        return with_activation(layer, self.activation)


class LayerNorm(ElasticModule, torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` over one last axis that follows a named dimension.

    Args:
        normalized_shape: K, one number (or a sequence of one).
        eps: Added to the variance.
        elementwise_affine: Whether there are scale and shift.
        bias: Whether there is a shift.
        device: As in torch.
        dtype: As in torch.
        dim: Dimension of the features.
        grad_mode: See :meth:`ElasticModule.make_elastic`.

    Raises:
        ShapeError: More than one normalised axis.
    """

    OP = "layer_norm"
    AXES = ("features",)
    features_axis: ElasticAxis

    def __init__(
        self,
        normalized_shape: int | list[int] | tuple[int, ...],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dim: AxisSpec = None,
        grad_mode: str = "inplace",
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.make_elastic(grad_mode, features=ElasticAxis(dim, one_axis(self)))

    def forward(self, x: Tensor, widths: RowWidths | None = None) -> Tensor:
        """Normalise the active features; or each row of a ragged batch over its in_features."""
        if widths is not None:
            weight, bias = self.weight, self.bias
            paths = self._gradient_path(weight, bias)
            return run_ragged_norm("layer_norm", x, weight, bias, widths, self.eps, *paths)
        blocks = self._plain_blocks(self.features_axis.active)
        if blocks is not None and (blocks.weight is None or x.dtype is blocks.weight.dtype):
            try:
                return layer_norm_on_blocks(x, blocks, self.eps)
            except RuntimeError:
                check_width(x, self.features_axis, "LayerNorm")
                check_norm(x, self.weight, self.bias)
                raise
        check_width(x, self.features_axis, "LayerNorm")
        weight, bias = self.weight, self.bias
        return run_layer_norm(x, weight, bias, self.eps, *self._gradient_path(weight, bias))

    def active_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight and bias (k,)."""
        k = self.features_axis.active
        return {"weight": (k,), "bias": (k,)}

    def stock(self) -> torch.nn.Module:
        """A ``torch.nn.LayerNorm`` of the active width."""
        return torch.nn.LayerNorm(
            self.features_axis.active, self.eps, self.elementwise_affine, self.bias is not None,
            device="meta",
        )  # fmt: skip


class RMSNorm(ElasticModule, torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` over one last axis that follows a named dimension.

    Args:
        normalized_shape: K, one number (or a sequence of one).
        eps: Added to the mean square; when None, float32's epsilon (float64's for float64), as
            torch has it.
        elementwise_affine: Whether there is a scale.
        device: As in torch.
        dtype: As in torch.
        dim: Dimension of the features.
        grad_mode: See :meth:`ElasticModule.make_elastic`.

    Raises:
        ShapeError: More than one normalised axis.
    """

    OP = "rms_norm"
    BIAS = False
    AXES = ("features",)
    features_axis: ElasticAxis

    def __init__(
        self,
        normalized_shape: int | list[int] | tuple[int, ...],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dim: AxisSpec = None,
        grad_mode: str = "inplace",
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.make_elastic(grad_mode, features=ElasticAxis(dim, one_axis(self)))

    def forward(self, x: Tensor, widths: RowWidths | None = None) -> Tensor:
        """Normalise the active features; or each row of a ragged batch over its in_features."""
        eps = self.eps
        if eps is None:  # of the type that the norm is computed in
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        if widths is not None:
            weight = self.weight
            paths = self._gradient_path(weight)
            return run_ragged_norm("rms_norm", x, weight, None, widths, eps, *paths)
        check_width(x, self.features_axis, "RMSNorm")
        blocks = self._plain_blocks(self.features_axis.active)
        if blocks is not None and blocks.weight is not None and x.dtype is blocks.weight.dtype:
            try:
                return rms_norm_on_blocks(x, blocks, eps)
            except RuntimeError:
                check_rms_norm(x, self.weight)
                raise
        weight = self.weight
        slot, _, dense = self._gradient_path(weight)
        return run_rms_norm(x, weight, eps, slot, dense)

    def active_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight (k,)."""
        return {"weight": (self.features_axis.active,)}

    def stock(self) -> torch.nn.Module:
        """A ``torch.nn.RMSNorm`` of the active width."""
        return torch.nn.RMSNorm(
            self.features_axis.active, self.eps, self.elementwise_affine, device="meta"
        )


def check_width(x: Tensor, axis: ElasticAxis, layer: str, at: int = -1) -> None:
    """The input's width, its axis ``at``, is the active one: axes that disagree are found."""
    if x.dim() < max(-at, at + 1) or x.shape[at] != axis.size():
        raise ShapeError(
            f"{layer} got x of shape {tuple(x.shape)}; its active input width is "
            f"{axis.active} of {axis.full}"
            + (f" (dimension {axis.dimension!r})" if axis.dimension else " (not elastic)")
        )


def one_axis(norm: Any) -> int:
    """The only normalised axis of a norm."""
    shape = tuple(norm.normalized_shape)
    if len(shape) != 1:
        raise ShapeError(f"normalized_shape={shape}; elastic norms have exactly one axis")
    return shape[0]
