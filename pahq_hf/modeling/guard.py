"""What must be so while a circuit is searched or measured: the weights as they were wrapped, no dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor, nn

from pahq_hf.errors import ConfigError
from pahq_hf.precision.weights import WeightMatrix

_CHUNK = 1 << 22  # values that are summed at once on a GPU
_SPREAD = (-7046029254386353131, -4417276706812531889)  # odd, with about half their bits set


@dataclass(frozen=True)
class _Seen:
    """A tensor as it was.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
        on_cpu: Whether its values were summed up on the CPU.
        sums: Checksums of its values; there are several where a tensor is made of others.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    on_cpu: bool
    sums: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Seen:
        on_cpu = tensor.device.type == "cpu"
        return cls(tensor.dtype, tuple(tensor.shape), on_cpu, _sums(tensor, on_cpu))


class WeightGuard:
    """Knows a patched model's weights, and notices what was done to them behind its back.

    A search reads some values from the checkpoint and others from memory, and its circuit carries the
    fingerprint of what was loaded: weights that are cast, replaced or edited later make all three disagree.
    Moving the model to another device is fine.

    Args:
        model: The Hugging Face model inside, patched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen = {name: _Seen.of(tensor) for name, tensor in _tensors(model).items()}

    def check(self, model: nn.Module) -> None:
        """Check that a model is as it was. Reads every resident weight once, at the speed of memory.

        Args:
            model: The same model.

        Raises:
            ConfigError: Naming the first weight that is not.
        """
        now = _tensors(model)
        for name in self._seen:
            if name not in now:
                raise _changed(f"{name} is gone")
        for name in now:
            if name not in self._seen:
                raise _changed(f"{name} was added")
        for name, tensor in now.items():
            seen = self._seen[name]
            if tensor.is_meta:
                raise _changed(f"{name} was moved out of memory")
            if tuple(tensor.shape) != seen.shape:
                raise _changed(f"{name} has shape {tuple(tensor.shape)}, it had {seen.shape}")
            if tensor.dtype != seen.dtype:
                raise _changed(f"{name} is in {tensor.dtype}, it was in {seen.dtype}")
        for name, tensor in now.items():
            if _sums(tensor, self._seen[name].on_cpu) != self._seen[name].sums:
                raise _changed(f"values of {name} were edited")


def _changed(what: str) -> ConfigError:
    return ConfigError(
        f"the model was changed after PAHQModel wrapped it: {what}; load it anew, and change a model before "
        "it is wrapped"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no module is in training mode: dropout is off. Afterwards those that were are so again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# -- tensors ------------------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and buffers that hold weights; a rotary table may be made anew for longer prompts."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    state = model.state_dict(keep_vars=True)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, WeightMatrix))
    for name, buffer in model.named_buffers():
        if name in state or name.startswith(inside):
            found[name] = buffer
    return found


def _sums(tensor: Tensor, on_cpu: bool) -> tuple[int, ...]:
    return tuple(_sum(part.detach(), on_cpu) for part in _parts(tensor))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: codes and scales of a torchao one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from _parts(getattr(tensor, name))


def _sum(tensor: Tensor, on_cpu: bool) -> int:
    values = tensor.contiguous().flatten().view(torch.uint8)
    if on_cpu:
        return xxhash.xxh3_64_intdigest(values.cpu().numpy().data)
    # On a GPU: a sum of the values, each mixed with its place, so that nothing large has to be copied.
    words = values.view(torch.int32) if values.numel() % 4 == 0 else values
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _CHUNK):
        some = words[start : start + _CHUNK].to(torch.int64)
        mixed = (
            some ^ (torch.arange(start, start + some.numel(), device=some.device) * _SPREAD[0])
        ) * _SPREAD[1]
        total += (mixed ^ (mixed >> 31)).sum()
    return int(total)
