"""Running a model again without computing again what its last run has computed.

Used by anytime inference. A *call* remembers what a module was given and what it returned, and is
replayed only where that is provably the same work: same arguments, no tensor changed in place.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import OptionError
from sorted_kernels.nn import active
from sorted_kernels.nn.module_list import DepthContainer
from sorted_kernels.submodel import Submodel

now = time.perf_counter  # tests put a clock of their own here


class Call:
    """A call of a module: its arguments and result, and the version of every tensor in them.

    Args:
        function: What to call; it is called once, here.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
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

    def had(self, args: tuple[Any, ...], kwargs: dict[str, Any], seen: set[tuple[int, int]]) -> bool:
        """Whether the call was given these arguments; ``seen`` has pairs already found equal."""
        return _same(args, self.args, seen) and (
            not (kwargs or self.kwargs) or _same(kwargs, self.kwargs, seen)
        )


class Position(torch.nn.Module):
    """Stands for one block of a depth list: computes the first time, replays from then on."""

    def __init__(self, replay: Replay, index: int, block: torch.nn.Module) -> None:
        super().__init__()
        # Past Module's bookkeeping: the block stays a part of its model alone.
        self.__dict__.update(replay=replay, index=index, block=block, call=None, runs=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives for these arguments."""
        state = self.__dict__
        replay, call = state["replay"], state["call"]
        state["runs"] += 1
        replay.in_blocks = True
        if call is None:
            replay.mark_start(args)
            call = state["call"] = Call(state["block"], args, kwargs)
            if not call.inputs_intact():
                raise OptionError(
                    f"{self} changes its input in place, so exits cannot share its work; "
                    "write x = x + y, not x += y"
                )
        elif not call.inputs_intact() or not call.output_intact():
            raise OptionError(
                f"the hidden state around {self} is changed in place after it, so exits cannot "
                "share it; write x = x + y, not x += y"
            )
        elif not call.had(args, kwargs, replay.equal):
            raise OptionError(
                f"{self} gets other arguments at another depth, so exits cannot share its work; "
                "the model's forward must loop once over the list, first block first"
            )
        return call.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def __str__(self) -> str:
        return f"block {self.__dict__['index']} of {self.__dict__['replay'].name!r}"


class Replay:
    """Runs of one model at rising depths that share the blocks and what comes before them.

    Args:
        model: The model.
        name: Path of its depth list.
        blocks: Its depth list.
    """

    def __init__(self, model: torch.nn.Module, name: str, blocks: DepthContainer) -> None:
        self.model, self.name, self.blocks = model, name, blocks
        self.positions = [Position(self, i, b) for i, b in enumerate(blocks.all_blocks())]
        self.in_blocks = False
        self.blocks_started = 0.0
        self.equal: set[tuple[int, int]] = set()
        self._wait = False
        self._stems = _outside(model, blocks)
        self._calls: dict[torch.nn.Module, list[Call]] = {}

    def run(
        self, forward: Callable[[], Any], submodel: Submodel, count: int, *, wait: bool
    ) -> Any:
        """One run of the model with the first ``count`` blocks.

        Args:
            forward: Runs the model.
            submodel: What is active meanwhile.
            count: How many blocks run; those of earlier runs are replayed.
            wait: Wait for the device where times are taken.

        Raises:
            OptionError: The model's forward does not run each block once, on its predecessor.
        """
        positions = self.positions[:count]
        for position in positions:
            position.__dict__["runs"] = 0
        self.in_blocks, self._wait = False, wait
        self.equal.clear()
        with (
            active(self.model, submodel),
            self.blocks.play(positions),
            self._replaying_stems(),
            torch.inference_mode(False),  # its tensors have no version to tell changes by
            torch.no_grad(),
        ):
            output = forward()
        for position in positions:
            if position.__dict__["runs"] != 1:
                raise OptionError(
                    f"the model's forward runs {position} {position.__dict__['runs']} times; "
                    "exits can share blocks that run exactly once"
                )
        if wait:
            synchronize(output)
        return output

    def mark_start(self, args: tuple[Any, ...]) -> None:
        """Note when a run's first new block starts: the clock of the time a block takes."""
        if self._awaiting_start:
            self._awaiting_start = False
            if self._wait:
                synchronize(args)
            self.blocks_started = now()

    @contextlib.contextmanager
    def _replaying_stems(self) -> Iterator[None]:
        """Have the modules outside the list replay the calls that they get before the blocks."""
        self._awaiting_start = True
        before = [(module, module.__dict__.get("forward")) for module in self._stems]
        for module in self._stems:
            module.__dict__["forward"] = self._replaying(module)
        try:
            yield
        finally:
            for module, forward in before:
                if forward is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = forward
            # Those that did not run before the blocks (the head) need no care in later runs.
            self._stems = [module for module in self._stems if module in self._calls]

    def _replaying(self, module: torch.nn.Module) -> Callable[..., Any]:
        """The module's forward, except that before the blocks it replays equal calls."""
        forward = module.forward
        earlier = self._calls.get(module, [])
        made: list[Call] = []

        def replaying(*args: Any, **kwargs: Any) -> Any:
            if self.in_blocks:
                return forward(*args, **kwargs)
            call = earlier[len(made)] if len(made) < len(earlier) else None
            intact = call is not None and call.inputs_intact() and call.output_intact()
            if call is None or not intact or not call.had(args, kwargs, self.equal):
                call = Call(forward, args, kwargs)
            made.append(call)
            self._calls[module] = made
            return call.output

        return replaying


def synchronize(value: Any) -> None:
    """Wait for the devices of the tensors in a value."""
    for device in {tensor.device for tensor in _tensors(value) if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def _outside(model: torch.nn.Module, blocks: DepthContainer) -> list[torch.nn.Module]:
    """The outermost modules that do not contain the blocks, but for those tied to their depth."""
    dimension = blocks.depth_axis.dimension if blocks.depth_axis is not None else None
    found: dict[torch.nn.Module, None] = {}

    def visit(module: torch.nn.Module) -> bool:
        """Collect below a module; returns whether the blocks are below it."""
        if module is blocks:
            return True
        children = list(module.children())
        holds = [visit(child) for child in children]
        if any(holds):
            for child, has_blocks in zip(children, holds, strict=True):
                if not has_blocks:
                    collect(child)
        return any(holds)

    def collect(module: torch.nn.Module) -> None:
        if type(module).forward is torch.nn.Module.forward:  # a container: its children are run
            for child in module.children():
                collect(child)
        elif not any(_follows(part, dimension) for part in module.modules()):
            found[module] = None

    visit(model)
    return list(found)


def _follows(module: torch.nn.Module, dimension: str | None) -> bool:
    axes = getattr(module, "axes", None)
    return isinstance(axes, dict) and any(axis.dimension == dimension for axis in axes.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors inside tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    return [(t, t._version) for t in _tensors(value) if not t.is_inference()]


def _same(new: Any, old: Any, seen: set[tuple[int, int]]) -> bool:
    """Whether two arguments hold the same, bit for bit where they are tensors."""
    if new is old:
        return True
    if type(new) is not type(old):
        return False
    if isinstance(new, (tuple, list)):
        pairs = zip(new, old, strict=False)
        return len(new) == len(old) and all(_same(a, b, seen) for a, b in pairs)
    if isinstance(new, Mapping):
        return new.keys() == old.keys() and all(_same(new[k], old[k], seen) for k in new)
    if isinstance(new, Tensor):
        key = (id(new), id(old))
        if key not in seen and _equal(new, old):
            seen.add(key)
        return key in seen
    if isinstance(new, (int, float, complex, str, bytes)):
        return bool(new == old)
    return True  # caches, configurations: new objects of every run, which carry no work over


def _equal(new: Tensor, old: Tensor) -> bool:
    if new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
        return False
    if new.data_ptr() == old.data_ptr() and new.stride() == old.stride():
        return True
    # A NaN is equal to itself here: it is the same work again.
    return torch.equal(new, old) or bool(((new == old) | ((new != new) & (old != old))).all())
