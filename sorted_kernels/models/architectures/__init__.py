"""Tables of the architectures that ``sk.elasticize`` knows, one file each."""

from sorted_kernels.models.architectures import (  # noqa: F401  (they register themselves)
    bert,
    gpt2,
    llama,
    mobilenet_v2,
    vit,
)
from sorted_kernels.models.architectures.registry import (
    Architecture,
    Form,
    architecture_of,
    register_architecture,
)

__all__ = ["Architecture", "Form", "architecture_of", "register_architecture"]
