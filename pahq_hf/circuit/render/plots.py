"""Plots of evaluations: faithfulness over circuit size, and ROC. PNG and SVG stills, and HTML pages.

A page is self-contained: plotly is inside it, nothing is fetched, and only its own scripts run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pahq_hf.circuit.files import make_folder, write_atomically, write_text
from pahq_hf.circuit.render.palette import LIGHT
from pahq_hf.circuit.render.picture import NO_DATE, PictureFormat
from pahq_hf.circuit.render.plots_page import Figure as Plotted
from pahq_hf.circuit.render.plots_page import plots_page


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        name: What the legend calls it.
        x: Abscissae.
        y: Ordinates.
        steps: Whether y stays until the next x.
        dashed: Whether it is a mere guide.
    """

    name: str
    x: list[float]
    y: list[float]
    steps: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """Lines and their axes.

    Attributes:
        title: Above it.
        x: Title of the abscissa.
        y: Title of the ordinate.
        lines: What is drawn.
        log_x: Whether the abscissa is logarithmic.
    """

    title: str
    x: str
    y: str
    lines: list[Line]
    log_x: bool = False


def plots_of(facts: dict[str, Any]) -> dict[str, Plot]:
    """The plots an evaluation gives, by file name.

    Args:
        facts: What `pahq_hf.evaluation.report.evaluate` found.

    Returns:
        `faithfulness` if it has a curve, `roc` if it has a reference.
    """
    plots = {}
    if "curve" in facts:
        plots["faithfulness"] = _curve_plot(facts["curve"])
    if "reference" in facts:
        plots["roc"] = _roc_plot(facts["reference"])
    return plots


def write_plots(facts: dict[str, Any], folder: Path) -> list[Path]:
    """Write `NAME.png`, `NAME.svg` and `NAME.html` of every plot.

    Args:
        facts: What `pahq_hf.evaluation.report.evaluate` found.
        folder: Created if needed.

    Returns:
        The files.

    Raises:
        RunError: If the folder cannot be written.
    """
    make_folder(folder)
    written = []
    formats: tuple[PictureFormat, ...] = ("png", "svg")
    for name, plot in plots_of(facts).items():
        for fmt in formats:
            written.append(folder / f"{name}.{fmt}")
            write_atomically(written[-1], partial(_save, plot, fmt))
        written.append(folder / f"{name}.html")
        write_text(written[-1], page_of(plot))
    return written


def _save(plot: Plot, fmt: PictureFormat, path: Path) -> None:
    with style.context("default"):  # whatever a matplotlibrc says
        draw_plot(plot).savefig(path, format=fmt, dpi=110, metadata=NO_DATE[fmt])


def draw_plot(plot: Plot) -> Figure:
    """A plot as a matplotlib figure."""
    figure = Figure(figsize=(6.0, 4.5), layout="constrained", facecolor=LIGHT.ground)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for line in plot.lines:
        style = {"color": LIGHT.dim, "linestyle": "--", "linewidth": 1} if line.dashed else {"marker": "."}
        axes.plot(line.x, line.y, label=line.name, drawstyle="steps-post" if line.steps else None, **style)
    if plot.log_x:
        axes.set_xscale("log")
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    axes.set_title(plot.title, fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return figure


def page_of(plot: Plot) -> str:
    """A plot as an HTML page."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines" if line.dashed else "lines+markers",
            "name": line.name,
            "x": line.x,
            "y": line.y,
            "line": {"shape": "hv" if line.steps else "linear", "dash": "dash" if line.dashed else "solid"},
        }
        for line in plot.lines
    ]
    layout = {
        "xaxis": {"title": {"text": plot.x}, "type": "log" if plot.log_x else "linear"},
        "yaxis": {"title": {"text": plot.y}},
        "template": "none",
    }
    return plots_page(plot.title, [Plotted(plot.title, traces, layout)])


def _curve_plot(curve: dict[str, Any]) -> Plot:
    fractions = curve["signed"]["fractions"]
    names = {"signed": f"by score, CPR {curve['cpr']:.3f}", "absolute": f"by |score|, CMD {curve['cmd']:.3f}"}
    lines = [Line(title, fractions, curve[name]["faithfulness"]) for name, title in names.items()]
    lines.append(Line("full model", [fractions[0], fractions[-1]], [1.0, 1.0], dashed=True))
    return Plot("Faithfulness over circuit size", "share of edges kept", "faithfulness", lines, log_x=True)


def _roc_plot(reference: dict[str, Any]) -> Plot:
    lines = []
    for name in ("edges", "nodes"):
        roc = reference[name]["roc"]
        if roc is not None:
            title = f"{name}, AUC {roc['auc']['step']:.3f} step, {roc['auc']['trapezoid']:.3f} trapezoid"
            lines.append(Line(title, roc["fpr"], roc["tpr"], steps=True))
    lines.append(Line("random", [0.0, 1.0], [0.0, 1.0], dashed=True))
    return Plot("ROC against the reference", "false positive rate", "true positive rate", lines)
