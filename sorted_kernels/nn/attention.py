"""Multi-head attention whose heads and features follow named dimensions."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sorted_kernels.errors import ShapeError
from sorted_kernels.nn.axis import AxisSpec
from sorted_kernels.nn.layers import Linear
from sorted_kernels.ops.attention import attention

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class MultiheadAttention(torch.nn.Module):
    """Attention of H heads between linear projections, over its leading heads and features.

    The projections are :class:`~sorted_kernels.nn.Linear` layers whose axes follow the dimensions:
    a head is a block of rows of ``q_proj``, ``k_proj`` and ``v_proj`` and of columns of
    ``out_proj``. At full size it computes what ``torch.nn.MultiheadAttention`` does.

    Args:
        embed_dim: E, the stored features.
        num_heads: H, the stored heads.
        num_kv_heads: Hkv, a divisor of H; H when not given. H / Hkv heads of q share one of k and
            v; they are active together, so an active count of heads is rounded up to a multiple.
        head_dim: D; E / H when not given.
        bias: Whether the projections have biases.
        batch_first: Whether inputs are (B, S, E), and not (S, B, E).
        device: As in torch.
        dtype: As in torch.
        dim: Dimension of the features: a name, ``(name, multiple_of)`` or None.
        heads_dim: Dimension of the heads: a name or None. Its full size is H.
        grad_mode: As of the other layers.

    Raises:
        ShapeError: Sizes that do not divide each other, or below 1.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        batch_first: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dim: AxisSpec = None,
        heads_dim: str | None = None,
        grad_mode: str = "inplace",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.batch_first = batch_first
        self.dimensions = {} if heads_dim is None else {heads_dim: num_heads}
        options = {"device": device, "dtype": dtype, "grad_mode": grad_mode}

        def projection(heads: int, group: int) -> Linear:
            rows = None if heads_dim is None else (heads_dim, group * self.head_dim)
            width = heads * self.head_dim
            return Linear(embed_dim, width, bias, in_dim=dim, out_dim=rows, **options)

        group = num_heads // num_kv_heads
        self.q_proj = projection(num_heads, group)
        self.k_proj, self.v_proj = projection(num_kv_heads, 1), projection(num_kv_heads, 1)
        columns = None if heads_dim is None else (heads_dim, group * self.head_dim)
        self.out_proj = Linear(
            num_heads * self.head_dim, embed_dim, bias, in_dim=columns, out_dim=dim, **options
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``torch.nn.MultiheadAttention`` does: Xavier uniform, biases zero."""
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            torch.nn.init.xavier_uniform_(layer.weight)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attend from the query's rows to the key's.

        Args:
            query: (B, S, active E), or (S, B, E) without ``batch_first``.
            key: (B, T, active E); the query when not given.
            value: (B, T, active E); the key when not given.
            mask: Broadcasts to (B, active H, S, T): boolean (True: attend) or additive. Padding of
                keys is (B, 1, 1, T).
            causal: Row i attends to columns 0..i.

        Returns:
            The query's shape.

        Raises:
            ShapeError: An input that has not three axes, or not the active features.
        """
        key = query if key is None else key
        value = key if value is None else value
        wanted = "(batch, rows, features)" if self.batch_first else "(rows, batch, features)"
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() != 3:
                raise ShapeError(f"{name} has shape {tuple(x.shape)}; three axes are {wanted}")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        y = attention(*(self._by_head(x) for x in (q, k, v)), mask=mask, causal=causal)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return y if self.batch_first else y.transpose(0, 1)

    def _by_head(self, x: Tensor) -> Tensor:
        """A projection (B, S, n D) as a view (B, n, S, D)."""
        heads = x.shape[-1] // self.head_dim
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def plain(self, projections: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
        """The same forward between plain projections, as a module of torch alone.

        ``torch.nn.MultiheadAttention`` can hold neither fewer heads than its features make nor
        shared heads of k and v, and returns a pair; so this is a ``torch.fx.GraphModule``. It takes
        what :meth:`forward` takes, but a key or value that is not given is left out, not None; and
        PyTorch takes ``mask`` and ``causal`` together on a CPU only.
        """
        graph = torch.fx.Graph()
        query, rest, options = (graph.placeholder(n) for n in ("query", "*rest", "**options"))

        def item(x: torch.fx.Node, index: int | slice) -> torch.fx.Node:
            return graph.call_function(operator.getitem, (x, index))

        def option(name: str, otherwise: Any) -> torch.fx.Node:
            return graph.call_method("get", (options, name, otherwise))

        def swapped(x: torch.fx.Node, first: int) -> torch.fx.Node:
            return graph.call_method("transpose", (x, first, first + 1))

        # A graph has no conditions, and is traced anew when it is unpickled. What is given by
        # position is one to three tensors: the last one stands for those that are left out.
        given = graph.call_function(operator.add, ((query,), rest))
        key = option("key", item(item(given, slice(2)), -1))
        value = option("value", option("key", item(given, -1)))
        inputs = [query, key, value]
        if not self.batch_first:
            inputs = [swapped(x, 0) for x in inputs]
        heads = []
        for name, x in zip(PROJECTIONS, inputs, strict=False):
            split = (graph.call_module(name, (x,)), -1, (-1, self.head_dim))
            heads.append(swapped(graph.call_method("unflatten", split), 1))
        how: dict[str, Any] = {
            "attn_mask": option("mask", None),
            "is_causal": option("causal", False),
        }
        how["enable_gqa"] = self.num_heads != self.num_kv_heads
        y = graph.call_function(F.scaled_dot_product_attention, tuple(heads), how)
        joined = graph.call_method("flatten", (swapped(y, 1), 2))
        y = graph.call_module("out_proj", (joined,))
        graph.output(y if self.batch_first else swapped(y, 0))
        made = torch.fx.GraphModule(dict(projections), graph, class_name=type(self).__name__)
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Stored sizes."""
        return f"{self.embed_dim}, {self.num_heads}, {self.num_kv_heads}, head_dim={self.head_dim}"


def _check_sizes(embed_dim: int, heads: int, kv_heads: int, head_dim: int | None) -> None:
    sizes = {"embed_dim": embed_dim, "num_heads": heads, "num_kv_heads": kv_heads}
    for name, size in {**sizes, "head_dim": 1 if head_dim is None else head_dim}.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ShapeError(f"{name}={size!r}; allowed are integers of at least 1")
    if heads % kv_heads:
        raise ShapeError(f"num_kv_heads={kv_heads} does not divide num_heads={heads}")
    if head_dim is None and embed_dim % heads:
        raise ShapeError(f"num_heads={heads} does not divide embed_dim={embed_dim}; give head_dim")
