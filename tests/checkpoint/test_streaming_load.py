"""Low-precision models read tensor by tensor are the models that are loaded whole and then rounded."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import pahq_hf.checkpoint.load
from pahq_hf.checkpoint.placement import one_device
from pahq_hf.config import PAHQConfig
from pahq_hf.errors import ConfigError, ModelLoadError
from pahq_hf.model import PAHQModel
from pahq_hf.precision.embeddings import EmbeddingMatrix
from tests.families import ALL_FAMILIES
from tests.helpers import FP32
from tests.models import FAMILIES, VOCAB, WIDTH, padded_prompts, tiny_attention_only, tiny_llama

pytestmark = pytest.mark.crossing

RTN, PAHQ = PAHQConfig("rtn"), PAHQConfig("pahq")
LOW = PAHQConfig("pahq", quantize_embeddings=True)
IDS = padded_prompts()["input_ids"]
EMBEDDING = {"gpt2": "transformer.wte.weight", "qwen2": "model.embed_tokens.weight"}

families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def only_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may load a checkpoint as a whole."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the checkpoint was loaded as a whole")

    monkeypatch.setattr(pahq_hf.checkpoint.load.AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.fixture
def whole_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is loaded as a whole."""
    names: list[str] = []
    load = AutoModelForCausalLM.from_pretrained

    def noted(name: str, *args: Any, **kwargs: Any) -> Any:
        names.append(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(pahq_hf.checkpoint.load.AutoModelForCausalLM, "from_pretrained", noted)
    return names


def plain(folder: Path, **options: Any) -> PreTrainedModel:
    """The checkpoint as transformers loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    return model


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> Path:
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors)
    save_file(changed or tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def exact_logits(model: PAHQModel) -> Tensor:
    """Logits in full precision, of tables too."""
    with model.patched.precision.full_precision(), model.patched.exact_embeddings():
        logits: Tensor = model(IDS).logits
    return logits


@torch.no_grad()
def assert_same_model(ours: PAHQModel, theirs: PAHQModel) -> None:
    """Assert that two low-precision models are equal to the bit, at both precisions."""
    assert ours.identity.fingerprint == theirs.identity.fingerprint
    for mine, other in zip(ours.patched.linears(), theirs.patched.linears(), strict=True):
        assert mine.low is not None and mine.nbytes == other.nbytes
        assert torch.equal(mine.dense(), other.dense())
    for mine, other in zip(tables(ours), tables(theirs), strict=True):
        assert torch.equal(mine, other)  # in low precision, or as they are
    for kind in ("named_parameters", "named_buffers"):
        resident, wanted = (dict(getattr(model.base_model, kind)()) for model in (ours, theirs))
        names = [name for name in wanted if not re.search(r"\.low\.|(wte|embed_tokens|lm_head)\.", name)]
        assert len(names) > 4 or kind == "named_buffers"
        for name in names:
            assert resident[name].dtype == wanted[name].dtype, name
            assert torch.equal(resident[name], wanted[name]), name
    assert not any(parameter.is_meta for parameter in ours.parameters())
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert torch.equal(exact_logits(ours), exact_logits(theirs))
    assert not torch.equal(ours(IDS).logits, exact_logits(ours))


def tables(model: PAHQModel) -> tuple[Tensor, Tensor]:
    """Embedding and unembedding as they are in effect."""
    top, bottom = model.patched.unembedding, model.patched.embedding
    ids = torch.arange(bottom.num_embeddings)
    return top.dense() if isinstance(top, EmbeddingMatrix) else top.weight, bottom(ids)


# -- the same model ---------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("config", "shards"), [(PAHQ, True), (RTN, False), (LOW, True)], ids=str)
def test_streamed_is_loaded_and_rounded(
    family: str,
    dtype: torch.dtype,
    config: PAHQConfig,
    shards: bool,
    saved: Callable[..., Path],
    request: pytest.FixtureRequest,
) -> None:
    folder = saved(family, dtype, **({"max_shard_size": "20KB"} if shards else {}))
    assert (len(list(folder.glob("*.safetensors"))) > 1) == shards
    hf, mark = plain(folder), PAHQModel.from_pretrained(folder, FP32).identity.fingerprint
    expected = hf(IDS).logits.detach()
    request.getfixturevalue("only_streamed")
    ours = PAHQModel.from_pretrained(folder, config)
    assert_same_model(ours, PAHQModel(hf, config))
    assert ours.identity.fingerprint == mark
    torch.testing.assert_close(exact_logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert ours(IDS).logits.dtype == torch.float32 and not ours.base_model.training
    kept_as_stored = dtype == torch.bfloat16 or config.quantize_embeddings
    matrices = ours.patched.embedding_matrices
    assert len(matrices) == kept_as_stored * (1 if hf.config.tie_word_embeddings else 2)
    assert sum(matrix.nbytes for matrix in matrices) <= 2 * len(matrices) * VOCAB * WIDTH


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [RTN, LOW], ids=["rtn", "tables"])
def test_embeddings_tied_or_not(
    family: str, tied: bool, config: PAHQConfig, tmp_path: Path, only_streamed: None
) -> None:
    def make() -> PreTrainedModel:
        hf = FAMILIES[family]()
        hf.config.tie_word_embeddings = tied
        hf.tie_weights()
        if tied:
            hf.lm_head.weight = hf.model.embed_tokens.weight
        return hf

    make().save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    ours = PAHQModel.from_pretrained(tmp_path, config)
    assert_same_model(ours, PAHQModel(make(), config))
    if not config.quantize_embeddings:
        assert (ours.patched.unembedding.weight is ours.patched.embedding.weight) == tied


def hub_style(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 as on the Hub: no `transformer.`, and buffers that models have no more."""
    causal = {f"h.{n}.attn.bias": torch.ones(64, 64).tril().view(1, 1, 64, 64) for n in range(2)}
    return {name.removeprefix("transformer."): value for name, value in tensors.items()} | causal


def test_names_without_prefix(saved: Callable[..., Path], only_streamed: None) -> None:
    folder = rewrite(saved("gpt2"), hub_style)
    for config in (RTN, LOW):
        ours = PAHQModel.from_pretrained(folder, config)
        assert_same_model(ours, PAHQModel(FAMILIES["gpt2"](), config))


def test_attention_only(tmp_path: Path, only_streamed: None) -> None:
    """Its MLPs' matrices have no elements."""
    tiny_attention_only().save_pretrained(tmp_path)
    assert_same_model(PAHQModel.from_pretrained(tmp_path, RTN), PAHQModel(tiny_attention_only(), RTN))


def test_the_checkpoint_has_only_the_unembedding(saved: Callable[..., Path]) -> None:
    """Of a tied pair: transformers fills in the embedding, and so do we."""
    folder = saved("qwen2")
    rewrite(folder, lambda t: {("lm_head.weight" if k == EMBEDDING["qwen2"] else k): v for k, v in t.items()})
    for config in (RTN, LOW):
        ours = PAHQModel.from_pretrained(folder, config)
        assert_same_model(ours, PAHQModel(FAMILIES["qwen2"](), config))


@pytest.mark.parametrize("family", EMBEDDING)
@pytest.mark.parametrize("config", [RTN, LOW], ids=["rtn", "tables"])
def test_a_tied_checkpoint_with_two_equal_tables_is_streamed(
    family: str, config: PAHQConfig, saved: Callable[..., Path], only_streamed: None
) -> None:
    folder = saved(family)
    rewrite(folder, lambda t: t | {"lm_head.weight": t[EMBEDDING[family]].clone()})
    ours = PAHQModel.from_pretrained(folder, config)
    assert_same_model(ours, PAHQModel(FAMILIES[family](), config))
    assert len(ours.patched.embedding_matrices) == config.quantize_embeddings


@pytest.mark.parametrize("family", EMBEDDING)
@pytest.mark.parametrize("config", [RTN, LOW], ids=["rtn", "tables"])
def test_a_tied_config_whose_tables_differ_is_what_transformers_makes_of_it(
    family: str, config: PAHQConfig, saved: Callable[..., Path], whole_loads: list[str]
) -> None:
    folder = saved(family)
    rewrite(folder, lambda t: t | {"lm_head.weight": torch.randn_like(t[EMBEDDING[family]])})
    expected = plain(folder)(IDS).logits.detach()
    assert not torch.allclose(expected, FAMILIES[family]()(IDS).logits)  # the head does count
    before = len(whole_loads)
    ours, full = (PAHQModel.from_pretrained(folder, c) for c in (config, FP32))
    assert len(whole_loads) == before + 2
    torch.testing.assert_close(exact_logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(exact_logits(ours), exact_logits(full))
    assert ours.identity.fingerprint == full.identity.fingerprint
    assert len(ours.patched.embedding_matrices) == 2 * config.quantize_embeddings


# -- buffers, settings, devices ---------------------------------------------------------------------

COUNTING = """
import torch
from transformers import LlamaForCausalLM

class CountingLlama(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("seen", torch.zeros(config.vocab_size, dtype=torch.float64))
        self.register_buffer("scratch", torch.full((3,), 2.5), persistent=False)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_persistent_buffers_are_read(
    dtype: torch.dtype, saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that comes with its own code."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = saved("llama", dtype)
    (folder / "modeling_counting.py").write_text(COUNTING)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling_counting.CountingLlama"}
    (folder / "config.json").write_text(json.dumps(settings))
    stored = {"steps": torch.tensor(41), "seen": torch.arange(float(VOCAB)).double() / 7}
    rewrite(folder, lambda tensors: tensors | stored)
    theirs = plain(folder, trust_remote_code=True)
    ours = PAHQModel.from_pretrained(folder, RTN, trust_remote_code=True)
    assert type(ours.base_model).__name__ == "CountingLlama"
    assert torch.equal(ours.base_model.get_buffer("scratch"), torch.full((3,), 2.5))
    for name, value in stored.items():
        buffer = ours.base_model.get_buffer(name)
        assert buffer.dtype == theirs.get_buffer(name).dtype and torch.equal(buffer, theirs.get_buffer(name))
        assert torch.equal(buffer.to(value.dtype), value)
    assert not isinstance(PAHQModel.from_pretrained(folder, RTN).base_model, type(ours.base_model))


def test_rotary_tables_are_the_configs(saved: Callable[..., Path], only_streamed: None) -> None:
    """They are in no checkpoint: the skeleton computes them."""
    hf = tiny_llama()
    hf.config.rope_parameters = {"rope_type": "default", "rope_theta": 50.0}
    folder = saved("llama")
    hf.config.save_pretrained(folder)
    ours = PAHQModel.from_pretrained(folder, RTN)
    expected = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).model.rotary_emb.inv_freq
    assert torch.equal(ours.base_model.model.rotary_emb.inv_freq, expected)
    assert not torch.equal(expected, tiny_llama().model.rotary_emb.inv_freq)


@pytest.mark.parametrize("size", [4, 7])
@pytest.mark.parametrize(
    "name", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"]
)
def test_rotary_tables_of_old_checkpoints_are_ignored(
    name: str, size: int, saved: Callable[..., Path]
) -> None:
    """As transformers does: `inv_freq` is no part of its state."""
    folder = rewrite(saved("llama"), lambda t: t | {name: torch.full((size,), 9.0)})
    assert torch.equal(plain(folder)(IDS).logits, tiny_llama()(IDS).logits)
    assert_same_model(PAHQModel.from_pretrained(folder, RTN), PAHQModel(tiny_llama(), RTN))


def test_generation_config_is_honoured(saved: Callable[..., Path], only_streamed: None) -> None:
    folder = saved("llama")
    model = PAHQModel.from_pretrained(folder, RTN)
    usual = model.generate(IDS[:1], max_new_tokens=6)
    stop = int(usual[0, IDS.shape[1] + 2])
    settings = {"max_new_tokens": 6, "eos_token_id": stop, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = PAHQModel.from_pretrained(folder, RTN)
    assert model.generation_config.max_new_tokens == 6
    found = model.generate(IDS[:1])[0].tolist()
    assert found[-1] == stop and found == usual[0, : len(found)].tolist() and len(found) < usual.shape[1]
    (folder / "generation_config.json").unlink()
    assert PAHQModel.from_pretrained(folder, RTN).generation_config.max_new_tokens is None


@pytest.mark.parametrize(
    "place",
    [{"": "cpu"}, "cpu", torch.device("cpu"), {"": torch.device("cpu")}, {"model": "cpu", "lm_head": "cpu"}],
    ids=str,
)
def test_device_map(place: Any, saved: Callable[..., Path], only_streamed: None) -> None:
    ours = PAHQModel.from_pretrained(saved("llama"), RTN, device_map=place)
    assert_same_model(ours, PAHQModel(tiny_llama(), RTN))


@pytest.mark.parametrize("place", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize("config", [RTN, PAHQConfig("fp32")], ids=["rtn", "fp32"])
def test_auto_is_the_one_device_there_is(
    place: str,
    config: PAHQConfig,
    saved: Callable[..., Path],
    whole_loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    ours = PAHQModel.from_pretrained(saved("llama"), config, device_map=place)
    assert len(whole_loads) == (0 if config.is_low else 1)  # streamed, not loaded in FP32 to be divided
    assert ours.patched.device == torch.device("cpu")
    assert torch.equal(ours(IDS).logits, PAHQModel(tiny_llama(), config)(IDS).logits)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("auto", "device_map='auto' would spread the model over 2 GPUs.*device='cuda:0'"),
        ("balanced", "device_map='balanced' would spread"),
        ({"model": "cpu", "lm_head": "meta"}, "whole on one device; this device_map names cpu, meta"),
        ({"model": "cpu", "lm_head": "disk"}, "offloads nothing"),
        ({}, "this device_map names none"),
        ({"": "abacus"}, "device 'abacus' cannot be used"),
        ("abacus", "device 'abacus' cannot be used"),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [RTN, PAHQConfig("fp32")], ids=["rtn", "fp32"])
def test_several_devices_and_none_are_refused_in_one_line(
    place: Any,
    message: str,
    config: PAHQConfig,
    saved: Callable[..., Path],
    whole_loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    folder = saved("llama")
    with pytest.raises(ConfigError, match=message) as caught:
        PAHQModel.from_pretrained(folder, config, device_map=place)
    assert "\n" not in str(caught.value) and not whole_loads


def test_memory_bounds_say_which_gpus_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(
        "pahq_hf.checkpoint.placement.usable_device", torch.device
    )  # a meta tensor forgets its number
    assert one_device("auto", {0: 0, 1: "20GiB"}) == torch.device("meta", 1)
    assert one_device("auto", {"cpu": "20GiB"}) == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, "float32"], ids=str)
def test_asking_for_float32_streams_too(dtype: Any, saved: Callable[..., Path], only_streamed: None) -> None:
    ours = PAHQModel.from_pretrained(saved("llama", torch.bfloat16), RTN, dtype=dtype)
    assert ours(IDS).logits.dtype == ours.dtype == torch.float32


# -- what cannot be streamed ------------------------------------------------------------------------


def test_renamed_tensors_are_named(saved: Callable[..., Path], whole_loads: list[str]) -> None:
    """Transformers is asked; it does not know them either."""
    lost, new = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.attention.query.weight"
    folder = rewrite(saved("llama"), lambda t: {(new if k == lost else k): v for k, v in t.items()})
    with pytest.raises(ModelLoadError) as caught:
        PAHQModel.from_pretrained(folder, RTN)
    assert lost in str(caught.value) and str(folder) in str(caught.value) and whole_loads == [str(folder)]


@pytest.mark.parametrize("config", [RTN, LOW], ids=["rtn", "tables"])
def test_pickled_checkpoints(config: PAHQConfig, saved: Callable[..., Path], whole_loads: list[str]) -> None:
    folder = saved("gpt2")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    ours = PAHQModel.from_pretrained(folder, config)
    assert whole_loads == [str(folder)]
    assert_same_model(ours, PAHQModel(FAMILIES["gpt2"](), config))


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("qwen3_moe", {}, "rearranged at loading"),
        ("llama", {"use_safetensors": False}, "no safetensors files"),
        ("llama", {}, None),
    ],
)
def test_what_is_loaded_as_a_whole_says_so(
    family: str,
    options: dict[str, Any],
    reason: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / family
    ALL_FAMILIES[family]().save_pretrained(folder)
    if "use_safetensors" in options:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    PAHQModel.from_pretrained(folder, RTN, **options)
    found = [record.getMessage() for record in caplog.records if "as a whole" in record.getMessage()]
    assert len(found) == (reason is not None)
    assert all(reason in text for text in found)
    assert all(record.levelno >= logging.WARNING for record in caplog.records if found)
