"""Small data sets, CIFAR-10 from a local copy, and the loader for what fits in memory."""

from sorted_kernels.data.augment import CropAndFlip
from sorted_kernels.data.batches import Batches
from sorted_kernels.data.blobs import blobs
from sorted_kernels.data.cifar import cifar10
from sorted_kernels.data.digits import Digits, digit_images, digits
from sorted_kernels.data.images import Images

__all__ = [
    "Batches",
    "CropAndFlip",
    "Digits",
    "Images",
    "blobs",
    "cifar10",
    "digit_images",
    "digits",
]
