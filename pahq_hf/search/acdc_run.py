"""ACDC as a search of the run pipeline: its screen, its journal, its progress.

Its steps:

1. Score all edges by attribution where a screen is asked for, and let the best survive; or take the screen
   that an interrupted run kept.
2. Take over the readers that it finished.
3. Search the others with the engine (`acdc`), and keep each when it is finished.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pahq_hf.circuit.estimates import EstimateFacts, most_wrong
from pahq_hf.circuit.files import SCREEN_NAME
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.config import PAHQConfig
from pahq_hf.engine.setting import Setting
from pahq_hf.precision.margin import default_margin
from pahq_hf.search.acdc import Decider, search
from pahq_hf.search.acdc_options import ACDCConfig, GreedyT
from pahq_hf.search.batches import AdaptiveBatch, BatchSize, FixedBatch
from pahq_hf.search.expectation import search_progress
from pahq_hf.search.kind import Found
from pahq_hf.search.reference import Reference
from pahq_hf.search.replay import replay, step_of
from pahq_hf.search.screen import Screen, make_screen
from pahq_hf.search.state import ReaderRecord, Search
from pahq_hf.search.work import Work


def acdc(work: Work[ACDCConfig]) -> Found:
    """Run ACDC to its end.

    Args:
        work: The search.

    Returns:
        What it found.

    Raises:
        RunError: If what an interrupted run kept is damaged, or a step cannot be written.
    """
    options = work.options
    screen = _screen(work)
    survivors = None if screen is None else screen.survivors
    reference = Reference.kept(work) if options.decides_by == "gap" else None
    done = replay(work, survivors, reference=reference).records
    state = searched(work, f"ACDC, tau {options.threshold:g}", done, survivors, reference=reference)
    facts = {
        **({} if options.tests == "all" else {"estimates": _estimates(state).to_json()}),
        **({} if screen is None else {"screen": screen.facts()}),
    }
    return replace(
        found_by(work, state, done, facts),
        label=f"tau {options.threshold:g}",
        estimated=None if options.tests == "all" else state.estimated,
    )


def searched(
    work: Work[Any],
    name: str,
    done: Sequence[ReaderRecord],
    survivors: BoolArray | None = None,
    decider: Decider | None = None,
    reference: Reference | None = None,
) -> Search:
    """Run a greedy search from where it stopped to its end; what it decides is shown and kept.

    Args:
        work: The search, whose options are greedy ones.
        name: What it is called.
        done: Readers finished by an earlier run, in order.
        survivors: Edges that are tested; all by default. [readers, writers]
        decider: Makes what decides the edges of a reader; ACDC's by default.
        reference: What gaps are from, where the criterion is the gap.

    Returns:
        The finished search.
    """
    options, engine = work.options, work.engine
    with search_progress(work.progress, name, work.graph, options, survivors, done) as shown:

        def on_reader(state: Search, record: ReaderRecord) -> None:
            work.keep(step_of(record))
            shown.on_reader(state)

        return search(
            engine,
            options,
            batch=_batch(work),
            done=done,
            survivors=survivors,
            decider=decider,
            reference=reference,
            on_reader=on_reader,
            on_batch=lambda _, tested: shown.on_batch(tested),
        )


def resolve(options: ACDCConfig, setting: Setting) -> ACDCConfig:
    """The options with the margin of the regime, checked.

    Raises:
        ConfigError: If no reader matches, or there is a margin where there is no second look.
        MetricError: If the screen's method means nothing for the metric, or estimates have no gradient.
    """
    setting.graph.match_readers(options.readers)  # a wrong glob fails before any work
    options.foresee(setting.metric, setting.precision)
    return with_margin(options, setting.precision)


def with_margin(acdc: GreedyT, pahq: PAHQConfig) -> GreedyT:
    """The search with the margin of its regime.

    Raises:
        ConfigError: If there is a margin where there is no second look, or no component of a node's to raise.
    """
    acdc.foresee(None, pahq)
    if pahq.regime == "pahq":
        if acdc.level == "node":
            return replace(acdc, margin=0.0)
        if acdc.margin is not None:
            return acdc
        formats = {pahq.format, *pahq.policy.values()}
        return replace(acdc, margin=default_margin(formats, pahq.compute))
    return acdc


def check(work: Work[ACDCConfig], found: Found) -> None:
    """Check that a circuit is what a finished search found; of an unfinished one nothing can be said.

    Args:
        work: The search, which only reads.
        found: The circuit.

    Raises:
        RunError: If it is not, or if the journal is damaged.
    """
    folder = work.folder
    lost = work.options.screen is not None and folder is not None and not os.path.exists(folder / SCREEN_NAME)
    if lost or not work.is_begun:
        return
    screen, reference = _screen(work), None
    if work.options.decides_by == "gap":
        if not work.steps:
            return
        reference = Reference.kept(work)
    survivors = None if screen is None else screen.survivors
    compare(work, found, replay(work, survivors, reference=reference))


def compare(work: Work[Any], found: Found, state: Search) -> None:
    """Check that a circuit is what its journal ends at; of an unfinished one nothing can be said.

    Args:
        work: The search, which only reads.
        found: The circuit.
        state: What the journal tells.

    Raises:
        RunError: If it is not.
    """
    if len(state.records) < len(state.graph.readers):
        return
    kept = _ended(work, state)
    ours, theirs = (found.kept, found.scores, found.tested), (kept, state.scores, state.tested)
    marked = np.zeros_like(state.estimated) if found.estimated is None else found.estimated
    if not (np.array_equal(marked, state.estimated) and all(map(np.array_equal, ours, theirs))):
        raise work.other_circuit()


def _screen(work: Work[ACDCConfig]) -> Screen | None:
    """Which edges the search may pass over: None if it tests all.

    A new screen's captured runs are gone before the engine captures its own.
    """
    text, folder = work.options.screen, work.folder
    if text is None:
        return None
    if work.is_begun and folder is not None:
        kept = Screen.load(text, work.graph, folder, work.header)
        work.shared(("screen", text), lambda: kept)  # for thresholds that have not begun
        return kept
    with work.phase("screen"), work.progress.phase("screening"):
        screen = work.shared(
            ("screen", text), lambda: make_screen(text, work.setting, work.limits, work.progress)
        )
    if folder is not None:
        screen.save(folder, work.header)
    return screen


def _batch(work: Work[Any]) -> BatchSize:
    if work.limits.batch is not None:
        return FixedBatch(work.limits.batch)
    return AdaptiveBatch() if work.engine.gains_by_batches else FixedBatch(1)


def found_by(work: Work[Any], state: Search, done: Sequence[ReaderRecord], facts: Mapping[str, Any]) -> Found:
    """What a greedy search found.

    Args:
        work: The search, whose options are greedy ones.
        state: Where it ended.
        done: Readers finished by an earlier run.
        facts: What it says of itself.
    """
    options = work.options
    second_looks = {
        "margin": options.to_dict()["margin"],
        "tests": sum(record.looks for record in state.records),
        "changed": sum(record.changed for record in state.records),
    }
    kept = _ended(work, state)
    same = np.array_equal(kept, state.kept)
    exact = same and work.setting.precision.regime in ("fp32", "rtn")
    return Found(
        kept,
        state.scores,
        state.tested,
        # Where a component is raised, the metric is that of the last one's tests: it is measured again.
        final=state.metric if exact else None,
        searched=None if options.readers is None else work.graph.match_readers(options.readers),
        facts={"second_looks": second_looks, **facts, "resumed_readers": len(done)},
    )


def _ended(work: Work[Any], state: Search) -> BoolArray:
    """What is kept in the end: dead edges too, unless they are to go (`prune_dead`)."""
    return work.graph.live_edges(state.kept) if work.options.prune_dead else state.kept


def _estimates(state: Search) -> EstimateFacts:
    counts = [record.counts for record in state.records]
    estimated = int(state.estimated.sum())
    audited, wrong = sum(each.audited for each in counts), sum(each.wrong for each in counts)
    facts = EstimateFacts(
        tests=int(state.tested.sum()) - estimated,
        estimated=estimated,
        gradients=sum(each.gradients for each in counts),
        audited=audited,
        wrong=wrong,
    )
    return replace(facts, at_most=most_wrong(audited, wrong) if facts.unaudited else 0.0)
