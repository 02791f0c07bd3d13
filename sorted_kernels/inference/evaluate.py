"""One metric for every sub-model of a space, in one pass over the data."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from sorted_kernels.errors import OptionError, ShapeError, SpaceError
from sorted_kernels.inference.metrics import WHOLE_METRICS, WholeMetric
from sorted_kernels.inference.results import Results, Row
from sorted_kernels.models import count_flops, count_parameters
from sorted_kernels.nn import activate, active, current
from sorted_kernels.submodel import Submodel, SubmodelSpace

# Takes a batch's output and targets; gives the metric's sum over the batch and the count summed.
Metric = Callable[[Any, Any], tuple[Any, Any]]
_IGNORED = -100  # the target that torch's cross-entropy leaves out
_WARM_UP, _REPEATS = 3, 15


def evaluate(
    model: torch.nn.Module,
    space: SubmodelSpace | Sequence[Submodel],
    loader: Iterable[Any],
    *,
    metric: str | Metric = "accuracy",
    higher_is_better: bool | None = None,
    forward: Callable[[torch.nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    latency: bool = False,
    input_shape: Sequence[int] | None = None,
) -> Results:
    """Evaluate every sub-model of a space on the same data.

    Each batch is loaded and moved once and given to all sub-models, so a loader that shuffles or
    augments shows each of them the same samples. The model runs in evaluation mode without
    gradients; its modes and its active sub-model are restored, also after an error.

    Args:
        model: An elastic model.
        space: The sub-models.
        loader: Gives ``(inputs, targets)`` pairs.
        metric: ``"accuracy"`` (a fraction), ``"loss"`` (mean cross-entropy), both over outputs
            ``(..., classes)`` and targets ``(...)`` of which -100 is left out; ``"f1"`` (of class
            1), ``"matthews"`` (correlation of classes), ``"pearson"`` and ``"spearman"``
            (correlations of values), over the whole data as GLUE has them; or a function of
            ``(output, targets)`` that gives the sum of the metric over the batch and the count it
            is a sum of.
        higher_is_better: Whether more is better; known for the named metrics, True for a function.
        forward: Function of ``(model, inputs)`` that gives the output; ``model(inputs)`` otherwise.
        device: Where batches are moved to; the model's own device otherwise.
        progress: Show a progress bar (needs ``rich`` and a terminal, and is left out otherwise).
        latency: Also measure each sub-model's forward on the loader's first batch (median of 15).
        input_shape: Shape, batch axis first, at which FLOPs are counted; that of one sample of the
            first batch otherwise, given to the model itself (with ``forward``, inputs may be a
            mapping of tensors: the model's keywords).

    Returns:
        One row a sub-model, with its metric, parameters and FLOPs.

    Raises:
        SpaceError: The space is empty.
        OptionError: The metric is unknown, the loader is empty, or the inputs are of another kind
            and ``input_shape`` is not given.
        ShapeError: Outputs and targets do not fit the named metric.
        DimensionError: A sub-model does not fit the model.
    """
    submodels = list(space)
    if not submodels:
        raise SpaceError("space is empty; evaluate needs at least one sub-model")
    name, measure, higher = _resolve(metric, higher_is_better)
    tallies = [_Tally(submodel, measure) for submodel in submodels]
    run = forward or call_model
    target = torch.device(device) if device is not None else device_of(model)
    shape: Any = None if input_shape is None else tuple(input_shape)
    first = True
    with evaluating(model), _progress_bar(progress, loader, len(tallies)) as advance:
        for batch in loader:
            inputs, targets = move(pair(batch), target)
            if shape is None:
                shape = _one_sample(inputs, forward is not None)
            for tally in tallies:
                activate(model, tally.submodel)
                tally.add(run(model, inputs), targets)
                if first and latency:
                    tally.latency_ms = _time_forward(run, model, inputs, target)
                advance()
            first = False
    if shape is None or first:
        raise OptionError("loader is empty; evaluate needs at least one batch")
    rows = [tally.row(model, shape) for tally in tallies]
    return Results(rows, metric=name, higher_is_better=higher)


class _Tally:
    """What one sub-model has gathered; sums stay on the device, so that it is not waited for."""

    def __init__(self, submodel: Submodel, measure: Metric | WholeMetric) -> None:
        self.submodel, self.measure = submodel, measure
        self.sum: Any = 0.0
        self.count: Any = 0
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.latency_ms: float | None = None

    def add(self, output: Any, targets: Any) -> None:
        if isinstance(self.measure, WholeMetric):
            self.pairs.append(self.measure.pair(output, targets))
            return
        batch_sum, batch_count = self.measure(output, targets)
        self.sum, self.count = self.sum + batch_sum, self.count + batch_count

    def value(self) -> float:
        if isinstance(self.measure, WholeMetric):
            return self.measure.of(self.pairs)
        count = float(self.count)
        return float(self.sum) / count if count else math.nan

    def row(self, model: torch.nn.Module, shape: Any) -> Row:
        metric = self.value()
        parameters = count_parameters(model, self.submodel)
        flops = count_flops(model, self.submodel, shape)
        return Row(self.submodel, metric, parameters, flops, self.latency_ms)


def accuracy(output: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many targets the largest logit hits, and how many there are (-100 left out).

    Args:
        output: Logits ``(..., classes)``.
        targets: Class indices ``(...)``.

    Raises:
        ShapeError: The leading axes differ.
    """
    _check_shapes(output, targets)
    counted = targets != _IGNORED
    return ((output.argmax(dim=-1) == targets) & counted).sum(), counted.sum()


def cross_entropy(output: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropy, and over how many targets (-100 left out).

    Args:
        output: Logits ``(..., classes)``.
        targets: Class indices ``(...)``.

    Raises:
        ShapeError: The leading axes differ.
    """
    _check_shapes(output, targets)
    logits = output.reshape(-1, output.shape[-1]).float()
    loss = torch.nn.functional.cross_entropy(logits, targets.reshape(-1), reduction="sum")
    return loss.double(), (targets != _IGNORED).sum()


_METRICS: dict[str, tuple[Metric | WholeMetric, bool]] = {
    "accuracy": (accuracy, True),
    "loss": (cross_entropy, False),
    **{name: (whole, True) for name, whole in WHOLE_METRICS.items()},
}


def _resolve(metric: str | Metric, higher: bool | None) -> tuple[str, Metric | WholeMetric, bool]:
    """Name, function and sense of a metric option."""
    if isinstance(metric, str) and metric in _METRICS:
        function, sense = _METRICS[metric]
        return metric, function, sense if higher is None else higher
    if isinstance(metric, str) or not callable(metric):
        raise OptionError(
            f"metric {metric!r} is unknown; allowed are {sorted(_METRICS)} or a function"
        )
    return getattr(metric, "__name__", "metric"), metric, higher is not False


def _check_shapes(output: Any, targets: Any) -> None:
    if not isinstance(output, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise OptionError(
            f"output is a {type(output).__name__} and targets a {type(targets).__name__}; allowed "
            "are tensors: give forward= to pick the logits, or a function as metric"
        )
    if output.shape[:-1] != targets.shape:
        raise ShapeError(
            f"output has shape {tuple(output.shape)} and targets {tuple(targets.shape)}; allowed "
            "are outputs (..., classes) with targets (...)"
        )


def call_model(model: torch.nn.Module, inputs: Any) -> Any:
    """What runs where no ``forward`` was given."""
    return model(inputs)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def pair(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise OptionError(f"loader gave a {type(batch).__name__}; allowed are (inputs, targets)")
    return batch[0], batch[1]


def move(value: Any, device: torch.device) -> Any:
    """The value with every tensor inside tuples, lists and dictionaries on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (tuple, list)):
        moved = [move(item, device) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    return value


def _one_sample(inputs: Any, keywords: bool) -> torch.Tensor | dict[str, torch.Tensor]:
    if keywords and isinstance(inputs, Mapping):
        return {name: value[:1] for name, value in inputs.items()}
    if not isinstance(inputs, torch.Tensor):
        raise OptionError(
            f"input_shape is needed to count FLOPs where inputs are a {type(inputs).__name__}"
        )
    return inputs[:1]


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode and the sub-model come back after."""
    training = [module for module in model.modules() if module.training]
    with active(model, current(model)), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _time_forward(
    run: Callable[[torch.nn.Module, Any], Any],
    model: torch.nn.Module,
    inputs: Any,
    device: torch.device,
) -> float:
    """Median milliseconds of a forward, the device's queue included."""
    times = []
    for repeat in range(_WARM_UP + _REPEATS):
        start = time.perf_counter()
        run(model, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= _WARM_UP:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


@contextlib.contextmanager
def _progress_bar(
    wanted: bool, loader: Iterable[Any], submodels: int
) -> Iterator[Callable[[], None]]:
    """A bar over all forwards on a terminal, and nothing anywhere else."""
    if not wanted or not sys.stderr.isatty():
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda: None
        return
    total: int | None = None
    with contextlib.suppress(TypeError):  # a loader need not know its length
        total = len(loader) * submodels  # type: ignore[arg-type]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"Evaluating {submodels} sub-models", total=total)
        yield lambda: bar.advance(task)
