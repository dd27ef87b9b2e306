"""How many tests a search will make."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray, Graph, ReaderOrder
from pahq_hf.search.acdc_options import GreedyOptions
from pahq_hf.search.progress import Count, Progress
from pahq_hf.search.state import ReaderRecord, Search

_PRIOR_TESTS = 50  # tests that the first guess counts for
_PRIOR_SHARE = 0.02  # of all edges: tests that it counts for once there are some, in large graphs
_INTERVAL = 0.5  # seconds between two guesses


class ExpectedTests:
    """Tests that a search has still to make, from what it has decided so far.

    A reader's edges are tested only if its node still reaches somebody. Of a reader whose turn has not come
    that is certain where an edge of its node was kept; where none was, its hope are readers that come before
    it. How likely these keep an edge of a node that had none is what the search so far tells: how many nodes
    got their first reader per test.

    Args:
        graph: The graph.
        order: In which readers are visited.
        chosen: Readers that are searched; the others keep all edges untested. [readers]
        survivors: Edges that are tested; all by default. [readers, writers]
    """

    def __init__(
        self, graph: Graph, order: ReaderOrder, chosen: BoolArray, survivors: BoolArray | None = None
    ) -> None:
        self._graph = graph
        self._order = graph.reader_order(order)
        self._chosen = chosen
        edges = graph.all_edges if survivors is None else graph.all_edges & survivors
        self._edges: NDArray[np.int64] = edges.sum(axis=1)

    def remaining(self, state: Search) -> int:
        """Tests still to be made once the search has got to `state`."""
        decided = np.zeros(len(self._graph.readers), dtype=bool)
        decided[[record.reader for record in state.records]] = True
        reached: BoolArray = np.any(state.kept[decided], axis=0)  # writers that somebody reads for good
        tests = sum(len(record.scores) for record in state.records)
        # The first readers find the most nodes that had none: in large graphs they say little of later ones.
        prior = max(_PRIOR_TESTS, _PRIOR_SHARE * self._graph.edge_count) if tests else _PRIOR_TESTS
        rate = (int(reached.sum()) + 1) / (tests + prior)
        total, above = 0.0, np.zeros(len(self._graph.writers))  # expected tests of each writer's edges
        for reader in self._order:
            if decided[reader]:
                continue
            alive = self._alive(reader, reached, above, rate)
            seen = int(self._graph.prefix[reader])
            if not self._chosen[reader]:
                above[:seen] = np.inf  # it keeps all its edges
                continue
            total += alive * int(self._edges[reader])
            above[:seen] += alive * int(self._edges[reader]) / max(1, seen)
        return round(total)

    def _alive(self, reader: int, reached: BoolArray, above: NDArray[np.float64], rate: float) -> float:
        """How likely a reader's edges are tested."""
        feeds = list(self._graph.readers[reader].feeds)
        if not feeds or reached[feeds].any():
            return 1.0
        return float(1 - np.exp(-rate * above[feeds].sum()))


class SearchProgress:
    """Counts a search's tests, beside those it will make.

    Args:
        count: Who is told.
        expected: How many there will be.
        chosen: Readers that are searched. [readers]
    """

    def __init__(self, count: Count, expected: ExpectedTests, chosen: BoolArray) -> None:
        self._count = count
        self._expected = expected
        self._chosen = chosen
        self._next = 0.0

    def on_batch(self, tested: int) -> None:
        """Edges were tested; fewer than none where decisions were undone."""
        self._count.advance(tested)

    def on_reader(self, state: Search) -> None:
        """A reader is finished."""
        is_last = len(state.records) == len(state.graph.readers)
        if time.monotonic() < self._next and not is_last:
            return
        self._next = time.monotonic() + _INTERVAL
        tested = int(state.tested.sum())
        self._count.expect(tested + self._expected.remaining(state))
        done = [record.reader for record in state.records if self._chosen[record.reader]]
        self._count.note(kept=int(state.kept[done].sum()), metric=f"{state.metric:.4g}")


@contextmanager
def search_progress(
    progress: Progress,
    name: str,
    graph: Graph,
    config: GreedyOptions,
    survivors: BoolArray | None,
    done: Sequence[ReaderRecord],
) -> Iterator[SearchProgress]:
    """Show how far a search is.

    Args:
        progress: Who is told.
        name: What the search is called.
        graph: The graph.
        config: The search.
        survivors: Edges that are tested; all by default. [readers, writers]
        done: Readers finished by an earlier run.

    Yields:
        What the search tells its steps.
    """
    chosen = graph.match_readers(config.readers)
    expected = ExpectedTests(graph, config.order, chosen, survivors)
    state = Search.start(graph)
    for record in done:
        state.apply(record)
    tested = int(state.tested.sum())
    unit = "decision" if config.estimates else "test"
    with progress.count(name, unit, tested + expected.remaining(state), tested) as count:
        yield SearchProgress(count, expected, chosen)
