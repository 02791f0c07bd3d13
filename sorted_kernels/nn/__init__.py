"""Layers with elastic axes, and the switch between the sub-models of a model."""

from sorted_kernels.nn.activation import activate, active, current, depth_lists, dimensions
from sorted_kernels.nn.attention import MultiheadAttention
from sorted_kernels.nn.axis import ElasticAxis
from sorted_kernels.nn.batch_norm import BatchNorm1d, BatchNorm2d
from sorted_kernels.nn.batch_norm_policy import (
    forget_recalibrated,
    recalibrated,
    set_batch_norm_policy,
)
from sorted_kernels.nn.conv import Conv2d
from sorted_kernels.nn.conv1d import Conv1D
from sorted_kernels.nn.embedding import Embedding
from sorted_kernels.nn.group_norm import GroupNorm, InstanceNorm2d
from sorted_kernels.nn.layers import LayerNorm, Linear, RMSNorm
from sorted_kernels.nn.linear_cross_entropy import LinearCrossEntropy
from sorted_kernels.nn.module_list import ModuleList, Sequential

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv1D",
    "Conv2d",
    "ElasticAxis",
    "Embedding",
    "GroupNorm",
    "InstanceNorm2d",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropy",
    "ModuleList",
    "MultiheadAttention",
    "RMSNorm",
    "Sequential",
    "activate",
    "active",
    "current",
    "depth_lists",
    "dimensions",
    "forget_recalibrated",
    "recalibrated",
    "set_batch_norm_policy",
]
