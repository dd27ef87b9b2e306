"""The page of a circuit from strangers, and of a large or odd one, in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser

from pahq_hf.circuit.graph import GraphSpec
from pahq_hf.circuit.render import palette
from pahq_hf.circuit.render.page import circuit_page, compare_page
from pahq_hf.circuit.render.palette import DARK, LIGHT
from pahq_hf.errors import ConfigError
from tests.browser import SMALL, chromium, opened, random_circuit, visited
from tests.tiers import exhaustive, quick

SMOLLM2 = GraphSpec(layers=30, heads=9, kv_groups=3)
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)><svg onload=alert(1)>",
    "\"'><b onmouseover=alert(1)>\\\\\\u003cscript\\u003e",
    "${alert(1)} {{ 7 * 7 }} %{x} <!-- <script> --> ]]>",
    "\u2028\u2029\u202eevil\x00\x1b[31m\ud800",
    "<a href='javascript:alert(1)'>x</a>" + "w" * 10_000,
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every page goes: the browser has compiled the scripts of one at the same address."""
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as result:
        yield result


@pytest.mark.parametrize("text", quick(HOSTILE, HOSTILE[0], HOSTILE[4]))
def test_hostile_names_are_inert(browser: Browser, pages: Path, text: str) -> None:
    run: dict[str, Any] = {"task": {"name": text}, "metric": {"name": text, "final": text}}
    run |= {"arguments": {"threshold": text}, "precision": {"regime": {"<script>": text}}}
    circuit = random_circuit(SMALL, 30, model={"base_model": text, "revision": text}, discovery=run)
    for html in (circuit_page(circuit), compare_page(circuit, circuit)):
        with opened(browser, html, pages) as shown:
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


def test_data_cannot_end_its_script() -> None:
    html = circuit_page(random_circuit(SMALL, 30))
    data = html.split('id="data">')[1].split("</script>")[0]
    assert not re.search("[<>&\u2028\u2029]", data)
    assert json.loads(data)["readers"]


def test_browser_refuses_other_scripts_and_the_network(browser: Browser, pages: Path) -> None:
    page = circuit_page(random_circuit(SMALL, 30))
    html = page.replace("<main>", "<script>window.intruder = true</script><main>")
    policy = "Content Security Policy"
    with opened(browser, html, pages, foreseen=policy) as shown:
        assert shown.page.evaluate("window.intruder") is None
        assert any(policy in trouble for trouble in shown.troubles)
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


def test_waiting_passes_over_foreseen_troubles_only(browser: Browser, pages: Path) -> None:
    """A refusal is said before the page is drawn where the machine is slow."""
    path = pages / "slow.html"
    path.write_text("<p>drawn at the fourth look", encoding="utf-8")
    with visited(browser, path) as shown:
        shown.page.evaluate("() => { let looks = 0; window.pahq = { idle: () => ++looks > 3 }; }")
        shown.troubles.append("refused by policy")
        shown.foreseen = "policy"
        shown.settle()
        shown.page.evaluate("() => { window.pahq = { idle: () => false }; }")
        shown.troubles.append("TypeError")
        with pytest.raises(AssertionError, match=r"^\['TypeError'\]"):
            shown.settle()


# -- size ---------------------------------------------------------------------------------------------


def test_a_large_circuit_opens(browser: Browser, pages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says how fast; slow machines are no failure."""
    circuit = random_circuit(SMOLLM2, 2000)
    assert circuit.graph.edge_count == 70_651
    with opened(browser, circuit_page(circuit), pages) as shown:
        seconds = shown.ask("openedAfter") / 1000
        assert shown.drawn_lines() == circuit.to_networkx().number_of_edges()
        assert shown.drawn_nodes() == len(circuit.nodes)
    # The debugger that drives the browser about doubles the time.
    with capsys.disabled():
        print(f"\n2,000 of 70,651 edges: open after {seconds:.2f} s")


def test_starts_with_the_strongest_of_very_many(browser: Browser, pages: Path) -> None:
    circuit = random_circuit(SMOLLM2, 12_000)
    with opened(browser, circuit_page(circuit), pages) as shown:
        cut = shown.ask("cut")
        expected = [name for name, score in circuit.edges if abs(score) >= cut]
        assert shown.ask("visibleEdges") == expected
        assert 3_800 < len(expected) <= 4_000
        assert f"{len(expected):,} of 12,000" in (shown.page.locator("#count").text_content() or "")


@pytest.mark.parametrize(
    "scores", [(np.nan, np.inf, 0.0), exhaustive([np.nan]), exhaustive([np.inf]), exhaustive([0.0])]
)
def test_odd_scores(browser: Browser, pages: Path, scores: Sequence[float]) -> None:
    circuit = random_circuit(SMALL, 20)
    circuit.scores[circuit.kept] = np.resize(scores, 20)
    circuit.tested[:] = False
    with opened(browser, circuit_page(circuit), pages) as shown:
        assert len(shown.ask("visibleEdges")) == 20
        assert shown.page.locator("#top span:last-child").first.text_content() == "not tested"
        assert shown.troubles == []


def test_empty_circuit(browser: Browser, pages: Path) -> None:
    with opened(browser, circuit_page(random_circuit(SMALL, 0)), pages) as shown:
        assert (shown.drawn_nodes(), shown.drawn_lines()) == (0, 0)
        assert shown.page.locator("#count").text_content() == "0 of 0 edges shown"
        assert shown.page.title() == "Circuit"
        assert shown.troubles == []


def test_colours_are_in_one_place() -> None:
    """Whoever changes those of the page changes the palette, and nothing else."""
    folder = Path(palette.__file__).parent
    files = [path for path in folder.rglob("*.*") if path.suffix in (".py", ".js", ".css", ".jinja")]
    assert len(files) > 10
    colour = re.compile(r"#[0-9a-fA-F]{6}\b|(?<!&)#[0-9a-fA-F]{3}\b|rgba?\([^)]*[1-9]")
    stray = {path.name for path in files if colour.search(path.read_text(encoding="utf-8"))}
    assert stray == {"palette.py"}


def test_a_page_in_other_colours() -> None:
    light, dark = replace(LIGHT, mlp="#117733"), replace(DARK, ground="#0a0b0c")
    for html in (
        circuit_page(random_circuit(SMALL, 5), light, dark),
        compare_page(random_circuit(SMALL, 5), random_circuit(SMALL, 7), light, dark),
    ):
        assert '"#117733"' in html and LIGHT.mlp not in html
        assert "--ground:#0a0b0c;" in html and DARK.ground not in html


@pytest.mark.parametrize(
    "colours", [{"ink": "red"}, {"head": "#12345;}</style>"}, {"edges": {"q": ""}}, {"sets": ("#000000", 7)}]
)
def test_what_is_no_colour_is_refused(colours: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"a colour is written as #rrggbb; {next(iter(colours))} has"):
        replace(LIGHT, **colours)
