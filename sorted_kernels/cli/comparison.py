"""The runs of ``compare``: which methods, norms, budgets and seeds, and their results on disk."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sorted_kernels.data import Batches, Images, cifar10, digit_images
from sorted_kernels.errors import CheckpointError, OptionError
from sorted_kernels.inference import recalibrate
from sorted_kernels.inference.evaluate import accuracy as count_right
from sorted_kernels.inference.evaluate import evaluating
from sorted_kernels.inference.files import replacing
from sorted_kernels.models import CPRERESNET_RULES, CPreResNet20, count_flops, elasticize
from sorted_kernels.nn import activate, set_batch_norm_policy
from sorted_kernels.submodel import Submodel, SubmodelSpace
from sorted_kernels.training.baselines import METHODS, Hyperparameters, train

BUDGETS = ("steps", "passes")
NORMS = ("instance", "batch", "switchable")
"""Instance norm; batch norm with one set of statistics for all widths; with one set a width."""
RECALIBRATION_BATCHES = 10
CONFIG, FINISHED, UNDERWAY = "config.json", "finished", "underway"


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how it is trained.

    Under the budget ``steps`` every method takes as many optimizer steps; under ``passes`` every
    method makes as many forward/backward passes, ``steps`` times the number of widths: slimmable
    networks and the sandwich then train as under ``steps``, and one sub-model a step goes on for
    more steps. A network trained alone takes ``steps`` under both: all of them together make as
    many passes.

    Attributes:
        data: ``"digits"`` or ``"cifar10"``.
        side: Digits: height and width of the images.
        block: ``CPreResNet20``'s ``block``.
        widths: The widths to judge, of 16.
        methods: Names of ``METHODS``.
        norms: Of ``NORMS``.
        budgets: Of ``BUDGETS``.
        seeds: One training each.
        augment: Whether training images are changed at random.
        steps: Optimizer steps.
        batch_size: Images a batch.
        lr: Peak learning rate of SGD.
        momentum: Its momentum.
        weight_decay: Its decay.
        threads: CPU threads; torch's own choice where None.

    Raises:
        OptionError: A value outside what is allowed.
    """

    data: str
    side: int
    block: str
    steps: int
    batch_size: int
    seeds: tuple[int, ...]
    augment: bool = True
    lr: float = Hyperparameters.lr
    momentum: float = Hyperparameters.momentum
    weight_decay: float = Hyperparameters.weight_decay
    widths: tuple[int, ...] = (4, 8, 12, 16)
    methods: tuple[str, ...] = tuple(METHODS)
    norms: tuple[str, ...] = NORMS
    budgets: tuple[str, ...] = BUDGETS
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("methods", tuple(METHODS)), ("norms", NORMS), ("budgets", BUDGETS)):
            given = getattr(self, name)
            wrong = [value for value in given if value not in allowed]
            if wrong or not given or len(set(given)) != len(given):
                raise OptionError(
                    f"--{name} is {', '.join(given)!r}; allowed are {', '.join(allowed)}, each once"
                )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise OptionError(f"--seeds is {self.seeds}; allowed are integers from 0, each once")
        if self.steps < 1:
            raise OptionError(f"--steps is {self.steps}; allowed are integers of at least 1")

    def runs(self) -> list[Run]:
        """Every training, each once: both budgets may ask for the same one."""
        found: dict[str, Run] = {}
        for seed in self.seeds:
            for norm in self.norms:
                for method in self.methods:
                    if norm != "switchable" or method == "slimmable":
                        for budget in self.budgets:
                            run = Run(method, norm, self.steps_of(method, budget), seed)
                            found.setdefault(run.name, run)
        return list(found.values())

    def steps_of(self, method: str, budget: str) -> int:
        """Optimizer steps that a method takes under a budget (of one width where alone)."""
        if budget == "steps" or not METHODS[method].together:
            return self.steps
        count = len(self.widths)
        return max(1, round(self.steps * count / METHODS[method].passes(count)))

    def passes_of(self, run: Run) -> float:
        """Forward/backward passes that a run is expected to make."""
        method, count = METHODS[run.method], len(self.widths)
        return run.steps * method.passes(count) * (1 if method.together else count)

    def load(self, path: Path | None) -> Images:
        """The data.

        Raises:
            OptionError: A path is missing, or given for digits.
            DataError: It cannot be read.
        """
        if self.data == "digits":
            if path is not None:
                raise OptionError(f"--data is {str(path)!r}; this preset's digits need none")
            return digit_images(self.side)
        if path is None:
            raise OptionError("--data is missing; this preset needs the path of a CIFAR-10 copy")
        return cifar10(path)

    def write(self, path: Path) -> None:
        """Write what every run in a folder shares, unless the same stands there.

        Raises:
            CheckpointError: The file cannot be written, or holds something else.
        """
        ours = self._shared()
        if path.is_file():
            try:
                there = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error
            if there != ours:
                other = sorted(name for name in ours if there.get(name) != ours[name])
                raise CheckpointError(
                    f"{str(path.parent)!r} holds a comparison with other {', '.join(other)}; "
                    "choose another folder, or delete it"
                )
            return
        _write_json(path, ours)

    def _shared(self) -> dict[str, Any]:
        """What decides the result of a run beside the run itself."""
        free = {"methods", "norms", "budgets", "seeds", "steps", "threads"}
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}
        return {**kept, "widths": list(self.widths)}


PRESETS = {
    # Chosen so that all of it ends in a quarter of an hour on two CPU cores. Instance norm learns
    # digits that are moved about only in several times as many steps.
    "small": Comparison(
        data="digits", side=8, block="basic", steps=200, batch_size=64, seeds=(40, 42, 1010),
        augment=False, threads=1,
    ),
    # SortedNet v2, Table 7; 200 epochs of the 390 whole batches.
    "paper": Comparison(
        data="cifar10", side=32, block="bottleneck", steps=200 * 390, batch_size=128,
        seeds=(40, 42, 1010, 4242),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training: a method on a norm, so many optimizer steps, from a seed."""

    method: str
    norm: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.method}-{self.norm}-{self.steps}steps-seed{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        accuracy: Fraction of the test images that are right, a width.
        recalibrated: The same after the batch norms' statistics were taken anew a width; None
            where there is nothing to recalibrate.
        steps: Optimizer steps, of all widths where alone.
        passes: Forward/backward passes made.
        seconds: Of training; None where it was interrupted.
    """

    accuracy: dict[int, float]
    recalibrated: dict[int, float] | None
    steps: int
    passes: int
    seconds: float | None


class Runner:
    """Trains the runs of a comparison into a folder, or reads what was trained before.

    Args:
        comparison: What to run.
        data: Its images, on the device.
        out: The folder.
        device: Where to train.
        progress: Show the progress of each training.
    """

    def __init__(
        self,
        comparison: Comparison,
        data: Images,
        out: Path,
        *,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.comparison, self.data, self.out = comparison, data, out
        self.device, self.progress = device, progress

    def finished(self, run: Run) -> Outcome | None:
        """What the run gave if it is done.

        Raises:
            CheckpointError: Its file is damaged.
        """
        path = self._file(run)
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for name in ("accuracy", "recalibrated"):
                if content[name] is not None:
                    content[name] = {int(width): value for width, value in content[name].items()}
            return Outcome(**content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{str(path)!r} is damaged ({error}); delete it, and the run is done anew"
            ) from error

    def run(self, run: Run) -> Outcome:
        """Train, evaluate, and write the outcome; or read it where that was done before."""
        done = self.finished(run)
        if done is not None:
            return done
        underway = self.out / UNDERWAY / run.name
        resumed = underway.exists()
        parts = [
            self._train(run, full, widths, underway / str(full)) for full, widths in self._nets(run)
        ]
        outcome = _merge(parts)
        if resumed:
            outcome = replace(outcome, seconds=None)
        _write_json(self._file(run), asdict(outcome))
        shutil.rmtree(underway, ignore_errors=True)
        return outcome

    def _nets(self, run: Run) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Full width of each network that the run trains, and the widths that it is judged at."""
        widths = self.comparison.widths
        if METHODS[run.method].together:
            yield max(widths), widths
        else:
            yield from ((width, (width,)) for width in widths)

    def _train(self, run: Run, full: int, widths: Sequence[int], underway: Path) -> Outcome:
        plan = self.comparison
        torch.manual_seed(run.seed)
        model = self._network(run, full, widths)
        begin = time.perf_counter()
        passes = train(
            model,
            METHODS[run.method].objective(widths, run.seed),
            self._loader(run),
            run.steps,
            Hyperparameters(plan.lr, plan.momentum, plan.weight_decay),
            checkpoint_dir=underway,
            progress=self.progress,
        )
        seconds = time.perf_counter() - begin
        accuracy = self._judge(model, widths)
        recalibrated = None
        if run.norm == "batch":
            for width in widths:
                loader = self._loader(run)
                recalibrate(model, Submodel(width=width), loader, batches=RECALIBRATION_BATCHES)
            recalibrated = self._judge(model, widths)
        return Outcome(accuracy, recalibrated, run.steps, passes, seconds)

    def _loader(self, run: Run) -> Batches:
        plan = self.comparison
        return self.data.train_loader(plan.batch_size, augment=plan.augment, seed=run.seed)

    def _network(self, run: Run, full: int, widths: Sequence[int]) -> nn.Module:
        norm = "instance" if run.norm == "instance" else "batch"
        model = CPreResNet20(self.data.shape[0], norm=norm, block=self.comparison.block, width=full)
        elasticize(model, CPRERESNET_RULES).to(self.device)
        if run.norm == "switchable":
            set_batch_norm_policy(model, "switchable", SubmodelSpace(width=widths))
        return model

    def _judge(self, model: nn.Module, widths: Sequence[int]) -> dict[int, float]:
        """The accuracy of each width on the test images, without the costs of ``evaluate``."""
        right = dict.fromkeys(widths, 0)
        with evaluating(model):
            for images, targets in self.data.test_loader():
                for width in widths:
                    activate(model, Submodel(width=width))
                    right[width] += int(count_right(model(images), targets)[0])
        return {width: count / len(self.data.test_targets) for width, count in right.items()}

    def flops(self) -> dict[int, int]:
        """FLOPs of one image at each width, which no method or norm changes."""
        widths = self.comparison.widths
        model = self._network(Run("sorted", "instance", 1, 0), max(widths), widths)
        shape = (1, *self.data.shape)
        return {width: count_flops(model, Submodel(width=width), shape) for width in widths}

    def _file(self, run: Run) -> Path:
        return self.out / FINISHED / f"{run.name}.json"


def _merge(parts: list[Outcome]) -> Outcome:
    """The outcome of networks that were trained one by one, as one."""
    first, *others = parts
    for other in others:
        both = (
            None
            if first.recalibrated is None or other.recalibrated is None
            else {**first.recalibrated, **other.recalibrated}
        )
        seconds = (first.seconds or 0.0) + (other.seconds or 0.0)
        first = Outcome(
            {**first.accuracy, **other.accuracy}, both, first.steps + other.steps,
            first.passes + other.passes, seconds,
        )  # fmt: skip
    return first


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
