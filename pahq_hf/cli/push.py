"""`pahq push`: a circuit to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pahq_hf.cli.circuit_options import SubfolderOption, TokenOption
from pahq_hf.cli.output import JsonOption, print_facts


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
    from pahq_hf.circuit.circuit import Circuit

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
