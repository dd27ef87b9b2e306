"""Is all of a circuit needed, and is it all that is needed? (Wang et al. 2022, section 4, over edges.)"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray, Graph, edge_list
from pahq_hf.errors import ConfigError
from pahq_hf.evaluation.evaluator import Evaluator, faithfulness


@dataclass(frozen=True)
class Minimality:
    """What each kept edge alone is worth: `m(C without e) - m(C)`, m the minimised metric.

    Attributes:
        graph: The graph.
        kept: The circuit. [readers, writers]
        effects: Drop-one effects, 0 where there is no edge. [readers, writers]
        threshold: An edge whose effect is below it could go; None where nothing says how much counts.
    """

    graph: Graph
    kept: BoolArray
    effects: NDArray[np.float64]
    threshold: float | None = None

    @property
    def could_go(self) -> int | None:
        """Kept edges whose drop-one effect is below the threshold, as ACDC compares: signed, strict.

        Each could go alone; not all of them together.
        """
        if self.threshold is None:
            return None
        return int((self.effects[self.kept] < self.threshold).sum())

    def to_dict(self) -> dict[str, Any]:
        """The largest and the smallest effect, `could_go`, and every edge's effect by name, for JSON."""
        edges = edge_list(self.kept)
        effects = {self.graph.edge_name(*edge): float(self.effects[edge]) for edge in edges}
        ends: dict[str, Any] = {"largest": None, "smallest": None}
        if effects:
            for end, name in (
                ("largest", max(effects, key=effects.__getitem__)),
                ("smallest", min(effects, key=effects.__getitem__)),
            ):
                ends[end] = {"edge": name, "effect": effects[name]}
        return {**ends, "could_go": self.could_go, "threshold": self.threshold, "effects": effects}


def minimality(evaluator: Evaluator, kept: BoolArray, threshold: float | None = None) -> Minimality:
    """Remove each edge of a circuit alone.

    Args:
        evaluator: Measures circuits.
        kept: The circuit. [readers, writers]
        threshold: An edge whose effect is below it counts as one that could go.

    Returns:
        The effects.
    """
    return Minimality(evaluator.graph, kept.copy(), evaluator.drop_effects(kept), threshold)


@dataclass(frozen=True)
class Completeness:
    """Whether something outside the circuit does the task too.

    Attributes:
        complement: The metric of the model without the circuit's edges, m(M - C).
        complement_faithfulness: Its faithfulness: near 0 if the circuit is all there is; None if undefined.
        samples: How many subsets K were drawn.
        seed: What they were drawn from.
        mean: Mean of |m(C - K) - m(M - K)| over them; 0 is complete. None without samples.
        max: The largest of these.
    """

    complement: float
    complement_faithfulness: float | None
    samples: int
    seed: int
    mean: float | None
    max: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def completeness(evaluator: Evaluator, kept: BoolArray, samples: int = 20, seed: int = 0) -> Completeness:
    """Two measures of completeness.

    (a) The complement: faithfulness of the model without any of the circuit's edges. (b) Wang et al. 2022,
    section 4.1: C is complete if C and the whole model M suffer alike from any damage K within C. Subsets K
    are drawn at random, every edge of C with probability one half; the incompleteness of one is
    |m(C - K) - m(M - K)|. Wang et al. draw heads and use the logit difference; here it is edges and the
    minimised metric.

    Args:
        evaluator: Measures circuits.
        kept: The circuit. [readers, writers]
        samples: How many subsets to draw; two runs of the model each.
        seed: Seed of the draw.

    Returns:
        Both measures.

    Raises:
        ConfigError: If `samples` is negative.
    """
    if samples < 0:
        raise ConfigError(f"the number of samples must not be negative; got {samples}")
    everything = evaluator.graph.all_edges
    outside = evaluator.metric_of(everything & ~kept)
    rng = np.random.default_rng(seed)
    gaps = []
    for _ in range(samples):
        damage = kept & (rng.random(kept.shape) < 0.5)
        gaps.append(abs(evaluator.metric_of(kept & ~damage) - evaluator.metric_of(everything & ~damage)))
    return Completeness(
        complement=outside,
        complement_faithfulness=faithfulness(outside, evaluator.full, evaluator.empty),
        samples=samples,
        seed=seed,
        mean=float(np.mean(gaps)) if gaps else None,
        max=max(gaps, default=None),
    )
