"""`pahq discover`: the circuit of a task, by any search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pahq_hf.circuit.files import CIRCUIT_NAME, output_path
from pahq_hf.cli.declared import Command, chosen_options, threshold_of
from pahq_hf.cli.ending import after, again, beside, evaluation, print_end, shifted
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
from pahq_hf.errors import ConfigError
from pahq_hf.search.kind import SearchKind
from pahq_hf.search.registry import find_search, searches


def _discoverers() -> list[SearchKind[Any]]:
    """Searches of this command; attribution has one of its own."""
    return [kind for kind in searches().values() if kind.command == "discover"]


def discover(
    context: typer.Context,
    model: ModelChoice,
    task: TaskChoice,
    out: Annotated[
        Path,
        typer.Option(parser=output_path, metavar="<path>", help="Folder for the journal and the circuit."),
    ],
    precision: PrecisionChoice,
    limits: EngineChoice,
    run: RunChoice,
    options: dict[str, Any],
    search: Annotated[str, typer.Option(metavar="NAME", help="acdc, or a registered search.")] = "acdc",
    batch: BatchOption = None,
) -> None:
    """Find the circuit of a task with ACDC, or another search, and write it to a folder."""
    from pahq_hf.cli.tables import run_table

    task.check()  # before a model is loaded, as all options
    kind = find_search(search)
    if kind.command != "discover":
        raise ConfigError(
            f"search {search!r} has a command of its own: pahq {kind.command} --method {search}"
        )
    wanted = kind.make_options(chosen_options(kind, options))
    engine = limits.config(batch)
    wrapped, data = begin(model, task, precision.config(), run, out)
    if run.resume:
        done = (out / CIRCUIT_NAME).exists()
        say_resumed(out, "run", finished=done, engine=limits.engine, threads=run.threads)
    with verdict_in_table(not run.as_json):
        circuit = wrapped.discover(
            data,
            search=search,
            config=wanted,
            engine=engine,
            out=out,
            resume=run.resume,
            take_over=run.take_over,
            progress=not run.as_json,
        )
    tau = threshold_of(kind, wanted)
    command = after(
        circuit.verdict if tau is not None else None,
        good=lambda: evaluation(context, out, circuit),
        more=lambda: again(context, threshold=shifted(tau or 0.0, 1 / 3), out=beside(out, "lower")),
        fewer=lambda: again(context, threshold=shifted(tau or 0.001, 3), out=beside(out, "higher")),
    )
    if run.as_json:
        print_json({"out": str(out), **circuit.discovery, "next": command})
    else:
        print_rich(run_table(circuit))
        print_end(out, command)
    exit_unverified(circuit)


discover_command = keeps_journal(Command(discover, _discoverers))
