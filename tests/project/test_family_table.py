"""`pahq families`, and the table that it reads."""

from __future__ import annotations

import json

import pytest

from pahq_hf.modeling.architectures.describe import describe_families
from pahq_hf.modeling.architectures.lookup import supported_families
from pahq_hf.modeling.architectures.shipped import TABLE_PATH, stored_families, written
from tests.families import ALL_FAMILIES
from tests.helpers import run_main

ASKED_FOR = {
    *("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "falcon", "phi", "phi3", "stablelm", "cohere"),
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "granite", "starcoder2"),
    *("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "olmoe", "gpt_bigcode", "xglm", "arcee"),
    *("nemotron", "apertus", "ernie4_5", "seed_oss", "ministral", "helium", "glm", "glm4", "granitemoe"),
    *("phimoe", "codegen", "mpt", "olmo", "smollm3", "exaone4", "cohere2", "hunyuan_v1_dense", "ministral3"),
    "gpt_oss",
}


def test_the_table_of_the_command_is_that_of_the_code() -> None:
    assert stored_families() == describe_families(), "run: python -m benchmarks.family_table"
    assert TABLE_PATH.read_text(encoding="utf-8") == written(stored_families())


def test_every_family_of_the_table_has_a_tiny_model() -> None:
    assert set(supported_families()) >= ASKED_FOR
    assert {build().config.model_type for build in ALL_FAMILIES.values()} == set(supported_families())


def test_facts_tell_families_apart() -> None:
    facts = {row.name: row for row in describe_families()}
    assert facts["gpt_neox"].blocks == "parallel" and facts["gpt_neox (sequential)"].blocks == "sequential"
    assert facts["falcon (7B)"].blocks == "parallel, one norm"
    assert "one key/value group" in facts["falcon (7B)"].also
    assert facts["falcon (RW)"].positions == facts["bloom"].positions == "ALiBi"
    assert facts["gpt_neo"].positions == "learned, local windows"
    assert facts["olmo2"].attention == "self_attn.(q_proj, k_proj, v_proj, o_proj) → post_attention_layernorm"
    assert facts["opt"].mlp == "final_layer_norm → (fc1, fc2)"


def test_the_command_lists_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("families", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["families"]
    assert {row["family"] for row in listed} == set(supported_families())
    assert run_main("families") == 0
    assert "gemma3_text" in capsys.readouterr().out
    assert run_main("families", "olmo2") == 0
    assert "post_feedforward_layernorm" in capsys.readouterr().out


def test_the_command_names_an_unknown_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("families", "t5") == 2
    assert "'t5' is not supported" in capsys.readouterr().err
