"""`pahq export`: a circuit for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.circuit_options import CircuitArgument
from pahq_hf.cli.output import JsonOption, print_json
from pahq_hf.errors import ConfigError

_ExportFormat = Literal["mib", "mib-circuits", "csv", "graphml", "dot"]


def export(
    folder: CircuitArgument,
    out: Annotated[
        Path,
        typer.Option(parser=output_path, metavar="<path>", help="File to write; of mib-circuits a folder."),
    ],
    fmt: Annotated[_ExportFormat, typer.Option("--format", help="File format.")] = "mib",
    rank: Annotated[
        Literal["signed", "absolute"],
        typer.Option(help="Of mib-circuits: rank edges by score, as for CPR, or by size, as for CMD."),
    ] = "signed",
    as_json: JsonOption = False,
) -> None:
    """Write a circuit for other tools: EAP-IG / MIB JSON, nine circuits for MIB, CSV, GraphML or DOT."""
    if rank != "signed" and fmt != "mib-circuits":
        raise ConfigError(f"--rank is of --format mib-circuits; the format is {fmt}")
    from pahq_hf.circuit.circuit import Circuit
    from pahq_hf.circuit.interchange import export as write

    circuit = Circuit.from_pretrained(folder)
    edges: int | list[int] = circuit.edge_count
    if fmt == "mib-circuits":
        from pahq_hf.evaluation.mib_circuits import export_mib_circuits

        edges = export_mib_circuits(circuit, out, rank)
    else:
        write(circuit, out, fmt)
    if as_json:  # else a file that is stdout has nothing else on it
        print_json({"out": str(out), "format": fmt, "edges": edges})
