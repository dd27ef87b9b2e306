"""What the command line prints: one JSON object, or tables."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq_hf.terminal import printable

if TYPE_CHECKING:
    from pahq_hf.circuit import Circuit

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]

UNVERIFIED = 1  # exit code


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
    """Tables for people, on the terminal when this returns; no text in them can steer it."""
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.segment import Segment

    class Printable:
        def __init__(self, table: Any) -> None:
            self.table = table

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for segment in console.render(self.table, options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    console = Console()
    for table in tables:
        console.print(Printable(table))
    console.file.flush()


def exit_unverified(*circuits: Circuit) -> None:
    """End with exit code 1 if the hooks engine did not confirm a result, and say so on stderr."""
    from pahq_hf.confirmation import unverified_text

    texts = [text for circuit in circuits if (text := unverified_text(circuit))]
    for text in texts:
        sys.stderr.write(f"pahq: {printable(text)}\n")
    if texts:
        raise typer.Exit(UNVERIFIED)
