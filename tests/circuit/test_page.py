"""The page of a circuit, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from playwright.sync_api import Browser

from pahq_hf import Circuit
from pahq_hf.circuit.graph import GraphSpec
from pahq_hf.circuit.nodes import ScoredNodes
from pahq_hf.circuit.render.layout import layout
from pahq_hf.circuit.render.page import circuit_page, compare_page
from pahq_hf.circuit.render.picture import draw
from pahq_hf.errors import CircuitError
from tests.browser import SMALL, Opened, chromium, opened, random_circuit
from tests.tiers import quick


def stronger(circuit: Circuit, cut: float) -> nx.MultiDiGraph:
    """The circuit as networkx sees it, without its weaker edges."""
    result = circuit.to_networkx()
    weak = [(*ends, key) for *ends, key, s in result.edges(keys=True, data="score") if abs(s) < cut]
    result.remove_edges_from(weak)
    return result


def through(graph: nx.MultiDiGraph, node: str) -> tuple[set[str], list[list[str]]]:
    """Nodes and edges on paths through a node."""
    up, down = nx.ancestors(graph, node) | {node}, nx.descendants(graph, node) | {node}
    edges = [
        [f"{a}->{reader}", b] for a, b, reader in graph.edges(data="reader") if {a, b} <= up or {a, b} <= down
    ]
    return up | down, sorted(edges)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every page goes: the browser has compiled the scripts of one at the same address."""
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as result:
        yield result


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    model = {"base_model": "some/model"}
    run = {
        "task": {"name": "ioi"},
        "arguments": {"threshold": 0.02},
        "precision": {"regime": "pahq"},
        "metric": {"name": "kl", "full": 0.0, "final": 0.25},
    }
    return random_circuit(SMALL, 60, model=model, discovery=run)


@pytest.fixture
def shown(browser: Browser, circuit: Circuit, pages: Path) -> Iterator[Opened]:
    with opened(browser, circuit_page(circuit), pages) as page:
        yield page
        assert page.troubles == []
        assert set(page.requests) == {page.url}


def move_slider(shown: Opened, share: float) -> float:
    """Move it by keyboard or pointer alike: set it, and say so. Returns the |score| it stands for."""
    shown.page.locator("#cut").evaluate(
        "(slider, share) => { slider.value = Math.round(share * slider.max); "
        "slider.dispatchEvent(new Event('input')); }",
        share,
    )
    return float(shown.ask("cut"))


def press(shown: Opened, key: str) -> None:
    shown.page.keyboard.press(key)
    shown.settle()


# -- where things are ---------------------------------------------------------------------------------


def test_layout_has_the_circuits_nodes_and_edges(circuit: Circuit) -> None:
    places, graph = layout(circuit.scored), circuit.to_networkx()
    assert [node.name for node in places.nodes] == circuit.nodes
    drawn = sorted((e.writer, e.reader, e.reader_name, e.kind, e.score) for e in places.edges)
    wanted = [(a, b, f["reader"], f["kind"], f["score"]) for a, b, f in graph.edges(data=True)]
    assert drawn == sorted(wanted)
    assert len({(node.x, node.y) for node in places.nodes}) == len(places.nodes)
    height = {node.name: node.y for node in places.nodes}
    assert all(height[edge.writer] < height[edge.reader] for edge in places.edges)


def test_layout_of_the_whole_model(circuit: Circuit) -> None:
    nodes = layout(circuit.scored, all_nodes=True).nodes
    assert [node.name for node in nodes] == [*(w.name for w in circuit.graph.writers), "logits"]
    assert (nodes[0].kind, nodes[-1].kind) == ("input", "logits")
    assert min(nodes, key=lambda node: node.y) is nodes[0]
    assert max(nodes, key=lambda node: node.y) is nodes[-1]


# -- the picture --------------------------------------------------------------------------------------


def test_draws_every_node_and_edge(shown: Opened, circuit: Circuit) -> None:
    graph = circuit.to_networkx()
    assert shown.drawn_nodes() == graph.number_of_nodes() == shown.ask("nodes")
    assert shown.drawn_lines() == graph.number_of_edges()
    assert shown.ask("edges") == circuit.edge_count
    assert shown.ask("visibleEdges") == [name for name, _ in circuit.edges]
    assert shown.page.locator("#count").text_content() == "60 of 60 edges shown"


def test_negative_scores_are_dotted(shown: Opened, circuit: Circuit) -> None:
    dashes = shown.page.evaluate(
        "[...document.querySelectorAll('#plot .js-line')].filter((line) => "
        "getComputedStyle(line).strokeDasharray !== 'none').length"
    )
    negative = [score for *_, score in circuit.to_networkx().edges(data="score") if score < 0]
    assert dashes == len(negative) > 0


def test_hover_shows_details(shown: Opened, circuit: Circuit) -> None:
    name = "a1.h2"
    text = shown.hover(name)
    edges = [edge for edge in layout(circuit.scored).edges if name in (edge.writer, edge.reader)]
    written = {edge.reader_name for edge in edges if edge.writer == name}
    read = [edge for edge in edges if edge.reader == name]
    strongest = max(edges, key=lambda edge: abs(edge.score))
    assert name in text
    assert f"{len(read)} in, {len(written)} out" in text
    assert f"{strongest.writer}->{strongest.reader_name}" in text


def test_hover_and_click_on_an_edge(shown: Opened, circuit: Circuit) -> None:
    name, target, x, y = shown.page.evaluate(
        """() => {
             const spots = plot.data.find((trace) => trace.meta === "edges");
             const nodes = plot.data.find((trace) => trace.meta === "nodes");
             const away = (i) => Math.min(
               ...spots.x.map((x, j) => j === i ? 9 : Math.hypot(x - spots.x[i], spots.y[j] - spots.y[i])),
               ...nodes.x.map((x, j) => Math.hypot(x - spots.x[i], nodes.y[j] - spots.y[i])));
             const best = spots.x.map((_, i) => i).sort((a, b) => away(b) - away(a))[0];
             const { xaxis, yaxis } = plot._fullLayout;
             const box = plot.getBoundingClientRect();
             return [spots.hovertext[best], spots.customdata[best],
                     box.left + xaxis._offset + xaxis.d2p(spots.x[best]),
                     box.top + yaxis._offset + yaxis.d2p(spots.y[best])];
           }"""
    )
    edge, score = circuit.edges[target]
    assert edge.replace(">", "&gt;").replace("<", "&lt;") in name
    shown.page.mouse.move(x, y)
    box = shown.page.locator("#plot .hoverlayer .hovertext")
    box.wait_for()
    assert edge in (box.text_content() or "")
    shown.page.mouse.click(x, y)
    assert {name for name, _ in shown.ask("highlightedLines")} == {edge}
    assert f"{abs(score):.4g}" in (shown.page.locator("#details p").text_content() or "")


# -- controls -----------------------------------------------------------------------------------------


def test_slider_hides_weaker_edges(shown: Opened, circuit: Circuit) -> None:
    counts = []
    for share in (0.0, 0.3, 0.8, 1.0):
        cut = move_slider(shown, share)
        expected = [name for name, score in circuit.edges if abs(score) >= cut]
        assert shown.ask("visibleEdges") == expected
        assert shown.drawn_lines() == stronger(circuit, cut).number_of_edges()
        assert shown.page.locator("#count").text_content() == f"{len(expected)} of 60 edges shown"
        counts.append(len(expected))
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (60, 1)
    assert shown.drawn_nodes() == len(circuit.nodes)


def test_legend_hides_kinds(shown: Opened, circuit: Circuit) -> None:
    shown.page.get_by_label(re.compile(r"^q \(")).uncheck()
    assert shown.ask("visibleEdges") == [name for name, _ in circuit.edges if "<q>" not in name]


def test_search(shown: Opened, circuit: Circuit) -> None:
    box, answer = shown.page.get_by_label("Find a node"), shown.page.locator("#found")
    box.fill("a0.h1")
    assert set(shown.ask("highlightedNodes")) == through(circuit.to_networkx(), "a0.h1")[0]
    assert answer.text_content() == "a0.h1 is highlighted"
    plot = shown.page.locator("#plot .bglayer rect, #plot .nsewdrag").first.bounding_box()
    assert plot is not None
    middle = plot["x"] + plot["width"] / 2, plot["y"] + plot["height"] / 2
    assert shown.ask("position", "a0.h1") == pytest.approx(middle, abs=2)
    box.fill("a0")
    assert "nodes begin with this" in (answer.text_content() or "")
    box.fill("<b>a9.h9</b>")
    assert answer.text_content() == "No node of this circuit matches “<b>a9.h9</b>”"
    box.fill("M1")
    assert shown.page.locator("#details h2").text_content() == "m1"


@pytest.mark.parametrize("share", quick([0.0, 0.5], 0.5))
def test_click_highlights_what_runs_through_a_node(shown: Opened, circuit: Circuit, share: float) -> None:
    graph = stronger(circuit, move_slider(shown, share))
    for name in circuit.nodes:
        shown.click(name)
        nodes, edges = through(graph, name)
        assert set(shown.ask("highlightedNodes")) == nodes
        assert sorted(shown.ask("highlightedLines")) == edges
        assert shown.page.locator("#details h2").text_content() == name


def test_whole_nodes_show_their_scores(browser: Browser, circuit: Circuit, pages: Path) -> None:
    """On the pointer's touch and where a node is selected; circuits of edges show none."""
    graph = circuit.graph
    scores = np.arange(len(graph.writers)) / 8 - 0.5
    kept = np.ones(len(graph.writers), dtype=bool)
    nodes = ScoredNodes(kept, scores, np.arange(len(kept)) > 0)
    of_nodes = replace(circuit, kept=graph.all_edges.copy(), scored_nodes=nodes)
    score = f"{scores[graph.writer_index('m1')]:+.4g}"
    with opened(browser, circuit_page(of_nodes), pages) as shown:
        shown.click("m1")
        assert (shown.page.locator("#details p").text_content() or "").startswith(f"score {score}; ")
        shown.click("logits")
        assert "score" not in (shown.page.locator("#details p").text_content() or "")


def test_clearing(shown: Opened) -> None:
    shown.click("a1.h1")
    assert shown.ask("highlightedNodes")
    left, top = shown.ask("position", "a0.h0")
    shown.page.mouse.click(left - 40, top + 45)
    assert shown.ask("highlightedNodes") == []
    shown.click("a1.h1")
    press(shown, "Escape")
    assert shown.ask("highlightedNodes") == []
    assert shown.page.locator("#details").is_hidden()


def test_top_edges(shown: Opened, circuit: Circuit) -> None:
    ranked = sorted(circuit.edges, key=lambda edge: -abs(edge[1]))
    listed = shown.page.locator("#top button span:first-child").all_text_contents()
    assert listed == [name for name, _ in ranked[:40]]
    shown.page.locator("#top button").first.click()
    assert {name for name, _ in shown.ask("highlightedLines")} == {ranked[0][0]}


def test_facts(shown: Opened) -> None:
    rows = [row.split("\t") for row in shown.page.locator("#facts tr").all_inner_texts()]
    facts = dict(rows)
    assert facts["model"] == "some/model"
    assert (facts["task"], facts["threshold"], facts["precision"]) == ("ioi", "0.02", "pahq")
    assert (facts["metric"], facts["circuit"], facts["edges kept"]) == ("kl", "0.25", "60 of 190")
    assert "seconds" not in facts
    assert shown.page.title() == "Circuit of some/model on ioi"


def test_keyboard(shown: Opened) -> None:
    slider = shown.page.get_by_label("Hide edges")
    slider.focus()
    press(shown, "End")
    assert len(shown.ask("visibleEdges")) == 1
    assert "1 of 60" in (slider.get_attribute("aria-valuetext") or "")
    press(shown, "Home")
    shown.page.locator("#top button").nth(1).focus()
    press(shown, "Enter")
    assert shown.ask("highlightedLines")
    shown.page.get_by_label("Find a node").focus()
    shown.page.keyboard.type("logi")
    press(shown, "Enter")
    assert "logits" in shown.ask("highlightedNodes")
    nameless = shown.page.evaluate(
        """[...document.querySelectorAll("input, button")].filter((control) =>
             !(control.labels && control.labels.length) && !control.textContent.trim() && !control.ariaLabel
           ).map((control) => control.outerHTML)"""
    )
    assert nameless == []


def test_zoom_pan_and_reset(shown: Opened) -> None:
    before = shown.ask("position", "a2.h3"), shown.ask("position", "a0.h0")
    shown.click("a1.h1")
    lit = shown.ask("highlightedNodes")
    shown.page.mouse.move(500, 450)
    with shown.moving():
        shown.page.mouse.wheel(0, -400)
    zoomed = shown.ask("position", "a2.h3"), shown.ask("position", "a0.h0")
    assert zoomed[0][0] - zoomed[1][0] > before[0][0] - before[1][0]
    with shown.moving():
        shown.page.mouse.down()
        shown.page.mouse.move(560, 480, steps=4)
        shown.page.mouse.up()
    panned = shown.ask("position", "a0.h0")
    assert panned[0] - zoomed[1][0] == pytest.approx(60, abs=3)
    assert shown.ask("highlightedNodes") == lit
    # What is redrawn stays where it was moved to.
    move_slider(shown, 0.5)
    assert shown.ask("position", "a0.h0") == pytest.approx(panned, abs=1)
    with shown.moving():
        shown.page.get_by_role("button", name="Reset view").click()
    assert shown.ask("position", "a0.h0") == pytest.approx(before[1], abs=1)


def test_nothing_offers_to_send_the_circuit_away(shown: Opened) -> None:
    titles = [(b.get_attribute("data-title") or "").lower() for b in shown.page.locator(".modebar-btn").all()]
    assert sorted(titles) == ["download plot as a png", "pan", "zoom", "zoom in", "zoom out"]
    assert shown.page.locator("a[href], form, iframe").count() == 0


def test_picture_can_be_saved(shown: Opened) -> None:
    shown.page.locator("#plot").hover()
    with shown.page.expect_download() as download:
        shown.page.locator(".modebar-btn[data-title*='ownload']").click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    del shown.requests[1:]  # the picture is made from a blob


def test_the_still_picture_has_the_colours_of_the_page(
    shown: Opened, circuit: Circuit, tmp_path: Path
) -> None:
    draw(circuit.scored, tmp_path / "picture.svg", "svg")
    still = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    shown.settle()
    for mark, name in ((".js-line", "stroke"), ("path.point", "fill")):
        found = set(
            shown.page.locator(f"#plot .scatterlayer {mark}").evaluate_all(
                f"(marks) => marks.map((mark) => getComputedStyle(mark).{name}).filter((c) => c !== 'none')"
            )
        )
        colours = {"#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", c)[:3]) for c in found}
        assert len(colours) > 1
        assert [colour for colour in colours if f"{name}: {colour}" not in still] == []


@pytest.mark.parametrize("system", quick(["light", "dark"], "dark"))
def test_light_and_dark(browser: Browser, circuit: Circuit, pages: Path, system: Any) -> None:
    other = {"light": "dark", "dark": "light"}[system]
    grounds = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}
    with opened(browser, circuit_page(circuit), pages, color_scheme=system) as shown:

        def ground() -> list[str]:
            return shown.page.evaluate(
                "[getComputedStyle(document.body).backgroundColor, "
                "getComputedStyle(document.querySelector('#plot .main-svg')).backgroundColor]"
            )

        assert shown.ask("theme") == system
        assert ground() == [grounds[system]] * 2
        shown.page.get_by_role("button", name=other.title()).click()
        assert shown.ask("theme") == other
        assert ground() == [grounds[other]] * 2


# -- two circuits -------------------------------------------------------------------------------------


def test_compare_colours_three_sets(browser: Browser, pages: Path) -> None:
    a, b = random_circuit(SMALL, 90, 1), random_circuit(SMALL, 120, 2)
    graphs = a.to_networkx(), b.to_networkx()
    lines = [{(u, v, reader) for u, v, reader in graph.edges(data="reader")} for graph in graphs]
    with opened(browser, compare_page(a, b), pages) as shown:
        colours = shown.page.locator("#legend i").evaluate_all(
            "(swatches) => swatches.map((swatch) => getComputedStyle(swatch).backgroundColor)"
        )
        assert len(set(colours)) == 3
        sets = [lines[0] - lines[1], lines[1] - lines[0], lines[0] & lines[1]]
        assert [shown.drawn_lines(colour) for colour in colours] == [len(part) for part in sets]
        labels = shown.page.locator("#legend label").all_text_contents()
        kept = [a.kept & ~b.kept, b.kept & ~a.kept, a.kept & b.kept]
        names = ("only A", "only B", "in both")
        counted = [f"{name} ({part.sum()})" for name, part in zip(names, kept, strict=True)]
        assert labels == counted
        assert shown.ask("edges") == int((a.kept | b.kept).sum())
        assert shown.troubles == []


def test_compare_needs_one_graph() -> None:
    with pytest.raises(CircuitError, match="different graphs"):
        compare_page(random_circuit(SMALL, 5), random_circuit(GraphSpec(2, 4, 2), 5))
