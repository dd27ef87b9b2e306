"""Commands of `pahq` that look at circuits and pass them on; none of them needs the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.output import JsonOption, print_facts, print_json, print_rich

CircuitArgument = Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of a circuit.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
SubfolderOption = Annotated[str | None, typer.Option(help="Folder inside the repository.")]
_ExportFormat = Literal["mib", "csv", "graphml", "dot"]
TokenOption = Annotated[str | None, typer.Option(help="Hub token; the stored one if unset.")]


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
    from pahq_hf import Circuit
    from pahq_hf.circuit.files import write_atomically, write_text
    from pahq_hf.cli.tables import edge_table, layer_table, run_table

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
        print_rich(run_table(circuit), layer_table(circuit), edge_table(circuit))


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a circuit.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="owner/name; created if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    subfolder: SubfolderOption = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a card that was edited on the Hub.")
    ] = False,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a circuit on the Hugging Face Hub."""
    from pahq_hf import Circuit

    url = Circuit.from_pretrained(folder.resolve()).push_to_hub(
        repo_id,
        private=private or None,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        subfolder=subfolder,
        overwrite_card=overwrite_card,
    )
    print_facts({"url": url}, as_json)


def pull(
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    out: Annotated[Path, typer.Option(parser=output_path, metavar="<path>", help="Folder for the circuit.")],
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a circuit from the Hugging Face Hub, checked, into a folder."""
    from pahq_hf import Circuit
    from pahq_hf.circuit.files import refuse_overwrite

    refuse_overwrite(out)
    circuit = Circuit.from_pretrained(repo_id, revision=revision, subfolder=subfolder, token=token)
    circuit.save_pretrained(out)
    print_facts({"out": str(out), "edges": circuit.edge_count}, as_json)


def export(
    folder: CircuitArgument,
    out: Annotated[Path, typer.Option(parser=output_path, metavar="<path>", help="File to write.")],
    fmt: Annotated[_ExportFormat, typer.Option("--format", help="File format.")] = "mib",
) -> None:
    """Write a circuit for other tools: EAP-IG / MIB JSON, CSV, GraphML or Graphviz DOT."""
    from pahq_hf import Circuit
    from pahq_hf.circuit.interchange import export as write

    write(Circuit.from_pretrained(folder), out, fmt)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="EAP-IG or MIB graph JSON.")],
    out: Annotated[Path, typer.Option(parser=output_path, metavar="<path>", help="Folder for the circuit.")],
) -> None:
    """Make a circuit folder of an EAP-IG or MIB graph."""
    from pahq_hf.circuit.files import refuse_overwrite
    from pahq_hf.circuit.interchange import from_mib

    refuse_overwrite(out)
    from_mib(file).save_pretrained(out)


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
    from pahq_hf import Circuit
    from pahq_hf.circuit.comparison import compare_circuits
    from pahq_hf.circuit.files import write_text

    a, b = Circuit.from_pretrained(first), Circuit.from_pretrained(second)
    facts = compare_circuits(a.scored, b.scored)
    if html is not None:
        from pahq_hf.circuit.render.page import compare_page

        write_text(html, compare_page(a, b))
    print_facts(facts, as_json)
