"""This library's attention under the name that the models of ``transformers`` ask for.

``model.set_attn_implementation("sorted_kernels")`` chooses it; models keep their own by default.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from sorted_kernels import ops
from sorted_kernels.errors import OptionError

NAME = "sorted_kernels"


def register_attention() -> bool:
    """Enter it into ``transformers``' interfaces, if both are there; whether they are."""
    if not callable(getattr(ops, "attention", None)) or "transformers" not in sys.modules:
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return True


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What ``transformers`` calls.

    Args:
        module: The model's attention module.
        query: (B, H, S, D).
        key: (B, Hkv, T, D).
        value: (B, Hkv, T, D).
        attention_mask: Broadcasts to (B, H, S, T), or None.
        dropout: Must be 0.
        scaling: Of the scores.
        is_causal: Whether row i sees keys up to i where there is no mask; when not given, what the
            module says.
        **options: What other attention functions take.

    Returns:
        (B, S, H, D), and no weights.

    Raises:
        OptionError: Dropout, or an option that changes the scores.
    """
    refused = {"dropout": dropout or None}
    refused.update({name: options.get(name) for name in ("softcap", "position_bias")})
    for name, given in refused.items():
        if given is not None:
            raise OptionError(f"{name} is not possible with the attention {NAME!r}")
    length = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and length > 1
    if causal and key.shape[2] > length:  # a cache with room for more
        key, value = key[:, :, :length], value[:, :, :length]
    attention: Any = ops.attention  # type: ignore[attr-defined]
    out = attention(query, key, value, causal=causal, mask=attention_mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None
