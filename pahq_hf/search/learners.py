"""What the searches that learn have in common: the check of their options, and a run on pairs in two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast

from pahq_hf.engine.setting import Setting
from pahq_hf.errors import ConfigError
from pahq_hf.search.course import Beginning, Measures, kept_beginning, split_of
from pahq_hf.search.kind import Found
from pahq_hf.search.mask_options import MaskOptions
from pahq_hf.search.pairs import warn_unsplit
from pahq_hf.search.refine_options import RefineOptions
from pahq_hf.search.units import units_of
from pahq_hf.search.work import Work

OptionsT = TypeVar("OptionsT", bound=RefineOptions | MaskOptions)


def resolve(options: OptionsT, setting: Setting) -> OptionsT:
    """The options, checked against a setting.

    Raises:
        ConfigError: If more edges, or nodes, are asked for than there are.
        MetricError: If the metric has no gradient.
    """
    units = units_of(options, setting.graph)
    total = units.graph.edge_count
    if options.edges is not None and options.edges > total:
        raise ConfigError(f"this model has {total:,} {units.word}s; cannot keep {options.edges:,} of them")
    options.foresee(setting.metric, setting.precision)
    return cast(OptionsT, options.settled(tests_all=total <= units.few))


def in_two(work: Work[OptionsT], search: Callable[[Measures, Beginning], Found]) -> Found:
    """Search on a part of the pairs, judged by the others; the metric of what is found is of all of them.

    Its first step is what it begins with.

    Args:
        work: The search.
        search: What it does then, on the engines of both parts.

    Raises:
        RunError: If what an interrupted run kept is damaged, or a step cannot be written.
    """
    options = work.options
    split = split_of(work, options.validation, options.seed)
    if not work.is_hushed:
        warn_unsplit(split, options.validation, options.own_patience)
    with Measures.of(work, split) as measures:
        beginning = kept_beginning(work) if work.steps else measures.begin()
        if not work.steps:
            work.keep(beginning.to_json())
        found = search(measures, beginning)
    if split.validation is None:
        return found
    return replace(found, final=work.engine.metric_of(found.kept))
