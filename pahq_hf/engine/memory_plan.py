"""Bytes of a model by part and format, of a run's activations, and what a run will need at its peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from pahq_hf.checkpoint.foreign import reading
from pahq_hf.config import PAHQConfig
from pahq_hf.engine.hooks.passes import buffer_bytes
from pahq_hf.engine.sparse.budget import BATCH_TOKENS, default_budget
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.formats.registry import stored_bytes
from pahq_hf.precision.fp32.source import CheckpointSource, stored_name
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.memory import read_memory
from pahq_hf.precision.policy import layouts
from pahq_hf.precision.weight_block import Layout, WeightBlock

_FP32 = 4  # bytes
_STORED = "in the checkpoint"
_TRANSIENT = 3  # copies of the largest projection, in FP32, that a product of it may need for a moment


@dataclass(frozen=True)
class Share:
    """Weights of one part of the model in one format.

    Attributes:
        part: `attention`, `mlp`, `embedding`, `unembedding` or `norms and biases`.
        format: How they are kept.
        bytes: What that takes; 0 for an unembedding that is the embedding.
        bytes_fp32: What FP32 would take.
    """

    part: str
    format: str
    bytes: int
    bytes_fp32: int


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a model and of a run on it.

    Attributes:
        shares: The weights.
        activations: Captured activations of clean and corrupted run.
        working: Candidates side by side, decoded weights, and FP32 weights on their way.
        interpreter: Python and its libraries in this process; 0 for a model that is loaded, where they can
            no longer be told from it.
        stored: Whether activations are in memory (`ram`) or in a file (`disk`).
    """

    shares: tuple[Share, ...]
    activations: int
    working: int
    interpreter: int
    stored: str = "ram"

    @property
    def weights(self) -> int:
        """All weights as they are kept."""
        return sum(share.bytes for share in self.shares)

    @property
    def weights_fp32(self) -> int:
        """All weights in FP32."""
        return sum(share.bytes_fp32 for share in self.shares)

    @property
    def peak(self) -> int:
        """Expected peak of anonymous memory, from load to circuit."""
        resident = self.activations if self.stored == "ram" else 0
        return self.interpreter + self.weights + resident + self.working

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "parts": [asdict(share) for share in self.shares],
            "weights": self.weights,
            "weights_fp32": self.weights_fp32,
            "activations": self.activations,
            "working": self.working,
            "interpreter": self.interpreter,
            "peak": self.peak,
        }


def report(
    model: PatchedModel,
    config: PAHQConfig,
    *,
    n: int,
    length: int,
    budget: int | None = None,
    stored: str = "ram",
    source: CheckpointSource | None = None,
) -> MemoryReport:
    """Account for a model, loaded or not.

    Args:
        model: The patched model; projections and tables may be on the meta device.
        config: Its precision.
        n: Prompt pairs of a run.
        length: Tokens of a prompt.
        budget: Memory budget of a run, in bytes; the default one if None.
        stored: Where activations go.
        source: The checkpoint, for the dtype of its embedding.

    Returns:
        The report.
    """
    linears = list(model.linears())
    largest = max((w.in_features * w.out_features for w in linears), default=0)
    width, writers = int(model.hf.config.hidden_size), len(model.graph.writers)
    decoded = sum(w.in_features * w.out_features for w in linears)
    buffers = BATCH_TOKENS * width * model.spec.layers
    limit = default_budget(model.device) if budget is None else budget
    example = writers * length * width * _FP32
    one_pass = min(max(buffer_bytes(model.device), example), n * example)
    working = max(min(limit, _FP32 * (decoded + buffers)), one_pass) + _TRANSIENT * _FP32 * largest
    return MemoryReport(
        shares=tuple(_shares(model, config, source)),
        activations=_activations(model, n * length),
        working=working,
        interpreter=read_memory().get("anonymous", 0) if _is_empty(model) else 0,
        stored=stored,
    )


def empty_model(
    config: PretrainedConfig, *, split_kv_groups: bool = False, trust_remote_code: bool = False
) -> PatchedModel:
    """A patched model without memory, for its shapes.

    Args:
        config: Config of a supported family.
        split_kv_groups: As for `PAHQConfig`.
        trust_remote_code: Whether code that comes with the model may run.
    """
    with reading("cannot make the model that its config tells"):
        with init_empty_weights(include_buffers=False):
            hf = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        hf.tie_weights()
    return PatchedModel(hf, split_kv_groups=split_kv_groups, streamed=True)


def _is_empty(model: PatchedModel) -> bool:
    return all(parameter.is_meta for parameter in model.hf.parameters())


def _activations(model: PatchedModel, tokens: int) -> int:
    """Bytes that two captured runs and their differences take; heads are kept as z."""
    width = int(model.hf.config.hidden_size)
    heads = model.spec.heads * model.layers[0].attention.d_head
    mlps = 1 if model.spec.mlps else 0
    run = 2 * width + model.spec.layers * (width + heads + 2 * mlps * width)
    differences = model.spec.layers * 2 * (heads + mlps * width)
    return _FP32 * tokens * (2 * run + differences)


def _shares(model: PatchedModel, config: PAHQConfig, source: CheckpointSource | None) -> Iterator[Share]:
    formats = layouts(model.precision.parts, config.policy, config.format) if config.is_low else {}
    totals: dict[tuple[str, str], list[int]] = {}

    def add(part: str, fmt: str, size: int, full: int) -> None:
        total = totals.setdefault((part, fmt), [0, 0])
        total[0] += size
        total[1] += full

    counted: set[int] = set()
    for layer in model.layers:
        attention = layer.attention
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            _add_linear(add, "attention", linear, formats.get(linear))
        for linear in model.mlp_linears(layer):
            _add_linear(add, "mlp", linear, formats.get(linear))
    counted |= {id(linear.weight) for linear in model.linears()}
    _add_tables(add, model, config, source, counted)
    rest = [p for p in model.hf.parameters() if id(p) not in counted and _is_plain(p)]
    size = sum(parameter.numel() for parameter in rest) * _FP32
    add("norms and biases", "fp32", size, size)
    for (part, fmt), (held, full) in totals.items():
        yield Share(part, fmt, held, full)


def _is_plain(parameter: Tensor) -> bool:
    """Not the codes of a low-precision weight, which are counted with it."""
    return parameter.dtype in (torch.float32, torch.float64) and type(parameter) is nn.Parameter


def _add_linear(add: Any, part: str, linear: PAHQLinear, layout: Layout | None) -> None:
    blocks: Sequence[tuple[WeightBlock, str]] = layout or [(linear.whole, "fp32")]
    for block, fmt in blocks:
        rows, cols = block.rows.stop - block.rows.start, block.cols.stop - block.cols.start
        add(part, fmt, stored_bytes(rows, cols, fmt), _FP32 * rows * cols)


def _add_tables(
    add: Any,
    model: PatchedModel,
    config: PAHQConfig,
    source: CheckpointSource | None,
    counted: set[int],
) -> None:
    embedding, top = model.embedding, model.unembedding
    vocab, width = embedding.num_embeddings, embedding.embedding_dim
    if model.embedding_matrices:
        tied = len(model.embedding_matrices) == 1
    else:
        tied = top.weight is embedding.weight
        counted |= {id(top.weight), id(embedding.weight)}
    fmt: str = config.format if config.quantize_embeddings else "fp32"
    if config.is_low and not config.quantize_embeddings and _bf16_tables(model, source):
        fmt = _STORED
    size, full = 0 if fmt == _STORED else stored_bytes(vocab, width, fmt), _FP32 * vocab * width
    add("embedding", fmt, size, full)
    if tied:
        add("unembedding", "tied", 0, 0)
    else:
        add("unembedding", fmt, size, full)


def _bf16_tables(model: PatchedModel, source: CheckpointSource | None) -> bool:
    """Whether embedding and unembedding are, or would be, left in a BF16 checkpoint."""
    if model.embedding_matrices:
        return True
    if source is None or not _is_empty(model):
        return False
    names = {id(weight): name for name, weight in model.hf.named_parameters()}
    for table in (model.embedding, model.unembedding):
        stored = stored_name(names.get(id(table.weight), ""), model.hf.base_model_prefix, source)
        if stored is None or source.whole(stored).dtype != torch.bfloat16:
            return False
    return True
