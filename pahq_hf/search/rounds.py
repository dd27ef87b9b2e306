"""Rounds in which a circuit loses edges and gets others, and what they lead to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pahq_hf.circuit.graph import BoolArray, Graph, edge_list
from pahq_hf.engine.protocol import Engine
from pahq_hf.search.attribution.methods import Scores
from pahq_hf.search.units import Units

Edge = tuple[int, int]

GAIN = 1e-4  # of the gap between the full model and no edges, that a swap has to bring
_LITTLE = 0.05  # of the gap of the circuit itself, that is enough where it is less
NOTHING = 1e-6  # of it, by which the metric moves where an edge does nothing: rounding


@dataclass(frozen=True)
class Scale:
    """What metrics of circuits are held against.

    Attributes:
        full: The metric of all edges.
        empty: The metric of none.
        none: The metric of the smallest circuit there is, where that is another one: without nodes.
    """

    full: float
    empty: float
    none: float | None = None

    @classmethod
    def of(cls, engine: Engine, units: Units) -> Scale:
        """The scale of an engine's prompts.

        Args:
            engine: What `units` made of an engine.
            units: What is kept or removed.
        """
        full = engine.metric_of(engine.graph.all_edges.copy())
        return cls(full, units.empty_metric(engine), units.smallest_metric(engine))

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Scale:
        """Read what `to_json` made.

        Raises:
            TypeError: If a value is no number; or KeyError.
        """
        full, empty, none = as_float(facts["full"]), as_float(facts["empty"]), facts.get("none")
        return cls(full, empty, None if none is None else as_float(none))

    def to_json(self) -> dict[str, float]:
        """As a part of a journal's step."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def smallest(self) -> float:
        """The metric of the smallest circuit there is."""
        return self.empty if self.none is None else self.none

    @property
    def whole(self) -> float:
        """The gap of no edges."""
        return self.gap(self.empty)

    @property
    def nothing(self) -> float:
        """By how much the metric moves where an edge does nothing."""
        return NOTHING * self.whole

    def gain(self, gap: float) -> float:
        """What a swap has to bring where a circuit is so far from all edges: little beside that."""
        return max(self.nothing, min(GAIN * self.whole, _LITTLE * gap))

    def gap(self, metric: float) -> float:
        """How far a metric is from that of all edges."""
        return abs(metric - self.full)


@dataclass(frozen=True)
class Round:
    """What changes at once.

    Attributes:
        removed: Edges that go, the least first.
        added: Edges that come back.
        metric: Of the circuit then.
        validation: The same on the pairs that judge; None if there are none, or it is not measured yet.
        is_back: Whether it goes to the best circuit before, without what does nothing there: it is the last
            one, and its circuit is kept.
    """

    removed: tuple[Edge, ...]
    added: tuple[Edge, ...]
    metric: float
    validation: float | None = None
    is_back: bool = False

    def to_json(self) -> dict[str, Any]:
        """As a step of a journal."""
        found: dict[str, Any] = {"removed": [list(edge) for edge in self.removed], "metric": self.metric}
        if self.added:
            found["added"] = [list(edge) for edge in self.added]
        if self.is_back:
            found["back"] = True
        return found if self.validation is None else found | {"validation": self.validation}

    @classmethod
    def read(cls, step: Mapping[str, Any]) -> Round:
        """Read what `to_json` made.

        Raises:
            ValueError: If a value is missing or of another type; or TypeError or KeyError.
        """
        removed, added, judged = step["removed"], step.get("added", []), step.get("validation")
        is_back = step.get("back", False)
        if type(is_back) is not bool or any(
            type(index) is not int for e in (*removed, *added) for index in e
        ):
            raise TypeError("a value is of another type")
        return cls(
            tuple((r, w) for r, w in removed),
            tuple((r, w) for r, w in added),
            as_float(step["metric"]),
            None if judged is None else as_float(judged),
            is_back,
        )

    @classmethod
    def back(cls, last: BoolArray, kept: BoolArray, metric: float, validation: float | None) -> Round:
        """The round from the last circuit to another, which was measured. [readers, writers]"""
        removed, added = (tuple(edge_list(one & ~other)) for one, other in ((last, kept), (kept, last)))
        return cls(removed, added, metric, validation, is_back=True)


def changed(kept: BoolArray, removed: Sequence[Edge], added: Sequence[Edge]) -> BoolArray:
    """A circuit without some edges and with others. [readers, writers]"""
    other = kept.copy()
    for edge in removed:
        other[edge] = False
    for edge in added:
        other[edge] = True
    return other


def after(graph: Graph, kept: BoolArray, taken: Round) -> BoolArray:
    """A circuit after a round. [readers, writers]

    Raises:
        ValueError: If the round is none of this circuit's.
    """
    removed, added = taken.removed, taken.added
    rows, columns = graph.all_edges.shape
    inside = all(0 <= r < rows and 0 <= w < columns for r, w in (*removed, *added))
    edges = inside and all(graph.all_edges[edge] for edge in (*removed, *added))
    if not edges or not (removed or added) or len({*removed, *added}) < len(removed) + len(added):
        raise ValueError("it does not change edges of the graph")
    if not all(kept[edge] for edge in removed) or any(kept[edge] for edge in added):
        raise ValueError("it does not change edges of the circuit before it")
    return changed(kept, removed, added)


def least_first(kept: BoolArray, effects: Scores) -> list[Edge]:
    """A circuit's edges, those first whose removal alone moves the metric least."""
    readers, writers = np.nonzero(kept)
    order = np.argsort(np.abs(effects[readers, writers]), kind="stable")
    return [(int(readers[k]), int(writers[k])) for k in order]


def ranks(graph: Graph, scores: Scores, kept: BoolArray, worth: Scores, rounds: Sequence[Round]) -> Scores:
    """Where each edge ranks among all, from 1 for the best to nearly 0.

    Args:
        graph: The graph.
        scores: Rank edges that were never in the circuit. [readers, writers]
        kept: The circuit, whose edges come first. [readers, writers]
        worth: Of each of these. [readers, writers]
        rounds: What led to it: edges that went last come next.

    Returns:
        [readers, writers]
    """
    ranked = dict.fromkeys(sorted(edge_list(kept), key=lambda edge: -worth[edge]))
    for taken in reversed(rounds):
        ranked |= dict.fromkeys(edge for edge in reversed(taken.removed) if edge not in ranked)
    seen = changed(graph.no_edges(), (), list(ranked))
    readers, writers = np.nonzero(graph.all_edges & ~seen)
    others = np.argsort(-scores[readers, writers], kind="stable")
    ranked |= dict.fromkeys((int(readers[k]), int(writers[k])) for k in others)
    found = np.zeros(graph.all_edges.shape)
    for place, edge in enumerate(ranked):
        found[edge] = 1 - place / len(ranked)
    return found


def as_float(value: object) -> float:
    """A number of a journal's step.

    Raises:
        TypeError: If it is none.
    """
    if type(value) is not float:
        raise TypeError("a value is of another type")
    return value
