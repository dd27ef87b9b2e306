"""`pahq export`: a circuit for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.circuit_options import CircuitArgument

_ExportFormat = Literal["mib", "csv", "graphml", "dot"]


def export(
    folder: CircuitArgument,
    out: Annotated[Path, typer.Option(parser=output_path, metavar="<path>", help="File to write.")],
    fmt: Annotated[_ExportFormat, typer.Option("--format", help="File format.")] = "mib",
) -> None:
    """Write a circuit for other tools: EAP-IG / MIB JSON, CSV, GraphML or Graphviz DOT."""
    from pahq_hf.circuit.circuit import Circuit
    from pahq_hf.circuit.interchange import export as write

    write(Circuit.from_pretrained(folder), out, fmt)
