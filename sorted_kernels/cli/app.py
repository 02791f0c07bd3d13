"""The commands of ``sorted-kernels``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sorted_kernels.cli import doctor as doctoring
from sorted_kernels.cli import exporting, runs
from sorted_kernels.cli.compare import run_compare
from sorted_kernels.cli.comparison import BUDGETS, NORMS, PRESETS
from sorted_kernels.cli.demo import run_demo
from sorted_kernels.cli.recipe import OBJECTIVES, Recipe
from sorted_kernels.cli.tasks import resolve
from sorted_kernels.errors import DimensionError, OptionError
from sorted_kernels.inference import Results, select
from sorted_kernels.inference.results import Row
from sorted_kernels.submodel import Submodel, parse_size
from sorted_kernels.training.baselines import METHODS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train, judge, choose and export the sub-models of one set of weights.\n\n"
    "Exit codes: 0 done, 1 unexpected failure, 2 wrong usage or input, 130 interrupted. "
    "--debug, anywhere, shows where an error comes from.",
)
console = Console()

Run = Annotated[Path, typer.Argument(help="Folder that `train` or `demo` wrote.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"  $ sorted-kernels {line}" for line in lines)


@app.command(epilog=_examples("demo", "demo --out runs/seed1 --seed 1", "demo --quick"))
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder for what comes out. [default: runs/demo]")
    ] = None,
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="3 epochs, to see it work.")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train 96 sub-models at once on handwritten digits, draw, select, export, and prove it."""
    run_demo(
        out or Path("runs/demo-quick" if quick else "runs/demo"),
        Recipe(seed=seed, epochs=3 if quick else Recipe.epochs),
        device=runs.pick_device(device),
        progress=not quiet,
        console=console,
    )


@app.command(
    epilog=_examples(
        "doctor",
        "doctor --explain linear 4096 4096 4096 1001 999 bfloat16",
        "doctor --explain linear 8 4096 4096 512 512 float32 --activation gelu",
        "doctor --explain linear 512 4096 4096 4096 2048 bfloat16 --ragged",
    )
)
def doctor(
    explain: Annotated[
        tuple[str, int, int, int, int, int, str] | None,
        typer.Option(
            metavar="linear N M K m k DTYPE",
            help="What would run N rows through the (m, k) block of an (M, K) weight, and why.",
        ),
    ] = None,
    activation: Annotated[
        str, typer.Option(help="With --explain: none, relu, gelu or silu.")
    ] = "none",
    ragged: Annotated[
        bool, typer.Option(help="With --explain: rows have sizes of their own, at most (m, k).")
    ] = False,
) -> None:
    """Show what is installed, which back end each operation takes here and why."""
    if explain is None:
        doctoring.report(console)
        return
    op, rows, full_m, full_k, m, k, dtype = explain
    if op != "linear":
        raise OptionError(f"--explain is {op!r}; allowed is linear")
    sizes = (full_m, full_k), (m, k)
    problems = doctoring.linear_problems(rows, *sizes, dtype, activation, ragged)
    doctoring.explain(console, problems)


@app.command(
    epilog=_examples(
        "train --out runs/digits",
        "train --out runs/digits --objective sandwich --epochs 50",
        "train --out runs/mine --task my_task.py:make_task",
    )
)
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    task: Annotated[str, typer.Option(help="'digits', or path/to/file.py:function.")] = Recipe.task,
    objective: Annotated[
        str, typer.Option(help=f"One of {', '.join(OBJECTIVES)}.")
    ] = Recipe.objective,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = Recipe.epochs,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, in place of epochs.")
    ] = Recipe.steps,
    batch_size: Annotated[int, typer.Option(help="Digits: rows a batch.")] = Recipe.batch_size,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = Recipe.lr,
    weight_decay: Annotated[float, typer.Option(help="Decoupled decay.")] = Recipe.weight_decay,
    warmup: Annotated[float, typer.Option(help="Part of all steps that warm up.")] = Recipe.warmup,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = Recipe.clip,
    accumulate: Annotated[
        int, typer.Option(help="Micro-batches an optimizer step.")
    ] = Recipe.accumulate,
    depth: Annotated[int, typer.Option(help="Digits: residual blocks.")] = Recipe.depth,
    width: Annotated[int, typer.Option(help="Digits: features between blocks.")] = Recipe.width,
    hidden: Annotated[int, typer.Option(help="Digits: features inside a block.")] = Recipe.hidden,
    holdout: Annotated[
        bool, typer.Option("--holdout", help="Digits: judge on a fifth of the training digits.")
    ] = Recipe.holdout,
    seed: Seed = Recipe.seed,
    resume: Annotated[
        bool | None,
        typer.Option(help="Demand, or refuse, a begun run. [default: go on if there is one]"),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train all sub-models of a task at once; run it again to go on where it was interrupted."""
    recipe = Recipe(
        task=resolve(task),
        objective=objective,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        clip=clip,
        accumulate=accumulate,
        depth=depth,
        width=width,
        hidden=hidden,
        holdout=holdout,
        seed=seed,
    )
    runs.train_run(
        out,
        recipe,
        device=runs.pick_device(device),
        resume="auto" if resume is None else resume,
        progress=not quiet,
    )
    _say(f"trained; next: sorted-kernels evaluate {out}")


@app.command(
    epilog=_examples(
        "compare",
        "compare --methods slimmable,sorted --norms instance --budgets passes",
        "compare --preset paper --data cifar-10-python.tar.gz --out runs/table2",
    )
)
def compare(
    out: Annotated[
        Path | None, typer.Option(help="Folder for what comes out. [default: runs/compare-PRESET]")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="small: digits, minutes on a CPU; paper: CIFAR-10, for a GPU.")
    ] = "small",
    data: Annotated[
        Path | None, typer.Option(help="CIFAR-10: its .tar.gz (Python or binary), or its folder.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help=f"Some of {','.join(METHODS)}. [default: all]")
    ] = None,
    norms: Annotated[
        str | None,
        typer.Option(
            help=f"Some of {','.join(NORMS)} (batch norm with one set of statistics a width; "
            "slimmable alone). [default: all]"
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(help=f"What all methods get as much of: some of {','.join(BUDGETS)}."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="For example 40,42,1010.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each training.")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train cPreResNet20 at many widths by SortedNet and by others; print SortedNet's Table 2."""
    if preset not in PRESETS:
        raise OptionError(f"--preset is {preset!r}; allowed are {', '.join(PRESETS)}")
    words = {"methods": methods, "norms": norms, "budgets": budgets}
    changes: dict[str, Any] = {k: tuple(v.split(",")) for k, v in words.items() if v is not None}
    if seeds is not None:
        changes["seeds"] = _numbers("seeds", seeds)
    if steps is not None:
        changes["steps"] = steps
    run_compare(
        replace(PRESETS[preset], **changes),
        out or Path(f"runs/compare-{preset}"),
        data=data,
        device=runs.pick_device(device),
        progress=not quiet,
        console=console,
    )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise OptionError(f"--{option} is {text!r}; allowed is the like of 40,42,1010")
    return tuple(int(part) for part in parts)


@app.command(epilog=_examples("evaluate runs/digits", "evaluate runs/digits --latency"))
def evaluate(
    run: Run,
    latency: Annotated[bool, typer.Option("--latency", help="Time each forward, too.")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Evaluate every sub-model of a run; write the table and two pictures."""
    task = runs.open_run(run, runs.pick_device(device))
    results = runs.evaluate_run(task, run, latency=latency, progress=not quiet)
    _print_rows(results, results.rows)
    for path in (*runs.draw(results, run), run / "results.csv", run / runs.RESULTS):
        _say(str(path))


@app.command(
    name="select",
    epilog=_examples(
        "select runs/digits --min-recovery 99",
        "select runs/digits --max-flops 500000 --max-params 300000",
    ),
)
def select_command(
    run: Run,
    max_flops: Annotated[float | None, typer.Option(help="FLOPs of one forward.")] = None,
    max_params: Annotated[float | None, typer.Option(help="Parameters.")] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds a forward (`evaluate --latency`).")
    ] = None,
    min_metric: Annotated[float | None, typer.Option(help="Metric to reach, e.g. 0.97.")] = None,
    min_recovery: Annotated[float | None, typer.Option(help="Percent of the best metric.")] = None,
) -> None:
    """Choose the best sub-model within a budget, or the cheapest that is good enough."""
    results = runs.read_results(run)
    chosen = select(
        results,
        max_flops=max_flops,
        max_params=max_params,
        max_latency_ms=max_latency_ms,
        min_metric=min_metric,
        min_recovery=min_recovery,
    )
    _print_rows(results, [chosen])
    sizes = ",".join(f"{name}={size}" for name, size in chosen.submodel.items())
    _say(f"next: sorted-kernels export {run} --submodel {sizes} --out model.pt2")


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
    out: Annotated[
        Path, typer.Option(help="File: .pt2 (a torch.export program) or .safetensors (weights).")
    ],
) -> None:
    """Write one sub-model to a file of its own, which torch alone can load."""
    if out.suffix not in (".pt2", ".safetensors"):
        raise OptionError(f"--out is {str(out)!r}; allowed suffixes are .pt2 and .safetensors")
    chosen, task = parse_submodel(submodel), runs.open_run(run, runs.pick_device("cpu"))
    if out.suffix == ".pt2":
        exporting.write_program(task.model, chosen, task.example, out)
    else:
        exporting.write_weights(task.model, chosen, out)
    _say(f"{out}: {chosen}")


def parse_submodel(text: str) -> Submodel:
    """``depth=6,width=4`` as a sub-model; ``ffn=(64,32)`` gives one size a block.

    Raises:
        OptionError: The text is not like that.
        DimensionError: A size is below 1.
    """
    sizes: dict[str, Any] = {}
    message = f"--submodel is {text!r}; allowed is the like of depth=6,width=4"
    for part in re.split(r",(?![^()]*\))", text):  # commas outside parentheses
        name, _, size = (piece.strip() for piece in part.partition("="))
        if not name.isidentifier() or name in sizes:
            raise OptionError(message)
        try:
            sizes[name] = parse_size(size)
        except DimensionError as error:
            raise OptionError(message) from error
    return Submodel(**sizes)


def _print_rows(results: Results, rows: tuple[Row, ...] | list[Row]) -> None:
    titles, lines = results.table()
    table = Table()
    for title in titles:
        table.add_column(title, justify="right")
    for row, line in zip(results.rows, lines, strict=True):
        if row in rows:
            table.add_row(*line)
    console.print(table)


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
