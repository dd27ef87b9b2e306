"""What a search has decided so far, reader by reader."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray, Graph

_RECENT = 16  # readers that tell how often edges stay


@dataclass(frozen=True)
class Counts:
    """What deciding by estimates took.

    Attributes:
        gradients: Circuits whose slopes were measured.
        audited: Estimated edges that were drawn and tested.
        wrong: Audited edges whose decision was wrong, and is mended.
    """

    gradients: int = 0
    audited: int = 0
    wrong: int = 0


@dataclass(frozen=True)
class ReaderRecord:
    """What was decided about one reader.

    Attributes:
        reader: Its index.
        searched: False when the reader was outside the search and keeps all its edges.
        kept: Writers kept, ascending.
        scores: `new - cur` of every tested edge by writer.
        metric: The metric after the last decision.
        looks: Edges tested again in FP32.
        changed: Edges whose decision the second test changed.
        estimated: Writers among `scores` whose score is an estimate, ascending.
        counts: What the estimates took.
    """

    reader: int
    searched: bool
    kept: tuple[int, ...]
    scores: dict[int, float]
    metric: float
    looks: int = 0
    changed: int = 0
    estimated: tuple[int, ...] = ()
    counts: Counts = Counts()


@dataclass
class Search:
    """State of a search: what is decided so far.

    Attributes:
        graph: The model's graph.
        kept: Edges not removed.
        scores: `new - cur` when an edge was tested, else 0.
        tested: Edges that were tested, or decided by an estimate.
        estimated: Edges among them whose score is an estimate.
        metric: Metric of the current circuit.
        records: Finished readers in order.
    """

    graph: Graph
    kept: BoolArray  # [readers, writers]
    scores: NDArray[np.float64]  # [readers, writers]
    tested: BoolArray  # [readers, writers]
    estimated: BoolArray  # [readers, writers]
    metric: float = 0.0
    records: list[ReaderRecord] = field(default_factory=list)

    @classmethod
    def start(cls, graph: Graph) -> Search:
        """Nothing decided yet."""
        none = graph.no_edges()
        return cls(graph, graph.all_edges.copy(), np.zeros(none.shape), none, none.copy())

    def apply(self, record: ReaderRecord) -> None:
        """Take over a finished reader's decisions."""
        reader = record.reader
        if record.searched:
            self.kept[reader] = False
            self.kept[reader, list(record.kept)] = True
        for writer, score in record.scores.items():
            self.scores[reader, writer] = score
            self.tested[reader, writer] = True
        self.estimated[reader, list(record.estimated)] = True
        self.metric = record.metric
        self.records.append(record)

    def keep_rate(self) -> float:
        """Share of edges that stayed, over the readers searched last."""
        recent = [record for record in self.records[-4 * _RECENT :] if record.scores][-_RECENT:]
        tested = sum(len(record.scores) for record in recent)
        return (sum(len(record.kept) for record in recent) + 1) / (tested + 50)
