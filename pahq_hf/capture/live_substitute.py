"""What stands in for removed edges while a model runs as a circuit, forward pass by forward pass."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from pahq_hf.capture.activations import Activations

_CACHES = ("cache", "past_key_values")  # as transformers from 5.24 on calls it, and before


@dataclass(frozen=True)
class Call:
    """One forward pass of the model's body, as it was called.

    Attributes:
        arguments: By name.
        cache_name: What the body calls its key/value cache; None if it takes none.
        began_cache: Whether the cache was made for this pass, and the caller gave none.
    """

    arguments: dict[str, Any]
    cache_name: str | None
    began_cache: bool = False

    @classmethod
    def of(
        cls, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: PretrainedConfig
    ) -> Call:
        """Name what a module is called with; a cache that it would make itself is made here.

        Args:
            body: The model's body.
            args: Positional arguments.
            kwargs: Arguments by name.
            config: The model's.
        """
        names = list(inspect.signature(body.forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        known = [name for name in _CACHES if name in given] or [name for name in _CACHES if name in names]
        cache_name = known[0] if known else None
        use = given.get("use_cache")
        wanted = getattr(config, "use_cache", False) if use is None else use
        begins = bool(wanted) and cache_name is not None and given.get(cache_name) is None
        if begins:
            assert cache_name is not None
            given[cache_name] = DynamicCache(config=config)
        return cls(given, cache_name, begins)

    @property
    def ids(self) -> Tensor | None:
        """Token ids; None if the pass is given embeddings. [batch, pos]"""
        found: Tensor | None = self.arguments.get("input_ids")
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """Examples and tokens of this pass."""
        given = self.arguments["inputs_embeds"] if self.ids is None else self.ids
        return int(given.shape[0]), int(given.shape[1])

    @property
    def cache(self) -> Any:
        """The key/value cache, or None."""
        return None if self.cache_name is None else self.arguments.get(self.cache_name)

    @property
    def past(self) -> int:
        """Tokens that are in the cache."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    @property
    def mask(self) -> Tensor | None:
        """Which tokens are real, those in the cache included; None if all are or a mask of scores is given.

        [batch, past + pos]
        """
        found = self.arguments.get("attention_mask")
        return found if isinstance(found, Tensor) and found.ndim == 2 else None

    def positions(self, device: torch.device) -> Tensor:
        """Where each token stands, counted from its example's first real one. [batch, pos]"""
        batch, width = self.shape
        given = self.arguments.get("position_ids")
        if isinstance(given, Tensor) and given.ndim == 2:
            return given.to(device).expand(batch, width)
        if self.mask is not None:
            return positions_of(self.mask)[:, -width:].to(device)
        return torch.arange(self.past, self.past + width, device=device).expand(batch, width)


class Substitute(Protocol):
    """Gives what stands in for removed edges."""

    def of(self, call: Call) -> Activations:
        """What takes the place of what writers write in a forward pass; no hook of a circuit is in place.

        Returns:
            Activations with streams: embedding, z, mlp, attention_in, mlp_in, final_in. [batch, pos, ...]

        Raises:
            ConfigError: If there is nothing for this pass.
        """


def positions_of(mask: Tensor) -> Tensor:
    """Positions counted from each example's first real token. [batch, pos] -> [batch, pos]"""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def body_of(hf: PreTrainedModel, *inside: nn.Module) -> nn.Module:
    """The innermost model that every forward pass goes through: from token ids to the final norm.

    Args:
        hf: The whole model.
        inside: What has to be in it.
    """
    body: nn.Module = hf
    for module in hf.modules():  # outer ones come before what is in them
        if isinstance(module, PreTrainedModel) and set(inside) <= set(module.modules()):
            body = module
    return body
