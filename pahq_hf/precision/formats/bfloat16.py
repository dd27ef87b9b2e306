"""BF16: half the bytes, no scales."""

from __future__ import annotations

import torch
from torch import Tensor

from pahq_hf.precision.formats.one_tensor import OneTensor


class BFloat16Weight(OneTensor):
    """A weight matrix rounded to BF16.

    Args:
        weight: Full-precision weight. [out, in]
    """

    tensor: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # A buffer: Hugging Face takes the dtype of the first parameter for the model's.
        self.register_buffer("tensor", weight.to(torch.bfloat16, copy=True))  # not a mapped file's pages

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.tensor.nbytes

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """The stored values of a block, in FP32. [rows, cols]"""
        return self.tensor[rows, cols].to(torch.float32)
