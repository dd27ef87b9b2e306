"""`pahq pull`: a circuit from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pahq_hf.circuit.files import output_path
from pahq_hf.cli.circuit_options import RevisionOption, SubfolderOption, TokenOption
from pahq_hf.cli.output import JsonOption, print_facts


def pull(
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    out: Annotated[Path, typer.Option(parser=output_path, metavar="<path>", help="Folder for the circuit.")],
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a circuit from the Hugging Face Hub, checked, into a folder."""
    from pahq_hf.circuit.circuit import Circuit
    from pahq_hf.circuit.files import refuse_overwrite

    refuse_overwrite(out)
    circuit = Circuit.from_pretrained(repo_id, revision=revision, subfolder=subfolder, token=token)
    circuit.save_pretrained(out)
    print_facts({"out": str(out), "edges": circuit.edge_count}, as_json)
