"""What a model says without an engine: plain forward passes."""

from __future__ import annotations

import torch
from torch import Tensor

from pahq_hf import PAHQModel, Task


def answers(model: PAHQModel, task: Task) -> Tensor:
    """Logits at the answer positions, from a plain forward pass."""
    with torch.no_grad():
        logits = model(
            input_ids=task.clean_ids,
            attention_mask=task.attention_mask,
            position_ids=task.position_ids,
            use_cache=False,
        ).logits
    return logits[task.answer_rows, task.answer_positions]
