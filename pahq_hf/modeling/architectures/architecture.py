"""What a row of the table of families says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PretrainedConfig

from pahq_hf.errors import UnsupportedModelError
from pahq_hf.modeling.architectures.position_embeddings import NO_ROTARY, ROTARY_TABLES, Rotary, plain_bias

MLPRun = Callable[[nn.Module, Tensor], Tensor]
ScoreBias = Callable[[nn.Module, Tensor | None, dict[str, Any], tuple[int, int]], Tensor | None]


def call(mlp: nn.Module, x: Tensor) -> Tensor:
    """What most MLPs are: a module that maps the normalised stream to what it adds."""
    result: Tensor = mlp(x)
    return result


@dataclass(frozen=True)
class Architecture:
    """Where one family keeps what the engines need. Defaults are Llama's.

    Paths are relative to the causal LM (`layers`, `final_norm`, `unembedding`), to a decoder layer
    (`attention...`, `mlp...`), or to the attention module (`qkv`, `out`, `qk_norm`).

    Attributes:
        model_type: `config.model_type`.
        layers: The decoder layers.
        final_norm: The norm before the unembedding.
        unembedding: The unembedding, a linear layer.
        attention: Attention module of a layer.
        attention_norm: Norm before it; None when it reads the stream as it is.
        attention_post_norm: RMS norm of its output, before that is added to the stream.
        qkv: Names of the q, k, v projections inside the attention; one name when they are fused.
        fused: How a fused projection is laid out: `blocks` [all q | all k | all v]; `groups`, for each
            key/value group [its q | k | v]; or `quarters`, for each quarter of the heads [its q | v | k].
        out: Output projection inside the attention.
        qk_norm: Norms of queries and keys after their projections, where the attention has them.
        joint_qk_norm: Whether such a norm spans all heads, instead of each.
        norm_after_rotary: Whether it comes after they were turned.
        qkv_bound: Bound of queries, keys and values (`clip_qkv`).
        rotary: How positions turn queries and keys.
        score_bias: What is added to attention scores: the mask, and whatever else knows of positions.
        scaling: The factor of attention scores.
        softcap: Attribute of the attention that bounds its scores, `c tanh(s / c)`; None without.
        sinks: Attribute of the attention with a score for each head that takes part in its softmax and
            carries nothing; None without.
        adds_residual: Whether the attention module itself adds the stream to its output.
        mlp: MLP module of a layer; empty when its parts lie in the layer itself.
        mlp_norm: Norm before it; None when it reads the stream as it is. Parallel blocks may share the
            attention's.
        mlp_post_norm: RMS norm of its output, before that is added to the stream.
        mlp_linears: Projections inside the MLP, those that a layer has.
        mlp_gates: Which of these are multiplied with each other, by the last part of their names.
        experts: Where a mixture of experts keeps its matrices, stacked: `gate_up_proj`, `down_proj`.
        mlp_run: Computes the MLP of an input [batch, pos, d_model].
        mlp_exit: Module of the layer whose output is what the MLP makes; by default the MLP itself.
        conv1d: Whether projections are `Conv1D`, stored [in, out].
        parallel: Whether attention and MLP of a layer read the same stream.
        residual_multiplier: Factor of what a block adds to the stream.
        norm_offset: What norms add to their weight (Gemma, Nemotron: 1).
        logit_scale: Factor of the logits.
        logit_softcap: Bound of the logits, `c tanh(l / c)`.
        kv_groups: Key/value groups; by default what the config says.
        mlps: Whether layers have an MLP (a GPT-2 may have none).
        reference: Attention implementation of transformers whose forward pass is the one to reproduce.
        assumed: The family whose row this is, where it was assumed for one that has none.
        sparse: Whether the sparse engine may be used: attention is causal, and the MLP treats each token
            by itself. Otherwise the hooks engine runs.
    """

    model_type: str
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    unembedding: str = "lm_head"
    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    fused: Literal["blocks", "groups", "quarters"] = "blocks"
    out: str = "o_proj"
    qk_norm: tuple[str, str] | None = None
    joint_qk_norm: bool = False
    norm_after_rotary: bool = False
    qkv_bound: float | None = None
    rotary: Rotary = ROTARY_TABLES
    score_bias: ScoreBias = plain_bias
    scaling: Callable[[Any], float] = attrgetter("scaling")
    softcap: str | None = None
    sinks: str | None = None
    adds_residual: bool = False
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    mlp_linears: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    mlp_gates: tuple[str, ...] = ("gate_proj", "up_proj", "gate_up_proj")
    experts: str | None = None
    mlp_run: MLPRun = call
    mlp_exit: str | None = None
    conv1d: bool = False
    parallel: bool = False
    residual_multiplier: float = 1.0
    norm_offset: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    kv_groups: int | None = None
    mlps: bool = True
    reference: Literal["eager", "sdpa"] = "eager"
    assumed: str | None = None
    sparse: bool = True

    @property
    def is_coupled(self) -> bool:
        """Whether the heads of a layer depend on each other, through a norm that spans them."""
        return self.joint_qk_norm or self.attention_post_norm is not None

    @property
    def shares_norm(self) -> bool:
        """Whether attention and MLP read what one norm puts out."""
        return self.parallel and self.mlp_norm is not None and self.mlp_norm == self.attention_norm

    @property
    def is_rotary(self) -> bool:
        """Whether queries and keys are turned by their positions."""
        return self.rotary is not NO_ROTARY

    def find(self, root: nn.Module, path: str) -> Any:
        """The submodule at a path of this table; `root` itself for an empty one.

        Raises:
            UnsupportedModelError: If there is none.
        """
        try:
            return attrgetter(path)(root) if path else root
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(root).__name__} has no {path!r}, where family {self.model_type!r} keeps a part of "
                "it: is this another version of the model's code?"
            ) from error

    def optional(self, root: nn.Module, path: str | None) -> nn.Module | None:
        """The submodule at a path, or None where there is no path."""
        return None if path is None else self.find(root, path)

    def mlp_projections(self, block: nn.Module) -> dict[str, nn.Module]:
        """The projections that a layer's MLP has, by their paths inside it; experts are not among them."""
        mlp, found = self.find(block, self.mlp), {}
        for path in self.mlp_linears if self.mlps else ():
            part = next(iter(path.split(".")))
            if hasattr(mlp, part):  # a family's layers may be of two kinds: one MLP, or a mixture of experts
                found[path] = self.find(mlp, path)
        return found

    def projections(self, block: nn.Module) -> Iterator[nn.Module]:
        """All projections of an untouched layer, experts apart."""
        attention = self.find(block, self.attention)
        for name in (*self.qkv, self.out):
            yield self.find(attention, name)
        yield from self.mlp_projections(block).values()


RowOf = Callable[[PretrainedConfig], Architecture]
