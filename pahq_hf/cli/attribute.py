"""`pahq attribute`: score every edge of a model at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.declared import Command
from pahq_hf.cli.ending import after, again, beside, evaluation
from pahq_hf.cli.groups import SearchChoice
from pahq_hf.cli.output import keeps_journal, verdict_in_table
from pahq_hf.cli.wanted import conclude, prepare
from pahq_hf.search.attribution.kinds import MethodName
from pahq_hf.search.kind import SearchKind, shifted
from pahq_hf.search.registry import find_search, searches


def _methods() -> list[SearchKind[Any]]:
    """Searches of this command; all have the same options."""
    return [kind for kind in searches().values() if kind.command == "attribute"]


def attribute(
    context: typer.Context,
    asked: SearchChoice,
    out: Annotated[Path, typer.Option(parser=output_path, metavar="<path>", help="Folder for the circuit.")],
    options: dict[str, Any],
    method: Annotated[MethodName, typer.Option(help="How edges are scored.")] = "eap-ig",
) -> None:
    """Score every edge by attribution, and write the best as a circuit to a folder."""
    from pahq_hf.cli.tables import run_table

    wanted = prepare(find_search(method), options, asked, out)
    with verdict_in_table(not asked.run.as_json):
        circuit = wanted.model.attribute(wanted.task, **wanted.how, **wanted.options.to_dict())
    (kept, total), threshold = circuit.size, wanted.options.threshold

    def more() -> str:
        if threshold is not None:
            return again(context, threshold=shifted(threshold, 1 / 3), out=beside(out, "more"))
        return again(context, topn=min(2 * kept, total), out=beside(out, "more"))

    command = after(
        circuit.verdict,
        good=lambda: evaluation(context, out, circuit),
        more=more,
        fewer=lambda: again(context, topn=max(1, total // 20), threshold=None, out=beside(out, "fewer")),
    )
    conclude(out, circuit.discovery, lambda: run_table(circuit), command, circuit, as_json=asked.run.as_json)


attribute_command = keeps_journal(Command(attribute, _methods))
