"""Nested states to JSON and tensors, and back: never through pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import CheckpointError

_TENSOR, _TUPLE, _MAP = "$tensor", "$tuple", "$map"


class Encoder:
    """Turns a nested state into what JSON can hold, and gathers its tensors on the way.

    Tensors are replaced by ``{"$tensor": key}``; one tensor under two names (tied weights) is kept
    once. Tuples and mappings with keys that are not strings have markers of their own.

    Attributes:
        tensors: What was gathered: contiguous tensors, no two of which share memory.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._keys: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, path: str) -> Any:
        """Encode one value.

        Args:
            value: Numbers, strings, None, tensors, and lists, tuples and mappings of them. The
                caller keeps it alive until the tensors are written.
            path: Where it stands, for tensor keys and messages.

        Raises:
            CheckpointError: Something in it is of another type.
        """
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            return {_TENSOR: self._gather(value.detach(), path)}
        if isinstance(value, (list, tuple)):
            items = [self.encode(item, f"{path}/{i}") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {_TUPLE: items}
        if isinstance(value, Mapping):
            pairs = [[key, self.encode(item, f"{path}/{key}")] for key, item in value.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return dict(pairs)
            return {_MAP: [[self.encode(key, path), item] for key, item in pairs]}
        raise CheckpointError(
            f"{path} is a {type(value).__name__}, which a checkpoint cannot hold; allowed are "
            "tensors, numbers, strings, None, and lists, tuples and mappings of them"
        )

    def _gather(self, tensor: Tensor, path: str) -> str:
        storage = tensor.untyped_storage()
        place = (storage.data_ptr(), tensor.storage_offset())
        identity = (place, tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in self._keys:
            return self._keys[identity]
        key = path if path not in self.tensors else f"{path}#{len(self.tensors)}"
        self._keys[identity] = key
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not (whole and tensor.is_contiguous()) or storage.data_ptr() in self._storages:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._storages.add(storage.data_ptr())
        self.tensors[key] = tensor
        return key


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :meth:`Encoder.encode`.

    Raises:
        LookupError: A tensor that the JSON names is not among ``tensors``.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_TENSOR}:
        try:
            return tensors[value[_TENSOR]]
        except KeyError:
            raise LookupError(f"tensor {value[_TENSOR]!r} is missing") from None
    if set(value) == {_TUPLE}:
        return tuple(decode(value[_TUPLE], tensors))
    if set(value) == {_MAP}:
        return {decode(key, tensors): decode(item, tensors) for key, item in value[_MAP]}
    return {key: decode(item, tensors) for key, item in value.items()}
