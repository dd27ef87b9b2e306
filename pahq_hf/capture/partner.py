"""Corrupted prompts that run along with a circuit, also while it generates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from pahq_hf.capture.activations import Activations
from pahq_hf.capture.live_substitute import Call, body_of, positions_of
from pahq_hf.capture.recording import recording
from pahq_hf.errors import ConfigError, TaskError, describe
from pahq_hf.modeling.patched_model import PatchedModel


def read_prompts(given: object, mask: object = None) -> tuple[Tensor, Tensor | None]:
    """Token ids and mask of corrupted prompts, from what a caller has.

    Args:
        given: Token ids, or what a tokenizer returns: `input_ids` and `attention_mask` by name.
        mask: Which are real; in place of the tokenizer's.

    Returns:
        The ids, and the mask if there is one. [batch, pos], [batch, pos]

    Raises:
        ConfigError: If they are no tensors of whole numbers.
    """
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise ConfigError(
                f"corrupted prompts need input_ids, as a tokenizer returns them; got {describe(list(given))}"
            )
        mask = given.get("attention_mask") if mask is None else mask
        given = given["input_ids"]
    if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
        raise ConfigError(
            "corrupted prompts are a tensor of token ids [batch, pos], or what "
            f'tokenizer(prompts, return_tensors="pt") gives; got {_kind(given)}'
        )
    if mask is not None and not isinstance(mask, Tensor):
        raise ConfigError(
            "the mask of corrupted prompts is a tensor [batch, pos], 1 on real tokens and 0 on padding; got "
            f"{_kind(mask)}"
        )
    return given, mask


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else describe(value)


class Partner:
    """What the corrupted prompts write, in every forward pass of the circuit they stand in for.

    The rule: as far as the corrupted prompts go, the partner reads them; after that it reads the tokens that
    the circuit reads. What a circuit generates is so appended to its own prompt and to the corrupted one, and
    both go on differing only by what their prompts differ in. A cache of the partner's own follows the
    circuit's: it is cut, reordered and repeated with it.

    Args:
        model: The patched model.
        ids: Token ids of the corrupted prompts, laid out as the prompts of the circuit. [batch, pos]
        mask: Which are real; those of the circuit's prompts by default. [batch, pos]

    Raises:
        ConfigError: If the shapes of the two do not fit.
        TaskError: If a token id is outside the vocabulary.
    """

    def __init__(self, model: PatchedModel, ids: Tensor, mask: Tensor | None = None) -> None:
        if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
            given = "" if mask is None else f" and their mask {tuple(mask.shape)}"
            raise ConfigError(
                f"corrupted prompts are token ids [batch, pos], with a mask of the same shape; they have "
                f"shape {tuple(ids.shape)}{given}"
            )
        size = model.embedding.num_embeddings
        if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= size:
            worst = None if ids.numel() == 0 else int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise TaskError(f"a corrupted prompt holds token id {worst}; the model has {size} tokens")
        self._model = model
        self._ids = ids.to(model.device)
        self._mask = None if mask is None else mask.to(model.device)
        self._body = body_of(model.hf, model.layers[0].block, model.final_norm)

    def of(self, call: Call) -> Activations:
        """What the partner writes and reads in a forward pass.

        Raises:
            ConfigError: If the pass is not of prompts that the corrupted ones fit, or goes on with a cache
                that was filled without them.
        """
        self._check(call)
        arguments = {
            name: value
            for name, value in call.arguments.items()
            if name not in ("input_ids", "inputs_embeds", "output_attentions", "output_hidden_states")
        }
        arguments["input_ids"] = self._tokens(call)
        if self._mask is not None:
            mask = self._joined(self._mask, call)
            arguments["attention_mask"] = mask
            if "position_ids" in arguments or call.mask is not None:
                arguments["position_ids"] = positions_of(mask)[:, -call.shape[1] :]
        if call.cache is not None:
            assert call.cache_name is not None
            arguments[call.cache_name] = self._cache_of(call)
        with torch.no_grad(), recording(self._model, call.shape[0]) as run:
            self._body(**arguments)
        return run

    def _check(self, call: Call) -> None:
        (batch, width), (examples, length) = call.shape, self._ids.shape
        # Chunks of a prompt are known by the cache they share.
        short = call.past + width < length and (call.cache is None or call.began_cache)
        if batch % examples or short:
            raise ConfigError(
                f"the corrupted prompts have shape {(examples, length)}, this forward pass "
                f"{(batch, call.past + width)}: give corrupted prompts of the same shape, or mean activations"
            )
        if call.ids is None and call.past + width > length:
            raise ConfigError(
                "beyond the corrupted prompts their partner reads the tokens that the circuit reads: give "
                "input_ids, not inputs_embeds"
            )
        if call.arguments.get("attention_mask") is not None and call.mask is None:
            raise ConfigError(
                "corrupted prompts run along with a 2-D attention mask (1 on real tokens) only; generate "
                "with a dynamic cache, the default, or none"
            )

    def _tokens(self, call: Call) -> Tensor:
        """The partner's token ids in this pass. [batch, pos]"""
        batch, width = call.shape
        own = self._repeated(self._ids, batch)[:, call.past : call.past + width]
        return own if call.ids is None else torch.cat([own, call.ids[:, own.shape[1] :].to(own)], dim=1)

    def _joined(self, mask: Tensor, call: Call) -> Tensor:
        """The partner's mask, the circuit's beyond the corrupted prompts. [batch, past + pos]"""
        batch, width = call.shape
        mask, total = self._repeated(mask, batch), call.past + width
        rest = call.mask
        rest = mask.new_ones(batch, total) if rest is None else rest.to(mask)
        return torch.cat([mask[:, :total], rest[:, mask.shape[1] :]], dim=1)

    @staticmethod
    def _repeated(values: Tensor, batch: int) -> Tensor:
        """Each example as often as `generate` repeats it for beams and several answers."""
        return values.repeat_interleave(batch // len(values), dim=0)

    def _cache_of(self, call: Call) -> Cache:
        cache, past = call.cache, call.past
        if past == 0:
            return follow(cache, DynamicCache(config=self._model.hf.config), self._ids)
        partner: Cache | None = getattr(cache, "partner", None)
        mine = partner is not None and torch.equal(cache.partner_prompts, self._ids)
        if partner is None or not mine or partner.get_seq_length() != past:
            raise ConfigError(
                "this cache was filled without these corrupted prompts: start generating inside the block"
            )
        return partner


class _Followed(Cache):
    """A cache with a partner's that is cut, reordered and repeated with it.

    Attributes:
        partner: The other one.
        partner_prompts: The corrupted prompts it is of.
    """

    partner: Cache
    partner_prompts: Tensor

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.partner.reorder_cache(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self.partner.crop(*args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.partner.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Any) -> None:
        super().batch_select_indices(indices)
        self.partner.batch_select_indices(indices)

    def reset(self) -> None:
        super().reset()
        self.partner.reset()


def follow(cache: Any, partner: Cache, prompts: Tensor) -> Cache:
    """Let a cache take another one along in all that is done to it.

    Args:
        cache: The one that is handed around.
        partner: The other one.
        prompts: The corrupted prompts it is of.

    Returns:
        The partner.
    """
    own = type(cache)
    if not issubclass(own, _Followed):
        cache.__class__ = type(own.__name__, (_Followed, own), {})
    cache.partner, cache.partner_prompts = partner, prompts
    return partner
