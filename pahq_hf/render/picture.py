"""A still picture of a circuit, for its card and for papers: matplotlib, no window."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pahq_hf.circuit import Circuit

PictureFormat = Literal["png", "svg"]
COLOURS = {"q": "#1f77b4", "k": "#2ca02c", "v": "#d62728", "mlp": "#9467bd", "logits": "#7f7f7f"}
_LABELLED = 120  # nodes; more names than this cannot be read


def positions(circuit: Circuit) -> dict[str, tuple[float, float]]:
    """Where the circuit's nodes are drawn: layers from bottom to top, heads in a row, MLPs above them.

    Args:
        circuit: The circuit.

    Returns:
        (x, y) by node name.
    """
    spec = circuit.graph.spec
    middle = (spec.heads - 1) / 2
    places = {}
    inside = set(circuit.nodes)
    for writer in circuit.graph.writers:
        if writer.name not in inside:
            continue
        if writer.is_input:
            places[writer.name] = (middle, -1.0)
        elif writer.head is None:
            places[writer.name] = (spec.heads + 0.5, 2.0 * writer.layer + 1.0)
        else:
            places[writer.name] = (float(writer.head), 2.0 * writer.layer)
    if "logits" in inside:
        places["logits"] = (middle, 2.0 * spec.layers + 0.5)
    return places


def draw(circuit: Circuit, path: Path, fmt: PictureFormat = "png") -> None:
    """Draw a circuit into a file.

    Args:
        circuit: The circuit.
        path: The file.
        fmt: `png` or `svg`.
    """
    places = positions(circuit)
    height = min(10.0, 3.0 + 0.35 * circuit.graph.spec.layers)
    figure = Figure(figsize=(9.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axis_off()
    edges = list(circuit.to_networkx().edges(data=True))
    largest = max((abs(facts["score"]) for *_, facts in edges), default=0.0) or 1.0
    kinds = [kind for kind in COLOURS if any(facts["kind"] == kind for *_, facts in edges)]
    for kind in kinds:
        own = [(a, b, abs(facts["score"]) / largest) for a, b, facts in edges if facts["kind"] == kind]
        axes.add_collection(
            LineCollection(
                [[places[a], places[b]] for a, b, _ in own],
                colors=COLOURS[kind],
                linewidths=[0.4 + 2.6 * share for *_, share in own],
                alpha=0.55,
                zorder=1,
            )
        )
    if places:
        xs, ys = zip(*places.values(), strict=True)
        axes.scatter(xs, ys, s=60, c="#f2f2f2", edgecolors="#333333", linewidths=0.8, zorder=2)
    if len(places) <= _LABELLED:
        for name, (x, y) in places.items():
            axes.annotate(name, (x, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=6)
    axes.autoscale_view()
    axes.margins(0.05)
    if kinds:
        lines = [Line2D([], [], color=COLOURS[kind], label=kind) for kind in kinds]
        axes.legend(handles=lines, loc="upper left", fontsize=7, frameon=False)
    title = f"{circuit.edge_count:,} of {circuit.graph.edge_count:,} edges"
    axes.set_title(title, fontsize=9)
    figure.savefig(path, format=fmt, dpi=90, metadata=_NO_DATE[fmt])


# What would make two pictures of one circuit differ.
_NO_DATE: dict[PictureFormat, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None}}
