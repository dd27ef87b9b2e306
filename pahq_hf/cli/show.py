"""`pahq show`: what ran, and which edges were kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.circuit_options import CircuitArgument, RevisionOption, SubfolderOption, TokenOption
from pahq_hf.cli.output import JsonOption, print_json, print_rich


def show(
    folder: CircuitArgument,
    html: Annotated[
        Path | None,
        typer.Option(parser=output_path, metavar="<path>", help="Write an interactive page to this file."),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(parser=output_path, metavar="<path>", help="Write a picture to this file.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(parser=output_path, metavar="<path>", help="Write a picture to this file.")
    ] = None,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a circuit: what ran, kept edges per layer, the strongest edges; or a page or picture of it."""
    from pahq_hf.circuit.circuit import Circuit
    from pahq_hf.circuit.files import write_atomically, write_text
    from pahq_hf.cli.tables import edge_table, layer_table, node_table, run_table

    circuit = Circuit.from_pretrained(folder, revision=revision, subfolder=subfolder, token=token)
    if html is not None:
        from pahq_hf.circuit.render.page import circuit_page

        write_text(html, circuit_page(circuit))
    if svg is not None or png is not None:
        from pahq_hf.circuit.render.picture import draw

        if svg is not None:
            write_atomically(svg, lambda path: draw(circuit.scored, path, "svg"))
        if png is not None:
            write_atomically(png, lambda path: draw(circuit.scored, path, "png"))
    if as_json:
        print_json({**circuit.to_json(), "discovery": circuit.discovery})
    elif html is None and svg is None and png is None:
        print_rich(run_table(circuit), layer_table(circuit), node_table(circuit) or edge_table(circuit))
