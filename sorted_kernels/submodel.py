"""Sub-models and the spaces they are drawn from. Knows sizes only: no tensor, no module."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from sorted_kernels.errors import DimensionError, SpaceError

Weights = str | Sequence[float]


@functools.total_ordering
class Submodel(Mapping[str, Any]):
    """One size for each dimension: ``Submodel(depth=8, hidden=384)``.

    A dimension inside the blocks of a model may have one size a block, from the first on:
    ``Submodel(depth=3, ffn=(1536, 768, 768))``, as in MatFormer's mix-and-match.

    Frozen, hashable, and ordered by its sizes (dimensions in alphabetical order; sizes of blocks by
    their mean, then one by one), so that lists of sub-models sort the same way everywhere. Reads
    like a mapping (``s["depth"]``) or an object (``s.depth``).

    Raises:
        DimensionError: A size is not an integer of at least 1 or a tuple of such, or no dimension
            is given.
    """

    __slots__ = ("_sizes", "_key", "_hash")
    _sizes: dict[str, Any]
    _key: tuple[tuple[str, Any], ...]
    _hash: int

    def __init__(self, **sizes: int | Sequence[int]) -> None:
        if not sizes:
            raise DimensionError("Submodel needs at least one dimension, e.g. Submodel(depth=8)")
        checked = {name: _checked(name, size) for name, size in sizes.items()}
        key = tuple(sorted(checked.items()))
        object.__setattr__(self, "_sizes", checked)
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "_hash", hash(key))

    def replace(self, **sizes: int | Sequence[int]) -> Submodel:
        """The same sub-model with some sizes changed."""
        return Submodel(**{**self._sizes, **sizes})

    def fits_in(self, other: Submodel) -> bool:
        """Whether every dimension here is at most the other's: this is a part of the other."""
        return all(name in other and _at_most(size, other[name]) for name, size in self._key)

    def __getitem__(self, name: str) -> Any:
        return self._sizes[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._sizes[name]
        except KeyError:
            raise AttributeError(f"{self!r} has no dimension {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a Submodel is frozen; use .replace(...)")

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Submodel) else NotImplemented

    def __lt__(self, other: Submodel) -> bool:
        if not isinstance(other, Submodel):
            return NotImplemented
        ours, theirs = ([(n, size_order(v)) for n, v in key] for key in (self._key, other._key))
        return ours < theirs

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._sizes,)

    def __repr__(self) -> str:
        return f"Submodel({self})"

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self._sizes.items())


def _rebuild(sizes: dict[str, Any]) -> Submodel:
    return Submodel(**sizes)


def _checked(name: str, size: Any) -> int | tuple[int, ...]:
    """A size as it is kept: an integer, or a tuple of one for each block."""
    listed = isinstance(size, (tuple, list))
    sizes = tuple(size) if listed else (size,)
    for one in sizes:
        if isinstance(one, bool) or not isinstance(one, int) or one < 1:
            break
    else:
        if sizes:
            return sizes if listed else size
    raise DimensionError(
        f"size of dimension {name!r} is {size!r}; allowed are integers of at least 1, or a tuple "
        "of one for each block"
    )


def _at_most(size: Any, limit: Any) -> bool:
    """Whether a size is at most another, block by block."""
    if isinstance(size, tuple) and isinstance(limit, tuple):
        return len(size) <= len(limit) and all(a <= b for a, b in zip(size, limit, strict=False))
    if isinstance(size, tuple):
        return max(size) <= limit
    return size <= (min(limit) if isinstance(limit, tuple) else limit)


def size_order(size: int | tuple[int, ...]) -> tuple[float, bool, tuple[int, ...]]:
    """What sizes of one dimension are sorted by: one number, or one a block by their mean."""
    if isinstance(size, tuple):
        return sum(size) / len(size), True, size
    return size, False, (size,)


def parse_size(text: str) -> int | tuple[int, ...]:
    """``"768"`` or ``"(1536, 768)"`` as a size, the way ``str`` of a sub-model writes it.

    Raises:
        DimensionError: The text is not like that.
    """
    inner = text.strip()
    listed = inner.startswith("(") and inner.endswith(")")
    parts = [part.strip() for part in (inner[1:-1] if listed else inner).split(",")]
    if listed and len(parts) > 1 and not parts[-1]:  # Python's tuple of one
        parts.pop()
    if not all(part.isdecimal() for part in parts) or (not listed and len(parts) > 1):
        raise DimensionError(f"size {text!r} is not like 768 or (1536, 768)")
    sizes = tuple(int(part) for part in parts)
    return sizes if listed else sizes[0]


def probabilities(weights: Weights, count: int) -> list[float]:
    """Turn a weights option into ``count`` probabilities, smallest size first.

    Args:
        weights: ``"uniform"``, ``"geometric"`` (each size half as likely as the one below it, as
            in DyLoRA's geometric variant), ``"geometric:RATIO"``, or one number a size.
        count: How many sizes there are.

    Raises:
        SpaceError: Unknown name, wrong length, or a negative, infinite or all-zero weight.
    """
    if isinstance(weights, str):
        name, _, ratio_text = weights.partition(":")
        try:
            ratio = float(ratio_text) if ratio_text else 0.5
        except ValueError:
            ratio = math.nan
        if name == "uniform" and not ratio_text:
            values = [1.0] * count
        elif name == "geometric" and 0.0 < ratio <= 1.0:
            values = [ratio**i for i in range(count)]
        else:
            raise SpaceError(
                f"weights {weights!r} are unknown; allowed are 'uniform', 'geometric', "
                "'geometric:RATIO' with 0 < RATIO <= 1, or one number a size"
            )
    else:
        values = [float(value) for value in weights]
    if len(values) != count:
        raise SpaceError(f"{len(values)} weights were given for {count} sizes")
    total = sum(values)
    if not all(math.isfinite(v) and v >= 0 for v in values) or not 0 < total < math.inf:
        raise SpaceError(f"weights {list(values)} must be finite, not negative, and not all zero")
    return [value / total for value in values]


class SubmodelSpace:
    """The sub-models to train and their sampling distribution.

    ``SubmodelSpace(depth=[4, 8, 12], hidden=[192, 384])`` is the product of its dimensions, each
    drawn on its own (SortedNet, section 3); :meth:`of` takes a plain list instead.

    Args:
        weights: For each dimension that is not uniform, what :func:`probabilities` takes. Weights
            follow the sizes in the order they were given.
        **sizes: The sizes of each dimension.

    Raises:
        SpaceError: No dimension, a dimension without sizes or with one twice, or bad weights.
        DimensionError: A size below 1, or weights for a dimension that is not there.
    """

    def __init__(
        self, *, weights: Mapping[str, Weights] | None = None, **sizes: Iterable[Any]
    ) -> None:
        if not sizes:
            raise SpaceError("SubmodelSpace is empty: give at least one dimension with its sizes")
        weights = dict(weights or {})
        self.dimensions: dict[str, tuple[Any, ...]] = {}
        self._chances: dict[str, tuple[float, ...]] = {}
        for name, given in sizes.items():
            if not isinstance(given, Iterable):
                raise SpaceError(f"dimension {name!r} is {given!r}; its sizes are given as a list")
            values = [_checked(name, value) for value in given]
            if not values:
                raise SpaceError(f"dimension {name!r} has no sizes")
            if len(set(values)) != len(values):
                raise SpaceError(f"dimension {name!r} names a size twice: {values}")
            option = weights.pop(name, "uniform")
            if isinstance(option, str):  # named distributions run from the smallest size up
                values.sort(key=size_order)
            chances = zip(values, probabilities(option, len(values)), strict=True)
            pairs = sorted(chances, key=lambda pair: size_order(pair[0]))
            self.dimensions[name] = tuple(value for value, _ in pairs)
            self._chances[name] = tuple(chance for _, chance in pairs)
        if weights:
            raise DimensionError(
                f"weights name unknown dimensions {sorted(weights)}; there are {list(sizes)}"
            )
        self._listed: tuple[Submodel, ...] | None = None

    @classmethod
    def of(cls, submodels: Iterable[Submodel], *, weights: Weights = "uniform") -> SubmodelSpace:
        """A space that is a plain list of sub-models under one distribution.

        Args:
            submodels: The list; all have the same dimensions, none stands twice.
            weights: What :func:`probabilities` takes, in the order given (a named distribution
                runs over the sub-models sorted by size).

        Raises:
            SpaceError: The list is empty, repeats itself, or mixes dimensions.
        """
        listed = list(submodels)
        if not listed:
            raise SpaceError("SubmodelSpace.of was given no sub-model")
        if len(set(listed)) != len(listed):
            raise SpaceError("SubmodelSpace.of was given a sub-model twice")
        names = set(listed[0])
        for submodel in listed:
            if set(submodel) != names:
                raise SpaceError(
                    f"{submodel!r} has dimensions {sorted(submodel)}, others {sorted(names)}"
                )
        if isinstance(weights, str):
            listed.sort()
        pairs = sorted(zip(listed, probabilities(weights, len(listed)), strict=True))
        space = cls.__new__(cls)
        space.dimensions = {
            name: tuple(sorted({submodel[name] for submodel in listed}, key=size_order))
            for name in listed[0]
        }
        space._listed = tuple(submodel for submodel, _ in pairs)
        space._chances = {"": tuple(chance for _, chance in pairs)}
        return space

    def sample(self, generator: torch.Generator | None = None) -> Submodel:
        """Draw one sub-model, each dimension by its own distribution.

        Args:
            generator: Source of randomness; torch's global one when not given.
        """
        draws = torch.rand(len(self._chances), generator=generator, dtype=torch.float64)
        picks = [
            min(sum(edge <= draw for edge in itertools.accumulate(chances)), len(chances) - 1)
            for chances, draw in zip(self._chances.values(), draws.tolist(), strict=True)
        ]
        if self._listed is not None:
            return self._listed[picks[0]]
        sizes = zip(self.dimensions.items(), picks, strict=True)
        return Submodel(**{name: values[pick] for (name, values), pick in sizes})

    def probability(self, submodel: Submodel) -> float:
        """How likely :meth:`sample` draws a sub-model; 0 for one that is not in the space."""
        if submodel not in self:
            return 0.0
        if self._listed is not None:
            return self._chances[""][self._listed.index(submodel)]
        return math.prod(
            self._chances[name][sizes.index(submodel[name])]
            for name, sizes in self.dimensions.items()
        )

    @property
    def largest(self) -> Submodel:
        """The sub-model with the largest size in every dimension (of a list: its last)."""
        if self._listed is not None:
            return self._listed[-1]
        return Submodel(**{name: values[-1] for name, values in self.dimensions.items()})

    @property
    def smallest(self) -> Submodel:
        """The sub-model with the smallest size in every dimension (of a list: its first)."""
        if self._listed is not None:
            return self._listed[0]
        return Submodel(**{name: values[0] for name, values in self.dimensions.items()})

    def __iter__(self) -> Iterator[Submodel]:
        if self._listed is not None:
            yield from self._listed
            return
        for sizes in itertools.product(*self.dimensions.values()):
            yield Submodel(**dict(zip(self.dimensions, sizes, strict=True)))

    def __len__(self) -> int:
        if self._listed is not None:
            return len(self._listed)
        return math.prod(len(values) for values in self.dimensions.values())

    def __contains__(self, submodel: object) -> bool:
        if self._listed is not None:
            return submodel in self._listed
        return (
            isinstance(submodel, Submodel)
            and set(submodel) == set(self.dimensions)
            and all(size in self.dimensions[name] for name, size in submodel.items())
        )

    def __repr__(self) -> str:
        if self._listed is not None:
            return f"SubmodelSpace.of(<{len(self)} sub-models>)"
        inner = ", ".join(f"{name}={list(values)}" for name, values in self.dimensions.items())
        return f"SubmodelSpace({inner})"
