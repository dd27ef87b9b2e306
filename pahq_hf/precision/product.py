"""FP32 products at the speed the processor has.

PyTorch sends FP32 matrix products on CPU to MKL, which leaves more than half of an AVX-512 core of AMD
idle; oneDNN, which PyTorch also ships, does the same sums with the same FP32 fused multiply-adds
(measured here: 200 against 90 GFLOP/s a thread). It wants its weight packed once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 256  # tokens: activations of a layer stay in a core's L2 cache


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can take this weight: FP32 on CPU."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and min(weight.shape) > 0
    )


class Product:
    """`y = x W^T + b` with W packed for the processor.

    Args:
        weight: [out, in]
        bias: [out]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = can_pack(weight)
        self.nbytes = weight.numel() * weight.element_size()
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self._packed else weight
        )

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if not self._packed:
            return F.linear(x, self._weight, self._bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a token-wise function piece by piece, so that its intermediates stay in cache.

    Args:
        function: [tokens, in] -> [tokens, out]
        x: [..., in]

    Returns:
        [..., out]
    """
    flat = x.flatten(0, -2)
    if x.device.type != "cpu" or flat.shape[0] <= _CHUNK:
        return function(x)
    return torch.cat([function(piece) for piece in flat.split(_CHUNK)]).unflatten(0, x.shape[:-1])
