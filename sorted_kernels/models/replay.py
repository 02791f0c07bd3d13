"""Running a model at rising depths without computing again what earlier runs have computed."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any

import torch

from sorted_kernels.errors import OptionError
from sorted_kernels.models.calls import Call, Equal, Gone, Spent, SpentError, tensors
from sorted_kernels.nn import activate, current
from sorted_kernels.nn.module_list import DepthContainer
from sorted_kernels.submodel import Submodel

now = time.perf_counter  # tests put a clock of their own here


class Progress:
    """How far a run is; what positions share, which know no more of the replay.

    Were they to know it all, they and it would hold each other, and with them the hidden states,
    until the garbage collector comes.
    """

    __slots__ = ("equal", "blocks_run", "between", "done", "awaits_device", "blocks_started")

    def __init__(self, between: bool) -> None:
        self.equal: Equal = {}
        self.blocks_run = self.done = 0
        self.between = between  # whether modules that run between blocks replay too
        self.awaits_device = False
        self.blocks_started: float | None = None  # since when blocks compute, not replay

    def start(self, wait: bool, done: int) -> None:
        """A run starts.

        Args:
            wait: Wait for the device where times are taken.
            done: How many blocks earlier runs have computed.
        """
        self.blocks_run, self.done, self.awaits_device = 0, done, wait
        self.blocks_started = None

    def note_start(self, args: tuple[Any, ...]) -> None:
        """Note when a run's first new block starts: from there on its blocks' time counts."""
        if self.blocks_started is None:
            if self.awaits_device:
                synchronize(args)
            self.blocks_started = now()


class Step:
    """One block of a depth list in its place: computes the first time, replays from then on.

    Args:
        label: What errors call it.
        block: The block.
        progress: Shared by all.
    """

    __slots__ = ("label", "block", "progress", "call", "ran")

    def __init__(self, label: str, block: torch.nn.Module, progress: Progress) -> None:
        self.label, self.block, self.progress = label, block, progress
        self.call: Call | None = None
        self.ran = False

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block gives for these arguments."""
        progress, call = self.progress, self.call
        if self.ran:
            raise OptionError(f"the model's forward runs {self.label} twice; {_ONCE}")
        self.ran = True
        progress.blocks_run += 1
        if call is None:
            progress.note_start(args)
            call = Call(args, kwargs, self.block)
            if not call.intact():
                raise OptionError(
                    f"{self.label} changes its input in place; {_CANNOT_SHARE_IN_PLACE}"
                )
            self.call = call
        elif not call.intact():
            raise OptionError(f"the input or output of {self.label} is changed in place after it "
                              f"ran; {_CANNOT_SHARE_IN_PLACE}")  # fmt: skip
        elif not call.had(args, kwargs, progress.equal):
            raise OptionError(
                f"{self.label} gets other arguments at another depth, so exits cannot share its "
                "work; the model's forward must loop once over the list, first block first"
            )
        return call.output


class StandIn(torch.nn.Module):
    """Stands for a block in the list while its step runs.

    A module only in name, so that it may stand there; it has none of a module's state, and
    whatever it is asked for, its block answers.
    """

    def __init__(self, step: Step) -> None:
        self.__dict__.update(block=step.block, run=step.run)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives for these arguments."""
        return self.run(args, kwargs)


class Stem:
    """Stands for the forward of a module outside the list: before the blocks it replays calls.

    So it does between them where the runs' outputs are to be trained together: a dropout there
    draws once for all.

    Args:
        module: The module.
        progress: Knows how many blocks have run.
    """

    __slots__ = ("module", "progress", "calls", "runs", "_forward", "_own")

    def __init__(self, module: torch.nn.Module, progress: Progress) -> None:
        self.module, self.progress = module, progress
        self.calls: list[Call] = []
        self.runs = 0

    def put(self) -> None:
        """Take the forward's place."""
        attributes = self.module.__dict__
        self._forward, self._own, self.runs = self.module.forward, attributes.get("forward"), 0
        attributes["forward"] = self

    def remove(self) -> None:
        """Leave the module as it was."""
        if self._own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward gives for these arguments."""
        progress, calls, run = self.progress, self.calls, self.runs
        in_blocks = progress.blocks_run > 0
        if in_blocks and not progress.between:
            return self._forward(*args, **kwargs)
        self.runs += 1
        if (
            run < len(calls)
            and (not in_blocks or progress.blocks_run < progress.done)
            and calls[run].intact()
            and calls[run].had(args, kwargs, progress.equal)
        ):
            return calls[run].output
        calls[run:] = [Call(args, kwargs, self._forward)]
        return calls[run].output


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
        grad: Whether runs are recorded for a backward; every hidden state is kept then.
    """

    def __init__(
        self, model: torch.nn.Module, name: str, blocks: DepthContainer, *, grad: bool = False
    ) -> None:
        self.model, self.blocks, self.grad = model, blocks, grad
        self.progress = Progress(between=grad)
        self.steps = [
            Step(f"block {i} of {name!r}", block, self.progress)
            for i, block in enumerate(blocks.all_blocks())
        ]
        self._stand_ins: list[torch.nn.Module] = [StandIn(step) for step in self.steps]
        self._stems = [Stem(module, self.progress) for module in _outside(model, blocks)]
        self._keep_all = grad
        self._trial: dict[Step, Call] = {}  # full calls, until a run did without them
        self._done = 0

    def run(
        self, forward: Callable[[], Any], submodel: Submodel, count: int, *, wait: bool = False
    ) -> Any:
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
        try:
            output = self._run(forward, submodel, count, wait)
        except SpentError:
            if not self._trial:
                raise
            for step, call in self._trial.items():
                step.call = call
            for step in self.steps[self._done : count]:
                if step.call is not None and step.call.took_spent():
                    step.call = None
            self._trial, self._keep_all = {}, True
            output = self._run(forward, submodel, count, wait)
        if wait:
            synchronize(output)
        if not self._keep_all:
            self._forget(count)
        self._done = count
        return output

    def _run(self, forward: Callable[[], Any], submodel: Submodel, count: int, wait: bool) -> Any:
        before, steps, stems = current(self.model), self.steps[:count], self._stems
        for step in steps:
            step.ran = False
        self.progress.start(wait, self._done)
        grad = contextlib.nullcontext() if self.grad else torch.no_grad()
        with self.blocks.play(self._stand_ins[:count]), _with_versions(), grad:
            for stem in stems:
                stem.put()
            try:
                activate(self.model, submodel)
                output = forward()
            finally:
                activate(self.model, before)
                for stem in stems:
                    stem.remove()
        # Those that did not run before the blocks (the head) need no care in later runs.
        self._stems = [stem for stem in stems if stem.calls]
        self.progress.equal.clear()
        for step in steps:
            if not step.ran:
                raise OptionError(f"the model's forward leaves out {step.label}; {_ONCE}")
        for tensor in tensors(output):
            if isinstance(tensor, Spent):
                raise SpentError("the model returns hidden states that it did not return before")
        return output

    def _forget(self, count: int) -> None:
        """Give up all hidden states but the last; for good once a run did without them."""
        if self._done > 1:
            self._trial.clear()
        gone: Gone = {}
        last = self.steps[count - 1]
        for step in self.steps[max(self._done - 1, 0) : count]:
            call = step.call
            if call is not None:
                if self._done <= 1:
                    self._trial[step] = copy.copy(call)
                call.forget_inputs(gone)
                if step is not last:
                    call.forget_output(gone)


def _with_versions() -> contextlib.AbstractContextManager[Any]:
    """No inference mode, whose tensors have no version to tell changes by."""
    if torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return contextlib.nullcontext()


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
