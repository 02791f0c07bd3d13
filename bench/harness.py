"""Time contestants side by side: one process, shuffled round-robin, medians.

Contestants of a case take turns, in a new random order every round, so that a slow spell of the
machine, a power limit or a neighbour's cache footprint falls on all of them alike. A case whose
contestants do not compute the same thing is not timed at all.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bench import machine
from bench.goals import Goal
from bench.rows import Row

BASELINES = ("B0", "B1", "B2")
SECONDS_PER_SAMPLE = 2e-3
MAX_REPEATS = 1000
MAX_HIDDEN_REPEATS = 40  # launches that wait behind a sleeping kernel: the queue is finite
SLEEP_CYCLES = 40_000  # a call to hide, about 25 us
ROUNDS = (7, 200)


@dataclass(frozen=True)
class Contestant:
    """One implementation, ready to run.

    Attributes:
        call: Does the work once.
        outcome: What ``call`` computed, to be compared with the other contestants' (as many
            tensors, of the same shapes). ``None``: not compared.
    """

    call: Callable[[], object]
    outcome: Callable[[], Iterable[Tensor]] | None = None


@dataclass(frozen=True)
class Case:
    """A problem and those who solve it.

    Attributes:
        kernel: Family, as in :class:`bench.rows.Row`.
        mode: Part of the work.
        sizes: The problem, from :func:`bench.rows.format_sizes`.
        dtype: Element type of the operands.
        contestants: Provider -> a factory that allocates and returns a :class:`Contestant`.
        device: Where it runs.
        flops: Least operations needed.
        bytes: Least memory traffic needed.
        cache: ``hot`` or ``cold``.
        clock: ``device`` (time until the work is done), ``kernel`` (the same, with launches hidden
            behind earlier work on a GPU), ``host`` (time until the call returns) or ``memory``
            (calls return megabytes, and are not timed).
        tolerance: Largest norm-wise relative difference between two outcomes.
        goals: What the library's contestants aim at.
    """

    kernel: str
    mode: str
    sizes: str
    dtype: torch.dtype
    contestants: Mapping[str, Callable[[], Contestant]]
    device: torch.device
    flops: int = 0
    bytes: int = 0
    cache: str = "hot"
    clock: str = "device"
    tolerance: float = 1e-3
    goals: tuple[Goal, ...] = field(default=())

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel} {self.mode} {self.sizes} {dtype} {self.cache}"


class DisagreementError(AssertionError):
    """Two contestants computed different things, so that no time of theirs means anything."""


def relative_difference(a: Tensor, b: Tensor) -> float:
    """``||a - b|| / ||b||`` in float64; NaN counts as infinitely far."""
    a, b = a.detach().double(), b.detach().double()
    difference = float((a - b).norm() / b.norm().clamp_min(1e-30))
    return float("inf") if np.isnan(difference) else difference


def check_agreement(case: Case, contestants: Mapping[str, Contestant]) -> None:
    """Compare every contestant's outcome with the first one's, after one call each.

    Raises:
        DisagreementError: Two outcomes differ in their shapes or by more than the case's tolerance.
    """
    first: tuple[str, list[Tensor]] | None = None
    for provider, contestant in contestants.items():
        contestant.call()
        if contestant.outcome is None:
            continue
        outcome = [tensor.detach().clone() for tensor in contestant.outcome()]
        if first is None:
            first = (provider, outcome)
        shapes = [[tuple(tensor.shape) for tensor in each] for each in (outcome, first[1])]
        if shapes[0] != shapes[1]:
            raise DisagreementError(
                f"{case}: {provider} has the shapes {shapes[0]}, {first[0]} {shapes[1]}"
            )
        for i, (ours, theirs) in enumerate(zip(outcome, first[1], strict=True)):
            difference = relative_difference(ours, theirs)
            if difference > case.tolerance:
                raise DisagreementError(
                    f"{case}: tensor {i} of {provider} is {difference:.2g} away from that of "
                    f"{first[0]}; allowed is {case.tolerance:g}"
                )


class Timer:
    """Takes samples of one case: seconds a call, averaged over ``repeats`` calls in a row.

    A cold sample is one call after the caches were overwritten. A ``kernel`` sample on a GPU starts
    behind other work in the queue, so that launching is not what it measures.
    """

    def __init__(self, case: Case) -> None:
        self.gpu = case.device.type == "cuda"
        self.host, self.cold = case.clock == "host", case.cache == "cold"
        self.hide_launch = self.gpu and case.clock == "kernel" and not self.cold
        self.max_repeats = MAX_HIDDEN_REPEATS if self.hide_launch else MAX_REPEATS
        self.buffer = self._flush_buffer(case.device) if self.cold else None

    def _flush_buffer(self, device: torch.device) -> Tensor:
        size = 64 << 20
        if self.gpu:
            size = max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        return torch.empty(size // 4, device=device)

    def sample(self, call: Callable[[], object], repeats: int) -> float:
        """Seconds a call."""
        if self.gpu:
            torch.cuda.synchronize()
        if self.buffer is not None:
            self.buffer.fill_(1.0)
        if self.hide_launch:
            torch.cuda._sleep(SLEEP_CYCLES * repeats)
        return self._gpu(call, repeats) if self.gpu and not self.host else self._host(call, repeats)

    def _host(self, call: Callable[[], object], repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats

    def _gpu(self, call: Callable[[], object], repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / repeats

    def repeats_for(self, call: Callable[[], object]) -> int:
        """Calls that fill a sample, found by trying; 1 for cold samples."""
        if self.cold:
            return 1
        repeats = 1
        while True:
            seconds = self.sample(call, repeats) * repeats
            if seconds >= SECONDS_PER_SAMPLE / 2 or repeats >= self.max_repeats:
                break
            repeats = min(self.max_repeats, max(2, 2 * repeats))
        per_call = max(seconds / repeats, 1e-9)
        return min(self.max_repeats, max(1, round(SECONDS_PER_SAMPLE / per_call)))


def interleave(
    case: Case, contestants: Mapping[str, Contestant], seconds: float
) -> dict[str, list[float]]:
    """Samples (seconds a call) of each contestant, taken in turns.

    Args:
        case: The problem; says how to time.
        contestants: Provider -> contestant, built and checked.
        seconds: About how long all of them together may take, at least 7 rounds aside.
    """
    timer = Timer(case)
    repeats = {name: timer.repeats_for(each.call) for name, each in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order, shuffle = list(contestants), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        for done in range(ROUNDS[1]):
            if done >= ROUNDS[0] and time.perf_counter() > deadline:
                break
            shuffle(order)
            for name in order:
                if case.cache == "hot":
                    # What the last contestant drove out of the caches comes back over several
                    # calls, not one; only then does a call find what its own last one left.
                    timer.sample(contestants[name].call, repeats[name])
                samples[name].append(timer.sample(contestants[name].call, repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return samples


def make_row(case: Case, provider: str, values: Iterable[float], metric: str = "") -> Row:
    """The CSV row of some samples; seconds become milliseconds (microseconds for host times)."""
    values = np.asarray(list(values))
    if not metric:
        metric = "us" if case.clock == "host" else "ms"
        values = values * (1e6 if metric == "us" else 1e3)
    p20, p50, p80 = (float(v) for v in np.percentile(values, [20, 50, 80]))
    return Row(
        kernel=case.kernel,
        provider=provider,
        mode=case.mode,
        sizes=case.sizes,
        dtype=str(case.dtype).removeprefix("torch."),
        cache=case.cache,
        metric=metric,
        p20=p20,
        p50=p50,
        p80=p80,
        samples=len(values),
        flops=case.flops,
        bytes=case.bytes,
        device=machine.device_name(case.device.type),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        commit=machine.commit(),
        date=machine.today(),
    )


def run_case(case: Case, seconds: float) -> list[Row]:
    """Build, compare and time all contestants of a case.

    Raises:
        DisagreementError: They do not compute the same thing.
    """
    contestants = {provider: build() for provider, build in case.contestants.items()}
    if case.clock == "memory":
        return [
            make_row(case, provider, [float(each.call())], "MB")  # type: ignore
            for provider, each in contestants.items()
        ]
    check_agreement(case, contestants)
    samples = interleave(case, contestants, seconds)
    return [make_row(case, provider, values) for provider, values in samples.items()]
