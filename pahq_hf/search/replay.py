"""The journal of a greedy search: a step for every finished reader, and whether that can be one of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from pahq_hf.circuit.graph import BoolArray
from pahq_hf.search.acdc_options import GreedyOptions
from pahq_hf.search.reference import Reference
from pahq_hf.search.state import Counts, ReaderRecord, Search
from pahq_hf.search.work import Work

_ROUNDING = 1e-9  # of sums of metrics in double precision


def step_of(record: ReaderRecord) -> dict[str, Any]:
    """A finished reader as a step of the journal."""
    step = asdict(record) | {"scores": {str(writer): score for writer, score in record.scores.items()}}
    if record.counts == Counts():  # decided by tests alone
        del step["estimated"], step["counts"]
    return step


def record_of(step: Mapping[str, Any]) -> ReaderRecord:
    """Read what `step_of` made.

    Raises:
        ValueError: If a value is missing or of another type; or TypeError, KeyError or AttributeError.
    """
    kept, scores = step["kept"], step["scores"]
    estimated, taken = step.get("estimated", ()), step.get("counts", {})
    counts = [
        step["reader"],
        step.get("looks", 0),
        step.get("changed", 0),
        *kept,
        *estimated,
        *taken.values(),
    ]
    numbers = [step["metric"], *scores.values()]
    # Python takes true for 1 and 3.7 for 3: a step has to be what it says.
    if not isinstance(step["searched"], bool) or any(type(count) is not int for count in counts):
        raise TypeError("a value is of another type")
    if any(type(number) not in (int, float) for number in numbers):
        raise TypeError("a number is none")
    return ReaderRecord(
        reader=step["reader"],
        searched=step["searched"],
        kept=tuple(kept),
        scores={int(w): float(s) for w, s in scores.items()},
        metric=float(step["metric"]),
        looks=step.get("looks", 0),
        changed=step.get("changed", 0),
        estimated=tuple(estimated),
        counts=Counts(**taken),
    )


def replay(
    work: Work[Any],
    survivors: BoolArray | None,
    *,
    first: int = 0,
    mistake: Callable[[ReaderRecord, Search], str | None] | None = None,
    reference: Reference | None = None,
) -> Search:
    """The state of a search after the steps that an earlier part of it kept.

    Each must be about the reader whose turn it is, with scores of just the edges that are tested there.

    Args:
        work: The search, whose options are greedy ones.
        survivors: Edges that are tested; all by default. [readers, writers]
        first: Steps before the first reader's, but for that of a reference.
        mistake: What is wrong with the decisions about a reader, from the state before it; None if nothing.
            By default an edge is kept where its score reaches the threshold and nowhere else.
        reference: What gaps are from, where the criterion is the gap; the first step has it.

    Returns:
        The state.

    Raises:
        RunError: If they are no steps of this search, naming the first that is not.
    """
    graph, config = work.graph, work.options
    first = max(first, reference is not None)
    mistake = mistake or (lambda record, before: _other_than_scores(record, config))
    telescopes = work.setting.precision.regime == "fp32"  # a reader's tests begin where the last one's ended
    state, order = Search.start(graph), graph.reader_order(config.order)
    chosen = graph.match_readers(config.readers)
    for number, step in enumerate(work.steps[first:], start=first + 1):
        try:
            record = record_of(step)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise work.damaged(number, f": {error}") from error
        turn = number - first - 1
        if turn >= len(order) or record.reader != order[turn]:
            raise work.damaged(number, ": its readers are not in the order of a search")
        reader = record.reader
        wrong = _inconsistency(record, state, config, bool(chosen[reader]), survivors)
        if wrong is None and record.searched:
            wrong = mistake(record, state) or _wrong_counts(record, config)
        wrong = wrong or _jump(record, state, survivors, telescopes, reference)
        if wrong is not None:
            raise work.damaged(number, f", reader {graph.readers[reader].name}: {wrong}")
        state.apply(record)
    return state


def _inconsistency(
    record: ReaderRecord, before: Search, config: GreedyOptions, chosen: bool, survivors: BoolArray | None
) -> str | None:
    """What is wrong with a record; None if it can be the next step of a search."""
    graph, reader = before.graph, record.reader
    edges = set(graph.in_edges(reader))
    if not edges.issuperset((*record.kept, *record.scores)):
        return f"reader {reader} has edges that do not exist"
    if record.searched is not chosen:
        return "it was searched, and is outside the search" if record.searched else "it was not searched"
    if not all(map(math.isfinite, (record.metric, *record.scores.values()))):
        return "a number in it is not finite"
    if not chosen:
        whole = record.kept == tuple(sorted(edges)) and not record.scores
        return None if whole else "it is outside the search, and does not keep all its edges untested"
    tested: set[int] = set()
    if graph.has_out_edge(before.kept, reader):
        tested = edges if survivors is None else {writer for writer in edges if survivors[reader, writer]}
    if tested != record.scores.keys():
        return f"it has scores of {len(record.scores)} edges; {len(tested)} are tested there"
    return None


def _other_than_scores(record: ReaderRecord, config: GreedyOptions) -> str | None:
    """Whether a record keeps other edges than those whose scores reach the threshold."""
    kept = {writer for writer, score in record.scores.items() if config.stays(score)}
    if tuple(sorted(kept)) != record.kept:
        return f"the edges it keeps are not those whose scores reach the threshold {config.threshold:g}"
    return None


def _wrong_counts(record: ReaderRecord, config: GreedyOptions) -> str | None:
    """What is wrong with what a record says of how its edges were decided; None if nothing."""
    mistaken = _wrong_estimates(record, config)
    if mistaken is not None:
        return mistaken
    if not 0 <= record.changed <= record.looks or (record.looks and not config.margin):
        return f"{record.changed} of {record.looks} second looks changed a decision"
    return None


def _wrong_estimates(record: ReaderRecord, config: GreedyOptions) -> str | None:
    """What is wrong with what a record says of estimates; None if nothing."""
    estimated, counts = record.estimated, record.counts
    if not config.estimates and (estimated or counts != Counts()):
        return "it has estimates, and the search tests every edge"
    if tuple(sorted(set(estimated))) != estimated:
        return "edges whose score is an estimate are not in order"
    if not {*estimated} <= record.scores.keys() - {*record.kept}:
        return "an edge whose score is an estimate was kept, or has none"
    # What is wrong is kept and no estimate any more; all else that was audited still is one.
    fits = 0 <= counts.wrong <= counts.audited <= len(estimated) + counts.wrong
    if not fits or counts.wrong > len(record.kept) or counts.gradients < (1 if estimated else 0):
        return f"its counts do not fit its {len(estimated)} estimates: {counts}"
    return None


def _jump(
    record: ReaderRecord,
    before: Search,
    survivors: BoolArray | None,
    telescopes: bool,
    reference: Reference | None,
) -> str | None:
    """What is wrong with a record's metric; None if nothing, or if it was measured afresh."""
    edges = list(before.graph.in_edges(record.reader))
    screened = survivors is not None and not survivors[record.reader, edges].all()
    tested = record.searched and before.graph.has_out_edge(before.kept, record.reader)
    afresh = screened or record.looks or record.counts.wrong or not telescopes
    if not before.records or (tested and afresh):
        return None
    added = sum(s for w, s in record.scores.items() if w not in record.kept)
    if reference is None:
        what, found, expected = "metric", record.metric, before.metric + added
    else:  # scores tell how gaps grow
        full = reference.full
        what, found, expected = "gap", abs(record.metric - full), abs(before.metric - full) + added
    if abs(found - expected) <= _ROUNDING * max(1.0, abs(record.metric), abs(expected)):
        return None
    return f"its {what} is {found!r}; the record before and its scores make it {expected!r}"
