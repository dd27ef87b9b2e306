"""`pahq import`: another tool's circuit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pahq_hf.circuit.files import output_path


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="EAP-IG or MIB graph JSON.")],
    out: Annotated[Path, typer.Option(parser=output_path, metavar="<path>", help="Folder for the circuit.")],
) -> None:
    """Make a circuit folder of an EAP-IG or MIB graph."""
    from pahq_hf.circuit.files import refuse_overwrite
    from pahq_hf.circuit.interchange import from_mib

    refuse_overwrite(out)
    from_mib(file).save_pretrained(out)
