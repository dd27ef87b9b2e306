"""`Subject`: what runs search, whatever they look for in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.config import EngineConfig, PAHQConfig
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Subject:
    """A model on prompts, and how it is computed.

    Attributes:
        model: The patched model.
        identity: What identifies the base model, stored with circuits.
        task: The prompts.
        precision: The model's.
        limits: Which engine computes metrics, and what it may take.
    """

    model: PatchedModel
    identity: ModelIdentity
    task: Task
    precision: PAHQConfig
    limits: EngineConfig = field(default_factory=EngineConfig)
