"""`pahq sweep`: circuits at several thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.declared import Command
from pahq_hf.cli.ending import again, evaluation
from pahq_hf.cli.groups import SearchChoice
from pahq_hf.cli.options import BatchOption
from pahq_hf.cli.output import keeps_journal, verdict_in_table
from pahq_hf.cli.wanted import conclude, prepare
from pahq_hf.errors import ConfigError
from pahq_hf.search.kind import shifted
from pahq_hf.search.registry import find_search

if TYPE_CHECKING:
    from pahq_hf.search.sweep_result import Sweep


def sweep(
    context: typer.Context,
    asked: SearchChoice,
    thresholds: Annotated[str, typer.Option(metavar="A,B,...", help="tau of every circuit.")],
    out: Annotated[
        Path,
        typer.Option(
            parser=output_path, metavar="<path>", help="Folder for a run per threshold, sweep.json and plots."
        ),
    ],
    options: dict[str, Any],
    batch: BatchOption = None,
) -> None:
    """Find a task's circuits at several thresholds, computing once what the searches share."""
    from pahq_hf.cli.tables import sweep_table
    from pahq_hf.search.sweep_result import check_thresholds

    values = check_thresholds(read_thresholds(thresholds))
    wanted = prepare(find_search("acdc"), options, asked, out, batch=batch, sweep=values)
    with verdict_in_table(not asked.run.as_json):
        swept = wanted.model.sweep(wanted.task, thresholds=values, config=wanted.options, **wanted.how)
    command, table = _next(context, swept, out), lambda: sweep_table(swept.rows)
    conclude(out, swept.to_json(), table, command, *swept.values(), as_json=asked.run.as_json)


sweep_command = keeps_journal(
    Command(sweep, lambda: [find_search("acdc")], without=("threshold", "direction"))
)


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
