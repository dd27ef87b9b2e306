"""Turn a Hugging Face causal LM into a `PatchedModel`: PAHQ attention, PAHQ linears, named rooms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pahq_hf.architectures import Architecture, find_architecture, graph_spec
from pahq_hf.attention import PAHQAttention
from pahq_hf.config import Format
from pahq_hf.errors import ConfigError, ModelLoadError
from pahq_hf.graph import Graph
from pahq_hf.layers import Layer, patch_layer
from pahq_hf.memory import trim
from pahq_hf.norms import widen_norms
from pahq_hf.precision import (
    Component,
    Layout,
    PAHQLinear,
    PAHQTable,
    PrecisionControl,
    Region,
    SourceBlock,
    SpillSource,
    WeightMatrix,
    WeightSource,
    layouts,
    patch_embedding,
    stored_name,
)
from pahq_hf.precision.control import Part
from pahq_hf.precision.weights import Shared
from pahq_hf.projections import linear_from, qkv_ranges


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
        self.unembedding: nn.Linear | PAHQTable = self.arch.find(hf, self.arch.unembedding)
        self.tables: list[PAHQTable] = []  # embedding and unembedding, when they are low precision too
        if hf.dtype == torch.float64:
            widen_norms(hf, self.arch.norm_offset)
        self.precision = PrecisionControl(dict(self._components()), list(self.linears()))

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
                        (attention.q_proj, Region(rows, attention.q_proj.region.cols)),
                        (attention.k_proj, Region(shared, attention.k_proj.region.cols)),
                        (attention.v_proj, Region(shared, attention.v_proj.region.cols)),
                        (attention.o_proj, Region(attention.o_proj.region.rows, rows)),
                    ],
                )
            if self.spec.mlps:
                yield f"m{number}", [(linear, linear.region) for linear in self.mlp_linears(layer)]

    # -- precision --------------------------------------------------------------------------------

    def lower(
        self,
        fmt: Format,
        source: WeightSource | None,
        compute: torch.dtype = torch.float32,
        *,
        policy: Mapping[str, Format] | None = None,
        tables: Format | None = None,
    ) -> None:
        """Keep every projection in a low-precision format; FP32 stays readable.

        Args:
            fmt: The format.
            source: The checkpoint the weights came from. Where it is None, or does not hold a
                projection's values exactly, the FP32 values go to a spill file first.
            compute: Dtype of products with differences from anchors.
            policy: Other formats for some components, by pattern.
            tables: Format of embedding and unembedding; None leaves them as they are, in memory or
                in the checkpoint.

        Raises:
            ConfigError: If the model is not in float32, or a pattern of the policy matches nothing.
            ModelLoadError: If a weight holds NaN or infinity, or the spill file cannot be written.
        """
        if self.hf.dtype != torch.float32:
            raise ConfigError(
                "low-precision regimes need dtype=torch.float32: load the model so, or choose precision fp32"
            )
        formats: dict[WeightMatrix, Layout] = dict(layouts(self.precision.parts, policy or {}, fmt).items())
        stay = tables is None and self.embedding.weight.is_meta
        if tables is not None or stay:
            self._patch_tables()
            formats |= {table: [(table.region, tables or fmt)] for table in self.tables}
        linears: dict[str, WeightMatrix] = dict(self._named_linears())
        linears |= {f"table {n}": table for n, table in enumerate(self.tables)}
        blocks = self._checkpoint_blocks(source) if source is not None else {}
        strays = {name: linear for name, linear in linears.items() if name not in blocks}
        blocks |= spill_blocks(strays)
        device = self.device
        for name, linear in linears.items():
            if stay and linear in self.tables:
                linear.leave(blocks[name], device)
            else:
                linear.lower(formats[linear], blocks[name], compute, device)
            trim()
        self.precision.free_staging()

    def compute_in(self, compute: torch.dtype) -> None:
        """Let products with differences from anchors run in another dtype from now on."""
        for linear in (*self.linears(), *self.tables):
            linear.compute_in(compute)

    def _patch_tables(self) -> None:
        unembedding, embedding = self.arch.find(self.hf, self.arch.unembedding), self.embedding
        tied = unembedding.weight is embedding.weight
        top = PAHQTable(unembedding.weight, unembedding.bias)
        bottom = top if tied else PAHQTable(embedding.weight, None)
        parent, _, leaf = self.arch.unembedding.rpartition(".")
        setattr(self.hf.get_submodule(parent), leaf, top)
        patch_embedding(embedding, bottom)
        self.unembedding = top
        self.tables = [top] if tied else [top, bottom]
        for table in self.tables:
            table.shared = Shared(self.precision.mode)

    @contextmanager
    def exact_tables(self) -> Iterator[None]:
        """Inside, embedding and unembedding are FP32 whatever they are kept in."""
        with self.precision.mode.exact_tables():
            yield

    def _named_linears(self) -> Iterator[tuple[str, PAHQLinear]]:
        names = {module: name for name, module in self.hf.named_modules()}
        for linear in self.linears():
            yield names[linear], linear

    def _checkpoint_blocks(self, source: WeightSource) -> dict[str, SourceBlock]:
        found = {}
        for name, linear in self._named_linears():
            origin, segments = self._origin(name, linear)
            block = self._block(source, [origin], self.arch.conv1d, segments, linear)
            if block is not None:
                found[name] = block
        top = f"{self.arch.unembedding}.weight"
        bottom = f"{self._name_of(self.embedding)}.weight"
        for number, table in enumerate(self.tables):
            names = [top, bottom] if len(self.tables) == 1 else [(top, bottom)[number]]
            block = self._block(source, names, False, ((0, table.out_features),), table)
            if block is not None:
                found[f"table {number}"] = block
        return found

    def _block(
        self,
        source: WeightSource,
        names: Sequence[str],
        transposed: bool,
        segments: tuple[tuple[int, int], ...],
        linear: WeightMatrix,
    ) -> SourceBlock | None:
        """Where a checkpoint keeps a matrix, under the first of its names; None if it does not hold it."""
        stored = [stored_name(name, self.hf.base_model_prefix, source) for name in names]
        for name in filter(None, stored):
            block = SourceBlock(source, name, transposed, segments)
            if _holds(block, linear):
                return block
        return None

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.hf.named_modules() if other is module)

    def _origin(self, name: str, linear: PAHQLinear) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Checkpoint tensor of a projection, and which of its outputs are ours."""
        parent, _, leaf = name.rpartition(".")
        row = self.arch
        if leaf == "o_proj":
            return f"{parent}.{row.out}.weight", ((0, linear.out_features),)
        if leaf in ("q_proj", "k_proj", "v_proj") and len(row.qkv) == 1:
            attention = self.hf.get_submodule(parent)
            rows = sum(getattr(attention, f"{kind}_proj").out_features for kind in "qkv")
            ranges = qkv_ranges(row, rows, self.spec.heads, self.spec.kv_groups)
            return f"{parent}.{row.qkv[0]}.weight", tuple(ranges[leaf[0]])
        if leaf in ("q_proj", "k_proj", "v_proj"):
            name = f"{parent}.{row.qkv['qkv'.index(leaf[0])]}"
        return f"{name}.weight", ((0, linear.out_features),)

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
        table = self.unembedding
        change = (
            table.change(x - clean) if isinstance(table, PAHQTable) else F.linear(x - clean, table.weight)
        )
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


def resident_device(hf: PreTrainedModel) -> torch.device:
    """Where a model is, whatever part of it has no memory."""
    tensors = chain(hf.parameters(), hf.buffers())  # lazily: every forward asks
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def check_supported(hf: PreTrainedModel, *, streamed: bool = False) -> None:
    """Check what can be checked of a model before anything runs.

    Args:
        hf: The model.
        streamed: Whether its projections are yet to be read from a checkpoint.

    Raises:
        UnsupportedModelError: If the family is unknown.
        ConfigError: If the model is patched already, not in float32 or float64, or partly offloaded.
    """
    find_architecture(hf.config)
    if any(isinstance(module, PAHQAttention) for module in hf.modules()):
        raise ConfigError("this model is patched already; wrap a freshly loaded one")
    if hf.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"the model is in {hf.dtype}; circuit discovery keeps the residual stream in full precision: "
            "load it with dtype=torch.float32 (weights get smaller through PAHQConfig instead)"
        )
    if not streamed and any(parameter.is_meta for parameter in hf.parameters()):
        raise ConfigError(
            "some weights are offloaded to the CPU or to disk, out of reach of the projections' patches: "
            "load the model with a device_map that offloads nothing"
        )


def repair_empty_mlps(hf: PreTrainedModel) -> None:
    """Let an attention-only GPT-2 run: Hugging Face's `Conv1D` fails on a matrix without rows."""
    row = find_architecture(hf.config)
    if row.mlps:
        return
    for block in row.find(hf, row.layers):
        mlp = row.find(block, row.mlp)
        for name in row.mlp_linears:
            setattr(mlp, name, linear_from(getattr(mlp, name), row))


def token_embedding(hf: PreTrainedModel) -> nn.Embedding:
    """The token embedding of a causal LM."""
    return cast(nn.Embedding, hf.get_input_embeddings())


def spill_blocks(linears: dict[str, WeightMatrix]) -> dict[str, SourceBlock]:
    """FP32 copies of projections, in one temporary file."""
    if not linears:
        return {}
    tensors = {}
    for name, linear in linears.items():
        if linear.weight is None:
            raise ConfigError(f"{name} is kept in low precision already")
        if linear.weight.is_meta:
            raise ModelLoadError(f"the checkpoint lacks the weight of {name}")
        tensors[name] = linear.weight.detach().cpu()
    source = SpillSource(tensors)
    return {
        name: SourceBlock(source, name, False, ((0, linear.out_features),))
        for name, linear in linears.items()
    }


def _state_shapes(hf: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters, tied ones once, and persistent buffers, before anything is patched."""
    shapes = {name: tuple(parameter.shape) for name, parameter in hf.named_parameters()}
    twins = {name for name, _ in hf.named_parameters(remove_duplicate=False)}
    state = hf.state_dict(keep_vars=True)
    return shapes | {name: tuple(tensor.shape) for name, tensor in state.items() if name not in twins}


def _holds(block: SourceBlock, linear: WeightMatrix) -> bool:
    if linear.weight is None:
        raise ConfigError("a projection is kept in low precision already")
    region = linear.region
    if linear.weight.is_meta:
        return True  # the checkpoint is all there is; the self-check finds a wrong layout
    try:
        values = block.read(region.rows, region.cols)
    except (RuntimeError, ValueError, IndexError):
        return False  # another layout than the table's: the spill file serves instead
    weight = linear.weight
    return values.shape == weight.shape and torch.equal(values.to(weight.device, weight.dtype), weight)
