"""What each generated task is, for lists and documentation."""

from __future__ import annotations

from dataclasses import dataclass

from pahq_hf.errors import MetricError
from pahq_hf.tasks import docstring, gendered_pronoun, greater_than, induction, ioi, sva
from pahq_hf.tasks.metrics import default_metric, find_metric

_WITHOUT_DISTRACTORS = ("induction",)  # what is right there is right against all


@dataclass(frozen=True)
class TaskFacts:
    """One generated task.

    Attributes:
        name: Name for `load_task`.
        description: What the model has to do.
        example: A prompt and its right continuation.
        corruptions: How prompts can be corrupted; the first is the default.
        metric: The metric it is usually scored with.
    """

    name: str
    description: str
    example: str
    corruptions: tuple[str, ...]
    metric: str


DESCRIPTIONS: tuple[TaskFacts, ...] = (
    TaskFacts(
        "ioi",
        "indirect object identification: the name said once, not the one said twice",
        "When Mary and John went to the store, John gave a drink to -> Mary",
        ioi.CORRUPTIONS,
        default_metric("ioi"),
    ),
    TaskFacts(
        "greater_than",
        "a war ends after it began: any two digits above the year's",
        "The war lasted from the year 1732 to the year 17 -> 33, 34, ...",
        greater_than.CORRUPTIONS,
        default_metric("greater_than"),
    ),
    TaskFacts(
        "docstring",
        "the next argument of a Python function in its docstring",
        "def port(self, load, size, file, last): ... :param load: ... :param size: ... :param -> file",
        docstring.CORRUPTIONS,
        default_metric("docstring"),
    ),
    TaskFacts(
        "induction",
        "random tokens said twice: each of the second copy after its first",
        "A B C D A B C -> D, and B, C before it",
        induction.CORRUPTIONS,
        default_metric("induction"),
    ),
    TaskFacts(
        "gendered_pronoun",
        "the pronoun that goes with a name",
        "So Mary is a great friend, isn't -> she",
        gendered_pronoun.CORRUPTIONS,
        default_metric("gendered_pronoun"),
    ),
    TaskFacts(
        "sva",
        "subject-verb agreement across a second noun",
        "The keys to the cabinet -> are",
        sva.CORRUPTIONS,
        default_metric("sva"),
    ),
)


def foreseen_metric(task: str, given: str | None) -> str | None:
    """What a task will be scored with, checked as far as that is known before there are prompts.

    Args:
        task: What `load_task` is given.
        given: The metric that is asked for; None takes the task's own.

    Returns:
        Name of the metric; None where only the data will tell.

    Raises:
        MetricError: If there is no such metric, or a generated task lacks what it needs.
    """
    name = task.partition(":")[0]
    if name not in [facts.name for facts in DESCRIPTIONS]:
        return given
    metric = default_metric(name) if given is None else given
    if "distractors" in find_metric(metric).needs and name in _WITHOUT_DISTRACTORS:
        raise MetricError(f"metric {metric} needs a distractor for every example; task {name!r} has none")
    return metric
