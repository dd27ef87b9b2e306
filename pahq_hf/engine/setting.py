"""`Setting`: what metric values depend on, whichever edges are asked about."""

from __future__ import annotations

from dataclasses import dataclass

from pahq_hf.circuit.graph import Graph
from pahq_hf.config import Ablation, PAHQConfig
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Setting:
    """A model on a task, and how edges are removed from it and measured.

    Attributes:
        model: The patched model.
        task: The prompts.
        metric: What is minimised.
        ablation: What stands in for removed edges.
        precision: How weights are kept and computed.
    """

    model: PatchedModel
    task: Task
    metric: str
    ablation: Ablation
    precision: PAHQConfig

    @property
    def graph(self) -> Graph:
        """The model's graph."""
        return self.model.graph

    @property
    def rule(self) -> RegimeRule:
        """How low precision is used."""
        return RegimeRule.of(self.precision, self.model.device)

    @property
    def has_means(self) -> bool:
        """Whether it depends on the other prompts what stands in for a prompt's edges."""
        return self.ablation.startswith("mean")
