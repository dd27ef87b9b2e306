"""Circuits as one self-contained HTML page: nothing is fetched when it is looked at."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import numpy as np
from markupsafe import Markup

from pahq_hf.circuit.comparison import check_same_graph
from pahq_hf.circuit.render.embed import (
    embedded_json,
    one_line_ends,
    readable,
    script_hashes,
    source,
    templates,
)
from pahq_hf.circuit.render.facts import Described, run_facts
from pahq_hf.circuit.render.layout import layout
from pahq_hf.circuit.render.palette import DARK, LIGHT, Palette
from pahq_hf.circuit.scored_edges import ScoredEdges

_SCRIPTS = ("data.js", "drawing.js", "controls.js")
_TITLE = (("of", "model"), ("on", "task"))

_Facts = dict[str, str]


def circuit_page(circuit: Described, light: Palette = LIGHT, dark: Palette = DARK) -> str:
    """A page that shows a circuit.

    Args:
        circuit: The circuit.
        light: Its colours on a light ground.
        dark: Its colours on a dark one.

    Returns:
        An HTML document.
    """
    facts = _facts(circuit)
    title = " ".join(["Circuit", *(f"{word} {facts[key]}" for word, key in _TITLE if key in facts)])
    return _render(title, [""], [facts], _drawing(circuit.scored, [circuit.scored]), light, dark)


def compare_page(a: Described, b: Described, light: Palette = LIGHT, dark: Palette = DARK) -> str:
    """A page that shows which edges two circuits share.

    Args:
        a: One circuit.
        b: Another one of a model of the same shape.
        light: Its colours on a light ground.
        dark: Its colours on a dark one.

    Returns:
        An HTML document.

    Raises:
        CircuitError: If their graphs differ.
    """
    one, other = a.scored, b.scored
    check_same_graph(one, other)
    both = ScoredEdges(
        graph=one.graph,
        kept=one.kept | other.kept,
        scores=np.where(one.kept, one.scores, other.scores),
        tested=np.where(one.kept, one.tested, other.tested),
    )
    facts = [_facts(a), _facts(b)]
    title = "Comparison of two circuits"
    return _render(title, ["A", "B"], facts, _drawing(both, [one, other]), light, dark)


def _facts(circuit: Described) -> _Facts:
    facts = {name: readable(_text(value)) for name, value in run_facts(circuit).items()}
    return {name: value for name, value in facts.items() if value != "unknown"}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _drawing(union: ScoredEdges, circuits: list[ScoredEdges]) -> dict[str, Any]:
    """What the page's scripts draw: columns of nodes, readers and edges, linked by number."""
    places = layout(union)
    number = {node.name: i for i, node in enumerate(places.nodes)}
    readers: dict[str, dict[str, Any]] = {}
    edges: dict[str, list[Any]] = {"writer": [], "reader": [], "bends": []}
    scores: list[list[float | None]] = [[] for _ in circuits]
    tested: list[list[int]] = [[] for _ in circuits]
    estimated: list[list[int]] = [[] for _ in circuits]
    gates: list[list[str | None]] = [[] for _ in circuits]
    node_scores = [_node_scores(circuit) for circuit in circuits]
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
        for circuit, own, seen, guessed, gate in zip(circuits, scores, tested, estimated, gates, strict=True):
            own.append(_finite(float(circuit.scores[index])) if circuit.kept[index] else None)
            seen.append(int(circuit.tested[index]))
            guessed.append(int(circuit.is_estimate(*index)))
            gate.append(circuit.gate(*index))
    return {
        "nodes": [
            {
                "name": node.name,
                "kind": node.kind,
                "x": node.x,
                "y": node.y,
                "scores": [own.get(node.name) for own in node_scores],
            }
            for node in places.nodes
        ],
        "readers": list(readers.values()),
        "edges": {**edges, "scores": scores, "tested": tested, "estimated": estimated, "gates": gates},
        "rows": places.rows,
    }


def _node_scores(circuit: ScoredEdges) -> dict[str, float]:
    """Scores of the nodes that are in, where whole nodes have one."""
    found = {name: circuit.more_of_node(name).get("score") for name in circuit.nodes}
    return {name: _finite(score) for name, score in found.items() if isinstance(score, float)}


def _finite(score: float) -> float:
    """JSON has no infinities, and nothing can be drawn with such a width."""
    return score if math.isfinite(score) else 0.0


def _render(
    title: str,
    columns: list[str],
    facts: list[_Facts],
    drawing: dict[str, Any],
    light: Palette,
    dark: Palette,
) -> str:
    # Only a page needs them, and `pahq show` alone should start fast.
    from plotly.offline import get_plotlyjs

    pages = templates()
    own = "\n".join(source(pages, name) for name in _SCRIPTS)
    scripts = [one_line_ends(get_plotlyjs()), f'(() => {{\n"use strict";\n{own}}})();\n']
    names = list(dict.fromkeys(name for column in facts for name in column))
    colours = f':root{{{light.for_styles()}}}\n:root[data-theme="dark"]{{{dark.for_styles()}}}\n'
    palettes = {"light": light.for_scripts(), "dark": dark.for_scripts()}
    return pages.get_template("page.html.jinja").render(
        title=title,
        columns=columns,
        facts=[(name, [column.get(name, "–") for column in facts]) for name in names],
        # Only these very scripts run: the browser refuses whatever else got into the page.
        hashes=script_hashes(scripts),
        scripts=[Markup(script) for script in scripts],
        style=Markup(colours + source(pages, "page.css")),
        data=embedded_json({**drawing, "palettes": palettes}),
    )
