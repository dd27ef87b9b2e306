"""Which families are supported, where they keep what, and how to add one's own."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PretrainedConfig, PreTrainedModel

from pahq_hf.circuit.graph import GraphSpec
from pahq_hf.errors import ConfigError, UnsupportedModelError, describe
from pahq_hf.modeling.architectures.architecture import Architecture, RowOf
from pahq_hf.modeling.architectures.assumption import hint_of
from pahq_hf.modeling.architectures.describe import FamilyFacts, describe_families
from pahq_hf.modeling.architectures.families import TABLE
from pahq_hf.modeling.architectures.position_embeddings import NO_ROTARY
from pahq_hf.modeling.architectures.refusals import check_is_not_quantised, check_is_transformer

__all__ = [
    "NO_ROTARY",
    "Architecture",
    "FamilyFacts",
    "describe_families",
    "find_architecture",
    "graph_spec",
    "register_architecture",
    "supported_families",
    "unsupported",
]


def supported_families() -> list[str]:
    """Model types in the table, sorted."""
    return sorted(TABLE)


def register_architecture(row: Architecture | RowOf, model_type: str | None = None) -> None:
    """Add a family of one's own, or replace one.

    A row says where the model keeps what; the check at load says whether it is right.

    Args:
        row: The row, or a function that makes it from a config, for families with variants.
        model_type: Its `config.model_type`; that of the row by default.

    Raises:
        ConfigError: If it is no row, or a function that comes without a `model_type`.

    Example:
        ```python
        register_architecture(Architecture(model_type="mine", attention_norm="norm1", mlp_norm="norm2"))
        model = PAHQModel(MyForCausalLM(config))
        ```
    """
    if not (isinstance(row, Architecture) or callable(row)):
        raise ConfigError(
            f"register_architecture takes an Architecture or a function that makes one; got {describe(row)}"
        )
    if model_type is None and not isinstance(row, Architecture):
        raise ConfigError("register_architecture needs the model_type of a row that is a function")
    name = model_type or getattr(row, "model_type", None)
    if not isinstance(name, str):
        raise ConfigError(f"model_type is the name in a model's config; got {describe(name)}")
    if isinstance(row, Architecture):
        known = row
        TABLE[name] = lambda config: known
    else:
        TABLE[name] = row


def find_architecture(
    config: PretrainedConfig, *, of: Callable[[], PreTrainedModel | None] | None = None
) -> Architecture:
    """The row for a model's config.

    Args:
        config: A Hugging Face config.
        of: Gives the model: an error says then whose row may fit.

    Returns:
        Its row.

    Raises:
        UnsupportedModelError: If the family is not in the table, or uses a feature that changes the graph.
        ConfigError: If what was registered for it makes no row.
    """
    check_is_transformer(config)
    check_is_not_quantised(config)
    row = TABLE.get(config.model_type)
    if row is None:
        model = None if of is None else of()
        hint = "" if model is None else hint_of(model)
        text = getattr(config, "text_config", None)
        if text is not None and getattr(text, "model_type", None) in TABLE:
            hint = f"; its text model is of family {text.model_type!r}: load that"
        raise unsupported(config.model_type, hint)
    found = row(config)
    if not isinstance(found, Architecture):
        raise ConfigError(
            f"the function registered for family {config.model_type!r} must make an Architecture; "
            f"got {describe(found)}"
        )
    return found


def unsupported(family: str, hint: str = "") -> UnsupportedModelError:
    """What is raised for a family that is not in the table."""
    return UnsupportedModelError(
        f"model family {family!r} is not supported{hint}; `pahq families` lists the "
        f"{len(supported_families())} that are; or add it with register_architecture"
    )


def graph_spec(config: PretrainedConfig, *, split_kv_groups: bool = False) -> GraphSpec:
    """The shape of the residual-stream graph, from the config alone.

    Args:
        config: A Hugging Face config.
        split_kv_groups: Give every query head key and value readers of its own.

    Returns:
        The graph's shape.

    Raises:
        UnsupportedModelError: If the family is not in the table.
    """
    row = find_architecture(config)
    heads = config.num_attention_heads
    return GraphSpec(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_groups=row.kv_groups or getattr(config, "num_key_value_heads", None) or heads,
        mlps=row.mlps,
        parallel=row.parallel,
        split_kv_groups=split_kv_groups,
        coupled=row.is_coupled,
    )
