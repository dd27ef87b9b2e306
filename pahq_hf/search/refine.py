"""`refine`: the most faithful circuit of a size, learned by gradients and refined by exact tests.

Its phases:

1. Rank all edges by gradients averaged along the mask, and learn their scores (`learning`). More of the best
   edges than are asked for are where it starts.
2. Remove edges in rounds: those whose removal moves the metric least, each tested alone in the present
   circuit. As many go at once as leave the gap `|m(C) - m(full)|` where the worst of them alone would, or
   nearly so; what they do together is measured.
3. Swap: edges that are gone come back, by gradients at the present circuit and then each by its test, and as
   many of the least go for them. Where the metric is nearer without an edge, it goes first. It ends when
   none of the best candidates, each for the edge that is least then, brings the metric nearer.

Gradients see many prompts and find the set; tests tell which of its edges can be spared.
"""

from __future__ import annotations

import numpy as np

from pahq_hf.circuit.files import CIRCUIT_NAME, JOURNAL_NAME
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import ConfigError, MetricError, RunError
from pahq_hf.precision.memory import trim
from pahq_hf.search.attribution.methods import Scores
from pahq_hf.search.kind import Found
from pahq_hf.search.learned import kept_scores, load_scores
from pahq_hf.search.learning import Learned, Learner, Schedule, best
from pahq_hf.search.pruning import Pruned, Round, after, ranks
from pahq_hf.search.refine_options import RefineOptions
from pahq_hf.search.work import Work
from pahq_hf.tasks.metrics import find_metric

_MORE = 1.4  # times as many edges as are asked for are learned
_PLUS = 100  # and so many more at least


def resolve(options: RefineOptions, setting: Setting) -> RefineOptions:
    """The options, checked against a setting.

    Raises:
        ConfigError: If more edges are asked for than there are.
        MetricError: If the metric has no gradient.
    """
    total = setting.graph.edge_count
    if options.edges > total:
        raise ConfigError(f"this model has {total:,} edges; cannot keep {options.edges:,} of them")
    if not find_metric(setting.metric).differentiable:
        raise MetricError(f"metric {setting.metric} has no gradient, by which refine ranks edges")
    return options


def refine(work: Work[RefineOptions]) -> Found:
    """Find the most faithful circuit of a size.

    Its steps are levels of learning, then rounds of removals and swaps.

    Args:
        work: The search.

    Returns:
        What it found. Scores rank edges: 1 for the best, towards 0 for the worst; edges that tests removed
        come in the reverse of the order in which they went.

    Raises:
        RunError: If what an interrupted run kept is damaged, or a step cannot be written.
    """
    options, graph = work.options, work.graph
    schedule = _schedule(options, graph)
    learned = _learn(work, schedule)
    start = _start(graph, learned.scores, schedule.levels[-1], options.edges)
    circuit = Pruned(work.engine, start, options.edges)
    for number, step in enumerate(work.steps[len(schedule.levels) :], start=len(schedule.levels) + 1):
        try:
            circuit.take(Round.read(step))
        except (KeyError, ValueError, TypeError) as error:
            raise work.damaged(number, f": {error}") from error
    with work.progress.count("refining", "edge", int(start.sum()) - options.edges) as count:
        count.advance(int(start.sum() - circuit.kept.sum()))
        for taken in circuit.rounds():
            work.keep(taken.to_json())
            count.advance(len(taken.removed) - len(taken.added))
            count.note(gap=f"{circuit.gap:.4g}")
    scores = ranks(graph, learned.scores, circuit)
    facts = {"refine": {"start": int(start.sum()), "rounds": len(circuit.taken)}}
    return Found(circuit.kept, scores, start | circuit.kept, facts=facts, label=f"{options.edges} edges")


def check(work: Work[RefineOptions], found: Found) -> None:
    """Check that a circuit is what a finished search found.

    Args:
        work: The search, which only reads.
        found: The circuit.

    Raises:
        RunError: If it is not, or what the search kept is damaged.
    """
    if not work.is_begun or work.folder is None:
        return
    schedule = _schedule(work.options, work.graph)
    learned = load_scores(work, len(schedule.levels))
    if learned is None or learned.level < len(schedule.levels):
        return
    kept = _start(work.graph, learned.scores, schedule.levels[-1], work.options.edges)
    for number, step in enumerate(work.steps[len(schedule.levels) :], start=len(schedule.levels) + 1):
        try:
            kept = after(work.graph, kept, Round.read(step))
        except (KeyError, ValueError, TypeError) as error:
            raise work.damaged(number, f": {error}") from error
    if not np.array_equal(kept, found.kept):
        raise RunError(
            f"the circuit in {work.folder} is not the one its {JOURNAL_NAME} tells of: one of them was "
            f"changed; remove {CIRCUIT_NAME} and --resume to make it again from the journal"
        )


# -- learning ---------------------------------------------------------------------------------------------


def _schedule(options: RefineOptions, graph: Graph) -> Schedule:
    size = min(graph.edge_count, max(round(_MORE * options.edges), options.edges + _PLUS))
    schedule = Schedule.towards(
        size, graph, options.steps, options.rate, options.noise, options.minibatch, options.seed
    )
    return schedule


def _learn(work: Work[RefineOptions], schedule: Schedule) -> Learned:
    """Learn the levels that an interrupted run has not, and keep each."""
    learned = load_scores(work, len(schedule.levels))
    if learned is not None and learned.level == len(schedule.levels):
        return learned
    learner = Learner(work.gradients(), schedule)
    try:
        with work.phase("learn"), work.progress.count("learning", "step", schedule.total) as count:
            if learned is None:
                learned = learner.start()
            count.advance(sum(map(schedule.steps_of, range(learned.level))))

            def on_step(size: int, gap: float) -> None:
                count.advance(1)
                count.note(edges=size, gap=f"{gap:.4g}")

            while learned.level < len(schedule.levels):
                learned = learner.learn(learned, on_step)
                kept_scores(work, learned)
        return learned
    finally:
        del learner
        trim()  # the engine has runs of its own


def _start(graph: Graph, scores: Scores, size: int, least: int) -> BoolArray:
    """The live edges of the best, enough of them. [readers, writers]"""
    while True:
        kept = graph.live_edges(best(graph, scores, size))
        if kept.sum() >= least or size == graph.edge_count:
            return kept
        size = min(graph.edge_count, size + max(1, size // 10))
