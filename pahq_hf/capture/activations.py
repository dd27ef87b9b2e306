"""What the writers of one run wrote, and its readers read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pahq_hf.modeling.architectures.position_embeddings import Tables


@dataclass
class Activations:
    """Everything one run wrote to the residual stream.

    Heads are kept as z, not as contributions: `d_model / d_head` times less memory. Where a norm or a factor
    follows the output projection, z is multiplied by its scale (`PAHQAttention.written`).

    Attributes:
        embedding: What the `input` writer adds. [batch, pos, d_model]
        z: Per layer, what each head reads out, as it enters the stream. [batch, pos, head, d_head]
        mlp: Per layer, what the MLP adds; empty for attention-only models. [batch, pos, d_model]
        attention_in: Per layer, the stream the heads read. [batch, pos, d_model]
        mlp_in: Per layer, the stream the MLP reads. [batch, pos, d_model]
        final_in: The stream `logits` reads. [batch, pos, d_model]
        final_out: What the final norm makes of it at the answer positions. [rows, d_model]
        logits: Logits at the answer positions. [rows, vocab]
        masks: Per layer, what is added to attention scores. [batch or 1, 1 or head, query, key]
        rotary: Per layer, the rotary tables, or None.
    """

    embedding: Tensor = field(default_factory=lambda: torch.empty(0))
    z: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    attention_in: list[Tensor] = field(default_factory=list)
    mlp_in: list[Tensor] = field(default_factory=list)
    final_in: Tensor = field(default_factory=lambda: torch.empty(0))
    final_out: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    masks: list[Tensor | None] = field(default_factory=list)
    rotary: list[Tables | None] = field(default_factory=list)

    def part(self, examples: slice) -> Activations:
        """What some examples wrote and read; answers, masks and rotary tables are left out."""

        def each(values: list[Tensor]) -> list[Tensor]:
            return [value[examples] for value in values]

        return Activations(
            embedding=self.embedding[examples],
            z=each(self.z),
            mlp=each(self.mlp),
            attention_in=each(self.attention_in),
            mlp_in=each(self.mlp_in),
            final_in=self.final_in[examples],
        )

    @property
    def nbytes(self) -> int:
        """What they take in memory, but for masks and tables."""
        tensors = [self.embedding, *self.z, *self.mlp, *self.attention_in, *self.mlp_in, self.final_in]
        return sum(each.nbytes for each in (*tensors, self.final_out, self.logits))

    def map_writers(self, change: Callable[[Tensor], Tensor]) -> Activations:
        """A copy whose written activations (embedding, z, mlp) are changed one by one."""
        return replace(
            self,
            embedding=change(self.embedding),
            z=[change(z) for z in self.z],
            mlp=[change(mlp) for mlp in self.mlp],
        )
