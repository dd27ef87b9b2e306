"""Deciding the edges of one reader in order, each by a test (docs/semantics.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pahq_hf.engine.protocol import Engine
from pahq_hf.search.acdc_options import GreedyOptions
from pahq_hf.search.audit import Audit
from pahq_hf.search.batches import BatchSize
from pahq_hf.search.state import ReaderRecord

_PRIOR_WEIGHT = 30.0  # edges their testimony counts for within a reader
_LOOKS = 4  # edges looked at together: weights are read once for all, and little is undone on a change


@dataclass(frozen=True)
class Deciding:
    """What the search of one reader is given.

    Attributes:
        engine: Computes metrics; the reader is in its focus.
        config: Threshold and margin.
        reader: The reader.
        screened: Writers of edges that are gone untested.
        cur: The metric of the current circuit.
        batch: Chooses batch sizes.
        keep_rate: How often edges stayed in the readers before.
        audit: Draws estimated edges.
        reference: The full model's metric as these tests would have it, where the criterion is the gap.
        on_batch: Called with the reader and the number of edges just decided, negative when undone.
    """

    engine: Engine
    config: GreedyOptions
    reader: int
    screened: tuple[int, ...]
    cur: float
    batch: BatchSize
    keep_rate: float
    audit: Audit
    reference: float | None = None
    on_batch: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class Look:
    """An edge that waits for its second look.

    Attributes:
        position: Its place among the reader's edges.
        removed: Edges gone when it was tested.
        cur: The metric before it was tested.
        new: The metric without it.
        stays: What was decided.
    """

    position: int
    removed: int
    cur: float
    new: float
    stays: bool


class ReaderSearch:
    """Decides the edges of one reader, in order, each by a test.

    Args:
        work: What it is given.
    """

    def __init__(self, work: Deciding) -> None:
        self._engine = work.engine
        self._config = work.config
        self._reader = work.reader
        gone = set(work.screened)
        self._edges = [w for w in work.engine.graph.in_edges(work.reader) if w not in gone]
        self._cur = work.cur
        self._batch = work.batch
        self._prior = work.keep_rate
        self._reference = work.reference
        self._on_batch = work.on_batch
        self._position = 0  # edges before it are decided
        self._kept: list[int] = []
        self._removed = list(work.screened)
        self._scores: dict[int, float] = {}
        self._moves: dict[int, float] = {}  # how far removing each edge moves the metric, either way
        self._waiting: list[Look] = []
        self._looks = self._changed = 0

    def run(self) -> ReaderRecord:
        """Decide them all."""
        while self._position < len(self._edges) or not self._is_done():
            self._advance()
            if len(self._waiting) >= _LOOKS or self._position == len(self._edges):
                self._look_again()
        return self._record()

    def _record(self) -> ReaderRecord:
        kept = tuple(sorted(self._kept))
        return ReaderRecord(self._reader, True, kept, self._scores, self._cur, self._looks, self._changed)

    def _is_done(self) -> bool:
        """Whether what is decided stays so, with all edges decided."""
        return True

    def _advance(self) -> None:
        """Decide the next edges."""
        self._try_batch(len(self._edges) - self._position)

    def _try_batch(self, most: int) -> None:
        """Test as many of the next edges as a batch holds, up to the first that stays."""
        rate = (self._prior * _PRIOR_WEIGHT + len(self._kept)) / (_PRIOR_WEIGHT + self._position)
        size = self._batch.next(most, rate)
        tried = self._edges[self._position : self._position + size]
        candidates = [[*self._removed, *tried[: k + 1]] for k in range(len(tried))]
        trial = self._engine.try_(self._reader, candidates)
        before, gone = self._position, len(self._removed)
        for writer, new in zip(tried, trial.values, strict=True):
            stays = self._decide(writer, new)
            self._position += 1
            if stays:
                break
        if len(self._removed) > gone:
            self._engine.accept(trial, len(self._removed) - gone - 1)
        self._report(self._position - before)

    def _decide(self, writer: int, new: float) -> bool:
        """Decide one edge as the sequential loop does. Returns whether it stays."""
        score = self._score(self._cur, new)
        self._scores[writer], self._moves[writer] = score, abs(new - self._cur)
        stays = self._stays(score, new, self._position)
        if self._is_doubtful(score, new):
            look = Look(self._position, len(self._removed), self._cur, new, stays)
            self._waiting.append(look)
        (self._kept if stays else self._removed).append(writer)
        if not stays:
            self._cur = new
        return stays

    def _score(self, cur: float, new: float) -> float:
        """What is held against tau of an edge without which a metric of `cur` is `new`."""
        if self._reference is None:
            return new - cur
        return abs(new - self._reference) - abs(cur - self._reference)

    def _stays(self, score: float, new: float, position: int) -> bool:
        """Whether an edge is kept.

        Args:
            score: Its score.
            new: The metric without it.
            position: Its place among the reader's edges.
        """
        return self._config.stays(score)

    def _is_doubtful(self, score: float, new: float) -> bool:
        """Whether the edge whose turn it is deserves a second look."""
        return self._is_near(score) or self._turns(score, new)

    def _turns(self, score: float, new: float) -> bool:
        """Whether errors of tests may decide, as the metric passes the full model's: there they add up.

        Elsewhere what tests of a reader are wrong by cancels between two of them, but for the edge's own. An
        error is relative to how far tests have come from where the metric was exact.
        """
        margin = self._config.margin or 0.0
        if self._reference is None or margin == 0:
            return False
        cur, new = self._cur - self._reference, new - self._reference
        doubt = margin * (abs(new - cur) + 2 * sum(self._moves.get(writer, 0.0) for writer in self._removed))
        passes = cur * new <= 0 or min(abs(cur), abs(new)) <= doubt
        return passes and abs(score - self._config.threshold) <= doubt

    def _is_near(self, score: float) -> bool:
        margin, tau = self._config.margin or 0.0, self._config.threshold
        if margin in (0.0, math.inf):
            return margin > 0
        return abs((abs(score) if self._config.absolute else score) - tau) <= margin * tau

    def _look_again(self) -> None:
        """Test waiting edges again, in FP32, and go back to the first whose decision changes."""
        looks, self._waiting = self._waiting, []
        if not looks:
            return
        candidates: list[list[int]] = []
        for look in looks:
            gone = self._removed[: look.removed]
            candidates += [gone, [*gone, self._edges[look.position]]]
        trial = self._engine.look_again(self._reader, candidates)
        self._looks += len(looks)
        for number, look in enumerate(looks):
            without, with_it = 2 * number + 1, 2 * number
            before, new = trial.values[with_it], trial.values[without]
            score, writer = self._score(before, new), self._edges[look.position]
            self._scores[writer], self._moves[writer] = score, abs(new - before)
            if self._stays(score, new, look.position) is not look.stays:
                self._changed += 1
                self._engine.accept(trial, without if look.stays else with_it)
                self._return_to(look)
                return

    def _return_to(self, look: Look) -> None:
        """Reverse the decision about an edge and forget all later ones."""
        writer = self._edges[look.position]
        undone = set(self._edges[look.position : self._position])
        self._removed = self._removed[: look.removed]
        self._kept = [w for w in self._kept if w not in undone]
        for later in undone - {writer}:
            self._scores.pop(later, None)
            self._moves.pop(later, None)
        self._report(look.position + 1 - self._position)
        self._position = look.position + 1
        if look.stays:
            self._removed.append(writer)
            self._cur = look.new
        else:
            self._kept.append(writer)
            self._cur = look.cur

    def _report(self, decided: int) -> None:
        if self._on_batch is not None and decided:
            self._on_batch(self._reader, decided)
