"""Attribution as a search of the run pipeline: score all edges, and keep the best."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import ConfigError
from pahq_hf.search.attribution.methods import Scores
from pahq_hf.search.attribution.options import AttributionConfig
from pahq_hf.search.attribution.scoring import edge_scores
from pahq_hf.search.attribution.selection import edges_from, top_edges
from pahq_hf.search.kind import Found
from pahq_hf.search.units import units_of
from pahq_hf.search.work import Work


def attribute(work: Work[AttributionConfig]) -> Found:
    """Score all edges of a model on a task, and choose the best.

    Its steps are readers that method `exact` has finished. The other methods take a few passes over the
    prompts, and begin again where they were interrupted.

    Args:
        work: The search.

    Returns:
        What it found.

    Raises:
        MetricError: If the method means nothing for the metric, or numbers come out as NaN.
        RunError: If what an interrupted run kept is damaged, or a step cannot be written.
    """
    options = work.options
    scores = edge_scores(
        options.method,
        work,
        steps=options.steps,
        seed=options.seed,
        members=options.members,
        units=work.units,
        known=_finished(work),
        on_reader=lambda reader, found: work.keep(
            {"reader": reader, "scores": {str(writer): score for writer, score in found.items()}}
        ),
    )
    asked = options.topn is not None or options.threshold is not None  # else all edges were asked for
    kept = chosen(work.graph, scores, options)
    if options.prune_dead:
        kept = work.graph.live_edges(kept)
    return Found(kept, scores, work.graph.all_edges.copy(), label=options.method if asked else None)


def resolve(options: AttributionConfig, setting: Setting) -> AttributionConfig:
    """The options, checked against a setting.

    Raises:
        MetricError: If the method means nothing for the metric.
        ConfigError: If more edges are asked for than there are.
    """
    options.foresee(setting.metric, setting.precision)
    units = units_of(options, setting.graph)
    total = units.graph.edge_count
    if options.topn is not None and options.topn > total:
        raise ConfigError(f"this model has {total:,} {units.word}s; cannot keep {options.topn:,} of them")
    return options


def chosen(graph: Graph, scores: Scores, options: AttributionConfig) -> BoolArray:
    """The edges that scores choose. [readers, writers]"""
    if options.threshold is not None:
        return edges_from(graph, scores, options.threshold, absolute=options.by_size)
    count = graph.edge_count if options.topn is None else options.topn
    return top_edges(graph, scores, count, absolute=options.by_size)


def _finished(work: Work[AttributionConfig]) -> Mapping[int, Mapping[int, float]]:
    """Scores that an interrupted run has kept, by reader and writer."""
    known: dict[int, dict[int, float]] = {}
    for number, step in enumerate(work.steps, start=1):
        try:
            reader, scores = step["reader"], {int(w): s for w, s in step["scores"].items()}
            sound = type(reader) is int and 0 <= reader < len(work.graph.readers) and reader not in known
            numbers = all(type(score) is float and math.isfinite(score) for score in scores.values())
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise work.damaged(number, f": {error}") from error
        if not sound or not numbers or scores.keys() != set(work.graph.in_edges(reader)):
            raise work.damaged(number, ": it does not have the scores of a reader's edges")
        known[reader] = scores
    return known
