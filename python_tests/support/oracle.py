"""The float64 oracle: each op as arithmetic on contiguous copies, written without this library."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import sorted_kernels as sk

from .poison import prefix

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-5
Parameters = dict[str, Tensor]


def _activate(z: Tensor, name: str | None) -> Tensor:
    if name == "relu":
        return z.clamp(min=0)
    if name == "gelu":
        return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    if name == "silu":
        return z / (1 + torch.exp(-z))
    return z


def exact_linear(x: Tensor, p: Parameters, activation: str | None) -> Tensor:
    z = x @ p["weight"].T
    return _activate(z + p["bias"] if "bias" in p else z, activation)


def exact_layer_norm(x: Tensor, p: Parameters) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    y = centred / (centred.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt()
    y = y * p["weight"] if "weight" in p else y
    return y + p["bias"] if "bias" in p else y


def exact_rms_norm(x: Tensor, p: Parameters) -> Tensor:
    y = x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt()
    return y * p["weight"] if "weight" in p else y


@dataclass(frozen=True)
class Family:
    """One op in its four forms: ours on parents, torch's and the oracle on blocks, and a layer.

    Args:
        name: For test ids.
        shapes: Parameter shapes of an (m, k) block.
        ours: ``(x, parents, m) -> y``.
        plain: ``(x, blocks) -> y`` in torch's own op of the same dtype.
        exact: The same for float64.
        layer: ``(M, K, **options) -> module`` with dimensions ``o`` (rows) and ``i`` (columns).
        indices: Whether the input is indices of rows.
    """

    name: str
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    ours: Callable[[Tensor, Parameters, int], Tensor]
    plain: Callable[[Tensor, Parameters], Tensor]
    exact: Callable[[Tensor, Parameters], Tensor]
    layer: Callable[..., torch.nn.Module] | None = None
    indices: bool = field(default=False)

    def __str__(self) -> str:
        return self.name

    def input(self, shape: tuple[int, ...], rows: int, dtype: torch.dtype) -> Tensor:
        """A random input of which the last axis is the width (indices have none)."""
        if self.indices:
            return torch.randint(rows, shape[:-1])
        return torch.randn(shape).to(dtype)

    def parameters(self, m: int, k: int, dtype: torch.dtype) -> Parameters:
        return {name: torch.randn(shape).to(dtype) for name, shape in self.shapes(m, k).items()}

    def submodel(self, m: int, k: int) -> sk.Submodel:
        return sk.Submodel(i=k, o=m) if self.name.startswith("linear") else sk.Submodel(i=k)


def _linear(activation: str | None, bias: bool) -> Family:
    def shapes(m: int, k: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (m, k), "bias": (m,)} if bias else {"weight": (m, k)}

    def ours(x: Tensor, p: Parameters, m: int) -> Tensor:
        return sk.linear(x, p["weight"], p.get("bias"), out_features=m, activation=activation)

    def plain(x: Tensor, p: Parameters) -> Tensor:
        z = F.linear(x, p["weight"], p.get("bias"))
        return z if activation is None else getattr(F, activation)(z)

    def layer(m: int, k: int, **options) -> torch.nn.Module:
        return sk.nn.Linear(k, m, bias, in_dim="i", out_dim="o", activation=activation, **options)

    name = f"linear-{activation or 'none'}" + ("" if bias else "-nobias")
    return Family(name, shapes, ours, plain, lambda x, p: exact_linear(x, p, activation), layer)


def _norm(kind: str, names: tuple[str, ...]) -> Family:
    def shapes(m: int, k: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(names, (k,))

    def ours(x: Tensor, p: Parameters, m: int) -> Tensor:
        return getattr(sk, kind)(x, **p, eps=EPS)

    def plain(x: Tensor, p: Parameters) -> Tensor:
        return getattr(F, kind)(x, (x.shape[-1],), **p, eps=EPS)

    def layer(m: int, k: int, **options) -> torch.nn.Module:
        made = sk.nn.LayerNorm if kind == "layer_norm" else sk.nn.RMSNorm
        extra = {"bias": "bias" in names} if kind == "layer_norm" else {}
        return made(k, EPS, bool(names), dim="i", **extra, **options)

    exact = exact_layer_norm if kind == "layer_norm" else exact_rms_norm
    return Family("-".join((kind, *names)), shapes, ours, plain, exact, layer)


EMBEDDING = Family(
    "embedding",
    lambda m, k: {"weight": (m, k)},
    lambda x, p, m: sk.embedding(x, p["weight"]),
    lambda x, p: F.embedding(x, p["weight"]),
    lambda x, p: p["weight"][x],
    lambda m, k, **options: sk.nn.Embedding(m, k, dim="i", **options),
    indices=True,
)
LINEAR = [_linear(name, True) for name in (None, "relu", "gelu", "silu")] + [_linear(None, False)]
NORMS = [
    _norm("layer_norm", ("weight", "bias")),
    _norm("layer_norm", ("weight",)),
    _norm("layer_norm", ()),
    _norm("rms_norm", ("weight",)),
    _norm("rms_norm", ()),
]
FAMILIES = [*LINEAR, *NORMS]
TRAINED = [family for family in [*FAMILIES, EMBEDDING] if family.shapes(1, 1)]


@dataclass
class Outcome:
    """An output and the gradients of the input (None for indices) and of each parameter."""

    y: Tensor
    dx: Tensor | None
    gradients: Parameters


def outcome(call: Callable[[Tensor, Parameters], Tensor], x: Tensor, p: Parameters, dy: Tensor):
    """Run an op and its backward on fresh leaves that share nothing with the arguments.

    Views keep their layout: leaves are made by ``detach``.
    """
    leaf = x.detach().requires_grad_(x.is_floating_point())
    leaves = {name: value.detach().requires_grad_() for name, value in p.items()}
    y = call(leaf, leaves)
    y.backward(dy)
    return Outcome(y.detach(), leaf.grad, {name: value.grad for name, value in leaves.items()})


def judged(family: Family, x: Tensor, blocks: Parameters, dy: Tensor) -> tuple[Outcome, Outcome]:
    """Torch's own op of the same dtype, and the float64 oracle, on contiguous copies."""
    plain = outcome(family.plain, x.clone(), {n: b.clone() for n, b in blocks.items()}, dy.clone())
    wide = x.double() if x.is_floating_point() else x
    exact = outcome(family.exact, wide, {n: b.double() for n, b in blocks.items()}, dy.double())
    return plain, exact


def assert_within_twice(
    actual: Tensor, plain: Tensor, exact: Tensor, what: str, terms: int = 0
) -> None:
    """The rule of every numerical test: at most twice torch's own error, plus 1e-6.

    The 1e-6 is of the largest element: in a handful of elements torch's own error is a matter of
    luck, and may be nothing. A sum of several ``terms``, each rounded to the dtype, may be off by
    half a rounding of each: in a handful of elements their order is luck, too.
    """
    assert actual.shape == exact.shape and actual.dtype == plain.dtype, what
    if not exact.numel():
        return
    error = (actual.double() - exact).abs().max().item()
    scale = max(1.0, exact.abs().max().item())
    slack = 1e-6 + terms * torch.finfo(plain.dtype).eps / 2
    allowed = 2 * (plain.double() - exact).abs().max().item() + slack * scale
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_outcome(actual: Outcome, plain: Outcome, exact: Outcome, what: str = "") -> None:
    """Compare outputs and gradients; full-size gradients by their block, and zero outside it."""
    assert_within_twice(actual.y, plain.y, exact.y, f"{what} y")
    if exact.dx is not None:
        assert_within_twice(actual.dx, plain.dx, exact.dx, f"{what} dx")
    for name, wanted in exact.gradients.items():
        found = actual.gradients[name]
        block = found[prefix(wanted.shape)]
        assert_within_twice(block, plain.gradients[name], wanted, f"{what} d{name}")
        rest = found.clone()
        rest[prefix(wanted.shape)] = 0
        assert not rest.any(), f"{what} d{name} is not zero outside its block"
