"""Turn a Hugging Face causal LM into a `PatchedModel`: PAHQ attention, PAHQ linears, named rooms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pahq_hf.circuit.graph import Graph
from pahq_hf.errors import ConfigError
from pahq_hf.modeling.architectures.architecture import Architecture
from pahq_hf.modeling.architectures.lookup import find_architecture, graph_spec
from pahq_hf.modeling.layers import Layer, patch_layer
from pahq_hf.modeling.norms import widen_norms
from pahq_hf.modeling.untouched import check_supported, resident_device, token_embedding
from pahq_hf.precision.active_components import ActiveComponents, Component, Part
from pahq_hf.precision.embeddings import EmbeddingMatrix, patch_embedding
from pahq_hf.precision.holding import Holding
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.weight_block import WeightBlock
from pahq_hf.precision.weights import Shared


class PatchedModel:
    """A Hugging Face causal LM cut into the pieces the engines need.

    Args:
        hf: The model; patched in place.
        split_kv_groups: Give every query head key and value readers of its own.
        streamed: Whether projections have no memory yet: `lower` reads them from the checkpoint.

    Raises:
        UnsupportedModelError: If the family is unknown.
        ConfigError: If the model is not in float32 or float64, is offloaded, or is patched already.
    """

    def __init__(self, hf: PreTrainedModel, *, split_kv_groups: bool = False, streamed: bool = False) -> None:
        check_supported(hf, streamed=streamed)
        self.arch: Architecture = find_architecture(hf.config)
        self.hf = hf
        self.spec = graph_spec(hf.config, split_kv_groups=split_kv_groups)
        self.graph = Graph(self.spec)
        self.original_shapes = _state_shapes(hf)
        self.is_applied = False  # whether hooks restrict it to a circuit now
        hf.eval()
        hf.requires_grad_(False)
        blocks = self.arch.find(hf, self.arch.layers)
        self.layers = [
            patch_layer(block, self.arch, number, self.spec) for number, block in enumerate(blocks)
        ]
        self.final_norm: nn.Module = self.arch.find(hf, self.arch.final_norm)
        self.unembedding: nn.Linear | EmbeddingMatrix = self.arch.find(hf, self.arch.unembedding)
        # Of embedding and unembedding, one where they are tied, when they are low precision too.
        self.embedding_matrices: list[EmbeddingMatrix] = []
        if hf.dtype == torch.float64:
            widen_norms(hf, self.arch.norm_offset)
        self.precision = ActiveComponents(dict(self._components()), list(self.linears()))

    # -- construction -----------------------------------------------------------------------------

    def linears(self) -> Iterator[PAHQLinear]:
        """Every projection whose precision is ours to choose."""
        for layer in self.layers:
            attention = layer.attention
            yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
            yield from self.mlp_linears(layer)

    def mlp_linears(self, layer: Layer) -> list[PAHQLinear]:
        """The projections of a layer's MLP."""
        return layer.mlp.linears

    def _components(self) -> Iterator[tuple[Component, list[Part]]]:
        group_size = self.spec.heads // self.spec.kv_groups
        for number, layer in enumerate(self.layers):
            attention = layer.attention
            for head in range(self.spec.heads):
                rows = attention.head_rows(head)
                shared = attention.head_rows(head // group_size)
                yield (
                    f"a{number}.h{head}",
                    [
                        (attention.q_proj, WeightBlock(rows, attention.q_proj.whole.cols)),
                        (attention.k_proj, WeightBlock(shared, attention.k_proj.whole.cols)),
                        (attention.v_proj, WeightBlock(shared, attention.v_proj.whole.cols)),
                        (attention.o_proj, WeightBlock(attention.o_proj.whole.rows, rows)),
                    ],
                )
            if self.spec.mlps:
                yield f"m{number}", [(linear, linear.whole) for linear in self.mlp_linears(layer)]

    # -- precision --------------------------------------------------------------------------------

    def compute_in(self, compute: torch.dtype) -> None:
        """Let products with differences from anchors run in another dtype from now on."""
        for linear in (*self.linears(), *self.embedding_matrices):
            linear.compute_in(compute)

    def patch_embeddings(self) -> None:
        """Cut embedding and unembedding into rows whose precision is ours to choose."""
        unembedding, embedding = self.arch.find(self.hf, self.arch.unembedding), self.embedding
        tied = unembedding.weight is embedding.weight
        top = EmbeddingMatrix(unembedding.weight, unembedding.bias)
        bottom = top if tied else EmbeddingMatrix(embedding.weight, None)
        parent, _, leaf = self.arch.unembedding.rpartition(".")
        setattr(self.hf.get_submodule(parent), leaf, top)
        patch_embedding(embedding, bottom)
        self.unembedding = top
        self.embedding_matrices = [top] if tied else [top, bottom]
        for table in self.embedding_matrices:
            table.shared = Shared(self.precision.mode)

    @contextmanager
    def used_by(self, holding: Holding) -> Iterator[None]:
        """Inside, the model computes with what someone holds of its weights, and as they are kept.

        Args:
            holding: What is raised, decoded and packed; calls inside add to it.

        Raises:
            ConfigError: If a circuit is applied.
        """
        if self.is_applied:
            raise ConfigError("a circuit is applied to this model: leave that block first")
        with self.precision.mode.using(holding):
            yield

    @contextmanager
    def exact_embeddings(self) -> Iterator[None]:
        """Inside, embedding and unembedding are FP32 whatever they are kept in."""
        with self.precision.mode.exact_embeddings():
            yield

    def name_of(self, module: nn.Module) -> str:
        """The name of one of the Hugging Face model's modules."""
        return next(name for name, other in self.hf.named_modules() if other is module)

    # -- running ----------------------------------------------------------------------------------

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        return token_embedding(self.hf)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return resident_device(self.hf)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of normalised final hidden states. [..., d_model] -> [..., vocab]"""
        scores: Tensor = self.unembedding(x) * self.arch.logit_scale
        cap = self.arch.logit_softcap
        return scores if cap is None else torch.tanh(scores / cap) * cap

    def logit_change(self, x: Tensor, clean: Tensor) -> Tensor:
        """`logits(x) - logits(clean)` without the cancellation of that difference.

        Args:
            x: Normalised final hidden states. [..., d_model]
            clean: Others that they are near to. [..., d_model]

        Returns:
            [..., vocab]
        """
        table, moved = self.unembedding, x - clean
        change = table.change(moved) if isinstance(table, EmbeddingMatrix) else F.linear(moved, table.weight)
        change = change * self.arch.logit_scale
        cap = self.arch.logit_softcap
        if cap is None:
            return change
        before = table(clean) * (self.arch.logit_scale / cap)
        after = before + change / cap
        return cap * torch.tanh(change / cap) * (1 - torch.tanh(before) * torch.tanh(after))

    @property
    def vocab_size(self) -> int:
        """Number of tokens the unembedding scores."""
        return int(self.unembedding.out_features)


def _state_shapes(hf: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters, tied ones once, and persistent buffers, before anything is patched."""
    shapes = {name: tuple(parameter.shape) for name, parameter in hf.named_parameters()}
    twins = {name for name, _ in hf.named_parameters(remove_duplicate=False)}
    state = hf.state_dict(keep_vars=True)
    return shapes | {name: tuple(tensor.shape) for name, tensor in state.items() if name not in twins}
