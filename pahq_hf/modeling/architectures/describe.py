"""How each family is read, in words: for `pahq families` and the README."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from pahq_hf.modeling.architectures.architecture import Architecture
from pahq_hf.modeling.architectures.families import TABLE, VARIANTS
from pahq_hf.modeling.architectures.position_embeddings import RotaryTables, alibi_bias, local_bias, mpt_bias
from pahq_hf.modeling.architectures.shipped import FamilyFacts


def describe_families() -> list[FamilyFacts]:
    """All families in the table and their variants, in order."""
    return [facts for family in sorted(TABLE) for facts in _describe(family)]


def _describe(family: str) -> Iterator[FamilyFacts]:
    for variant, options in VARIANTS.get(family, {"": {}}).items():
        config = _config(family, options)
        row = TABLE[family](config)
        yield FamilyFacts(
            family=family,
            variant=variant,
            layers=row.layers,
            attention=_chain(row.attention, row.attention_norm, (*row.qkv, row.out), row.attention_post_norm),
            mlp=_mlp(row) if row.mlps else "none",
            blocks=_blocks(row),
            positions=_positions(row, config),
            also=", ".join(_also(row)),
        )


def _config(family: str, options: dict[str, Any]) -> PretrainedConfig:
    """A config of a family; a plain one for a family that transformers has never heard of."""
    try:
        return AutoConfig.for_model(family, **options)
    except ValueError:
        return PretrainedConfig(**options)


def _blocks(row: Architecture) -> str:
    if not row.parallel:
        return "sequential"
    return "parallel, one norm" if row.shares_norm else "parallel"


def _chain(module: str, norm: str | None, projections: tuple[str, ...], post_norm: str | None) -> str:
    inside = f"{module}.({', '.join(projections)})" if module else f"({', '.join(projections)})"
    return " → ".join(part for part in (norm, inside, post_norm) if part)


def _mlp(row: Architecture) -> str:
    experts = (row.experts,) if row.experts else ()
    return _chain(row.mlp, row.mlp_norm, (*row.mlp_linears, *experts), row.mlp_post_norm)


def _positions(row: Architecture, config: PretrainedConfig) -> str:
    if row.is_rotary:
        rope = getattr(config, "rope_parameters", None) or {}
        partial = getattr(config, "rotary_dim", None) or rope.get("partial_rotary_factor", 1.0) != 1.0
        kinds = " by layer type" if any(isinstance(value, dict) for value in rope.values()) else ""
        if isinstance(row.rotary, RotaryTables) and row.rotary.turns is not None:
            kinds = " in some layers"
        return ("partial rotary" if partial else "rotary") + kinds
    if row.score_bias in (alibi_bias, mpt_bias) or getattr(config, "alibi", False):
        return "ALiBi"
    if row.model_type == "xglm":  # a table that is computed, and added like a learned one
        return "sinusoidal"
    return "learned, local windows" if row.score_bias is local_bias else "learned"


def _also(row: Architecture) -> Iterator[str]:
    if len(row.qkv) == 1:
        yield "fused q, k, v" + (" by group" if row.fused == "groups" else "")
    if row.kv_groups == 1:
        yield "one key/value group"
    if row.qk_norm is not None:
        yield ("q/k norm over all heads" if row.joint_qk_norm else "q/k norm") + (
            " after rotation" if row.norm_after_rotary else ""
        )
    if row.qkv_bound is not None:
        yield "bounded q, k, v"
    if row.is_coupled:
        yield "coupled heads"
    if row.sinks is not None:
        yield "attention sinks"
    if row.experts is not None:
        yield "mixture of experts"
    if row.softcap is not None or row.logit_softcap is not None:
        yield "softcaps"
    if row.residual_multiplier != 1.0 or row.logit_scale != 1.0:
        yield "multipliers"
    if not row.sparse:
        yield "hooks engine only"
