"""Operations over the prefixes of shared weights: one file an op family."""

from sorted_kernels.ops import gemm  # noqa: F401  (defines the compiled GEMM's op)
from sorted_kernels.ops.attention import attention
from sorted_kernels.ops.batch_norm import batch_norm
from sorted_kernels.ops.conv2d import conv2d
from sorted_kernels.ops.embedding import embedding
from sorted_kernels.ops.group_norm import group_norm, instance_norm
from sorted_kernels.ops.layer_norm import layer_norm
from sorted_kernels.ops.linear import linear
from sorted_kernels.ops.linear_cross_entropy import linear_cross_entropy
from sorted_kernels.ops.rms_norm import rms_norm

__all__ = [
    "attention",
    "batch_norm",
    "conv2d",
    "embedding",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
]
