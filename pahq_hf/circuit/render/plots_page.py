"""One self-contained page of plotly figures, with a table below: nothing is fetched when it is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from pahq_hf.circuit.render.embed import (
    embedded_json,
    one_line_ends,
    readable,
    script_hashes,
    source,
    templates,
)
from pahq_hf.circuit.render.palette import LIGHT


@dataclass(frozen=True)
class Figure:
    """A plotly figure.

    Attributes:
        label: What it shows, for those who cannot see it; any text.
        data: Its traces.
        layout: Its layout.
    """

    label: str
    data: Sequence[dict[str, Any]]
    layout: dict[str, Any]


@dataclass(frozen=True)
class PageTable:
    """A table of any texts.

    Attributes:
        titles: Of the columns.
        rows: Cells by row.
    """

    titles: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=list)

    def readable(self) -> PageTable:
        """The same, harmless to look at."""
        return PageTable(
            [readable(text) for text in self.titles], [[*map(readable, row)] for row in self.rows]
        )


def plots_page(title: str, figures: Sequence[Figure], table: PageTable | None = None) -> str:
    """A page that shows figures.

    Args:
        title: Its title, any text.
        figures: What is drawn, one below the other. Plotly reads some tags and TeX in texts: those from
            outside are to be escaped.
        table: Shown below them.

    Returns:
        An HTML document.
    """
    from plotly.offline import get_plotlyjs  # only a page needs it

    pages = templates()
    scripts = [one_line_ends(get_plotlyjs()), source(pages, "plots.js")]
    return pages.get_template("plots.html.jinja").render(
        title=readable(title),
        colours=Markup(f":root{{{LIGHT.for_styles()}}}"),
        labels=[readable(figure.label) for figure in figures],
        table=None if table is None else table.readable(),
        # Only these very scripts run: the browser refuses whatever else got into the page.
        hashes=script_hashes(scripts),
        scripts=[Markup(script) for script in scripts],
        data=embedded_json([{"data": figure.data, "layout": figure.layout} for figure in figures]),
    )
