"""Small data sets and the loader for what fits in memory."""

from sorted_kernels.data.batches import Batches
from sorted_kernels.data.blobs import blobs
from sorted_kernels.data.digits import Digits, digits

__all__ = ["Batches", "Digits", "blobs", "digits"]
