"""Keep a patched model's weights in low precision, FP32 readable: in the checkpoint, or in a spill file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from pahq_hf.errors import ConfigError, ModelLoadError
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.modeling.projections import qkv_ranges
from pahq_hf.precision.fp32.source import SourceBlock, SpillSource, WeightSource, stored_name
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.memory import trim
from pahq_hf.precision.policy import layouts
from pahq_hf.precision.weight_block import Layout
from pahq_hf.precision.weights import WeightMatrix

Segments = tuple[tuple[int, int], ...]


def lower(
    model: PatchedModel,
    fmt: str,
    source: WeightSource | None,
    compute: torch.dtype = torch.float32,
    *,
    policy: Mapping[str, str] | None = None,
    embeddings: str | None = None,
) -> None:
    """Keep every projection in a low-precision format; FP32 stays readable.

    Args:
        model: The patched model.
        fmt: The format.
        source: The checkpoint the weights came from. Where it is None, or does not hold a
            projection's values exactly, the FP32 values go to a spill file first.
        compute: Dtype of products with differences from anchors.
        policy: Other formats for some components, by pattern.
        embeddings: Format of embedding and unembedding; None leaves them as they are, in memory or
            in the checkpoint.

    Raises:
        ConfigError: If the model is not in float32, or a pattern of the policy matches nothing.
        ModelLoadError: If a weight holds NaN or infinity, or the spill file cannot be written.
    """
    check_lowerable(model.hf.dtype)
    formats: dict[WeightMatrix, Layout] = dict(layouts(model.precision.parts, policy or {}, fmt).items())
    stay = embeddings is None and model.embedding.weight.is_meta
    if embeddings is not None or stay:
        model.patch_embeddings()
        formats |= {table: [(table.whole, embeddings or fmt)] for table in model.embedding_matrices}
    linears: dict[str, WeightMatrix] = dict(_named_linears(model))
    linears |= {f"table {n}": table for n, table in enumerate(model.embedding_matrices)}
    blocks = _checkpoint_blocks(model, source) if source is not None else {}
    strays = {name: linear for name, linear in linears.items() if name not in blocks}
    blocks |= spill_blocks(strays)
    device = model.device
    for name, linear in linears.items():
        if stay and linear in model.embedding_matrices:
            linear.leave(blocks[name], device)
        else:
            linear.lower(formats[linear], blocks[name], compute, device)
        trim()
    model.precision.free_staging()


def check_lowerable(dtype: torch.dtype) -> None:
    """Check that weights of a dtype can be kept in low precision.

    Raises:
        ConfigError: If not.
    """
    if dtype != torch.float32:
        raise ConfigError(
            "low-precision regimes need dtype=torch.float32: load the model so, or choose precision fp32"
        )


def _named_linears(model: PatchedModel) -> Iterator[tuple[str, PAHQLinear]]:
    names = {module: name for name, module in model.hf.named_modules()}
    for linear in model.linears():
        yield names[linear], linear


def _checkpoint_blocks(model: PatchedModel, source: WeightSource) -> dict[str, SourceBlock]:
    """Where a checkpoint keeps the model's matrices, those that it holds."""
    prefix = model.hf.base_model_prefix
    found = {}
    for name, linear in _named_linears(model):
        origin, segments = _origin(model, name, linear)
        block = _block(source, [origin], prefix, model.arch.conv1d, segments, linear)
        if block is not None:
            found[name] = block
    top = f"{model.arch.unembedding}.weight"
    bottom = f"{model.name_of(model.embedding)}.weight"
    for number, table in enumerate(model.embedding_matrices):
        names = [top, bottom] if len(model.embedding_matrices) == 1 else [(top, bottom)[number]]
        block = _block(source, names, prefix, False, ((0, table.out_features),), table)
        if block is not None:
            found[f"table {number}"] = block
    return found


def _block(
    source: WeightSource,
    names: Sequence[str],
    prefix: str,
    transposed: bool,
    segments: Segments,
    linear: WeightMatrix,
) -> SourceBlock | None:
    """Where a checkpoint keeps a matrix, under the first of its names; None if it does not hold it."""
    stored = [stored_name(name, prefix, source) for name in names]
    for name in filter(None, stored):
        block = SourceBlock(source, name, transposed, segments)
        if _holds(block, linear):
            return block
    return None


def _origin(model: PatchedModel, name: str, linear: PAHQLinear) -> tuple[str, Segments]:
    """Checkpoint tensor of a projection, and which of its outputs are ours."""
    parent, _, leaf = name.rpartition(".")
    row = model.arch
    if leaf == "o_proj":
        return f"{parent}.{row.out}.weight", ((0, linear.out_features),)
    if leaf in ("q_proj", "k_proj", "v_proj") and len(row.qkv) == 1:
        attention = model.hf.get_submodule(parent)
        rows = sum(getattr(attention, f"{kind}_proj").out_features for kind in "qkv")
        ranges = qkv_ranges(row, rows, model.spec.heads, model.spec.kv_groups)
        return f"{parent}.{row.qkv[0]}.weight", tuple(ranges[leaf[0]])
    if leaf in ("q_proj", "k_proj", "v_proj"):
        name = f"{parent}.{row.qkv['qkv'.index(leaf[0])]}"
    return f"{name}.weight", ((0, linear.out_features),)


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


def _holds(block: SourceBlock, linear: WeightMatrix) -> bool:
    if linear.weight is None:
        raise ConfigError("a projection is kept in low precision already")
    whole = linear.whole
    if linear.weight.is_meta:
        return True  # the checkpoint is all there is; the self-check finds a wrong layout
    try:
        values = block.read(whole.rows, whole.cols)
    except (RuntimeError, ValueError, IndexError):
        return False  # another layout than the table's: the spill file serves instead
    weight = linear.weight
    return values.shape == weight.shape and torch.equal(values.to(weight.device, weight.dtype), weight)
