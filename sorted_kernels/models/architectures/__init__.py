"""Tables of the architectures that ``sk.elasticize`` knows, one file each."""

from sorted_kernels.models.architectures import llama, mobilenet_v2  # noqa: F401  (they register)
from sorted_kernels.models.architectures.registry import (
    Architecture,
    Form,
    architecture_of,
    register_architecture,
)

__all__ = ["Architecture", "Form", "architecture_of", "register_architecture"]
