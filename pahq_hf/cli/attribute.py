"""`pahq attribute`: score every edge of a model at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pahq_hf.circuit.files import CIRCUIT_NAME, output_path, refuse_overwrite
from pahq_hf.cli.declared import Command, chosen_options
from pahq_hf.cli.ending import after, again, beside, evaluation, print_end, shifted
from pahq_hf.cli.groups import EngineChoice, ModelChoice, PrecisionChoice, RunChoice, TaskChoice, begin
from pahq_hf.cli.output import (
    exit_unverified,
    keeps_journal,
    print_json,
    print_rich,
    say_resumed,
    verdict_in_table,
)
from pahq_hf.search.attribution.options import AttributionConfig, MethodName
from pahq_hf.search.kind import SearchKind
from pahq_hf.search.registry import find_search, searches


def _methods() -> list[SearchKind[Any]]:
    """Searches of this command; all have the same options."""
    return [kind for kind in searches().values() if kind.command == "attribute"]


def attribute(
    context: typer.Context,
    model: ModelChoice,
    task: TaskChoice,
    out: Annotated[Path, typer.Option(parser=output_path, metavar="<path>", help="Folder for the circuit.")],
    precision: PrecisionChoice,
    limits: EngineChoice,
    run: RunChoice,
    options: dict[str, Any],
    method: Annotated[MethodName, typer.Option(help="How edges are scored.")] = "eap-ig",
) -> None:
    """Score every edge by attribution, and write the best as a circuit to a folder."""
    from pahq_hf.cli.tables import run_table

    task.check()  # before a model is loaded, as all options
    kind = find_search(method)
    wanted: AttributionConfig = kind.make_options(chosen_options(kind, options))
    engine = limits.config()
    if not run.resume:
        refuse_overwrite(out, "continue it with --resume or choose another folder")
    wrapped, data = begin(model, task, precision.config(), run, out)
    if run.resume:
        done = (out / CIRCUIT_NAME).exists()
        say_resumed(out, "run", finished=done, engine=limits.engine, threads=run.threads)
    with verdict_in_table(not run.as_json):
        circuit = wrapped.attribute(
            data,
            engine=engine,
            out=out,
            resume=run.resume,
            take_over=run.take_over,
            progress=not run.as_json,
            **wanted.to_dict(),
        )
    total, threshold = circuit.graph.edge_count, wanted.threshold

    def more() -> str:
        if threshold is not None:
            return again(context, threshold=shifted(threshold, 1 / 3), out=beside(out, "more"))
        return again(context, topn=min(2 * circuit.edge_count, total), out=beside(out, "more"))

    command = after(
        circuit.verdict,
        good=lambda: evaluation(context, out, circuit),
        more=more,
        fewer=lambda: again(context, topn=max(1, total // 20), threshold=None, out=beside(out, "fewer")),
    )
    if run.as_json:
        print_json({"out": str(out), **circuit.discovery, "next": command})
    else:
        print_rich(run_table(circuit))
        print_end(out, command)
    exit_unverified(circuit)


attribute_command = keeps_journal(Command(attribute, _methods))
