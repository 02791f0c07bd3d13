"""Evaluation of a whole space, choice of a sub-model, pictures, and anytime inference."""

from sorted_kernels.inference.anytime import AnytimeResult, anytime
from sorted_kernels.inference.evaluate import evaluate
from sorted_kernels.inference.results import Results, Row
from sorted_kernels.inference.select import select

__all__ = ["AnytimeResult", "Results", "Row", "anytime", "evaluate", "select"]
