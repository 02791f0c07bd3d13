"""Exception types. Each says which argument was wrong, what it was, and what is allowed."""

from __future__ import annotations


class SortedKernelsError(Exception):
    """Base of every error that this library raises about what a user passed."""


class ShapeError(SortedKernelsError, ValueError):
    """A size or rank is outside what the tensor, module or option allows."""


class StrideError(SortedKernelsError, ValueError):
    """A tensor's memory layout cannot be read in place, and the library never copies silently."""


class DTypeError(SortedKernelsError, TypeError):
    """A tensor's dtype is not supported, or two tensors' dtypes differ."""


class DeviceError(SortedKernelsError, ValueError):
    """Two tensors are on different devices, or a back end cannot run on a tensor's device."""


class DimensionError(SortedKernelsError, ValueError):
    """A sub-model names an unknown dimension, or a size that the dimension does not have."""


class SpaceError(SortedKernelsError, ValueError):
    """A space of sub-models is empty, or its weights do not fit its sizes."""


class RuleError(SortedKernelsError, ValueError):
    """A rule given to ``elasticize`` matches nothing, or the axes it ties together disagree."""


class GradientError(SortedKernelsError, RuntimeError):
    """An operation is not available on the gradient path in use."""


class CheckpointError(SortedKernelsError, ValueError):
    """A checkpoint is missing, truncated, of another model, or cannot be written."""


class DataError(SortedKernelsError, ValueError):
    """A data file is missing, truncated, or holds something else."""


class OptionError(SortedKernelsError, ValueError):
    """An option has a value that is not among those allowed."""


class DependencyError(SortedKernelsError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def require(package: str, extra: str) -> object:
    """Import and return an optional package, or say which extra brings it.

    Args:
        package: Name to import, for example ``"matplotlib.pyplot"``.
        extra: The extra of this library that installs it.

    Raises:
        DependencyError: The package is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DependencyError(
            f"{package.split('.')[0]!r} is needed here and is not installed; "
            f"pip install 'sorted_kernels[{extra}]' brings it"
        ) from error
