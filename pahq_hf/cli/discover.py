"""`pahq discover`: the circuit of a task, by any search."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pahq_hf.circuit.files import CIRCUIT_NAME, output_path
from pahq_hf.cli.declared import Command, chosen_options, turned
from pahq_hf.cli.ending import after, again, beside, evaluation, is_given
from pahq_hf.cli.groups import SearchChoice
from pahq_hf.cli.options import BatchOption
from pahq_hf.cli.output import keeps_journal, verdict_in_table
from pahq_hf.cli.wanted import conclude, prepare
from pahq_hf.errors import ConfigError
from pahq_hf.search.bootstrap_options import BootstrapConfig, check_pairs, check_search
from pahq_hf.search.kind import SearchKind
from pahq_hf.search.mask_options import MaskOptions
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
            help="acdc, budget, refine, edge-pruning, ugs, or a registered search; --edges without "
            "--threshold means refine.",
        ),
    ] = "acdc",
    batch: BatchOption = None,
    bootstrap: Annotated[
        int | None,
        typer.Option(
            metavar="B",
            help="Search on so many resamples of the pairs too, and say how often each edge is found. Each "
            "takes as long as the search.",
        ),
    ] = None,
    consensus: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Of the resamples: edges in as many make the consensus circuit. 0.5 by default.",
        ),
    ] = None,
    bootstrap_seed: Annotated[
        int | None, typer.Option(metavar="SEED", help="What the resamples are drawn by. 0 by default.")
    ] = None,
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
    if batch is not None and not kind.in_batches:
        takers = " and ".join(each.name for each in _discoverers() if each.in_batches)
        raise ConfigError(f"search {search!r} takes no --batch, which is of --search {takers}")
    drawn = _bootstrap(bootstrap, consensus=consensus, seed=bootstrap_seed)
    if drawn is not None:
        check_search(kind, kind.make_options(chosen_options(kind, options)))
        check_pairs(asked.task.count())
    wanted = prepare(kind, options, asked, out, batch=batch)
    if drawn is not None and not asked.run.as_json and not (out / CIRCUIT_NAME).exists():
        runs = f"{drawn.resamples + 1:,} searches, each as long as one without it"
        sys.stderr.write(f"pahq: --bootstrap {drawn.resamples} takes {runs}\n")
    with verdict_in_table(not asked.run.as_json):
        circuit = wanted.model.discover(
            wanted.task, search=search, config=wanted.options, bootstrap=drawn, **wanted.how
        )
    options_used, total = wanted.options, circuit.size[1]

    def judged() -> str:
        ranks = getattr(options_used, "curve", False) is True
        return evaluation(context, out, circuit, *(["--curve"] if ranks else []))

    def other(*, more: bool) -> str:
        changes = turned(kind, options_used, more=more, total=total)
        if changes is None:
            return judged()
        name = ("more", "fewer") if "edges" in changes else ("lower", "higher")
        return again(context, **changes, out=beside(out, name[0 if more else 1]))

    if circuit.record.unparted and isinstance(options_used, MaskOptions):
        command = again(context, **options_used.longer(), out=beside(out, "longer"))
    else:
        command = after(
            circuit.verdict, good=judged, more=lambda: other(more=True), fewer=lambda: other(more=False)
        )
    conclude(out, circuit.discovery, lambda: run_table(circuit), command, circuit, as_json=asked.run.as_json)


def _bootstrap(resamples: int | None, **given: Any) -> BootstrapConfig | None:
    """What is asked of resamples; None if nothing is.

    Raises:
        ConfigError: If it is out of range, or about resamples where none are asked for.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if resamples is None and values:
        raise ConfigError("--consensus and --bootstrap-seed are about resamples: give --bootstrap B too")
    return None if resamples is None else BootstrapConfig(resamples, **values)


discover_command = keeps_journal(Command(discover, _discoverers))
