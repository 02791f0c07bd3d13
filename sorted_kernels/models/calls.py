"""Calls that are remembered, so that the same work need not be done again.

A call is replayed only where that is provably the same work: the same arguments, and no tensor
among them or in the result changed in place since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

    __slots__ = ("args", "kwargs", "output", "_inputs", "_outputs")

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[..., Any]
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self._inputs = _versions((args, kwargs) if kwargs else args)
        self.output = function(*args, **kwargs)
        self._outputs = _versions(self.output)

    def intact(self) -> bool:
        """Whether no argument was changed in place, in the call or since, and no result since."""
        for pairs in (self._inputs, self._outputs):
            for tensor, version in pairs:
                if tensor._version != version:
                    return False
        return True

    def had(self, args: tuple[Any, ...], kwargs: dict[str, Any], equal: Equal) -> bool:
        """Whether the call was given these arguments."""
        mine = self.args
        if len(args) == 1 == len(mine) and args[0] is mine[0] and not kwargs and not self.kwargs:
            return True
        return _same(args, mine, equal) and _same(kwargs, self.kwargs, equal)

    def took_spent(self) -> bool:
        """Whether a spent tensor was among the arguments."""
        return any(isinstance(tensor, Spent) for tensor in tensors((self.args, self.kwargs)))

    def forget_inputs(self, gone: Gone) -> None:
        """Put the spent tensors that stand for those that are gone among the arguments."""
        if self._inputs:
            self.args = _replaced(self.args, gone)
            self.kwargs = _replaced(self.kwargs, gone) if self.kwargs else self.kwargs
            self._inputs = [pair for pair in self._inputs if id(pair[0]) not in gone]

    def forget_output(self, gone: Gone) -> None:
        """Put spent tensors in the place of the result's, and note them in ``gone``."""
        for tensor, _ in self._outputs:
            if id(tensor) not in gone:
                gone[id(tensor)] = (tensor, _spent(tensor))
        self.output, self._outputs = _replaced(self.output, gone), []


class SpentError(OptionError):
    """Somebody wanted the content of a :class:`Spent` tensor."""


class Spent(Tensor):
    """Stands for a tensor that has been given up: it has a shape and a dtype, but no content.

    Any operation on it raises :class:`SpentError`.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer what needs no content and refuse everything else."""
        if func in _WITHOUT_CONTENT:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise SpentError(
            "the model uses the hidden state of an earlier block, which it did not use at the "
            "depths before: exits cannot share its work"
        )

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]  # what gets past Python


_WITHOUT_CONTENT = (
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.dim,
    Tensor.size,
)

Gone = dict[int, tuple[Tensor, Spent]]
"""What stands for a tensor, by the tensor's identity; the values keep it from being reused."""


def _spent(tensor: Tensor) -> Spent:
    return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        Spent, tensor.shape, dtype=tensor.dtype, device=tensor.device
    )


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a value and inside its tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        if len(value) == 1:
            return tensors(value[0])
        return [tensor for item in value for tensor in tensors(item)]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors(item)]
    return []


def _replaced(value: Any, gone: Gone) -> Any:
    """The value with others in the place of some tensors inside tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return gone[id(value)][1] if id(value) in gone else value
    if type(value) in (tuple, list):
        return type(value)([_replaced(item, gone) for item in value])
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
