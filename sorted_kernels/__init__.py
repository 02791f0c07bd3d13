"""One set of weights, every network in it, each at its own cost."""

from sorted_kernels import inference, models, nn, optim, training
from sorted_kernels.errors import (
    CheckpointError,
    DataError,
    DependencyError,
    DeviceError,
    DimensionError,
    DTypeError,
    GradientError,
    OptionError,
    RuleError,
    ShapeError,
    SortedKernelsError,
    SpaceError,
    StrideError,
)
from sorted_kernels.models import count_flops, count_parameters, elasticize, export
from sorted_kernels.nn import activate, active
from sorted_kernels.ops import (
    attention,
    batch_norm,
    conv2d,
    embedding,
    group_norm,
    instance_norm,
    layer_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
)
from sorted_kernels.row_widths import RowWidths
from sorted_kernels.staircase import Staircase
from sorted_kernels.submodel import Submodel, SubmodelSpace

__all__ = [
    "CheckpointError",
    "DTypeError",
    "DataError",
    "DependencyError",
    "DeviceError",
    "DimensionError",
    "GradientError",
    "OptionError",
    "RuleError",
    "ShapeError",
    "SortedKernelsError",
    "SpaceError",
    "Staircase",
    "StrideError",
    "RowWidths",
    "Submodel",
    "SubmodelSpace",
    "activate",
    "active",
    "attention",
    "batch_norm",
    "conv2d",
    "count_flops",
    "count_parameters",
    "elasticize",
    "embedding",
    "export",
    "group_norm",
    "inference",
    "instance_norm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "models",
    "nn",
    "optim",
    "training",
    "rms_norm",
]
