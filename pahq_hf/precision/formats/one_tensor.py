"""Weights that are one tensor, which knows its shape."""

from __future__ import annotations

from typing import Any

from torch import nn


class OneTensor(nn.Module):
    """A weight matrix kept as one `tensor`, plain or a torchao subclass. [out, in]"""

    tensor: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (out) and columns (in)."""
        rows, cols = self.tensor.shape
        return rows, cols
