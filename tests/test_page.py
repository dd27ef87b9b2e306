"""The page of a circuit, in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from playwright.sync_api import Browser

from pahq_hf import Circuit
from pahq_hf.errors import CircuitError
from pahq_hf.graph import Graph, GraphSpec
from pahq_hf.render.layout import layout
from pahq_hf.render.page import circuit_page, compare_page
from tests.browser import Opened, chromium, opened

SMALL = GraphSpec(layers=3, heads=4, kv_groups=2)
SMOLLM2 = GraphSpec(layers=30, heads=9, kv_groups=3)
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)><svg onload=alert(1)>",
    "\"'><b onmouseover=alert(1)>\\\\\\u003cscript\\u003e",
    "${alert(1)} {{ 7 * 7 }} %{x} <!-- <script> --> ]]>",
    "\u2028\u2029\u202eevil\x00\x1b[31m\ud800",
    "<a href='javascript:alert(1)'>x</a>" + "w" * 10_000,
]


def random_circuit(spec: GraphSpec, count: int, seed: int = 0, **facts: Any) -> Circuit:
    graph = Graph(spec)
    rng = np.random.default_rng(seed)
    places = np.argwhere(graph.all_edges)
    chosen = places[rng.choice(len(places), count, replace=False)]
    kept = graph.no_edges()
    kept[chosen[:, 0], chosen[:, 1]] = True
    scores = np.where(kept, rng.standard_normal(kept.shape) ** 3, 0.0)
    return Circuit(graph, kept, scores, kept.copy(), **facts)


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
def shown(browser: Browser, circuit: Circuit, tmp_path: Path) -> Iterator[Opened]:
    with opened(browser, circuit_page(circuit), tmp_path) as page:
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
    places, graph = layout(circuit), circuit.to_networkx()
    assert [node.name for node in places.nodes] == circuit.nodes
    drawn = sorted((e.writer, e.reader, e.reader_name, e.kind, e.score) for e in places.edges)
    wanted = [(a, b, f["reader"], f["kind"], f["score"]) for a, b, f in graph.edges(data=True)]
    assert drawn == sorted(wanted)
    assert len({(node.x, node.y) for node in places.nodes}) == len(places.nodes)
    height = {node.name: node.y for node in places.nodes}
    assert all(height[edge.writer] < height[edge.reader] for edge in places.edges)


def test_layout_of_the_whole_model(circuit: Circuit) -> None:
    nodes = layout(circuit, all_nodes=True).nodes
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
    edges = [edge for edge in layout(circuit).edges if name in (edge.writer, edge.reader)]
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


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_click_highlights_what_runs_through_a_node(shown: Opened, circuit: Circuit, share: float) -> None:
    graph = stronger(circuit, move_slider(shown, share))
    for name in circuit.nodes:
        shown.click(name)
        nodes, edges = through(graph, name)
        assert set(shown.ask("highlightedNodes")) == nodes
        assert sorted(shown.ask("highlightedLines")) == edges
        assert shown.page.locator("#details h2").text_content() == name


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
    assert (facts["metric"], facts["circuit"], facts["edges kept"]) == ("kl", "0.25", "60 of 455")
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
        "[...document.querySelectorAll('input, button')].filter((e) => "
        "!(e.labels && e.labels.length) && !e.textContent.trim()).length"
    )
    assert nameless == 0


def test_zoom_pan_and_reset(shown: Opened) -> None:
    before = shown.ask("position", "a2.h3"), shown.ask("position", "a0.h0")
    shown.page.mouse.move(500, 450)
    shown.page.mouse.wheel(0, -400)
    shown.page.wait_for_timeout(400)
    zoomed = shown.ask("position", "a2.h3"), shown.ask("position", "a0.h0")
    assert zoomed[0][0] - zoomed[1][0] > before[0][0] - before[1][0]
    shown.page.mouse.down()
    shown.page.mouse.move(560, 480, steps=4)
    shown.page.mouse.up()
    shown.page.wait_for_timeout(200)
    panned = shown.ask("position", "a0.h0")
    assert panned[0] - zoomed[1][0] == pytest.approx(60, abs=3)
    # What is redrawn stays where it was moved to.
    move_slider(shown, 0.5)
    assert shown.ask("position", "a0.h0") == pytest.approx(panned, abs=1)
    shown.page.get_by_role("button", name="Reset view").click()
    shown.page.wait_for_timeout(200)
    assert shown.ask("position", "a0.h0") == pytest.approx(before[1], abs=1)


def test_picture_can_be_saved(shown: Opened) -> None:
    shown.page.locator("#plot").hover()
    with shown.page.expect_download() as download:
        shown.page.locator(".modebar-btn[data-title*='ownload']").click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    del shown.requests[1:]  # the picture is made from a blob


@pytest.mark.parametrize("system", ["light", "dark"])
def test_light_and_dark(browser: Browser, circuit: Circuit, tmp_path: Path, system: Any) -> None:
    other = {"light": "dark", "dark": "light"}[system]
    grounds = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}
    with opened(browser, circuit_page(circuit), tmp_path, color_scheme=system) as shown:

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


def test_compare_colours_three_sets(browser: Browser, tmp_path: Path) -> None:
    a, b = random_circuit(SMALL, 90, 1), random_circuit(SMALL, 120, 2)
    graphs = a.to_networkx(), b.to_networkx()
    lines = [{(u, v, reader) for u, v, reader in graph.edges(data="reader")} for graph in graphs]
    with opened(browser, compare_page(a, b), tmp_path) as shown:
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


# -- safety -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_inert(browser: Browser, tmp_path: Path, text: str) -> None:
    run: dict[str, Any] = {"task": {"name": text}, "metric": {"name": text, "final": text}}
    run |= {"arguments": {"threshold": text}, "precision": {"regime": {"<script>": text}}}
    circuit = random_circuit(SMALL, 30, model={"base_model": text, "revision": text}, discovery=run)
    for html in (circuit_page(circuit), compare_page(circuit, circuit)):
        with opened(browser, html, tmp_path) as shown:
            assert shown.drawn_lines() == circuit.to_networkx().number_of_edges()
            assert shown.page.locator("script").count() == 3
            assert shown.page.locator("#facts :is(img, svg, b, a, script), h1 > *").count() == 0
            value = shown.page.locator("#facts td").first.text_content() or ""
            assert len(value) <= 120
            if len(text) > 120:
                assert value.endswith("…")
            elif text.isprintable():
                assert value == text
            shown.hover(circuit.nodes[1])
            shown.page.get_by_label("Find a node").fill(text[:30])
            shown.click(circuit.nodes[1])
            assert circuit.nodes[1] in shown.ask("highlightedNodes")
            assert shown.troubles == []
            assert set(shown.requests) == {shown.url}


def test_data_cannot_end_its_script(circuit: Circuit) -> None:
    html = circuit_page(circuit)
    data = html.split('id="data">')[1].split("</script>")[0]
    assert not re.search("[<>&\u2028\u2029]", data)
    assert json.loads(data)["readers"]


def test_browser_refuses_other_scripts_and_the_network(
    browser: Browser, circuit: Circuit, tmp_path: Path
) -> None:
    html = circuit_page(circuit).replace("<main>", "<script>window.intruder = true</script><main>")
    with opened(browser, html, tmp_path) as shown:
        assert shown.page.evaluate("window.intruder") is None
        assert any("Content Security Policy" in trouble for trouble in shown.troubles)
        blocked = shown.page.evaluate(
            """async () => {
                 const seen = [];
                 document.addEventListener("securitypolicyviolation", (e) => seen.push(e.effectiveDirective));
                 new Image().src = "http://127.0.0.1:9/picture";
                 await fetch("http://127.0.0.1:9/data").catch(() => null);
                 await new Promise((done) => setTimeout(done, 200));
                 return seen.sort();
               }"""
        )
        assert blocked == ["connect-src", "img-src"]


# -- size ---------------------------------------------------------------------------------------------


def test_opens_fast(browser: Browser, tmp_path: Path) -> None:
    circuit = random_circuit(SMOLLM2, 2000)
    assert circuit.graph.edge_count == 70_651
    with opened(browser, circuit_page(circuit), tmp_path) as shown:
        seconds = shown.ask("openedAfter") / 1000
        assert shown.drawn_lines() == circuit.to_networkx().number_of_edges()
        assert shown.drawn_nodes() == len(circuit.nodes)
    # The debugger that drives the browser about doubles the time.
    print(f"2,000 of 70,651 edges: open after {seconds:.2f} s")
    assert seconds < 6


def test_starts_with_the_strongest_of_very_many(browser: Browser, tmp_path: Path) -> None:
    circuit = random_circuit(SMOLLM2, 12_000)
    with opened(browser, circuit_page(circuit), tmp_path) as shown:
        cut = shown.ask("cut")
        expected = [name for name, score in circuit.edges if abs(score) >= cut]
        assert shown.ask("visibleEdges") == expected
        assert 3_800 < len(expected) <= 4_000
        assert f"{len(expected):,} of 12,000" in (shown.page.locator("#count").text_content() or "")


@pytest.mark.parametrize("scores", [np.nan, np.inf, 0.0])
def test_odd_scores(browser: Browser, tmp_path: Path, scores: float) -> None:
    circuit = random_circuit(SMALL, 20)
    circuit.scores[circuit.kept] = scores
    circuit.tested[:] = False
    with opened(browser, circuit_page(circuit), tmp_path) as shown:
        assert len(shown.ask("visibleEdges")) == 20
        assert shown.page.locator("#top span:last-child").first.text_content() == "not tested"
        assert shown.troubles == []


def test_empty_circuit(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, circuit_page(random_circuit(SMALL, 0)), tmp_path) as shown:
        assert (shown.drawn_nodes(), shown.drawn_lines()) == (0, 0)
        assert shown.page.locator("#count").text_content() == "0 of 0 edges shown"
        assert shown.page.title() == "Circuit"
        assert shown.troubles == []
