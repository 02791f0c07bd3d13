"""Tables of the architectures that ``sk.elasticize`` knows, one file each."""

from sorted_kernels.models.architectures import llama  # noqa: F401  (registers its table)
from sorted_kernels.models.architectures.registry import (
    Architecture,
    Form,
    architecture_of,
    register_architecture,
)

__all__ = ["Architecture", "Form", "architecture_of", "register_architecture"]
