"""`pahq discover`: the circuit of a task, by any search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.declared import Command, dial_of
from pahq_hf.cli.ending import after, again, beside, evaluation, is_given, shifted
from pahq_hf.cli.groups import SearchChoice
from pahq_hf.cli.options import BatchOption
from pahq_hf.cli.output import keeps_journal, verdict_in_table
from pahq_hf.cli.wanted import conclude, prepare
from pahq_hf.errors import ConfigError
from pahq_hf.search.kind import SearchKind
from pahq_hf.search.registry import default_search, find_search, searches


def _discoverers() -> list[SearchKind[Any]]:
    """Searches of this command; attribution has one of its own."""
    return [kind for kind in searches().values() if kind.command == "discover"]


def discover(
    context: typer.Context,
    asked: SearchChoice,
    out: Annotated[
        Path,
        typer.Option(parser=output_path, metavar="<path>", help="Folder for the journal and the circuit."),
    ],
    options: dict[str, Any],
    search: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="acdc, budget, refine, or a registered search; --edges without --threshold means refine.",
        ),
    ] = "acdc",
    batch: BatchOption = None,
) -> None:
    """Find the circuit of a task with ACDC, or another search, and write it to a folder."""
    from pahq_hf.cli.tables import run_table

    if not is_given(context, "search"):
        search = default_search(options)
    kind = find_search(search)
    if kind.command is None:
        raise ConfigError(f"search {search!r} is for Python alone: model.discover(task, search={search!r})")
    if kind.command != "discover":
        raise ConfigError(
            f"search {search!r} has a command of its own: pahq {kind.command} --method {search}"
        )
    wanted = prepare(kind, options, asked, out, batch=batch)
    with verdict_in_table(not asked.run.as_json):
        circuit = wanted.model.discover(wanted.task, search=search, config=wanted.options, **wanted.how)
    dial, at = kind.dial, dial_of(kind, wanted.options)
    command = after(
        circuit.verdict if at is not None else None,
        good=lambda: evaluation(context, out, circuit),
        more=lambda: again(context, **{dial: shifted(at or 0.0, 1 / 3), "out": beside(out, "lower")}),
        fewer=lambda: again(context, **{dial: shifted(at or 0.001, 3), "out": beside(out, "higher")}),
    )
    conclude(out, circuit.discovery, lambda: run_table(circuit), command, circuit, as_json=asked.run.as_json)


discover_command = keeps_journal(Command(discover, _discoverers))
