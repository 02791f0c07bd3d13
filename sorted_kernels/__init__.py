"""One set of weights, every network in it, each at its own cost."""

from sorted_kernels.submodel import Submodel, SubmodelSpace

__all__ = ["Submodel", "SubmodelSpace"]
