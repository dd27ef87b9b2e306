"""Arguments and options of the commands that look at circuits or pass them on; none needs the model."""

from __future__ import annotations

from typing import Annotated

import typer

CircuitArgument = Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of a circuit.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
SubfolderOption = Annotated[str | None, typer.Option(help="Folder inside the repository.")]
TokenOption = Annotated[str | None, typer.Option(help="Hub token; the stored one if unset.")]
