"""Families without a row: whose row they are read by, where somebody says so, and whose they resemble."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pahq_hf.errors import ConfigError, SelfCheckError, UnsupportedModelError, describe
from pahq_hf.modeling.architectures.architecture import Architecture, RowOf
from pahq_hf.modeling.architectures.families import TABLE

# Of families that look the same, those to name.
_FIRST = ("llama", "qwen3", "mixtral", "gpt2", "gpt_neox")
_NEEDED = ("num_attention_heads", "num_hidden_layers", "hidden_size")
_assumed: set[str] = set()


def assume_family(config: PretrainedConfig, family: str | None) -> None:
    """Read models of an unknown family by the row of a known one, in this process from now on.

    The self-check at load decides whether that is right.

    Args:
        config: Config of the model.
        family: Whose row; None does nothing.

    Raises:
        ConfigError: If there is no such family, or the model's has a row of its own.
    """
    if family is None:
        return
    if family not in TABLE or family in _assumed:
        known = ", ".join(sorted(set(TABLE) - _assumed))
        raise ConfigError(f"assume_family must be a known family ({known}); got {describe(family)}")
    name = config.model_type
    if name in TABLE and name not in _assumed:
        raise ConfigError(
            f"family {name!r} has a row of its own: leave assume_family={family!r} (--assume-family) out"
        )
    _assumed.add(name)
    TABLE[name] = _row_as(name, family, TABLE[family])


def _row_as(name: str, family: str, row_of: RowOf) -> RowOf:
    def row(config: PretrainedConfig) -> Architecture:
        missing = [entry for entry in _NEEDED if not isinstance(getattr(config, entry, None), int)]
        if missing:
            raise UnsupportedModelError(
                f"family {name!r} cannot be read as {family!r}: its config has no {missing[0]}"
            )
        try:
            return replace(row_of(config), model_type=name, assumed=family)
        except AttributeError as error:
            raise UnsupportedModelError(f"family {name!r} cannot be read as {family!r}: {error}") from error

    return row


@contextmanager
def blamed_on_assumption(row: Architecture) -> Iterator[None]:
    """Inside, a failed self-check says by whose row the model was read, where that was assumed.

    Raises:
        SelfCheckError: If the check failed.
        UnsupportedModelError: If a part of the model is not where the row says.
    """
    try:
        yield
    except (SelfCheckError, UnsupportedModelError) as error:
        if row.assumed is None:
            raise
        reason = str(error).removeprefix("self-check failed: ")
        raise type(error)(
            f"family {row.model_type!r} is not built like {row.assumed!r}, as was assumed: {reason}"
        ) from error


# -- by structure -----------------------------------------------------------------------------------


def resembling(hf: PreTrainedModel) -> str | None:
    """A family whose row finds all its parts in a model, and leaves none of its layers' over.

    Args:
        hf: The model; it need have no memory.

    Returns:
        Its name, or None.
    """
    order = [*_FIRST, *sorted(set(TABLE) - set(_FIRST) - _assumed)]
    return next((family for family in order if _fits(hf, TABLE[family])), None)


def _fits(hf: PreTrainedModel, row_of: RowOf) -> bool:
    try:
        row = row_of(hf.config)
        for path in (row.final_norm, row.unembedding):
            row.find(hf, path)
        return all(_is_all_of(layer, row) for layer in row.find(hf, row.layers))
    except (AttributeError, TypeError, UnsupportedModelError):  # a config or modules of another kind
        return False


def _is_all_of(layer: nn.Module, row: Architecture) -> bool:
    attention = row.find(layer, row.attention)
    parts = [*row.projections(layer), *(row.find(attention, path) for path in row.qk_norm or ())]
    norms = (row.attention_norm, row.attention_post_norm, row.mlp_norm, row.mlp_post_norm)
    parts += [row.find(layer, path) for path in norms if path is not None]
    inside = {id(module) for part in parts for module in part.modules()}
    weighted = (module for module in layer.modules() if any(True for _ in module.parameters(recurse=False)))
    return all(id(module) in inside for module in weighted)


def hint_of(hf: PreTrainedModel) -> str:
    """What to say of a model of an unknown family: whose row may fit."""
    family = resembling(hf)
    if family is None:
        return ""
    return (
        f"; its parts lie where those of {family!r} do: assume_family={family!r} (--assume-family {family}) "
        "reads it so, if the self-check agrees"
    )
