"""A sweep's trade-off: edges of its circuits against how far they are from the full model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from pahq_hf.circuit.render.embed import readable
from pahq_hf.circuit.render.palette import LIGHT
from pahq_hf.circuit.render.picture import NO_DATE, PictureFormat
from pahq_hf.circuit.render.plots_page import Figure as Plotted
from pahq_hf.circuit.render.plots_page import PageTable, plots_page

_NO_EDGES = 0.5  # where an empty circuit stands on the logarithmic axis


@dataclass(frozen=True)
class ParetoPoint:
    """One circuit of a sweep, to be drawn.

    Attributes:
        threshold: tau of its search.
        kept: Edges of the circuit.
        live: Kept edges on a path from `input` to `logits`.
        tested: Edges that its search tested.
        name: The minimised metric.
        metric: The value of that metric, in FP32.
        kl: KL from the full model, in FP32.
        faithfulness: Share of the metric that the circuit recovers, if that is defined.
        nodes: Heads and MLPs of the circuit, where whole nodes were kept or removed.
        nodes_tested: Heads and MLPs that its search tested, there.
    """

    threshold: float
    kept: int
    live: int
    tested: int
    name: str
    metric: float
    kl: float
    faithfulness: float | None
    nodes: int | None = None
    nodes_tested: int | None = None


@dataclass(frozen=True)
class _Panel:
    """One measure of a sweep's circuits.

    Attributes:
        label: The name of the measure.
        values: The measure of each circuit.
    """

    label: str
    values: list[float]


def pareto_front(edges: Sequence[int], values: Sequence[float]) -> list[int]:
    """Which circuits no other one beats: none with as few edges has a lower value, and the other way round.

    Args:
        edges: Edges of each.
        values: What should be low.

    Returns:
        Indices of these circuits, by ascending number of edges.
    """
    front: list[int] = []
    lowest = math.inf
    for index in sorted(range(len(edges)), key=lambda i: (edges[i], values[i])):
        if values[index] < lowest:
            lowest = values[index]
            front.append(index)
    return front


def _panels(rows: Sequence[ParetoPoint]) -> list[_Panel]:
    kl = _Panel("KL from the full model, FP32", [row.kl for row in rows])
    name = readable(rows[0].name)
    return [kl] if name == "kl" else [_Panel(f"{name} (minimised), FP32", [row.metric for row in rows]), kl]


def _places(rows: Sequence[ParetoPoint]) -> list[float]:
    return [float(row.kept) or _NO_EDGES for row in rows]


def draw_pareto(rows: Sequence[ParetoPoint], title: str, path: Path, fmt: PictureFormat = "png") -> None:
    """Draw a sweep into a file.

    Args:
        rows: The sweep's circuits.
        title: What it is of; any text.
        path: The file.
        fmt: `png` or `svg`.
    """
    with style.context("default"):
        _draw(rows, title, path, fmt)


def _draw(rows: Sequence[ParetoPoint], title: str, path: Path, fmt: PictureFormat) -> None:
    panels = _panels(rows)
    figure = Figure(figsize=(6.4 * len(panels), 4.4), layout="constrained", facecolor=LIGHT.ground)
    FigureCanvasAgg(figure)
    figure.suptitle(readable(title), fontsize=10, parse_math=False)
    places, edges = _places(rows), [row.kept for row in rows]
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        front = pareto_front(edges, panel.values)
        xs, ys = [places[i] for i in front], [panel.values[i] for i in front]
        axes.plot(xs, ys, drawstyle="steps-post", color=LIGHT.dim, linewidth=1, zorder=1)
        axes.scatter(places, panel.values, s=24, color=LIGHT.accent, zorder=2)
        for row, x, y in zip(rows, places, panel.values, strict=True):
            axes.annotate(
                f"τ={row.threshold:g}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter())
        axes.margins(0.1)
        axes.set_xlabel("edges kept")
        axes.set_ylabel(panel.label, parse_math=False)
        axes.grid(alpha=0.25)
    figure.savefig(path, format=fmt, dpi=100, metadata=NO_DATE[fmt])


def pareto_page(rows: Sequence[ParetoPoint], title: str) -> str:
    """A self-contained page of a sweep, with its figures on hover.

    Args:
        rows: The sweep's circuits.
        title: What it is of; any text.

    Returns:
        An HTML document.
    """
    panels = _panels(rows)
    titles = ("τ", *_sizes(rows[0]), *(panel.label for panel in panels), "faithfulness")
    cells = [
        (
            f"{row.threshold:g}",
            *(f"{count:,}" for count in _sizes(row).values()),
            *(f"{panel.values[number]:.6g}" for panel in panels),
            "–" if row.faithfulness is None else f"{row.faithfulness:.4f}",
        )
        for number, row in enumerate(rows)
    ]
    return plots_page(title, [_plot(rows, panel) for panel in panels], PageTable(titles, cells))


def _sizes(row: ParetoPoint) -> dict[str, int]:
    """What a circuit has and what was tested, by name."""
    if row.nodes is None or row.nodes_tested is None:
        return {"edges": row.kept, "live": row.live, "tested": row.tested}
    return {"nodes": row.nodes, "edges": row.kept, "nodes tested": row.nodes_tested}


def _plot(rows: Sequence[ParetoPoint], panel: _Panel) -> Plotted:
    """What Plotly draws. It reads some tags and TeX in texts, so they are escaped here too."""
    places, label = _places(rows), escape(readable(panel.label)).replace("$", "&#36;")
    front = pareto_front([row.kept for row in rows], panel.values)
    texts = [
        f"τ = {row.threshold:g}<br>{', '.join(f'{count:,} {name}' for name, count in _sizes(row).items())}"
        f"<br>{label}: {value:.6g}"
        for row, value in zip(rows, panel.values, strict=True)
    ]
    line = {
        "x": [places[i] for i in front],
        "y": [_finite(panel.values[i]) for i in front],
        "mode": "lines",
        "line": {"shape": "hv", "color": LIGHT.dim, "width": 1},
        "hoverinfo": "skip",
    }
    points = {
        "x": places,
        "y": [_finite(value) for value in panel.values],
        "mode": "markers+text",
        "text": [f"τ={row.threshold:g}" for row in rows],
        "textposition": "top right",
        "cliponaxis": False,
        "hovertext": texts,
        "hoverinfo": "text",
        "marker": {"size": 9, "color": LIGHT.accent},
    }
    layout = {
        "showlegend": False,
        "xaxis": {"type": "log", "title": {"text": "edges kept"}},
        "yaxis": {"title": {"text": label}},
        "margin": {"t": 20},
    }
    return Plotted(f"Edges against {panel.label}", [line, points], layout)


def _finite(value: float) -> float | None:
    """JSON has no infinities; what is infinite is not drawn."""
    return value if math.isfinite(value) else None
