"""How sure a search is of decisions that it took by estimates: what was audited, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pahq_hf.circuit.sections import Section

CONFIDENCE = 0.95


def most_wrong(audited: int, wrong: int, confidence: float = CONFIDENCE) -> float:
    """Upper confidence limit of the share of wrong decisions (Clopper and Pearson 1934), one-sided.

    Args:
        audited: Decisions that were drawn and tested.
        wrong: Wrong ones among them.
        confidence: Probability that the limit holds.

    Returns:
        The share at which `wrong` or fewer of `audited` come up with probability `1 - confidence`; 1 if
        nothing was audited.
    """
    if wrong >= audited:
        return 1.0
    low, high = wrong / audited, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if _at_most(wrong, audited, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most(successes: int, tries: int, share: float) -> float:
    """Probability of at most so many successes, of independent tries. 0 < share < 1"""
    if share >= 1:
        return 0.0
    log_p, log_q = math.log(share), math.log1p(-share)
    whole = math.lgamma(tries + 1)
    logs = (
        whole - math.lgamma(k + 1) - math.lgamma(tries - k + 1) + k * log_p + (tries - k) * log_q
        for k in range(successes + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def percent(share: float, towards: Callable[[float], float] = math.ceil) -> str:
    """A share in words, of two digits, which never claims more than it says: `1 %`, `4.9 %`.

    Args:
        share: From 0 to 1.
        towards: How it is rounded; up by default.
    """
    if share <= 0:
        return "0 %"
    value = 100 * share
    digits = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{towards(round(value / digits, 6)) * digits:.4g} %"


@dataclass(frozen=True, kw_only=True)
class EstimateFacts(Section):
    """Decisions of a search that were taken by estimates, and how many an audit found wrong.

    Attributes:
        tests: Edges whose score is that of a test.
        estimated: Edges whose score is an estimate. With `tests` they are the edges that count as tested.
        gradients: Circuits at which the metric's slopes were measured.
        audited: Estimated decisions that were drawn at random, and tested.
        wrong: Wrong ones among them; the search went back to each, so their edges are not `estimated`.
        at_most: Upper confidence limit (one-sided, 95 %) of the share of wrong decisions among the estimated
            ones that were not audited.
    """

    tests: int | None = None
    estimated: int | None = None
    gradients: int | None = None
    audited: int | None = None
    wrong: int | None = None
    at_most: float | None = None

    @property
    def shares(self) -> str | None:
        """How many decisions are estimates; None if the record does not say."""
        if self.tests is None or self.estimated is None:
            return None
        tests = "1 test" if self.tests == 1 else f"{self.tests:,} tests"
        estimates = "1 estimate" if self.estimated == 1 else f"{self.estimated:,} estimates"
        return f"{tests}, {estimates}"

    @property
    def unaudited(self) -> int | None:
        """How many estimates were not audited; of those that were, wrong ones are no estimates any more."""
        if self.estimated is None or self.audited is None or self.wrong is None:
            return None
        return self.estimated - (self.audited - self.wrong)

    @property
    def text(self) -> str | None:
        """How sure the search is that it decided like ACDC; None if it took no estimates."""
        if self.estimated is None or self.audited is None or self.wrong is None:
            return None
        if not 0 <= self.wrong <= self.audited:
            return None
        if not (self.estimated or self.audited):
            return "all were tested"
        if not self.audited:
            return "not audited"
        were = "was" if self.wrong == 1 else "were"
        found = f"{self.wrong:,} of {self.audited:,} audited {were} wrong"
        mended = f" and {'is' if self.wrong == 1 else 'are'} mended" if self.wrong else ""
        if self.unaudited == 0:
            return f"{found}{mended}, and all were audited"
        is_share = self.at_most is not None and 0 <= self.at_most <= 1  # a file may say anything
        limit = percent(self.at_most or 0.0 if is_share else most_wrong(self.audited, self.wrong))
        others = " of the others" if mended else ""
        return f"{found}{mended}, at most {limit}{others} are"
