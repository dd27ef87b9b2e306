"""`pahq compare`: two circuits of one graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.circuit_options import CircuitArgument
from pahq_hf.cli.output import JsonOption, print_facts


def compare(
    first: CircuitArgument,
    second: CircuitArgument,
    html: Annotated[
        Path | None,
        typer.Option(parser=output_path, metavar="<path>", help="Write a page that shows both to this file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two circuits of one graph: overlap by kind of edge, correlation of scores."""
    from pahq_hf.circuit.circuit import Circuit
    from pahq_hf.circuit.comparison import compare_circuits
    from pahq_hf.circuit.files import write_text
    from pahq_hf.circuit.fitting import in_one_graph

    a, b = Circuit.from_pretrained(first), Circuit.from_pretrained(second)
    a, b = in_one_graph(a, b)
    facts = compare_circuits(a.scored, b.scored)
    if html is not None:
        from pahq_hf.circuit.render.page import compare_page

        write_text(html, compare_page(a, b))
    print_facts(facts, as_json)
