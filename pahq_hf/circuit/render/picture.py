"""A still picture of a circuit, for its card and for papers: matplotlib, no window."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from matplotlib import path as outlines
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pahq_hf.circuit.render.layout import DRAWN_EDGES, Layout, LayoutEdge, layout
from pahq_hf.circuit.render.palette import LIGHT
from pahq_hf.circuit.scored_edges import ScoredEdges

PictureFormat = Literal["png", "svg"]
_LABELLED = 150  # nodes; more names than this cannot be read
_DEAD = "dead"  # of edges on no path from input to logits
_TALLEST = 10.0  # inches
_MARKERS = {"input": "D", "head": "o", "mlp": "s", "logits": "D"}  # as on the page
# What would make two pictures of one circuit differ.
NO_DATE: dict[PictureFormat, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None}}


def draw(circuit: ScoredEdges, path: Path, fmt: PictureFormat = "png") -> None:
    """Draw a circuit into a file: layers from bottom to top, edges by kind and |score|.

    Of very many edges the strongest are drawn, and the title says so. It looks the same on every machine,
    whatever its matplotlibrc says.

    Args:
        circuit: The circuit.
        path: The file.
        fmt: `png` or `svg`.
    """
    with style.context("default"):
        _draw(circuit, path, fmt)


def _draw(circuit: ScoredEdges, path: Path, fmt: PictureFormat) -> None:
    places = layout(circuit, most=DRAWN_EDGES)
    height = min(_TALLEST, 3.0 + 0.35 * circuit.graph.spec.layers)
    figure = Figure(figsize=(9.0, height), layout="constrained", facecolor=LIGHT.ground)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xticks=[], yticks=[])
    axes.set_axis_off()
    title = f"{circuit.edge_count:,} of {circuit.graph.edge_count:,} edges"
    if circuit.edge_count > DRAWN_EDGES:
        title += f"; the {DRAWN_EDGES:,} with the largest scores are drawn"
    axes.set_title(title, fontsize=9)
    kinds = _draw_edges(axes, places)
    _draw_nodes(axes, places)
    if kinds:
        lines = [Line2D([], [], color=colour, label=kind) for kind, colour in kinds.items()]
        figure.legend(handles=lines, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    axes.autoscale_view()
    axes.margins(0.04)
    figure.savefig(path, format=fmt, dpi=90, metadata=NO_DATE[fmt])


def _draw_edges(axes: Axes, places: Layout) -> dict[str, str]:
    """Draw all edges, dead ones in grey; returns the colours of the kinds there are."""
    where = {node.name: (node.x, node.y) for node in places.nodes}
    sizes = [abs(edge.score) for edge in places.edges if math.isfinite(edge.score)]
    largest = max(sizes, default=0.0) or 1.0
    kinds: dict[str, str] = {}
    for kind, colour in [*LIGHT.edges.items(), (_DEAD, LIGHT.faint)]:
        own = [edge for edge in places.edges if kind == (edge.kind if edge.live else _DEAD)]
        if not own:
            continue
        kinds[kind] = colour
        axes.update_datalim([corner for edge in own for corner in _corners(where, edge)])
        axes.add_collection(
            PathCollection(
                [_curve(where[edge.writer], where[edge.reader], edge.bend) for edge in own],
                facecolors="none",
                edgecolors=colour,
                linewidths=[0.4 + 2.6 * _share(edge, largest) for edge in own],
                alpha=0.55,
                zorder=0 if kind == _DEAD else 1,
            ),
            autolim=False,
        )
    return kinds


def _share(edge: LayoutEdge, largest: float) -> float:
    return min(1.0, abs(edge.score) / largest) if math.isfinite(edge.score) else 1.0


def _corners(where: dict[str, tuple[float, float]], edge: LayoutEdge) -> list[tuple[float, float]]:
    """Two points between whose columns and rows a curve stays: it bends by half of what its control does."""
    (x0, y0), (x1, y1) = where[edge.writer], where[edge.reader]
    return [(min(x0, x1) + min(0.0, edge.bend) / 2, y0), (max(x0, x1) + max(0.0, edge.bend) / 2, y1)]


def _curve(start: tuple[float, float], end: tuple[float, float], bend: float) -> outlines.Path:
    middle = ((start[0] + end[0]) / 2 + bend, (start[1] + end[1]) / 2)
    path = outlines.Path
    return path([start, middle, end], [path.MOVETO, path.CURVE3, path.CURVE3])


def _draw_nodes(axes: Axes, places: Layout) -> None:
    for kind, colour in LIGHT.nodes.items():
        own = [node for node in places.nodes if node.kind == kind]
        xs, ys = [node.x for node in own], [node.y for node in own]
        marker = _MARKERS[kind]
        axes.scatter(xs, ys, s=48, c=colour, marker=marker, edgecolors=LIGHT.ground, linewidths=1.2, zorder=2)
    if len(places.nodes) > _LABELLED:
        return
    for node in places.nodes:
        axes.annotate(
            node.name,
            (node.x, node.y),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=6,
            color=LIGHT.ink,
        )
