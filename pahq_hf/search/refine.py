"""`refine`: the most faithful circuit of a size, learned by gradients and refined by exact tests.

Its phases:

1. Rank all edges by gradients averaged along the mask, and learn their scores (`learning`). More of the best
   edges than are asked for are where it starts. Of a small graph all edges are, and nothing is learned.
2. Remove edges in rounds: those whose removal moves the metric least, each tested alone in the present
   circuit. As many go at once as leave the gap `|m(C) - m(full)|` where the worst of them alone would, or
   nearly so; what they do together is measured.
3. Swap: edges that are gone come back, by gradients at the present circuit and then each by its test, and as
   many of the least go for them. Where the metric is nearer without an edge, it goes first. It ends when
   none of the best candidates, each for the edge that is least then, brings the metric nearer, or when some
   rounds in a row brought nothing on the pairs that judge.

Gradients see many prompts and find the set; tests tell which of its edges can be spared. A share of the pairs
is split off before, and no phase sees them: the circuit of the size that is nearest there is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, cast

import numpy as np

from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.precision.memory import trim
from pahq_hf.search.attribution.methods import Scores
from pahq_hf.search.course import Beginning, Measures, Passed, kept_beginning
from pahq_hf.search.goal import Goal
from pahq_hf.search.kind import Found
from pahq_hf.search.learned import Level, keep_level, keep_scores, kept_levels, load_scores
from pahq_hf.search.learners import in_two
from pahq_hf.search.learning import Learned, Learner, Schedule, best
from pahq_hf.search.minibatches import Minibatch, Minibatches, minibatches_of
from pahq_hf.search.pairs import learned_from
from pahq_hf.search.pruning import Pruned
from pahq_hf.search.refine_options import RefineOptions
from pahq_hf.search.rounds import Round, after, ranks
from pahq_hf.search.work import Work

_MORE = 1.4  # times as many edges as are asked for are learned
_RANKED = 300  # edges that are learned where all are to be ranked
_FEWEST = 25  # the fewest that are learned where a gap is asked for


def refine(work: Work[RefineOptions]) -> Found:
    """Find the most faithful circuit of a size, or the smallest within a gap, or rank all edges.

    Its steps are what it begins with, then levels of learning, then rounds of removals and swaps.

    Args:
        work: The search.

    Returns:
        What it found. Scores rank edges: 1 for the best, towards 0 for the worst; edges that tests removed
        come in the reverse of the order in which they went.

    Raises:
        RunError: If what an interrupted run kept is damaged, or a step cannot be written.
    """
    return in_two(work, partial(_refined, work))


def _refined(work: Work[RefineOptions], measures: Measures, beginning: Beginning) -> Found:
    options, graph, goal = work.options, work.graph, _goal(work)
    schedule = _schedule(work)
    learns = bool(schedule.levels)
    tasks = learned_from(measures.split, work.setting, options.learn_pairs, options.seed) if learns else []

    def batches() -> Minibatches:
        return minibatches_of(tasks, options.minibatch, options.seed, work.setting, work.circuit_runs)

    learned, levels = _learn(work, schedule, measures, goal, beginning, batches)
    start = _started(learned, levels, goal, beginning)
    rounds, passed = _kept_rounds(work, start, 1 + len(levels))

    @cache
    def searched() -> Minibatch:
        return Minibatch.of(work.circuit_runs(measures.split.searched))

    def estimate(kept: BoolArray) -> Scores:
        return searched().at_circuit(kept.astype(float))[1]

    last = passed[-1]
    circuit = Pruned(measures.engine, beginning.searched, last.kept, last.metric, estimate)
    going = max(0, start.size - (options.edges or 0))
    what = f"removed {work.units.word}"
    with work.progress.count("refining", what, going, start.size - passed[-1].size) as count:
        more = iter(()) if rounds and rounds[-1].is_back else _rounds(circuit, goal, beginning)
        while not goal.is_given_up(beginning, passed, options.patience):
            found = next(more, None)
            if found is None:
                break
            taken = replace(found, validation=measures.validation_of(circuit.kept))
            work.keep(taken.to_json())
            rounds.append(taken)
            passed.append(Passed(circuit.kept, taken.metric, taken.validation))
            count.note(left=passed[-1].size, gap=f"{beginning.gap(passed[-1]):.4g}")
            count.advance(len(taken.removed) - len(taken.added))
    back = _back(measures, goal, beginning, rounds, passed)
    if back is not None:
        work.keep(back.to_json())
        rounds.append(back)
        passed.append(Passed(after(graph, passed[-1].kept, back), back.metric, back.validation))
    chosen, is_last = _taken(goal, beginning, rounds, passed)
    kept = _chosen(graph, goal, beginning, passed, chosen)
    last = passed[-1] if chosen is None else kept
    worth = _worth(measures, beginning, circuit, last)
    facts: dict[str, Any] = {"start": start.size, "rounds": len(rounds)}
    if goal.is_ranking:
        facts["curve"] = [each.facts() for each in passed]
    else:
        facts |= {"taken": chosen, "locally_minimal": is_last}
    facts |= {"learned_on": sum(map(len, tasks)), **measures.facts(beginning, kept)}
    tested = start.kept.copy()
    for each in passed:
        tested |= each.kept
    return Found(
        kept.kept,
        ranks(graph, learned.scores, last.kept, worth, rounds[:chosen]),
        tested,
        final=kept.metric,
        facts={"refine": facts},
        label=goal.name,
    )


def _rounds(circuit: Pruned, goal: Goal, beginning: Beginning) -> Iterator[Round]:
    """The rounds towards what is asked for."""
    bound = goal.bound(beginning.searched)
    if bound is not None:
        yield from circuit.within(bound)
        return
    yield from circuit.to_size(goal.edges or 0)
    if goal.edges is not None:
        yield from circuit.at_size(goal.edges)


def _back(
    measures: Measures, goal: Goal, beginning: Beginning, rounds: Sequence[Round], passed: Sequence[Passed]
) -> Round | None:
    """From the last circuit to the best one without the edges that do nothing there.

    Returns:
        The round; None where every edge of the best does something, or where it was taken.
    """
    chosen, is_last = _taken(goal, beginning, rounds, passed)
    if chosen is None or (rounds and rounds[-1].is_back) or (is_last and goal.edges is not None):
        return None  # rounds to a size end without what does nothing
    last, best = passed[-1], passed[chosen]
    bare = measures.without_idle(beginning, best, partial(goal.may_lose, beginning, best))
    if bare is best or np.array_equal(bare.kept, last.kept):
        return None
    return Round.back(last.kept, bare.kept, bare.metric, bare.validation)


def _taken(
    goal: Goal, beginning: Beginning, rounds: Sequence[Round], passed: Sequence[Passed]
) -> tuple[int | None, bool]:
    """Which circuit is kept, and whether it is where removals and swaps ended."""
    is_back = bool(rounds) and rounds[-1].is_back
    walked = len(rounds) - is_back
    best = goal.best(beginning, passed[: walked + 1])
    return (len(rounds) if is_back else best), best == walked


def _chosen(
    graph: Graph, goal: Goal, beginning: Beginning, passed: Sequence[Passed], number: int | None
) -> Passed:
    """The circuit of a number; where there is none, all edges if a ranking is asked for, else no edges."""
    if number is not None:
        return passed[number]
    kept = graph.all_edges.copy() if goal.is_ranking else graph.no_edges()
    scales = beginning.searched, beginning.validation
    searched, validation = (
        None if scale is None else scale.full if goal.is_ranking else scale.smallest for scale in scales
    )
    return Passed(kept, cast(float, searched), validation)


def _worth(measures: Measures, beginning: Beginning, circuit: Pruned, passed: Passed) -> Scores:
    """How much farther from the full model's the metric is without each edge. [readers, writers]"""
    is_last = passed.kept is circuit.kept
    effects = circuit.effects() if is_last else measures.engine.drop_each(passed.kept)
    gap = beginning.searched.gap
    found: Scores = abs(passed.metric + effects - beginning.searched.full) - gap(passed.metric)
    return np.where(passed.kept, found, 0.0)


def check(work: Work[RefineOptions], found: Found) -> None:
    """Check that a circuit is what a finished search found.

    Args:
        work: The search, which only reads.
        found: The circuit.

    Raises:
        RunError: If it is not, or what the search kept is damaged.
    """
    if not work.steps or work.folder is None:
        return
    beginning, schedule = kept_beginning(work), _schedule(work)
    goal = _goal(work)
    levels = kept_levels(work, len(schedule.levels))
    learned = load_scores(work, levels, Learned) if schedule.levels else Learned.nothing(work.graph)
    if learned is None or not _is_learned(levels, schedule, goal, beginning):
        return
    rounds, passed = _kept_rounds(work, _started(learned, levels, goal, beginning), 1 + len(levels))
    number, _ = _taken(goal, beginning, rounds, passed)
    chosen = _chosen(work.graph, goal, beginning, passed, number)
    if not np.array_equal(chosen.kept, found.kept):
        raise work.other_circuit()


def _kept_rounds(work: Work[RefineOptions], start: Passed, first: int) -> tuple[list[Round], list[Passed]]:
    """The rounds that an interrupted run has kept, and the circuits that these led to, the start included.

    Args:
        work: The search.
        start: Where the first began.
        first: Which step that is.

    Raises:
        RunError: If one cannot have been.
    """
    rounds, passed = [], [start]
    for number, step in enumerate(work.steps[first:], start=first + 1):
        try:
            taken = Round.read(step)
            kept = after(work.graph, passed[-1].kept, taken)
            if (taken.validation is None) != (start.validation is None):
                raise ValueError("it is judged by other pairs")
        except (KeyError, ValueError, TypeError) as error:
            raise work.damaged(number, f": {error}") from error
        rounds.append(taken)
        passed.append(Passed(kept, taken.metric, taken.validation))
    return rounds, passed


def _goal(work: Work[RefineOptions]) -> Goal:
    return Goal(work.options.edges, work.options.max_gap, work.units.word)


# -- learning ---------------------------------------------------------------------------------------------


def _schedule(work: Work[RefineOptions]) -> Schedule:
    options, graph = work.options, work.graph
    if options.steps is None:
        return Schedule((), graph.edge_count, 0, options.rate, options.noise, options.seed)
    if options.edges is not None:
        size = min(graph.edge_count, max(round(_MORE * options.edges), options.edges + work.units.spare))
    else:
        size = min(graph.edge_count // 2, _RANKED if options.max_gap is None else _FEWEST)
    return Schedule.towards(size, graph, options.steps, options.rate, options.noise, options.seed)


def _is_learned(levels: Sequence[Level], schedule: Schedule, goal: Goal, beginning: Beginning) -> bool:
    """Whether no more levels are to be learned: all are, or the last is too small for what is asked for."""
    if len(levels) == len(schedule.levels):
        return True
    return bool(levels) and not goal.is_within(beginning, levels[-1])


def _started(learned: Learned, levels: Sequence[Level], goal: Goal, beginning: Beginning) -> Passed:
    """The circuit that tests start from: that of the last level near enough; all edges where none is."""
    near = [level for level in levels if goal.is_within(beginning, level)]
    if near:
        return Passed(learned.start, near[-1].metric, near[-1].validation)
    validation = None if beginning.validation is None else beginning.validation.full
    return Passed(learned.start, beginning.searched.full, validation)


def _learn(
    work: Work[RefineOptions],
    schedule: Schedule,
    measures: Measures,
    goal: Goal,
    beginning: Beginning,
    batches: Callable[[], Minibatches],
) -> tuple[Learned, list[Level]]:
    """Learn the levels that an interrupted run has not, and keep each.

    Returns:
        What they came to, and what the journal says of them.
    """
    if not schedule.levels:
        return Learned.nothing(work.graph), []
    levels = kept_levels(work, len(schedule.levels))
    learned = load_scores(work, levels, Learned)
    if learned is not None and learned.level > len(levels):  # it stopped between the two
        circuit = _circuit(work, schedule, learned)
        levels.append(keep_level(work, learned, measures.of_circuit(circuit)))
    if learned is not None and _is_learned(levels, schedule, goal, beginning):
        return learned, levels
    if len(work.steps) > 1 + len(levels):
        raise work.damaged(2 + len(levels), ": a level of learning should stand there")
    learner = Learner(work.graph, batches(), schedule)
    try:
        with work.phase("learn"), work.progress.count("learning", "step", schedule.total) as count:
            if learned is None:
                learned = learner.start()
            count.advance(sum(map(schedule.steps_of, range(learned.level))))

            def on_step(size: int, gap: float) -> None:
                count.advance(1)
                count.note(edges=size, gap=f"{gap:.4g}")

            while not _is_learned(levels, schedule, goal, beginning):
                learned = learner.learn(learned, on_step)
                passed = measures.of_circuit(_circuit(work, schedule, learned))
                if goal.is_within(beginning, passed):
                    learned = replace(learned, start=passed.kept)
                keep_scores(work, learned)
                levels.append(keep_level(work, learned, passed))
        return learned, levels
    finally:
        del learner
        trim()


def _circuit(work: Work[RefineOptions], schedule: Schedule, learned: Learned) -> BoolArray:
    """The circuit of a level: the live edges of the best, enough of them. [readers, writers]"""
    graph, size, least = work.graph, schedule.levels[learned.level - 1], work.options.edges or 0
    while True:
        kept = graph.live_edges(best(graph, learned.scores, size))
        if kept.sum() >= least or size == graph.edge_count:
            return kept
        size = min(graph.edge_count, size + max(1, size // 10))
