"""A model class of one's own, and its row: the worked example of docs/families.md.

Its blocks are parallel with a norm each, names follow no family of Hugging Face, and the attention
builds its causal mask itself instead of taking one from the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from pahq_hf import Architecture, register_architecture
from pahq_hf.modeling.architectures.position_embeddings import NO_ROTARY


class TwinConfig(PretrainedConfig):
    """Sizes of a `TwinForCausalLM`."""

    model_type = "twin"

    def __init__(self, vocab_size: int = 53, hidden_size: int = 32, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = kwargs.pop("num_hidden_layers", 2)
        self.num_attention_heads = kwargs.pop("num_attention_heads", 4)
        self.num_key_value_heads = kwargs.pop("num_key_value_heads", 2)
        self.max_position_embeddings = 64
        super().__init__(**kwargs)


class Mixer(nn.Module):
    """Attention with grouped keys and values; the pattern is sharpened by a factor of 1.5."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = config.hidden_size // self.heads
        self.sharpness = 1.5 / self.width**0.5
        self.wq = nn.Linear(config.hidden_size, self.heads * self.width, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.groups * self.width, bias=False)
        self.wv = nn.Linear(config.hidden_size, self.groups * self.width, bias=False)
        self.wo = nn.Linear(self.heads * self.width, config.hidden_size)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[batch, pos, d_model] -> the same, and the pattern"""
        q, k, v = (f(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for f in (self.wq, self.wk, self.wv))
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * self.sharpness + causal_and_real(
            self, None, kwargs, (x.shape[1],) * 2
        )
        pattern = scores.softmax(-1)
        return self.wo((pattern @ v).transpose(1, 2).flatten(2)), pattern


def causal_and_real(
    attention: nn.Module, mask: Tensor | None, kwargs: dict[str, Any], size: tuple[int, int]
) -> Tensor:
    """The mask that `Mixer` adds to its scores: `real` says which tokens are no padding. [batch, 1, q, k]"""
    real: Tensor = kwargs["real"]
    queries, keys = size
    seen = torch.ones(queries, keys, dtype=torch.bool).tril() & real[:, None, None, :]
    return torch.zeros(seen.shape).masked_fill(~seen, -1e30)


class Twin(nn.Module):
    """One block: attention and MLP read the same stream, each through a norm of its own."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm_a, self.norm_b = nn.LayerNorm(size), nn.LayerNorm(size)
        self.mixer = Mixer(config)
        self.ff = nn.ModuleDict({"up": nn.Linear(size, 2 * size), "down": nn.Linear(2 * size, size)})

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """[batch, pos, d_model] -> the same"""
        mixed, _ = self.mixer(self.norm_a(x), real=real)
        return x + mixed + self.ff["down"](self.ff["up"](self.norm_b(x)).relu())


class TwinForCausalLM(PreTrainedModel, GenerationMixin):
    """The model."""

    config_class = TwinConfig
    base_model_prefix = "twin"

    def __init__(self, config: TwinConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Twin(config) for _ in range(config.num_hidden_layers))
        self.last_norm = nn.LayerNorm(config.hidden_size)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The unembedding."""
        return self.unembed

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of token ids. [batch, pos]"""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if position_ids is None:
            position_ids = (real.cumsum(-1) - 1).clamp(min=0)
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x, real.bool())
        return CausalLMOutputWithPast(logits=self.unembed(self.last_norm(x)))


def twin_mlp(ff: nn.Module, x: Tensor) -> Tensor:
    """A `Twin` calls the two maps of its MLP itself."""
    assert isinstance(ff, nn.ModuleDict)
    result: Tensor = ff["down"](ff["up"](x).relu())
    return result


ROW = Architecture(
    model_type="twin",
    layers="blocks",
    final_norm="last_norm",
    unembedding="unembed",
    attention="mixer",
    attention_norm="norm_a",
    qkv=("wq", "wk", "wv"),
    out="wo",
    mlp="ff",
    mlp_norm="norm_b",
    mlp_linears=("up", "down"),
    mlp_run=twin_mlp,
    mlp_exit="ff.down",
    parallel=True,
    rotary=NO_ROTARY,
    scaling=lambda mixer: float(mixer.sharpness),
    score_bias=causal_and_real,
)


def register() -> None:
    """What a user does once."""
    register_architecture(ROW)
