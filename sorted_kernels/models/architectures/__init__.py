"""Tables of the architectures that ``sk.elasticize`` knows, one file each."""

from sorted_kernels.models.architectures import bert, gpt2, llama, vit  # noqa: F401  (register themselves)
from sorted_kernels.models.architectures.registry import (
    Architecture,
    Form,
    architecture_of,
    register_architecture,
)

__all__ = ["Architecture", "Form", "architecture_of", "register_architecture"]
