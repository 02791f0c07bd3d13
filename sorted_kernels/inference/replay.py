"""Running a model at rising depths without computing again what earlier runs have computed."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sorted_kernels.errors import OptionError
from sorted_kernels.inference.calls import Call, Equal, Gone, Spent, SpentError, tensors
from sorted_kernels.nn import active
from sorted_kernels.nn.module_list import DepthContainer
from sorted_kernels.submodel import Submodel

now = time.perf_counter  # tests put a clock of their own here


class Progress:
    """How far a run is; what positions share, which know no more of the replay.

    Were they to know it all, they and it would hold each other, and with them the hidden states,
    until the garbage collector comes.
    """

    __slots__ = ("equal", "in_blocks", "awaits_device", "blocks_started")

    def __init__(self) -> None:
        self.equal: Equal = {}
        self.in_blocks = self.awaits_device = False
        self.blocks_started: float | None = None  # since when blocks compute, not replay

    def start(self, *, wait: bool) -> None:
        """A run starts; whether to wait for the device where times are taken."""
        self.in_blocks, self.awaits_device, self.blocks_started = False, wait, None

    def note_start(self, args: tuple[Any, ...]) -> None:
        """Note when a run's first new block starts: from there on its blocks' time counts."""
        if self.blocks_started is None:
            if self.awaits_device:
                synchronize(args)
            self.blocks_started = now()


class Position(torch.nn.Module):
    """Stands for one block of a depth list: computes the first time, replays from then on.

    A module only in name, so that it may stand in a list; it has none of a module's state, and
    whatever else it is asked for, its block answers.
    """

    def __init__(self, label: str, block: torch.nn.Module, progress: Progress) -> None:
        self.label, self.block, self.progress = label, block, progress
        self.call: Call | None = None
        self.ran = False

    __setattr__ = object.__setattr__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives for these arguments."""
        progress, call = self.progress, self.call
        if self.ran:
            raise OptionError(f"the model's forward runs {self} twice; {_ONCE}")
        self.ran = progress.in_blocks = True
        if call is None:
            progress.note_start(args)
            call = Call(args, kwargs, self.block)
            if not call.intact():
                raise OptionError(f"{self} changes its input in place; {_CANNOT_SHARE_IN_PLACE}")
            self.call = call
        elif not call.intact():
            raise OptionError(f"the input or output of {self} is changed in place after it ran; "
                              f"{_CANNOT_SHARE_IN_PLACE}")  # fmt: skip
        elif not call.had(args, kwargs, progress.equal):
            raise OptionError(
                f"{self} gets other arguments at another depth, so exits cannot share its work; "
                "the model's forward must loop once over the list, first block first"
            )
        return call.output

    def __repr__(self) -> str:
        return self.label


_ONCE = "exits can share blocks that run exactly once"
_CANNOT_SHARE_IN_PLACE = "exits cannot share such work: write x = x + y, not x += y"


class Replay:
    """Runs of one model at rising depths that share the blocks and what comes before them.

    Of the hidden states only the last is kept, unless the first runs show that the model uses
    others outside its blocks (dense connections, a list of hidden states): then all are.

    Args:
        model: The model.
        name: Path of its depth list.
        blocks: Its depth list.
    """

    def __init__(self, model: torch.nn.Module, name: str, blocks: DepthContainer) -> None:
        self.model, self.blocks = model, blocks
        self.progress = Progress()
        self.positions = [
            Position(f"block {i} of {name!r}", block, self.progress)
            for i, block in enumerate(blocks.all_blocks())
        ]
        self._stems = _outside(model, blocks)
        self._calls: dict[torch.nn.Module, list[Call]] = {}
        self._keep_all = False
        self._trial: dict[Position, Call] = {}  # full calls, until a run did without them
        self._done = 0

    def run(self, forward: Callable[[], Any], submodel: Submodel, count: int, *, wait: bool) -> Any:
        """One run of the model with the first ``count`` blocks.

        Args:
            forward: Runs the model.
            submodel: What is active meanwhile.
            count: How many blocks run, at least as many as before; the earlier are replayed.
            wait: Wait for the device where times are taken.

        Raises:
            OptionError: The model does not run each block once, or changes a hidden state in
                place.
        """
        self.progress.start(wait=wait)
        try:
            output = self._run(forward, submodel, count)
        except SpentError:
            if not self._trial:
                raise
            for position, call in self._trial.items():
                position.call = call
            for position in self.positions[self._done : count]:
                if position.call is not None and position.call.took_spent():
                    position.call = None
            self._trial, self._keep_all = {}, True
            self.progress.start(wait=wait)
            output = self._run(forward, submodel, count)
        if wait:
            synchronize(output)
        if not self._keep_all:
            self._forget(count)
        self._done = count
        return output

    def _run(self, forward: Callable[[], Any], submodel: Submodel, count: int) -> Any:
        positions = self.positions[:count]
        for position in positions:
            position.ran = False
        with (
            active(self.model, submodel),
            self.blocks.play(positions),
            self._replaying_stems(),
            torch.inference_mode(False),  # its tensors have no version to tell changes by
            torch.no_grad(),
        ):
            output = forward()
        self.progress.equal.clear()
        for position in positions:
            if not position.ran:
                raise OptionError(f"the model's forward leaves out {position}; {_ONCE}")
        if any(isinstance(tensor, Spent) for tensor in tensors(output)):
            raise SpentError("the model returns hidden states that it did not return before")
        return output

    def _forget(self, count: int) -> None:
        """Give up all hidden states but the last; for good once a run did without them."""
        if self._done > 1:
            self._trial.clear()
        gone: Gone = {}
        for index in range(max(self._done - 1, 0), count):
            position = self.positions[index]
            if position.call is not None:
                if self._done <= 1:
                    self._trial[position] = copy.copy(position.call)
                position.call.forget(gone, output=index < count - 1)

    @contextlib.contextmanager
    def _replaying_stems(self) -> Iterator[None]:
        """Have the modules outside the list replay the calls that they get before the blocks."""
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
        forward, progress = module.forward, self.progress
        earlier = self._calls.get(module, [])
        made: list[Call] = []

        def replaying(*args: Any, **kwargs: Any) -> Any:
            if progress.in_blocks:
                return forward(*args, **kwargs)
            call = earlier[len(made)] if len(made) < len(earlier) else None
            if call is None or not call.intact() or not call.had(args, kwargs, progress.equal):
                call = Call(args, kwargs, forward)
            made.append(call)
            self._calls[module] = made
            return call.output

        return replaying


def synchronize(value: Any) -> None:
    """Wait for the devices of the tensors in a value."""
    for device in {tensor.device for tensor in tensors(value) if tensor.device.type == "cuda"}:
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
