"""Metrics of a circuit (docs/semantics.md, section 4). All are minimised; means over examples.

A `MetricSpec` is everything there is to know of a metric, and is registered by its name. A `Metric` is one
that is bound to a task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from pahq_hf.errors import ConfigError, MetricError, check_registered, code_of, describe
from pahq_hf.tasks.metric_spec import MetricSpec, check_spec
from pahq_hf.tasks.targets import FinalStream, Targets, TokenSets

if TYPE_CHECKING:  # torch takes seconds to import, and names are checked without it
    import torch
    from torch import Tensor

    from pahq_hf.tasks.base import Task


def _kl(logits: Tensor, targets: Targets) -> Tensor:
    from pahq_hf.tasks.divergence import divergence

    return divergence(targets.reference_log_probs(), logits - targets.reference.double())


def _kl_rounding(value: float, error: float) -> float:
    # The sum over the gradient, |q - p|, is at most sqrt(2 KL) (Pinsker); the curvature adds half a square.
    return math.sqrt(2 * max(value, 0.0)) * error + error**2 / 2


def _logit_diff(logits: Tensor, targets: Targets) -> Tensor:
    right, wrong = targets.answers, targets.distractors
    return wrong.mean(wrong.gather(logits)) - right.mean(right.gather(logits))


def _nll(logits: Tensor, targets: Targets) -> Tensor:
    return -targets.answers.logsumexp(targets.answers.gather(logits.log_softmax(-1)))


def _nll_of_stream(stream: FinalStream, targets: Targets) -> Tensor:
    return stream.logsumexp() - targets.answers.logsumexp(stream.columns(targets.answers))


def _prob_diff(logits: Tensor, targets: Targets) -> Tensor:
    log_probs = logits.log_softmax(-1)
    right, wrong = targets.answers, targets.distractors
    return wrong.total(wrong.gather(log_probs).exp()) - right.total(right.gather(log_probs).exp())


def _prob_diff_of_stream(stream: FinalStream, targets: Targets) -> Tensor:
    right, wrong, total = targets.answers, targets.distractors, stream.logsumexp()[..., None]
    p_wrong = wrong.total((stream.columns(wrong) - total).exp())
    return p_wrong - right.total((stream.columns(right) - total).exp())


def _nll_called(name: str, *tasks: str) -> MetricSpec:
    """A negative log probability; of several answers, of all together."""
    return MetricSpec(name, _nll, _nll_of_stream, ("answers",), rounding=_twice, tasks=tasks)


def _twice(value: float, error: float) -> float:
    # The gradient of a difference of logits or of a log probability sums up to 2 at most.
    return 2 * error


_BUILT_IN: tuple[MetricSpec, ...] = (
    MetricSpec(
        "kl",
        _kl,
        lambda stream, _: stream.divergence(),
        ("reference",),
        flat_at_full=True,
        rounding=_kl_rounding,
        tasks=("ioi",),
    ),
    MetricSpec(
        "logit_diff",
        _logit_diff,
        lambda stream, targets: stream.direction(targets.distractors, targets.answers),
        ("answers", "distractors"),
        rounding=_twice,
        tasks=("docstring", "gendered_pronoun", "sva"),
    ),
    _nll_called("nll"),
    MetricSpec(
        "prob_diff",
        _prob_diff,
        _prob_diff_of_stream,
        ("answers", "distractors"),
        # Of the probability P of a set it is 2 P (1 - P), half at most, and there are two.
        rounding=lambda value, error: error,
        tasks=("greater_than",),
    ),
    _nll_called("match_nll", "induction"),
)
_METRICS: dict[str, MetricSpec] = {spec.name: spec for spec in _BUILT_IN}
_NAMES = frozenset(_METRICS)
_USUAL = "kl"  # where no metric claims a task: it needs no answers


def register_metric(spec: MetricSpec) -> None:
    """Add a metric of one's own, or replace one: searches, evaluation and `--metric` know its name then.

    Args:
        spec: The metric.

    Raises:
        ConfigError: If the name is no name or that of a built-in metric, or a task has a usual one already.

    Example:
        ```python
        def miss(logits, targets):  # [..., rows, vocab] -> [..., rows]
            right = targets.answers.mean(targets.answers.gather(logits))
            return (logits.amax(-1) - right).clamp(min=0)


        register_metric(MetricSpec("miss", miss, needs=("answers",)))
        model.discover(task, metric="miss", threshold=0.05)
        ```
    """
    check_registered(spec, MetricSpec, "metric", _NAMES)
    check_spec(spec)
    for other in _METRICS.values():
        taken = set(spec.tasks) & set(other.tasks)
        if other.name != spec.name and taken:
            raise ConfigError(
                f"task {min(taken)!r} is usually scored with {other.name!r}: pass metric= instead"
            )
    _METRICS[spec.name] = spec


def is_built_in(name: str) -> bool:
    """Whether a name is that of a metric of the package."""
    return name in _NAMES


def known_metrics() -> list[str]:
    """Names of metrics, the built-in ones first."""
    return list(_METRICS)


def find_metric(name: str) -> MetricSpec:
    """A metric by name.

    Raises:
        MetricError: If there is none of this name.
    """
    found = next((spec for spec in _METRICS.values() if spec.name == name), None)
    if found is None:
        raise MetricError(
            f"unknown metric {name!r}; known: {', '.join(_METRICS)}; or add it with register_metric"
        )
    return found


def default_metric(task: str) -> str:
    """The name of the metric that a task is usually scored with."""
    return next((spec.name for spec in _METRICS.values() if task in spec.tasks), _USUAL)


def check_metric(name: str, task: Task) -> None:
    """Check that there is such a metric, and that a task has what it needs.

    Raises:
        MetricError: If not.
    """
    needs = find_metric(name).needs
    if "answers" in needs and not task.has_answers:
        raise MetricError(
            f"metric {name} needs an answer for every example; {_lacks(task, task.answers)}: use kl"
        )
    if "distractors" in needs and not task.has_distractors:
        whole = ", as whole answers are scored alone: use nll, or answer_tokens first" if task.summed else ""
        raise MetricError(
            f"metric {name} needs a distractor for every example; {_lacks(task, task.distractors)}{whole}"
        )


def _lacks(task: Task, sets: Sequence[Sequence[int]]) -> str:
    """How many rows lack answers or distractors, and what columns their data has."""
    from pahq_hf.tasks.columns import listed

    without = sum(not tokens for tokens in sets)
    count = "none" if without == len(sets) else f"none in {without} of {len(sets)} rows"
    columns = task.source.get("columns")
    seen = f" (its data has columns {listed(columns)})" if isinstance(columns, list) else ""
    return f"task {task.name!r} has {count}{seen}"


# -- a metric on a task -----------------------------------------------------------------------------------


class Metric:
    """A metric bound to a task and to the full model's answer.

    Args:
        name: Of a registered metric.
        task: Supplies rows, answers and distractors.
        reference: The full model's logits, for a metric such as `kl`. [rows, vocab]
        device: Where logits will be.

    Raises:
        MetricError: If there is no such metric, or the task lacks the answers or distractors it needs.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        reference: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        import torch

        check_metric(name, task)
        device = device or torch.device("cpu")
        self.name = name
        self.spec = find_metric(name)
        needs_reference = "reference" in self.spec.needs
        # A distance from the model on the clean prompts is one from it on those that are in their place.
        self._sign = -1.0 if task.swapped and not needs_reference else 1.0
        if needs_reference and reference is None:
            raise MetricError(f"{name} needs the full model's logits as its reference")
        self.targets = Targets(
            TokenSets.of(task.answers, device),
            TokenSets.of(task.distractors, device),
            reference if needs_reference else None,
        )
        counts = torch.bincount(task.answer_rows, minlength=len(task)).to(torch.float64)
        # Rows of one example share its weight, unless they add up: the value is a mean over examples.
        share = torch.ones_like(counts) if task.summed else counts
        self.row_weights = (1 / (share[task.answer_rows] * len(task))).to(device)

    def rows(self, logits: Tensor) -> Tensor:
        """The metric row by row. [..., rows, vocab] -> [..., rows] in float64

        Logits in float64 may be more than rounded ones: `kl` is as exact as they differ from the reference.
        """
        with self._running():
            rows = self.spec.value(logits.double(), self.targets)
        return self._sign * self._checked_rows(rows, logits.shape[:-1])

    def rows_of_stream(self, stream: FinalStream, shape: Sequence[int]) -> Tensor:
        """The metric row by row from final streams, for a metric that has such a form.

        Args:
            stream: The streams.
            shape: Batch entries and rows.

        Returns:
            [batch, rows] in float64
        """
        assert self.spec.from_stream is not None
        with self._running():
            rows = self.spec.from_stream(stream, self.targets)
        return self._sign * self._checked_rows(rows, shape)

    def _running(self) -> AbstractContextManager[None]:
        """Where the metric's own code runs: what somebody's metric raises is known for its own."""
        return nullcontext() if self.name in _NAMES else code_of(f"metric {self.name!r}")

    def _checked_rows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        if not hasattr(rows, "double"):
            raise MetricError(f"metric {self.name} must give a tensor, one value a row; got {describe(rows)}")
        if tuple(rows.shape) != tuple(shape):
            raise MetricError(
                f"metric {self.name} gives values of shape {tuple(rows.shape)}; one a row is {tuple(shape)}"
            )
        return rows.double()

    def reduce(self, rows: Tensor) -> Tensor:
        """Mean over examples. [..., rows] -> [...]"""
        return (rows * self.row_weights).sum(-1)

    def __call__(self, logits: Tensor) -> float:
        """The metric of one run.

        Args:
            logits: Logits at the answer positions. [rows, vocab]

        Returns:
            The minimised value.

        Raises:
            MetricError: If it is NaN or infinite.
        """
        return checked(float(self.reduce(self.rows(logits))), self.name)

    def followed(self, logits: Tensor) -> Tensor:
        """The metric of one run, to take its gradient.

        Args:
            logits: Logits at the answer positions, with gradients. [rows, vocab]

        Returns:
            The minimised value. []

        Raises:
            MetricError: If it has no gradient.
        """
        self.check_gradient()
        value = self.reduce(self.rows(logits))
        self.check_followed(value)
        return value

    def check_followed(self, value: Tensor) -> None:
        """Check that a value from logits with gradients has one.

        Raises:
            MetricError: If it has none.
        """
        if not value.requires_grad:
            raise MetricError(
                f"metric {self.name} has no gradient, as a count has none: say differentiable=False where it "
                "is registered, and score edges by exact"
            )

    def check_gradient(self) -> None:
        """Check that the metric says it has a gradient.

        Raises:
            MetricError: If it says that it has none.
        """
        if not self.spec.differentiable:
            raise MetricError(
                f"metric {self.name} has no gradient: test its edges one by one, or take a metric such as kl"
            )

    def rounding(self, logits: Tensor, value: float, error: float) -> float:
        """How far the metric moves at most, to first order, when no logit moves by more than an error.

        Args:
            logits: The logits it was measured on. [rows, vocab]
            value: What it is there.
            error: Of each logit.

        Returns:
            The distance.
        """
        if self.spec.rounding is not None:
            with self._running():
                return self.spec.rounding(self._sign * value, error)
        import torch

        with torch.enable_grad():
            at = logits.detach().double().requires_grad_()
            moved = self.reduce(self.rows(at))
            if not (self.spec.differentiable and moved.requires_grad):
                return 2 * error  # as if it were a difference of two logits; a step may be higher
            (gradient,) = torch.autograd.grad(moved, at)
        return float(gradient.nan_to_num().abs().sum()) * error


def checked(value: float, name: str) -> float:
    """`value`, unless it is NaN or infinite: no comparison with a threshold means anything then.

    Raises:
        MetricError: If it is.
    """
    if not math.isfinite(value):
        raise MetricError(
            f"metric {name} came out as {value}: the model's logits hold NaN or infinity on this data; "
            "check the checkpoint and the prompts"
        )
    return value
