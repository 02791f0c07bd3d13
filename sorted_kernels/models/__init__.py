"""Existing models made elastic, sub-models cut out of them, and their costs."""

from sorted_kernels.models.architectures import Form, register_architecture
from sorted_kernels.models.elasticize import elasticize
from sorted_kernels.models.export import count_flops, count_parameters, export
from sorted_kernels.models.importance import sort_by_importance
from sorted_kernels.models.preresnet import CPRERESNET_RULES, CPreResNet20, elastic_cpreresnet20
from sorted_kernels.models.residual_mlp import (
    RESIDUAL_MLP_RULES,
    ResidualMLP,
    elastic_residual_mlp,
)

__all__ = [
    "CPRERESNET_RULES",
    "CPreResNet20",
    "Form",
    "RESIDUAL_MLP_RULES",
    "ResidualMLP",
    "count_flops",
    "count_parameters",
    "elastic_cpreresnet20",
    "elastic_residual_mlp",
    "elasticize",
    "export",
    "register_architecture",
    "sort_by_importance",
]
