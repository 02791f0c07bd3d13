"""Calls that are remembered, so that the same work need not be done again.

A call is replayed only where that is provably the same work: the same arguments, and no tensor
among them or in the result changed in place since.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import OptionError

Equal = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""Pairs of tensors found equal, by identity; the values keep the identities from being reused."""


class Call:
    """What a module was given and what it returned, with the version of every tensor in them.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        function: What to call with them; called once, here.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[..., Any]
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self._inputs = _versions((args, kwargs))
        self.output = function(*args, **kwargs)
        self._outputs = _versions(self.output)

    def inputs_intact(self) -> bool:
        """Whether no tensor among the arguments was changed in place since before the call."""
        return all(tensor._version == version for tensor, version in self._inputs)

    def output_intact(self) -> bool:
        """Whether no tensor in the result was changed in place since the call."""
        return all(tensor._version == version for tensor, version in self._outputs)

    def had(self, args: tuple[Any, ...], kwargs: dict[str, Any], equal: Equal) -> bool:
        """Whether the call was given these arguments."""
        return _same(args, self.args, equal) and (
            not (kwargs or self.kwargs) or _same(kwargs, self.kwargs, equal)
        )

    def took_spent(self) -> bool:
        """Whether a spent tensor was among the arguments."""
        return any(isinstance(tensor, Spent) for tensor in tensors((self.args, self.kwargs)))

    def forgetting(self, gone: dict[int, Spent], output: bool) -> Call:
        """The same call with spent tensors in the place of real ones.

        Args:
            gone: What stands for a tensor, by the tensor's identity.
            output: Whether the result goes too; ``gone`` then learns of it.
        """
        call = copy.copy(self)
        call.args, call.kwargs = _replaced(self.args, gone), _replaced(self.kwargs, gone)
        call._inputs = [(tensor, v) for tensor, v in self._inputs if id(tensor) not in gone]
        if output:
            gone.update((id(tensor), _spent(tensor)) for tensor in tensors(self.output))
            call.output, call._outputs = _replaced(self.output, gone), []
        return call


class SpentError(OptionError):
    """Somebody wanted the content of a :class:`Spent` tensor."""


class Spent(Tensor):
    """Stands for a tensor that has been given up: it has a shape and a dtype, but no content.

    Any operation on it raises :class:`SpentError`.
    """

    origin: torch.device

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer what needs no content and refuse everything else."""
        if func == Tensor.device.__get__:
            return args[0].origin
        if func in _WITHOUT_CONTENT:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise SpentError(
            "the model uses the hidden state of an earlier block, which it did not use at the "
            "depths before: exits cannot share its work"
        )


_WITHOUT_CONTENT = (
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.dim,
    Tensor.size,
)


def _spent(tensor: Tensor) -> Spent:
    if isinstance(tensor, Spent):
        return tensor
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(Spent)
    empty.origin = tensor.device
    return empty


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value and inside its tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)


def _replaced(value: Any, gone: dict[int, Spent]) -> Any:
    """The value with others in the place of some tensors inside tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return gone.get(id(value), value)
    if type(value) in (tuple, list):
        return type(value)(_replaced(item, gone) for item in value)
    if type(value) is dict:
        return {key: _replaced(item, gone) for key, item in value.items()}
    return value


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    return [
        (tensor, tensor._version)
        for tensor in tensors(value)
        if not isinstance(tensor, Spent) and not tensor.is_inference()
    ]


def _same(new: Any, old: Any, equal: Equal) -> bool:
    """Whether two arguments hold the same, bit for bit where they are tensors."""
    if new is old:
        return True
    if type(new) is not type(old):
        return False
    if isinstance(new, (tuple, list)):
        pairs = zip(new, old, strict=False)
        return len(new) == len(old) and all(_same(a, b, equal) for a, b in pairs)
    if isinstance(new, Mapping):
        return new.keys() == old.keys() and all(_same(new[k], old[k], equal) for k in new)
    if isinstance(new, Spent):
        return False
    if isinstance(new, Tensor):
        key = (id(new), id(old))
        if key not in equal and _equal(new, old):
            equal[key] = (new, old)
        return key in equal
    if isinstance(new, (int, float, complex, str, bytes)):
        return bool(new == old)
    return True  # caches, configurations: made anew in each run, and no work carries over in them


def _equal(new: Tensor, old: Tensor) -> bool:
    if new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
        return False
    if new.data_ptr() == old.data_ptr() and new.stride() == old.stride():
        return True
    # A NaN is equal to itself here: it is the same work again.
    return torch.equal(new, old) or bool(((new == old) | ((new != new) & (old != old))).all())
