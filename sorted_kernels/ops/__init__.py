"""Operations over the prefixes of shared weights: one file an op family."""

from sorted_kernels.ops import gemm  # noqa: F401  (defines the compiled GEMM's op)
from sorted_kernels.ops.attention import attention
from sorted_kernels.ops.embedding import embedding
from sorted_kernels.ops.layer_norm import layer_norm
from sorted_kernels.ops.linear import linear
from sorted_kernels.ops.rms_norm import rms_norm

__all__ = ["attention", "embedding", "layer_norm", "linear", "rms_norm"]
