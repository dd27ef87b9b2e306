"""A circuit in a notebook's output cell."""

from __future__ import annotations

import html
from pathlib import Path
from tempfile import TemporaryDirectory

from pahq_hf.circuit.render.embed import readable
from pahq_hf.circuit.render.facts import Described, run_facts
from pahq_hf.circuit.render.palette import LIGHT
from pahq_hf.circuit.render.picture import draw


def circuit_html(circuit: Described) -> str:
    """Facts of the run beside a picture; every text from files is escaped.

    Args:
        circuit: The circuit.

    Returns:
        HTML without scripts.
    """
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(readable(name))}</th>"
        f"<td>{html.escape(readable(str(value)))}</td></tr>"
        for name, value in run_facts(circuit).items()
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "circuit.svg"
        draw(circuit.scored, path, "svg")
        picture = path.read_text(encoding="utf-8")
    picture = picture[picture.index("<svg") :]  # what comes before is for files of their own
    return (
        "<div style='display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start'>"
        f"<table>{rows}</table><div style='max-width:640px;background:{LIGHT.ground}'>{picture}</div></div>"
    )
