"""Plots of sweeps: what is on the front, what is in the files, and that texts in them are inert."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from playwright.sync_api import Browser, Page

from pahq_hf.circuit.render.pareto import draw_pareto, pareto_front, pareto_page
from pahq_hf.errors import ConfigError
from pahq_hf.search.sweep_result import Sweep, SweepRow
from tests.browser import SMALL, chromium, random_circuit, visited
from tests.tiers import quick

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "$\\frac{$ ]]> \u2028\x1b[31m\ud800",
    "<a href='javascript:alert(1)'>x</a>" + "w" * 10_000,
]


def row(tau: float, kept: int, metric: float, kl: float, name: str = "logit_diff") -> SweepRow:
    return SweepRow(tau, kept, kept, 100, 120, 10, name, metric, kl, 0.5, 1.0)


ROWS = [row(0.01, 60, -2.0, 0.1), row(0.1, 20, -1.0, 0.7), row(1.0, 0, 0.0, 2.0)]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_no_circuit_beats_one_on_the_front(points: list[tuple[int, int]]) -> None:
    front = pareto_front([edges for edges, _ in points], [float(value) for _, value in points])
    for number, (edges, value) in enumerate(points):
        others = [point for i, point in enumerate(points) if i != number]
        beaten = any(e <= edges and v <= value and (e, v) != (edges, value) for e, v in others)
        if number in front:
            assert not beaten
        elif not beaten:  # its equal is there
            assert (edges, value) in [points[i] for i in front]
    assert [points[i][0] for i in front] == sorted({points[i][0] for i in front})


def texts(svg: Path) -> str:
    """What an SVG of matplotlib's says: it draws letters as paths and names them in comments."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", svg.read_text(), flags=re.DOTALL))


def test_pictures(tmp_path: Path) -> None:
    svg, png = tmp_path / "a.svg", tmp_path / "a.png"
    draw_pareto(ROWS, "demo on ioi", svg, "svg")
    draw_pareto(ROWS, "demo on ioi", png, "png")
    said = texts(svg)
    for text in ("demo on ioi", "τ=0.01", "τ=0.1", "τ=1", "edges kept", "logit_diff (minimised)", "KL from"):
        assert text in said
    assert imread(png).std() > 0.01
    again = tmp_path / "b.svg"
    draw_pareto([row(0.1, 20, 0.7, 0.7, "kl")], "demo", again, "svg")
    assert texts(again).count("KL from") == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_any_title_can_be_drawn(tmp_path: Path, text: str) -> None:
    for fmt in ("png", "svg"):
        draw_pareto(ROWS, text, tmp_path / f"a.{fmt}", fmt)  # type: ignore[arg-type]
        assert (tmp_path / f"a.{fmt}").stat().st_size > 1000
    assert "<script" not in (tmp_path / "a.svg").read_text()


def test_the_ending_says_what_to_draw(tmp_path: Path) -> None:
    facts = {
        "arguments": {"threshold": 0.1},
        "evaluations": 9,
        "reused": {"evaluations": 1},
        "metric": {"name": "kl", "fp32": 0.5, "full": 0.0, "empty": 2.0},
        "kl": 0.5,
        "seconds": {"total": 1.0},
        "task": {"name": "ioi"},
    }
    circuit = random_circuit(SMALL, 30, model={"base_model": "some/model"}, discovery=facts)
    sweep = Sweep({0.1: circuit}, {})
    assert sweep.rows[0].faithfulness == pytest.approx(0.75)
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.HTML", b"<!DOCTYPE")):
        sweep.draw(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert "some/model on ioi" in (tmp_path / "a.HTML").read_text()
    with pytest.raises(ConfigError, match=r"ends in \.png, \.svg or \.html"):
        sweep.draw(tmp_path / "a.pdf")


# -- the page, in a real browser -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every page goes: the browser has compiled the scripts of one at the same address."""
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as result:
        yield result


@contextmanager
def opened(browser: Browser, html: str, folder: Path) -> Iterator[Page]:
    """The page drawn, on which nothing goes wrong, is said or is asked for."""
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8", errors="surrogatepass")
    with visited(browser, file) as shown:
        shown.page.locator("#plot-0 .scatterlayer path.point").first.wait_for()
        yield shown.page
        assert shown.troubles == []
        assert set(shown.requests) == {shown.url}


def test_the_page_draws_both_measures(browser: Browser, pages: Path) -> None:
    with opened(browser, pareto_page(ROWS, "demo on ioi"), pages) as page:
        page.locator("#plot-1 .scatterlayer path.point").first.wait_for()
        for plot in ("#plot-0", "#plot-1"):
            assert page.locator(f"{plot} .scatterlayer path.point").count() == 3
        assert page.locator("h1").text_content() == "demo on ioi"
        cells = page.locator("tbody tr").first.locator("td").all_text_contents()
        assert cells == ["0.01", "60", "60", "100", "-2", "0.1", "0.5000"]


@pytest.mark.parametrize("text", quick(HOSTILE, HOSTILE[0], HOSTILE[2]))
def test_hostile_texts_are_inert(browser: Browser, pages: Path, text: str) -> None:
    rows = [row(0.1, 20, 0.5, 0.5, text)]
    with opened(browser, pareto_page(rows, text), pages) as page:
        assert page.locator("script").count() == 3
        assert page.locator("img, a[href^=javascript], h1 > *").count() == 0
        assert len(page.locator("h1").text_content() or "") <= 120


def test_data_cannot_end_its_script() -> None:
    html = pareto_page([row(0.1, 20, 0.5, 0.5, HOSTILE[0])], "x")
    data = html.partition('id="data">')[2].partition("</script>")[0]
    assert len(json.loads(data)) == 2
    assert "alert(1)</script>" not in html.partition("<table>")[2].partition('id="data">')[0]
