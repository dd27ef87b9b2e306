"""Where each Hugging Face family keeps its layers, norms and projections: one declarative table.

This is the only file that names attribute paths of Hugging Face models.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PretrainedConfig

from pahq_hf.errors import UnsupportedModelError
from pahq_hf.graph import GraphSpec

QKV = Literal["q", "k", "v"]
Rotate = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Architecture:
    """One row of the table. Paths are relative to the causal LM, or to a decoder layer.

    Attributes:
        model_type: `config.model_type`.
        layers: The decoder layers.
        final_norm: The norm before the unembedding.
        attention: Attention module of a layer.
        attention_norm: Norm before it.
        mlp: MLP module of a layer.
        mlp_norm: Norm before it.
        qkv: Names of the q, k, v projections inside the attention; one name when fused as [q | k | v].
        out: Output projection inside the attention.
        mlp_linears: Projections inside the MLP.
        conv1d: Whether projections are `Conv1D`, stored [in, out].
        rotary: Whether q and k are rotated (RoPE).
        unembedding: The unembedding.
    """

    model_type: str
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    mlp_linears: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    conv1d: bool = False
    rotary: bool = True
    unembedding: str = "lm_head"

    def find(self, root: nn.Module, path: str) -> Any:
        """The submodule at a path of this table."""
        return attrgetter(path)(root)

    def rotate_of(self, attention: type[nn.Module]) -> Rotate | None:
        """The `apply_rotary_pos_emb` that a family's attention class uses, or None."""
        if not self.rotary:
            return None
        module = sys.modules[attention.__module__]
        rotate: Rotate = module.apply_rotary_pos_emb
        return rotate


_LLAMA_LIKE = ("llama", "mistral", "qwen2")

_TABLE: dict[str, Architecture] = {
    "gpt2": Architecture(
        model_type="gpt2",
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        qkv=("c_attn",),
        out="c_proj",
        mlp_linears=("c_fc", "c_proj"),
        conv1d=True,
        rotary=False,
    ),
    **{name: Architecture(model_type=name) for name in _LLAMA_LIKE},
}


def supported_families() -> list[str]:
    """Model types in the table, sorted."""
    return sorted(_TABLE)


def find_architecture(config: PretrainedConfig) -> Architecture:
    """The row for a model's config.

    Args:
        config: A Hugging Face config.

    Returns:
        Its row.

    Raises:
        UnsupportedModelError: If the family is not in the table, or uses a feature that changes the graph.
    """
    row = _TABLE.get(config.model_type)
    if row is None:
        raise UnsupportedModelError(
            f"model family {config.model_type!r} is not supported; known families: "
            f"{', '.join(supported_families())}"
        )
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(f"{config.model_type} with cross-attention is not a decoder-only model")
    return row


def graph_spec(config: PretrainedConfig, *, split_kv_groups: bool = False) -> GraphSpec:
    """The shape of the residual-stream graph, from the config alone.

    A GPT-2 whose MLPs have no neurons (`n_inner=0`) counts as attention-only: such an MLP adds a
    constant, its output bias.

    Args:
        config: A Hugging Face config.
        split_kv_groups: Give every query head key and value readers of its own.

    Returns:
        The graph's shape.

    Raises:
        UnsupportedModelError: If the family is not in the table.
    """
    find_architecture(config)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    mlp_width = getattr(config, "n_inner", None) if config.model_type == "gpt2" else config.intermediate_size
    return GraphSpec(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_groups=groups,
        mlps=mlp_width != 0,
        split_kv_groups=split_kv_groups,
    )
