"""Layers with elastic axes, and the switch between the sub-models of a model."""

from sorted_kernels.nn.activation import activate, active, current, depth_lists, dimensions
from sorted_kernels.nn.attention import MultiheadAttention
from sorted_kernels.nn.axis import ElasticAxis
from sorted_kernels.nn.layers import Embedding, LayerNorm, Linear, RMSNorm
from sorted_kernels.nn.module_list import ModuleList, Sequential

__all__ = [
    "ElasticAxis",
    "Embedding",
    "LayerNorm",
    "Linear",
    "ModuleList",
    "MultiheadAttention",
    "RMSNorm",
    "Sequential",
    "activate",
    "active",
    "current",
    "depth_lists",
    "dimensions",
]
