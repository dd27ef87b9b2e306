"""Matrix products at the speed the processor has.

PyTorch sends FP32 matrix products on CPU to MKL, which leaves more than half of an AVX-512 core of AMD
idle; oneDNN, which PyTorch also ships, does the same sums with the same FP32 fused multiply-adds
(measured here: 200 against 90 GFLOP/s a thread, and 440 in BF16). It wants its weight packed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pahq_hf.errors import ConfigError
from pahq_hf.precision.backward import differentiable, is_differentiated

ComputeName = Literal["fp32", "bf16", "fp8"]
COMPUTE_DTYPES: dict[ComputeName, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
_CHUNK = 256  # tokens: activations of a layer stay in a core's L2 cache


def native_bf16(device: torch.device) -> bool:
    """Whether a device multiplies BF16 natively, faster than FP32 and accumulating in FP32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _cpu_gains_by_bf16()


def _cpu_gains_by_bf16() -> bool:
    """Said by what the processor is: a measurement would give one command two answers on a busy machine.

    AMX and AMD's AVX512-BF16 have twice the speed of FP32 or more, Intel's AVX512-BF16 without AMX half.
    """
    if not (torch.backends.mkldnn.is_available() and _cpu_multiplies_bf16()):
        return False
    return bool(torch.cpu._is_amx_tile_supported()) or _is_amd()


def _is_amd() -> bool:
    """SSE4a is AMD's alone. PyTorch before 2.13 does not say, which costs speed there and nothing else."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("sse4a", False))


def _cpu_multiplies_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def native_fp8(device: torch.device) -> bool:
    """Whether a device multiplies FP8 natively."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def resolve_compute(compute: str, fmt: str, device: torch.device) -> ComputeName:
    """What `compute` means on a device.

    `auto` is BF16 on GPUs that have it, and on CPUs known to be faster in it; FP8 only if it is
    asked for: its rounded differences double the scores' error, and no card has yet shown what they gain.

    Args:
        compute: `auto`, `fp32`, `bf16` or `fp8`.
        fmt: Format of the weights; FP8 products need FP8 weights.
        device: Where products run.

    Returns:
        `fp32`, `bf16` or `fp8`.

    Raises:
        ConfigError: If the name is unknown, or FP8 is asked for where there is none.
    """
    if compute == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    if compute == "fp8" and not (fmt == "fp8" and native_fp8(device)):
        raise ConfigError("compute=fp8 needs format fp8 and CUDA with compute capability 8.9 or newer")
    for name in COMPUTE_DTYPES:
        if compute == name:
            return name
    raise ConfigError(f"compute must be one of auto, {', '.join(COMPUTE_DTYPES)}; got {compute!r}")


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can take this weight: FP32, or BF16 where the processor has it, on CPU."""
    native = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _cpu_multiplies_bf16())
    return (
        weight.device.type == "cpu"
        and native
        and torch.backends.mkldnn.is_available()
        and min(weight.shape) > 0
    )


class DeltaProduct(Protocol):
    """`y = x W^T` for differences, in some dtype."""

    dtype: torch.dtype
    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """In the dtype of `x`. [..., in] -> [..., out]"""

    def raw(self, x: Tensor) -> Tensor:
        """In whatever dtype it computes; in that of `x` where that has gradients. [..., in] -> [..., out]"""

    def transposed(self, y: Tensor) -> Tensor:
        """`y W`, of a backward pass. [..., out] -> [..., in]"""


class Product:
    """`y = x W^T + b` with W packed for the processor.

    A BF16 weight makes a BF16 product: `x` is rounded to BF16, sums are FP32, and `y` comes back in the
    dtype of `x`.

    Args:
        weight: [out, in]
        bias: [out]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias if bias is None else bias.to(weight.dtype)
        self._packed = can_pack(weight)
        self.dtype = weight.dtype
        self.nbytes = weight.numel() * weight.element_size()
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self._packed else weight
        )

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return self.raw(x).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The same, as its own backward pass calls it. [..., in] -> [..., out]"""
        return self(x)

    def transposed(self, y: Tensor) -> Tensor:
        """`y W`, of a backward pass, in the dtype of `y`. [..., out] -> [..., in]"""
        return y @ (self._weight.to_dense() if self._packed else self._weight).to(y.dtype)

    def raw(self, x: Tensor) -> Tensor:
        """The same in the dtype of the weight: one pass over `y` less. [..., in] -> [..., out]"""
        if is_differentiated(x):  # oneDNN's own gradient would be zero, silently
            return differentiable(self, x)
        x = x.to(self.dtype)
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
