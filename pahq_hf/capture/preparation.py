"""What becomes of a model before circuits are found in it: checked, patched, checked again, lowered.

1. Refuse what is not supported, and say what identifies the model while its weights are untouched.
2. Run a few prompts through the untouched model.
3. Patch it, and compare what it says now.
4. Lower its weights. A model that is loaded tensor by tensor is lowered first: it has no others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from pahq_hf.capture.self_check import check_patched, probe_task, untouched_logits
from pahq_hf.checkpoint.fingerprint import identity_of
from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.config import PAHQConfig
from pahq_hf.modeling.architectures.assumption import assume_family, blamed_on_assumption
from pahq_hf.modeling.architectures.lookup import find_architecture
from pahq_hf.modeling.guard import WeightGuard
from pahq_hf.modeling.lowering import lower
from pahq_hf.modeling.originals import OriginalCheckpoint
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.modeling.untouched import check_supported, repair_empty_mlps, resident_device
from pahq_hf.precision.device_memory import memory_for
from pahq_hf.precision.fp32.source import CheckpointSource, WeightSource
from pahq_hf.precision.memory import trim
from pahq_hf.precision.products import COMPUTE_DTYPES, resolve_compute


@dataclass(frozen=True)
class Prepared:
    """A model that circuits can be found in.

    Attributes:
        patched: The patched model.
        asked: How it was to be kept and computed.
        config: The same with what `auto` means here.
        identity: What identifies it, stored with circuits.
        guard: Notices a change of its weights.
    """

    patched: PatchedModel
    asked: PAHQConfig
    config: PAHQConfig
    identity: ModelIdentity
    guard: WeightGuard


def prepare(
    model: PreTrainedModel,
    config: PAHQConfig,
    name: str,
    source: WeightSource | None,
    family: str | None = None,
) -> Prepared:
    """Patch a model in place.

    Args:
        model: A Hugging Face causal LM of a supported family.
        config: Precision regime and format.
        name: The name by which it was loaded.
        source: Where FP32 weights can be read again; a temporary file is written when there is none.
        family: Whose row it is read by, if its own family has none.

    Returns:
        The patched model, and what is known of it.

    Raises:
        UnsupportedModelError: If the family is unknown.
        SelfCheckError: If the patched model does not reproduce the untouched forward pass.
        ConfigError: If the model is not in float32 (or float64, FP32 regime only).
    """
    empty = any(parameter.is_meta for parameter in model.parameters())
    origin = source if empty and isinstance(source, CheckpointSource) else None
    streamed = origin is not None
    assume_family(model.config, family)
    check_supported(model, streamed=streamed)
    asked, config = config, resolved(config, resident_device(model))
    model.eval()
    identity = identity_of(model, name, origin)
    repair_empty_mlps(model)
    with memory_for("the model", resident_device(model)):
        patched = _patched(model, config, source, origin)
    guard = WeightGuard(model)
    trim()
    return Prepared(patched, asked, config, identity, guard)


def _patched(
    model: PreTrainedModel, config: PAHQConfig, source: WeightSource | None, origin: CheckpointSource | None
) -> PatchedModel:
    """Patch a model, check that nothing changed by it, and lower its weights."""
    probe = probe_task(model)
    reference = untouched_logits(model, probe, origin)
    with blamed_on_assumption(find_architecture(model.config)):
        patched = PatchedModel(model, split_kv_groups=config.split_kv_groups, streamed=origin is not None)
        OriginalCheckpoint(patched).install()
        if origin is not None:  # in full precision every projection reads the checkpoint again
            _lower(patched, config, source)
            with patched.precision.full_precision():
                check_patched(patched, probe, reference)
            return patched
        check_patched(patched, probe, reference)
    if config.is_low:
        _lower(patched, config, source)
    return patched


def resolved(config: PAHQConfig, device: torch.device) -> PAHQConfig:
    """The configuration with what `auto` means on a device, so that it pins a run."""
    if config.regime != "pahq":
        return replace(config, compute="fp32")
    return replace(config, compute=resolve_compute(config.compute, config.format, device))


def compute_dtype(config: PAHQConfig, device: torch.device) -> torch.dtype:
    """In which dtype products with differences run on a device."""
    return COMPUTE_DTYPES[resolve_compute(config.compute, config.format, device)]


def _lower(patched: PatchedModel, config: PAHQConfig, source: WeightSource | None) -> None:
    embeddings = config.format if config.quantize_embeddings else None
    compute = compute_dtype(config, patched.device)
    lower(patched, config.format, source, compute, policy=config.policy, embeddings=embeddings)
