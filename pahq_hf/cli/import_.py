"""`pahq import`: another tool's circuit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.output import JsonOption, print_json


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="EAP-IG or MIB graph JSON.")],
    out: Annotated[Path, typer.Option(parser=output_path, metavar="<path>", help="Folder for the circuit.")],
    as_json: JsonOption = False,
) -> None:
    """Make a circuit folder of an EAP-IG or MIB graph."""
    from pahq_hf.circuit.files import refuse_overwrite
    from pahq_hf.circuit.interchange import from_mib

    refuse_overwrite(out)
    circuit = from_mib(file)
    circuit.save_pretrained(out)
    if as_json:
        print_json({"out": str(out), "edges": circuit.edge_count})
