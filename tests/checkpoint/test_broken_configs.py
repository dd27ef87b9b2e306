"""A config with any wrong value is refused in one line that names the model, or does no harm."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pahq_hf.checkpoint.load import load_config
from pahq_hf.circuit.graph import Graph
from pahq_hf.engine.memory_plan import empty_model
from pahq_hf.errors import PAHQError
from pahq_hf.modeling.architectures.lookup import graph_spec
from tests.tiers import exhaustive

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def nested(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = {"a": [found]}
    return found


COUNTS = [
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"),
    *("num_key_value_heads", "head_dim"),
    *("n_embd", "n_layer", "n_head"),
]
NO_COUNTS = {
    **{
        name: value
        for name, value in {"text": "12", "word": "nope", "half": 1.5, "nan": float("nan")}.items()
    },
    **{"true": True, "none": None, "list": [], "numbers": [1, 2], "object": {}},
    **{"0": 0, "-1": -1, "10**9": 10**9, "10**30": 10**30, "400 digits": 10**400, "deep": nested(450)},
    **{"long": "x" * 100_000},
}
MAY_BE_ABSENT = {("num_key_value_heads", "none"), ("head_dim", "none")}
OTHERS = [
    *("rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "hidden_act", "tie_word_embeddings"),
    *("attention_bias", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "model_type"),
    *("architectures", "torch_dtype", "dtype", "layer_types", "sliding_window", "quantization_config"),
    *("text_config", "auto_map", "transformers_version", "use_cache", "is_encoder_decoder", "kv_lora_rank"),
    *("_name_or_path", "id2label", "num_labels", "attn_implementation", "max_position_embeddings"),
]
QUICK = ("word", "-1", "10**9", "list", "object", "deep")


def config_of(folder: Path, field: str, value: Any) -> Path:
    base = GPT2 if field.startswith("n_") else LLAMA
    (folder / "config.json").write_text(json.dumps({**base, field: value}))
    return folder


def size_up(folder: Path) -> None:
    """What `pahq info` does, and every load before weights are read."""
    config = load_config(str(folder))
    Graph(graph_spec(config))
    empty_model(config)


def refusal(folder: Path) -> str | None:
    """The line by which a model's folder is refused; None if it is not."""
    try:
        size_up(folder)
    except PAHQError as error:
        return str(error)
    return None


def test_what_is_right_is_not_refused(tmp_path: Path) -> None:
    for field, value in (("vocab_size", 41), ("n_layer", 3)):
        assert refusal(config_of(tmp_path, field, value)) is None


@pytest.mark.parametrize(("field", "kind"), sorted({*product(COUNTS, NO_COUNTS)} - MAY_BE_ABSENT))
def test_a_count_that_is_none_is_refused(field: str, kind: str, tmp_path: Path) -> None:
    line = refusal(config_of(tmp_path, field, NO_COUNTS[kind]))
    assert line is not None
    assert "\n" not in line and len(line) < 700
    assert "config" in line or str(tmp_path) in line


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        (field, kind) if kind in QUICK else exhaustive(field, kind)
        for field, kind in product(OTHERS, NO_COUNTS)
    ],
)
def test_no_other_value_ends_in_a_foreign_exception(field: str, kind: str, tmp_path: Path) -> None:
    """Some of them do no harm: which is for transformers to say."""
    line = refusal(config_of(tmp_path, field, NO_COUNTS[kind]))
    if kind in ("400 digits", "deep"):
        assert line is not None and "config.json is damaged" in line
    assert line is None or ("\n" not in line and len(line) < 700)
