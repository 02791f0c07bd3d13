"""The commands of ``sorted-kernels``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sorted_kernels.cli import doctor as doctoring
from sorted_kernels.cli import exporting, runs
from sorted_kernels.cli.demo import OPTIONS, run_demo
from sorted_kernels.errors import OptionError
from sorted_kernels.inference import Results, select
from sorted_kernels.inference.results import Row
from sorted_kernels.submodel import Submodel

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train, judge, choose and export the sub-models of one set of weights.\n\n"
    "Exit codes: 0 done, 1 unexpected failure, 2 wrong usage or input, 130 interrupted.",
)
console = Console()

Run = Annotated[Path, typer.Argument(help="Folder that `train` or `demo` wrote.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"  $ sorted-kernels {line}" for line in lines)


@app.command(epilog=_examples("demo", "demo --out runs/seed1 --seed 1", "demo --quick"))
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what comes out.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="3 epochs, to see it work.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train 96 sub-models at once on handwritten digits, draw, select, export, and prove it."""
    run_demo(
        out, seed=seed, epochs=3 if quick else int(OPTIONS["epochs"]),  # type: ignore[call-overload]
        progress=not quiet, console=console,
    )  # fmt: skip


@app.command(epilog=_examples("doctor"))
def doctor() -> None:
    """Show what is installed, which back end each operation takes here and why."""
    doctoring.report(console, Table)


@app.command(
    epilog=_examples(
        "train --out runs/digits",
        "train --out runs/digits --objective sandwich --epochs 50",
        "train --out runs/mine --task my_task.py:make_task",
    )
)
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; resumed if it was begun.")],
    task: Annotated[str, typer.Option(help="'digits', or path/to/file.py:function.")] = "digits",
    objective: Annotated[
        str, typer.Option(help=f"One of {', '.join(runs.OBJECTIVES)}.")
    ] = "stochastic",
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = OPTIONS["epochs"],  # type: ignore[assignment]
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = OPTIONS["lr"],  # type: ignore[assignment]
    weight_decay: Annotated[float, typer.Option(help="Decoupled decay.")] = OPTIONS["weight_decay"],  # type: ignore[assignment]
    accumulate: Annotated[int, typer.Option(help="Micro-batches an optimizer step.")] = 1,
    width: Annotated[int, typer.Option(help="Digits: residual width.")] = OPTIONS["width"],  # type: ignore[assignment]
    hidden: Annotated[int, typer.Option(help="Digits: width inside blocks.")] = OPTIONS["hidden"],  # type: ignore[assignment]
    batch_size: Annotated[int, typer.Option(help="Digits: rows a batch.")] = OPTIONS["batch_size"],  # type: ignore[assignment]
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Train all sub-models of a task at once."""
    options = {
        "task": task,
        "objective": objective,
        "epochs": epochs,
        "lr": lr,
        "weight_decay": weight_decay,
        "accumulate": accumulate,
        "width": width,
        "hidden": hidden,
        "batch_size": batch_size,
        "seed": seed,
    }
    runs.train_run(out, options, resume="auto", progress=not quiet)
    console.print(f"trained; next: sorted-kernels evaluate {out}")


@app.command(epilog=_examples("evaluate runs/digits"))
def evaluate(run: Run, quiet: Quiet = False) -> None:
    """Evaluate every sub-model of a run; write the table and two pictures."""
    results = runs.evaluate_run(runs.open_run(run), run, progress=not quiet)
    _print_rows(results, [*results])
    for path in (*runs.draw(results, run), run / "results.csv", run / "results.json"):
        console.print(path)


@app.command(
    name="select",
    epilog=_examples(
        "select runs/digits --max-flops 500000", "select runs/digits --min-recovery 99"
    ),
)
def select_command(
    run: Run,
    max_flops: Annotated[float | None, typer.Option(help="FLOPs of one forward.")] = None,
    max_params: Annotated[float | None, typer.Option(help="Parameters.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Milliseconds a forward.")] = None,
    min_metric: Annotated[float | None, typer.Option(help="Metric to reach, e.g. 0.97.")] = None,
    min_recovery: Annotated[float | None, typer.Option(help="Percent of the best metric.")] = None,
) -> None:
    """Choose the best sub-model within a budget, or the cheapest that is good enough."""
    results = Results.from_json(run / "results.json")
    chosen = select(
        results,
        max_flops=max_flops,
        max_params=max_params,
        max_latency_ms=max_latency_ms,
        min_metric=min_metric,
        min_recovery=min_recovery,
    )
    _print_rows(results, [chosen])


@app.command(
    name="export",
    epilog=_examples(
        "export runs/digits --submodel depth=6,width=4 --out small.pt2",
        "export runs/digits --submodel depth=6,width=4 --out small.safetensors",
    ),
)
def export_command(
    run: Run,
    submodel: Annotated[str, typer.Option(help="Sizes, e.g. depth=6,width=4.")],
    out: Annotated[Path, typer.Option(help=".pt2 (a program) or .safetensors (weights).")],
) -> None:
    """Write one sub-model to a file of its own."""
    chosen, task = parse_submodel(submodel), runs.open_run(run)
    if out.suffix == ".pt2":
        exporting.write_program(task.model, chosen, task.example, out)
    elif out.suffix == ".safetensors":
        exporting.write_weights(task.model, chosen, out)
    else:
        raise OptionError(f"--out {str(out)!r}: allowed suffixes are .pt2 and .safetensors")
    console.print(f"{out}: {chosen}")


def parse_submodel(text: str) -> Submodel:
    """``depth=6,width=4`` as a sub-model."""
    sizes = {}
    for part in text.split(","):
        name, separator, size = part.strip().partition("=")
        if not separator or not name.isidentifier() or not size.strip().isdigit():
            raise OptionError(f"--submodel {text!r} is not like depth=6,width=4")
        sizes[name] = int(size)
    return Submodel(**sizes)


def _print_rows(results: Results, rows: list[Row]) -> None:
    table = Table()
    for heading in (*results.dimensions, results.metric, "recovery %", "FLOPs", "parameters"):
        table.add_column(heading, justify="right")
    for row in rows:
        sizes: list[Any] = [row.submodel[name] for name in results.dimensions]
        cells = [f"{row.metric:.4f}", f"{results.recovery(row):.1f}"]
        costs = [f"{row.flops:,}", f"{row.parameters:,}"]
        table.add_row(*map(str, sizes), *cells, *costs)
    console.print(table)
