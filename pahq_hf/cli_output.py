"""What the command line prints: one JSON object, or tables."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]


def print_json(document: dict[str, Any]) -> None:
    """One JSON object on stdout, on one line."""
    sys.stdout.write(json.dumps(document) + "\n")


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Facts as JSON or as a table."""
    if as_json:
        print_json(facts)
        return
    from pahq_hf.render.table import facts_table

    print_rich(facts_table(facts))


def print_rich(*tables: Any) -> None:
    """Tables for people, on the terminal when this returns."""
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)
    console.file.flush()
