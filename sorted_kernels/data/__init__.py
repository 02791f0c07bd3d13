"""Small data sets, CIFAR-10 and GLUE from local copies, and the loader for what fits in memory."""

from sorted_kernels.data.augment import CropAndFlip
from sorted_kernels.data.batches import Batches
from sorted_kernels.data.blobs import blobs
from sorted_kernels.data.cifar import cifar10
from sorted_kernels.data.digits import Digits, digit_images, digits
from sorted_kernels.data.glue import GLUE, GlueTask, Sentences, glue
from sorted_kernels.data.images import Images

__all__ = [
    "GLUE",
    "Batches",
    "CropAndFlip",
    "Digits",
    "GlueTask",
    "Images",
    "Sentences",
    "blobs",
    "cifar10",
    "digit_images",
    "digits",
    "glue",
]
