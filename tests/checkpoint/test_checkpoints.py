"""Loading checkpoints: files, shards, dtypes, GGUF, and FP32 values read again from them."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)

from pahq_hf.config import PAHQConfig
from pahq_hf.errors import ModelLoadError
from pahq_hf.model import PAHQModel
from pahq_hf.precision.fp32.source import CheckpointSource, SpillSource
from pahq_hf.precision.linear import PAHQLinear
from tests.helpers import FP32
from tests.models import (
    FAMILIES,
    padded_prompts,
    relative_error,
    tiny_attention_only,
    tiny_llama,
    word_tokenizer,
)

TOLERANCE = 1e-5
RTN = PAHQConfig("rtn")

families = pytest.mark.parametrize("family", FAMILIES)


def linears(model: PAHQModel) -> list[PAHQLinear]:
    return list(model.patched.linears())


def spilled(model: PAHQModel) -> set[str]:
    """Projections whose FP32 values are in a temporary file, which has no name."""
    blocks = [linear.source_block for linear in linears(model)]
    return {block.name for block in blocks if block is not None and isinstance(block.source, SpillSource)}


# -- checkpoints ----------------------------------------------------------------------------------


def expect_reread(folder: Path, spill_folder: Path, **options: Any) -> PAHQModel:
    """Load in low precision; every FP32 value must come from the checkpoint, and be the loaded one."""
    full = PAHQModel.from_pretrained(folder, FP32, **options)
    low = PAHQModel.from_pretrained(folder, RTN, **options)
    assert not spilled(low) and not list(spill_folder.iterdir())
    for whole, block in zip(linears(full), linears(low), strict=True):
        assert not torch.equal(block.dense(), whole.dense())
        with block.shared.mode.full_precision():
            assert torch.equal(block.dense(), whole.dense())
            assert torch.equal(block.dense(slice(3, 7), slice(1, 5)), whole.dense(slice(3, 7), slice(1, 5)))
    return low


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [False, True])
def test_fp32_comes_back_from_the_checkpoint(
    family: str, dtype: torch.dtype, shards: bool, saved: Callable[..., Path], spill_folder: Path
) -> None:
    folder = saved(family, dtype, **({"max_shard_size": "20KB"} if shards else {}))
    assert (len(list(folder.glob("*.safetensors"))) > 2) == shards
    low = expect_reread(folder, spill_folder)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = padded_prompts()["input_ids"]
    with low.patched.precision.full_precision():
        assert relative_error(low(ids).logits, exact(ids).logits) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpoint_of_the_inner_model(family: str, saved: Callable[..., Path], spill_folder: Path) -> None:
    """Keys that lack the `transformer.` prefix, as in the Hub's own gpt2."""
    folder = saved(family)
    path, prefix = folder / "model.safetensors", {"gpt2": "transformer.", "llama": "model."}[family]
    tensors = load_file(path)
    assert any(name.startswith(prefix) for name in tensors)
    save_file({name.removeprefix(prefix): t for name, t in tensors.items()}, path, metadata={"format": "pt"})
    low = expect_reread(folder, spill_folder)
    ids = padded_prompts()["input_ids"]
    with low.patched.precision.full_precision():
        assert relative_error(low(ids).logits, FAMILIES[family]()(ids).logits) < TOLERANCE


def test_pickled_checkpoints_go_to_a_spill_file(saved: Callable[..., Path], spill_folder: Path) -> None:
    folder = saved("gpt2")
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    low = PAHQModel.from_pretrained(folder, RTN)
    assert len(spilled(low)) == len(linears(low)) and not list(spill_folder.iterdir())
    expect_exact_in_full_precision(low, "gpt2")


def test_what_the_checkpoint_does_not_hold_goes_to_a_spill_file(
    saved: Callable[..., Path], spill_folder: Path
) -> None:
    """One matrix was edited after loading: its FP32 values are those of the model, not of the file."""
    source = CheckpointSource([saved("llama") / "model.safetensors"])
    hf, edited = tiny_llama(), "model.layers.1.self_attn.v_proj.weight"
    hf.get_parameter(edited).data[2, 3] += 1
    wanted = {name: value.clone() for name, value in hf.state_dict().items()}
    model = PAHQModel(hf, RTN, source=source)
    assert spilled(model) == {edited.removesuffix(".weight")} and not list(spill_folder.iterdir())
    for name, module in model.base_model.named_modules():
        if isinstance(module, PAHQLinear):
            with module.shared.mode.full_precision():
                assert torch.equal(module.dense(), wanted[f"{name}.weight"])


@families
def test_models_in_memory_go_to_a_spill_file(family: str, spill_folder: Path) -> None:
    model = PAHQModel(FAMILIES[family](), RTN)
    assert len(spilled(model)) == len(linears(model)) and not list(spill_folder.iterdir())
    expect_exact_in_full_precision(model, family)


def test_the_fp32_regime_writes_nothing(spill_folder: Path) -> None:
    model = PAHQModel(tiny_llama(), FP32)
    assert not model.patched.precision.is_low and not list(spill_folder.iterdir())
    model.activate("a0.h0", "m1")
    assert model.patched.precision.nbytes == model.patched.precision.nbytes_fp32


@pytest.mark.parametrize("config", [RTN, FP32, PAHQConfig("pahq")], ids=lambda config: config.regime)
def test_a_model_loaded_from_files_can_be_copied(config: PAHQConfig, saved: Callable[..., Path]) -> None:
    """The copy computes the same, also in FP32, and neither notices the other."""
    model = PAHQModel.from_pretrained(saved("llama"), config)
    ids = torch.arange(1, 9)[None]
    for linear in linears(model):
        linear.hold_packed()
    twin = copy.deepcopy(model)
    assert all(linear.held_bytes == 0 for linear in linears(twin))  # it can make its own
    for linear in linears(model):
        linear.release()
    with torch.no_grad():
        low = model(ids).logits
        assert torch.equal(twin(ids).logits, low)
        with twin.patched.precision.full_precision():
            exact = twin(ids).logits
            assert torch.equal(model(ids).logits, low)
        assert torch.equal(exact, low) == (config is FP32)
        with model.patched.precision.full_precision():
            assert torch.equal(model(ids).logits, exact)
        twin.activate("a0.h0")
        assert not model.patched.precision.active and torch.equal(model(ids).logits, low)


def expect_exact_in_full_precision(model: PAHQModel, family: str) -> None:
    whole = PAHQModel(FAMILIES[family](), FP32)
    for block, original in zip(linears(model), linears(whole), strict=True):
        with block.shared.mode.full_precision():
            assert torch.equal(block.dense(), original.dense())


def test_a_checkpoint_changed_after_loading(saved: Callable[..., Path]) -> None:
    folder = saved("llama")
    model = PAHQModel.from_pretrained(folder, RTN)
    low = model.patched.precision.nbytes
    model.activate("a0.h0")
    FAMILIES["llama"](seed=1).save_pretrained(folder)
    with pytest.raises(ModelLoadError, match="changed on disk"):
        model.activate("m1")
    assert not model.patched.precision.active and model.patched.precision.nbytes == low


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_the_config(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")


def remove_the_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    "damage",
    [
        remove_weights,
        truncate_weights,
        empty_weights,
        drop_a_tensor,
        cut_a_tensor,
        spoil_the_config,
        remove_the_folder,
    ],
)
@pytest.mark.parametrize("config", [FP32, RTN], ids=["fp32", "rtn"])
def test_damaged_checkpoints(
    damage: Callable[[Path], None], config: PAHQConfig, saved: Callable[..., Path]
) -> None:
    folder = saved("llama")
    damage(folder)
    with pytest.raises(ModelLoadError) as caught:
        PAHQModel.from_pretrained(folder, config)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    if damage is drop_a_tensor:
        assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)


@pytest.mark.parametrize("name", ["no-such/model", "not a name", "../nowhere", ""])
def test_a_name_that_leads_nowhere(name: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        PAHQModel.from_pretrained(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


GGUF_IDS = ["absent", "empty", "cut", "wild", "other"]
CUT_GGUF = b"GGUF\x03\x00"
# One metadata entry whose name has 2**64 - 1 letters.
WILD_GGUF = struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**64 - 1) + b"\x00" * 64


@pytest.mark.parametrize("content", [None, b"", CUT_GGUF, WILD_GGUF, b"something else"], ids=GGUF_IDS)
def test_a_gguf_file_that_is_none(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelLoadError) as caught:
        PAHQModel.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_shard(saved: Callable[..., Path]) -> None:
    folder = saved("llama", max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelLoadError) as caught:
        PAHQModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_subfolder_and_tokenizer(tmp_path: Path, spill_folder: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "inner")
    word_tokenizer().save_pretrained(tmp_path / "inner")
    model = expect_reread(tmp_path, spill_folder, subfolder="inner")
    assert model.tokenizer("w7 w8")["input_ids"] == [7, 8]


def test_a_model_without_tokenizer_loads(saved: Callable[..., Path]) -> None:
    assert PAHQModel.from_pretrained(saved("llama")).tokenizer is None


def test_attention_only_checkpoint(tmp_path: Path) -> None:
    tiny_attention_only().save_pretrained(tmp_path)
    model = PAHQModel.from_pretrained(tmp_path, RTN)
    expected = PAHQModel(tiny_attention_only(), FP32)(padded_prompts()["input_ids"]).logits
    with model.patched.precision.full_precision():
        assert torch.equal(model(padded_prompts()["input_ids"]).logits, expected)
