"""`pahq discover`: the circuit of a task, by any search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.declared import Command, turned
from pahq_hf.cli.ending import after, again, beside, evaluation, is_given
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
    options_used, total = wanted.options, circuit.graph.edge_count

    def judged() -> str:
        ranks = getattr(options_used, "curve", False) is True
        return evaluation(context, out, circuit, *(["--curve"] if ranks else []))

    def other(*, more: bool) -> str:
        changes = turned(kind, options_used, more=more, total=total)
        if changes is None:
            return judged()
        name = ("more", "fewer") if "edges" in changes else ("lower", "higher")
        return again(context, **changes, out=beside(out, name[0 if more else 1]))

    command = after(
        circuit.verdict, good=judged, more=lambda: other(more=True), fewer=lambda: other(more=False)
    )
    conclude(out, circuit.discovery, lambda: run_table(circuit), command, circuit, as_json=asked.run.as_json)


discover_command = keeps_journal(Command(discover, _discoverers))
