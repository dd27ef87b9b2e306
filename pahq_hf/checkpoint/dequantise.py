"""Checkpoints with quantised weights that transformers reads without a GPU, as full precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import FineGrainedFP8Config, PretrainedConfig, PreTrainedModel

from pahq_hf.errors import ModelLoadError
from pahq_hf.modeling.architectures.refusals import READ_QUANTISED, quantised_by


def read_as(config: PretrainedConfig) -> str | None:
    """The format of quantised weights that are read as full precision; None of plain ones."""
    method = quantised_by(config)
    return method if method in READ_QUANTISED else None


def reading_options(config: PretrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` is told besides, so that it gives full precision where it can by itself."""
    if read_as(config) == "fp8":
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    return {}


def dequantise(model: PreTrainedModel) -> None:
    """Replace weights that are quantised still by their values, in place; the config says so no more.

    Args:
        model: A freshly loaded model.

    Raises:
        ModelLoadError: If one tells no values.
    """
    for name, module in model.named_modules():
        for leaf, weight in list(module.named_parameters(recurse=False)):
            if type(weight.data) is not Tensor:
                module._parameters[leaf] = nn.Parameter(_values(weight.data, f"{name}.{leaf}", model.dtype))
    model.tie_weights()
    vars(model.config).pop("quantization_config", None)
    for key in ("hf_quantizer", "_weight_conversions"):  # who saves the model would quantise it again
        vars(model).pop(key, None)


def _values(weight: Any, name: str, dtype: torch.dtype) -> Tensor:
    try:
        values: Tensor = weight.dequantize().to(dtype)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError) as error:
        raise ModelLoadError(
            f"the quantised weight {name} cannot be read as full precision ({type(weight).__name__}): load "
            "the unquantised checkpoint"
        ) from error
    return values
