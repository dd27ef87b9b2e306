"""The Hugging Face model inside a patched one writes the checkpoint it came from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.errors import ConfigError
from tests.families import ALL_FAMILIES, USUAL
from tests.helpers import FP32
from tests.models import padded_prompts, tiny_attention_only, tiny_gpt2, tiny_llama
from tests.tiers import quick

IDS = padded_prompts()["input_ids"]
PAHQ = PAHQConfig(compute="fp32")
TABLES = PAHQConfig(compute="fp32", quantize_embeddings=True)
configs = pytest.mark.parametrize("config", [FP32, PAHQ, TABLES], ids=["fp32", "pahq", "tables"])


def reloaded(folder: Path, **options: Any) -> PreTrainedModel:
    """As anybody loads it, who must be told of no missing or unexpected tensor."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    found: PreTrainedModel = model
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@torch.no_grad()
def assert_saved(hf: PreTrainedModel, original: PreTrainedModel, folder: Path) -> None:
    """Assert that a model writes what the untouched one writes, and that it reloads to the bit."""
    hf.save_pretrained(folder / "ours")
    original.save_pretrained(folder / "theirs")
    ours, theirs = stored(folder / "ours"), stored(folder / "theirs")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name].to(value.dtype), value), name
    assert torch.equal(reloaded(folder / "ours")(IDS).logits, reloaded(folder / "theirs")(IDS).logits)


@pytest.mark.crossing
@pytest.mark.parametrize("family", quick(ALL_FAMILIES, *USUAL))
@pytest.mark.parametrize("config", [PAHQ, FP32], ids=["pahq", "fp32"])
def test_of_every_family(family: str, config: PAHQConfig, tmp_path: Path) -> None:
    hf = ALL_FAMILIES[family]()
    PAHQModel(hf, config)
    assert_saved(hf, ALL_FAMILIES[family](), tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@configs
def test_of_checkpoints(
    family: str, dtype: torch.dtype, config: PAHQConfig, tmp_path: Path, saved: Callable[..., Path]
) -> None:
    """Weights that were never loaded come from the file they are in."""
    folder = saved(family, dtype)
    model = PAHQModel.from_pretrained(folder, config)
    assert_saved(model.base_model, reloaded(folder, dtype=torch.float32), tmp_path)


def test_attention_only(tmp_path: Path) -> None:
    hf = tiny_attention_only()
    PAHQModel(hf, FP32)
    hf.save_pretrained(tmp_path)
    tiny_attention_only().save_pretrained(tmp_path / "theirs")
    ours, theirs = stored(tmp_path), stored(tmp_path / "theirs")
    assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in theirs.items()}


@configs
def test_while_a_component_is_active_and_in_shards(config: PAHQConfig, tmp_path: Path) -> None:
    model = PAHQModel(tiny_gpt2(), config)
    model.activate("a1.h2")
    model.base_model.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert_same(reloaded(tmp_path / "ours"), tiny_gpt2())


@torch.no_grad()
def assert_same(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_of_a_copy(tmp_path: Path) -> None:
    """A deep copy writes its own weights."""
    model = PAHQModel(tiny_gpt2(), FP32)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.base_model.transformer.h[0].attn.q_proj.weight[0, 0] += 1
    twin.base_model.save_pretrained(tmp_path / "twin")
    model.base_model.save_pretrained(tmp_path / "model")
    name = "transformer.h.0.attn.c_attn.weight"
    assert stored(tmp_path / "twin")[name][0, 0] == stored(tmp_path / "model")[name][0, 0] + 1


def test_it_can_be_wrapped_again(tmp_path: Path) -> None:
    model = PAHQModel(tiny_gpt2(), PAHQ)
    model.base_model.save_pretrained(tmp_path)
    assert PAHQModel.from_pretrained(tmp_path, FP32).identity.fingerprint == model.identity.fingerprint


def test_names_that_patching_gave_are_refused(tmp_path: Path) -> None:
    model = PAHQModel(tiny_llama(), PAHQ)
    with pytest.raises(ConfigError, match=r"a name that patching gave.*leave state_dict out"):
        model.base_model.save_pretrained(tmp_path / "bad", state_dict=model.base_model.state_dict())
    assert not (tmp_path / "bad").exists()
    wanted = tiny_llama(seed=5)
    model.base_model.save_pretrained(tmp_path / "good", state_dict=wanted.state_dict())
    assert_same(reloaded(tmp_path / "good"), wanted)
