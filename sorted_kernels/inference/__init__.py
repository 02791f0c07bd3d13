"""Evaluation of a whole space, choice of a sub-model, pictures, and anytime inference."""

from sorted_kernels.inference.anytime import AnytimeResult, anytime
from sorted_kernels.inference.evaluate import evaluate
from sorted_kernels.inference.plots import cost_plot, heat_map
from sorted_kernels.inference.recalibrate import recalibrate
from sorted_kernels.inference.results import Results, Row
from sorted_kernels.inference.select import select

__all__ = [
    "AnytimeResult",
    "Results",
    "Row",
    "anytime",
    "cost_plot",
    "evaluate",
    "heat_map",
    "recalibrate",
    "select",
]
