"""The tasks of GLUE (Wang et al., 2019, arXiv:1804.07461) from a local copy of their TSV files.

Nothing is downloaded. The files of unlabelled test sentences are not read.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.data.batches import Batches
from sorted_kernels.errors import DataError, OptionError


@dataclass(frozen=True)
class GlueTask:
    """Where a task's files keep what, and how it is judged.

    Attributes:
        sentences: The columns of one sentence or of two: names in the file's first line, or
            numbers where it has no such line.
        label: The column of the label.
        classes: What stands there, class 0 first; none for a regression, whose label is a number.
        metrics: What GLUE reports, as :func:`sk.inference.evaluate` names it.
        files: Names of the splits, each in a file ``NAME.tsv``.
        broken_lines: Leave out lines of too few columns, as the file is known to have them.
    """

    sentences: tuple[str, ...] | tuple[int, ...]
    label: str | int
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    files: tuple[str, ...] = ("train", "dev")
    broken_lines: bool = False

    @property
    def num_labels(self) -> int:
        """Outputs of a model for it: one a class, or one number."""
        return len(self.classes) or 1


_BINARY, _PAIR = ("0", "1"), ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI_FILES = ("train", "dev_matched", "dev_mismatched")
GLUE = {
    "cola": GlueTask((3,), 1, _BINARY, ("matthews",)),
    "sst2": GlueTask(("sentence",), "label", _BINARY, ("accuracy",)),
    "mrpc": GlueTask(("#1 String", "#2 String"), "Quality", _BINARY, ("f1", "accuracy")),
    "stsb": GlueTask(_PAIR, "score", (), ("pearson", "spearman")),
    "qqp": GlueTask(
        ("question1", "question2"), "is_duplicate", _BINARY, ("f1", "accuracy"), broken_lines=True
    ),
    "mnli": GlueTask(
        _PAIR, "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",), _MNLI_FILES
    ),
    "qnli": GlueTask(("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)),
    "rte": GlueTask(_PAIR, "label", _ENTAILMENT, ("accuracy",)),
    "wnli": GlueTask(_PAIR, "label", _BINARY, ("accuracy",)),
}
"""The tasks by the names that ``transformers`` gives them."""


@dataclass(frozen=True)
class Sentences:
    """One split of a task.

    Attributes:
        texts: For each column of sentences, the sentences.
        labels: (n,) classes, int64; or numbers, float32.
    """

    texts: tuple[list[str], ...]
    labels: Tensor

    def loader(
        self,
        tokenizer: Any,
        batch_size: int,
        *,
        max_length: int = 128,
        shuffle: bool = True,
        seed: int = 0,
    ) -> Batches:
        """Batches of (what the model takes, labels), each as long as its longest row.

        Args:
            tokenizer: One of ``transformers``, with a padding token.
            batch_size: Rows a batch.
            max_length: Tokens a row, a pair's together; longer ones are cut.
            shuffle: Draw a new order every epoch.
            seed: Of the order.
        """
        encoded = tokenizer(
            *self.texts, padding=True, truncation=True, max_length=max_length,
            padding_side="right", return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        return Batches(
            dict(encoded), self.labels, batch_size, shuffle, seed, transform=_without_padding
        )


def _without_padding(
    inputs: Mapping[str, Tensor], _generator: torch.Generator
) -> dict[str, Tensor]:
    longest = int(inputs["attention_mask"].sum(1).max())
    return {name: value[:, :longest] for name, value in inputs.items()}


def glue(path: str | os.PathLike[str], task: str | GlueTask) -> dict[str, Sentences]:
    """Read a task's labelled splits.

    Args:
        path: The folder of its TSV files.
        task: A name in ``sk.data.GLUE``, or a description of files of one's own.

    Returns:
        Each split by the name of its file.

    Raises:
        OptionError: The task is unknown.
        DataError: A file is missing or empty, is not UTF-8, lacks a column, has a line of too few
            columns, or a label that the task does not have.
    """
    if isinstance(task, str):
        if task not in GLUE:
            raise OptionError(f"task is {task!r}; allowed are {', '.join(GLUE)}, or a GlueTask")
        task = GLUE[task]
    return {name: _read(Path(path) / f"{name}.tsv", task) for name in task.files}


def _read(path: Path, task: GlueTask) -> Sentences:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 at byte {error.start}") from error
    # By hand: quotes mean nothing in these files, and sentences hold what others call line ends.
    lines = [line.rstrip("\r").split("\t") for line in content.split("\n")]
    columns = [*task.sentences, task.label]
    first = 0
    if isinstance(task.label, str):
        first, missing = 1, [name for name in columns if name not in lines[0]]
        if missing:
            raise DataError(f"{str(path)!r} has columns {lines[0]}; the task also needs {missing}")
        columns = [lines[0].index(name) for name in columns]
    rows: list[list[str]] = []
    for number, fields in enumerate(lines[first:], first + 1):
        if len(fields) > max(columns):
            rows.append([fields[column] for column in columns])
        elif fields != [""] and not task.broken_lines:
            raise DataError(
                f"{str(path)!r} has {len(fields)} columns in line {number}; the task needs at "
                f"least {max(columns) + 1}"
            )
    if not rows:
        raise DataError(f"{str(path)!r} has no labelled sentence")
    *texts, labels = zip(*rows, strict=True)
    return Sentences(tuple(map(list, texts)), _labels(labels, task, path))


def _labels(labels: tuple[str, ...], task: GlueTask, path: Path) -> Tensor:
    if not task.classes:
        return torch.tensor([_number(label, path) for label in labels])
    unknown = sorted(set(labels) - set(task.classes))
    if unknown:
        raise DataError(
            f"{str(path)!r} has labels {unknown[:5]}; allowed are {', '.join(task.classes)}"
        )
    return torch.tensor([task.classes.index(label) for label in labels])


def _number(label: str, path: Path) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(float(label)):
            return float(label)
    raise DataError(f"{str(path)!r} has the score {label!r}; allowed are numbers")
