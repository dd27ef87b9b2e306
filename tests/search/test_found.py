"""What a search of one's own returns: one line names what is wrong with it, and nothing is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pahq_hf import Circuit, register_search
from pahq_hf.circuit.graph import Graph
from pahq_hf.errors import ConfigError, UnverifiedWarning
from pahq_hf.search.kind import Found, SearchOptions
from pahq_hf.search.registry import _SEARCHES
from pahq_hf.search.work import Work
from tests.helpers import wrapped
from tests.models import random_task

TASK = random_task(batch=2, length=5, padding="right", seed=3, metric="logit_diff")


@contextmanager
def registered(function: Callable[[Work[Any]], Any], options: type[Any] = SearchOptions) -> Iterator[None]:
    """The search `mine` while inside."""
    register_search("mine", options)(function)
    try:
        yield
    finally:
        del _SEARCHES["mine"]


def discover(out: Path | None = None, **options: Any) -> Circuit:
    """Run it on a tiny model."""
    return wrapped("llama").discover(TASK, search="mine", out=out, progress=False, **options)


def whole(graph: Graph) -> Found:
    """All edges."""
    return Found(graph.all_edges.copy(), np.zeros(graph.all_edges.shape), graph.all_edges.copy())


Change = Callable[[Found], Any]
BAD: Mapping[str, tuple[Change, str]] = {
    "nothing": (lambda found: None, "must return a Found"),
    "an array": (lambda found: found.kept, "must return a Found"),
    "no such edges": (
        lambda found: replace(found, kept=np.ones_like(found.kept)),
        r"its kept has \d+ edges that the graph does not, such as a0\.h0->a0\.h0<q>",
    ),
    "no such tested edges": (lambda found: replace(found, tested=np.ones_like(found.kept)), "its tested has"),
    "NaN": (lambda found: replace(found, scores=found.scores * math.nan), "its scores are NaN"),
    "infinity": (lambda found: replace(found, scores=found.scores + math.inf), "its scores are NaN or inf"),
    "a missing row": (lambda found: replace(found, kept=found.kept[1:]), "its kept must be .* of shape"),
    "turned scores": (lambda found: replace(found, scores=found.scores.T.copy()), "its scores must be"),
    "numbers as edges": (
        lambda found: replace(found, kept=found.kept.astype(int)),
        "its kept must be .*int64",
    ),
    "objects": (
        lambda found: replace(found, scores=found.scores.astype(object)),
        "its scores must be .*object",
    ),
    "half": (
        lambda found: replace(found, scores=found.scores.astype(np.float16)),
        "its scores must be .*float16",
    ),
    "a list": (lambda found: replace(found, kept=found.kept.tolist()), "its kept must be .*list"),
    "a tensor": (
        lambda found: replace(found, tested=torch.tensor(found.tested)),
        "its tested must be .*Tensor",
    ),
    "no scores": (lambda found: replace(found, scores=None), "its scores must be .*NoneType"),
    "readers by name": (lambda found: replace(found, searched=["logits"]), "its searched must be .*list"),
    "too few readers": (lambda found: replace(found, searched=found.kept[:3, 0]), "its searched must be"),
    "a final text": (lambda found: replace(found, final="0.1"), "its final must be a finite number"),
    "a final NaN": (lambda found: replace(found, final=math.nan), "its final must be a finite number"),
    "facts in a list": (lambda found: replace(found, facts=["fast"]), "its facts must be a mapping"),
    "facts by number": (lambda found: replace(found, facts={1: 2}), "its facts must be a mapping"),
    "a label": (lambda found: replace(found, label=3), "its label must be a string"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=list(BAD))
def test_what_is_no_circuit_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match=f"search 'mine' .*{message}")
    with registered(lambda work: change(whole(work.graph))), refused as caught:
        discover(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "circuit.json").exists()


def test_what_is_a_circuit_is_taken_as_it_is(tmp_path: Path) -> None:
    """Whatever stands where there is no edge, a NumPy number, and the graph's own arrays."""

    def fine(work: Work[Any]) -> Found:
        edges = work.graph.all_edges
        return Found(edges, np.where(edges, 0.5, math.nan), edges, final=np.float32(0.25), facts={"a": 1})

    with registered(fine), pytest.warns(UnverifiedWarning, match="0.25 by the search"):
        circuit = discover(tmp_path / "run")
    again = Circuit.from_pretrained(tmp_path / "run")
    assert np.array_equal(again.kept, again.graph.all_edges)
    assert np.array_equal(again.scores, 0.5 * again.graph.all_edges)
    assert circuit.record.metric.final == 0.25 and again.record.more["a"] == 1


def test_sections_of_the_record_are_not_a_searchs_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = {"screen": 0.1, "second_looks": 3, "resumed_readers": "none", "rounds": 7}
    with registered(lambda work: replace(whole(work.graph), facts=facts)):
        discover(tmp_path / "run")
    assert Circuit.from_pretrained(tmp_path / "run").record.more == {"rounds": 7}
    told = [message for message in caplog.messages if "left out of the record" in message]
    assert [message.split("'")[1] for message in told] == ["screen", "second_looks", "resumed_readers"]


def test_the_graph_cannot_be_altered() -> None:
    def careless(work: Work[Any]) -> Found:
        work.graph.all_edges[0] = False
        return whole(work.graph)

    graph = wrapped("llama").graph
    with registered(careless), pytest.raises(ValueError, match="read-only"):
        discover()
    with pytest.raises(ValueError, match="read-only"):
        graph.prefix[0] = 0
    assert graph.all_edges.sum() == graph.edge_count
