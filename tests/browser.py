"""A real Chromium for the tests of pages, driven by Playwright. `python -m tests.browser` installs one.

Playwright's own browsers come from a server that is not always within reach; Debian's come with apt.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.graph import Graph, GraphSpec

SMALL = GraphSpec(layers=3, heads=4, kv_groups=2)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PACKAGES = ("chromium", "fonts-dejavu-core")
MISSING = (
    "the tests of pages need Chromium: as root run `apt-get install chromium` (make test then does it by "
    "itself), or name another one in PAHQ_CHROMIUM"
)


def find_chromium() -> str | None:
    """Path of the browser: PAHQ_CHROMIUM, or the first on the path."""
    named = os.environ.get("PAHQ_CHROMIUM")
    if named:
        return shutil.which(named)
    return next((path for path in map(shutil.which, _NAMES) if path), None)


def random_circuit(spec: GraphSpec, count: int, seed: int = 0, **facts: Any) -> Circuit:
    """A circuit of `count` edges anywhere, with scores of both signs and many sizes."""
    graph = Graph(spec)
    rng = np.random.default_rng(seed)
    places = np.argwhere(graph.all_edges)
    chosen = places[rng.choice(len(places), count, replace=False)]
    kept = graph.no_edges()
    kept[chosen[:, 0], chosen[:, 1]] = True
    scores = np.where(kept, rng.standard_normal(kept.shape) ** 3, 0.0)
    return Circuit(graph, kept, scores, kept.copy(), **facts)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser.

    Raises:
        RuntimeError: If there is none on this machine.
    """
    path = find_chromium()
    if path is None:
        raise RuntimeError(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page in a browser, and what happened on it.

    Attributes:
        page: Playwright's page.
        url: Where it came from.
        requests: Every address it asked for.
        troubles: Dialogs, errors, and whatever is said on the console.
        foreseen: What a trouble says that is no reason to stop waiting.
    """

    page: Page
    url: str
    requests: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    foreseen: str | None = None

    def settle(self) -> None:
        """Wait until everything asked for is drawn."""
        # Playwright's own wait_for_function needs eval on the page, which the page forbids.
        self._wait("Boolean(window.pahq && window.pahq.idle())")

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Do something that moves or zooms the picture, and wait until it has been drawn where it goes."""
        count = "document.getElementById('plot').pahqMoves"
        self.page.evaluate(
            """() => {
                 const plot = document.getElementById("plot");
                 if (plot.pahqMoves === undefined) plot.on("plotly_relayout", () => plot.pahqMoves++);
                 plot.pahqMoves = 0;
               }"""
        )
        yield
        self._wait(f"{count} > 0")
        self.settle()

    def _wait(self, condition: str) -> None:
        """Wait until a condition holds; an unforeseen trouble ends it, for it may then never hold."""
        while not self.page.evaluate(condition):
            foreseen = self.foreseen
            unforeseen = [text for text in self.troubles if foreseen is None or foreseen not in text]
            assert not unforeseen, unforeseen
            self.page.wait_for_timeout(20)

    def ask(self, call: str, *arguments: Any) -> Any:
        """What a function or value of `window.pahq` says, once everything is drawn."""
        self.settle()
        return self.page.evaluate(
            "([name, values]) => typeof pahq[name] === 'function' ? pahq[name](...values) : pahq[name]",
            [call, list(arguments)],
        )

    def drawn_lines(self, colour: str | None = None) -> int:
        """Lines that are really in the picture, of one colour or of all."""
        self.settle()
        return self.page.evaluate(
            """(colour) => [...document.querySelectorAll("#plot .scatterlayer .js-line")].filter((line) =>
                 line.getAttribute("d") && (colour === null || getComputedStyle(line).stroke === colour)
               ).length""",
            colour,
        )

    def drawn_nodes(self) -> int:
        """Markers that are really in the picture."""
        self.settle()
        return self.page.locator("#plot .scatterlayer path.point").count()

    def hover(self, name: str) -> str:
        """The text that appears when the pointer rests on a node."""
        self.page.mouse.move(*self.ask("position", name))
        box = self.page.locator("#plot .hoverlayer .hovertext")
        box.wait_for()
        return "\n".join(box.locator("tspan").all_text_contents()) or box.text_content() or ""

    def click(self, name: str) -> None:
        """Click on a node."""
        self.page.mouse.click(*self.ask("position", name))
        self.settle()


@contextmanager
def opened(
    browser: Browser, html: str, folder: Path, *, foreseen: str | None = None, **context: Any
) -> Iterator[Opened]:
    """Open a page of ours from a file, as whoever made it would, and wait until all is drawn.

    Args:
        browser: The browser.
        html: The document.
        folder: Where its file goes.
        foreseen: What the page's troubles may say while it is waited for; they are kept all the same.
        **context: Options of Playwright's context, such as `color_scheme`.
    """
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    with visited(browser, path, **context) as result:
        result.foreseen = foreseen
        result.settle()
        yield result


@contextmanager
def visited(browser: Browser, path: Path, **context: Any) -> Iterator[Opened]:
    """Open any file.

    Documents follow each other in one tab, which has compiled the scripts of the one before at the same path:
    a new tab costs six times as much. One with a context of its own gets that. Nothing else is kept.
    """
    page = _new_tab(browser, **context) if context or not browser.contexts else browser.contexts[0].pages[0]
    page.mouse.move(0, 0)
    result = Opened(page, path.as_uri())

    def refuse(dialog: Any) -> None:
        result.troubles.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def hear(line: Any) -> None:
        result.troubles.append(line.text)

    def fail(error: Any) -> None:
        result.troubles.append(str(error))

    def ask(request: Any) -> None:
        result.requests.append(request.url)

    listeners: dict[Any, Any] = {"request": ask, "pageerror": fail, "console": hear, "dialog": refuse}
    for event, listener in listeners.items():
        page.on(event, listener)
    try:
        page.goto(result.url)
        yield result
    finally:
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
        if context:
            page.context.close()
        else:
            page.goto("about:blank")


def _new_tab(browser: Browser, **context: Any) -> Page:
    """A tab in a context of its own."""
    own = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **context})
    own.set_default_timeout(0)  # as long as it takes: the test's own limit ends what hangs
    return own.new_page()


def main() -> int:
    """Install Chromium where that is possible; otherwise say in one line what to do."""
    if find_chromium():
        return 0
    if os.geteuid() == 0 and shutil.which("apt-get") and not os.environ.get("PAHQ_CHROMIUM"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *_PACKAGES]):
            subprocess.run(["apt-get", "-qq", *command], env=environment, stdout=subprocess.DEVNULL)
        if find_chromium():
            return 0
    print(MISSING, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
