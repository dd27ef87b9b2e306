"""Circuits as one self-contained HTML page: nothing is fetched when it is looked at."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from itertools import groupby
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pahq_hf.circuit import Circuit
from pahq_hf.comparison import check_same_graph
from pahq_hf.render.facts import run_facts
from pahq_hf.render.layout import layout

_SCRIPTS = ("data.js", "drawing.js", "controls.js")
_TITLE = (("of", "model"), ("on", "task"))
_LONGEST = 120
# JSON inside HTML: nothing may look like markup, and the two separators end lines in old scripts.
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}

_Facts = dict[str, str]


def circuit_page(circuit: Circuit) -> str:
    """A page that shows a circuit.

    Args:
        circuit: The circuit.

    Returns:
        An HTML document.
    """
    facts = _facts(circuit)
    title = " ".join(["Circuit", *(f"{word} {facts[key]}" for word, key in _TITLE if key in facts)])
    return _render(title, [""], [facts], _drawing(circuit, [circuit]))


def compare_page(a: Circuit, b: Circuit) -> str:
    """A page that shows which edges two circuits share.

    Args:
        a: One circuit.
        b: Another one of a model of the same shape.

    Returns:
        An HTML document.

    Raises:
        CircuitError: If their graphs differ.
    """
    check_same_graph(a, b)
    both = Circuit(
        graph=a.graph,
        kept=a.kept | b.kept,
        scores=np.where(a.kept, a.scores, b.scores),
        tested=np.where(a.kept, a.tested, b.tested),
    )
    return _render("Comparison of two circuits", ["A", "B"], [_facts(a), _facts(b)], _drawing(both, [a, b]))


def _facts(circuit: Circuit) -> _Facts:
    facts = {name: _readable(_text(value)) for name, value in run_facts(circuit).items()}
    return {name: value for name, value in facts.items() if value != "unknown"}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _readable(text: str) -> str:
    """Text from a file, made harmless to look at: short, and without control or direction characters."""
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1] + "…"
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _drawing(union: Circuit, circuits: list[Circuit]) -> dict[str, Any]:
    """What the page's scripts draw: columns of nodes, readers and edges, linked by number."""
    places = layout(union)
    number = {node.name: i for i, node in enumerate(places.nodes)}
    readers: dict[str, dict[str, Any]] = {}
    edges: dict[str, list[Any]] = {"writer": [], "reader": [], "bends": []}
    scores: list[list[float | None]] = [[] for _ in circuits]
    tested: list[list[int]] = [[] for _ in circuits]
    for (writer, reader), lines in groupby(places.edges, key=lambda edge: (edge.writer, edge.reader_name)):
        parts = list(lines)
        targets = [number[part.reader] for part in parts]
        readers.setdefault(
            reader, {"number": len(readers), "name": reader, "kind": parts[0].kind, "targets": targets}
        )
        edges["writer"].append(number[writer])
        edges["reader"].append(readers[reader]["number"])
        edges["bends"].append([round(part.bend, 3) for part in parts])
        index = union.graph.reader_index(reader), union.graph.writer_index(writer)
        for circuit, own, seen in zip(circuits, scores, tested, strict=True):
            own.append(_finite(float(circuit.scores[index])) if circuit.kept[index] else None)
            seen.append(int(circuit.tested[index]))
    return {
        "nodes": [{"name": node.name, "kind": node.kind, "x": node.x, "y": node.y} for node in places.nodes],
        "readers": list(readers.values()),
        "edges": {**edges, "scores": scores, "tested": tested},
        "rows": places.rows,
    }


def _finite(score: float) -> float:
    """JSON has no infinities, and nothing can be drawn with such a width."""
    return score if math.isfinite(score) else 0.0


def _render(title: str, columns: list[str], facts: list[_Facts], drawing: dict[str, Any]) -> str:
    # Only a page needs them, and `pahq show` alone should start fast.
    from plotly.offline import get_plotlyjs

    pages = _environment()
    own = "\n".join(_source(pages, name) for name in _SCRIPTS)
    scripts = [_one_line_ends(get_plotlyjs()), f'(() => {{\n"use strict";\n{own}}})();\n']
    names = list(dict.fromkeys(name for column in facts for name in column))
    return pages.get_template("page.html.jinja").render(
        title=title,
        columns=columns,
        facts=[(name, [column.get(name, "–") for column in facts]) for name in names],
        # Only these very scripts run: the browser refuses whatever else got into the page.
        hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        scripts=[Markup(script) for script in scripts],
        style=Markup(_source(pages, "page.css")),
        data=Markup(json_in_page(drawing)),
    )


def plot_page(title: str, data: str) -> str:
    """A page that shows one plotly figure.

    Args:
        title: Its title, any text.
        data: The figure as `json_in_page` writes it.

    Returns:
        An HTML document.
    """
    from plotly.offline import get_plotlyjs

    pages = _environment()
    scripts = [_one_line_ends(get_plotlyjs()), _source(pages, "plot.js")]
    return pages.get_template("plot.html.jinja").render(
        title=title,
        hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        scripts=[Markup(script) for script in scripts],
        data=Markup(data),
    )


def json_in_page(document: Any) -> str:
    """JSON that cannot be taken for markup; no NaN."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("pahq_hf.render"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def _source(pages: Environment, name: str) -> str:
    """A file as it is: scripts and styles are full of braces, so they are no templates."""
    assert pages.loader is not None
    return _one_line_ends(pages.loader.get_source(pages, name)[0])


def _one_line_ends(text: str) -> str:
    """A browser hashes a script after it has made every line end a newline."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
