"""`pahq sweep`: circuits at several thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq_hf.circuit.files import SWEEP_NAME, output_path, read_json
from pahq_hf.cli.declared import Command, chosen_options
from pahq_hf.cli.ending import again, evaluation, print_end, shifted
from pahq_hf.cli.groups import EngineChoice, ModelChoice, PrecisionChoice, RunChoice, TaskChoice, begin
from pahq_hf.cli.options import BatchOption
from pahq_hf.cli.output import (
    exit_unverified,
    keeps_journal,
    print_json,
    print_rich,
    say_resumed,
    verdict_in_table,
)
from pahq_hf.errors import CircuitError, ConfigError
from pahq_hf.search.registry import find_search

if TYPE_CHECKING:
    from pahq_hf.search.sweep_result import Sweep


def sweep(
    context: typer.Context,
    model: ModelChoice,
    task: TaskChoice,
    thresholds: Annotated[str, typer.Option(metavar="A,B,...", help="tau of every circuit.")],
    out: Annotated[
        Path,
        typer.Option(
            parser=output_path, metavar="<path>", help="Folder for a run per threshold, sweep.json and plots."
        ),
    ],
    precision: PrecisionChoice,
    limits: EngineChoice,
    run: RunChoice,
    options: dict[str, Any],
    batch: BatchOption = None,
) -> None:
    """Find a task's circuits at several thresholds, computing once what the searches share."""
    from pahq_hf.cli.tables import sweep_table
    from pahq_hf.search.sweep_result import check_thresholds

    task.check()  # before a model is loaded, as all options
    values = check_thresholds(read_thresholds(thresholds))
    kind = find_search("acdc")
    wanted = kind.make_options(chosen_options(kind, options))
    engine = limits.config(batch)
    wrapped, data = begin(model, task, precision.config(), run, out)
    if run.resume:
        done = _holds(out, values)
        say_resumed(out, "sweep", finished=done, engine=limits.engine, threads=run.threads)
    with verdict_in_table(not run.as_json):
        swept = wrapped.sweep(
            data,
            thresholds=values,
            config=wanted,
            engine=engine,
            out=out,
            resume=run.resume,
            take_over=run.take_over,
            progress=not run.as_json,
        )
    command = _next(context, swept, out)
    if run.as_json:
        print_json({"out": str(out), **swept.to_json(), "next": command})
    else:
        print_rich(sweep_table(swept.rows))
        print_end(out, command)
    exit_unverified(*swept.values())


sweep_command = keeps_journal(Command(sweep, lambda: [find_search("acdc")], without=("threshold",)))


def _holds(out: Path, thresholds: Sequence[float]) -> bool:
    """Whether a folder holds a finished sweep at just these thresholds."""
    try:
        rows = read_json(out / SWEEP_NAME).get("rows")
        return {float(row["threshold"]) for row in rows or ()} == set(thresholds)
    except (CircuitError, KeyError, TypeError, ValueError):
        return False


def _next(context: typer.Context, found: Sweep, out: Path) -> str:
    """Judge the smallest circuit that does what the model does; without one, more thresholds."""
    from pahq_hf.search.sweep_result import threshold_folder

    rows = [row for row in found.rows if row.verdict is None or row.verdict.kind != "whole"]
    good = [row.threshold for row in rows if row.verdict is None or not row.verdict.poor]
    if good:
        return evaluation(context, threshold_folder(out, good[-1]), found[good[-1]])
    values = list(found)
    first = shifted(values[0] or 0.001, 1 / 3 if rows else 3)
    values = sorted({*values, first, shifted(first, 1 / 3 if rows else 3)})
    return again(context, thresholds=",".join(map(str, values)), resume=True)


def read_thresholds(text: str) -> list[float]:
    """Parse `0.001,0.01`.

    Raises:
        ConfigError: If it is not a list of numbers.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"cannot read the thresholds {text!r}; write them like 0.001,0.01") from error
