"""The real SmolLM2-135M: the same model as Hugging Face's, in FP32 and in a quarter of the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from pahq_hf.config import PAHQConfig
from pahq_hf.model import PAHQModel
from tests.helpers import FP32
from tests.models import relative_error

pytestmark = pytest.mark.smollm2

IOI = "When Mary and John went to the store, John gave a drink to"
PROMPTS = [IOI, "The capital of France is", "The keys to the cabinet"]


@pytest.fixture(scope="module")
def fp32(smollm2_path: Path) -> Iterator[PAHQModel]:
    yield PAHQModel.from_pretrained(smollm2_path, FP32)


@pytest.fixture(scope="module")
def rtn(smollm2_path: Path) -> Iterator[PAHQModel]:
    yield PAHQModel.from_pretrained(smollm2_path, PAHQConfig("rtn", "fp8"))


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_path, padding_side="left")


def next_words(model: PAHQModel, count: int = 1) -> str:
    prompt = model.tokenizer(IOI, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=count, do_sample=False)
    text: str = model.tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
    return text


@torch.no_grad()
def test_logits_equal_hugging_face(
    fp32: PAHQModel, smollm2_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    hf = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32, attn_implementation="eager")
    prompts: Any = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    mask = prompts["attention_mask"]
    inputs = {**prompts, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    ours, theirs = (model(**inputs).logits[mask.bool()] for model in (fp32, hf))
    assert relative_error(ours, theirs) < 1e-5


def test_generates_the_indirect_object(fp32: PAHQModel, rtn: PAHQModel) -> None:
    assert next_words(fp32) == next_words(rtn) == " Mary"


def test_linear_weights_take_a_quarter(rtn: PAHQModel) -> None:
    control = rtn.patched.precision
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576  # q and o, k and v, gate, up and down
    assert control.nbytes_fp32 == 4 * 30 * layer
    assert control.nbytes <= 0.27 * control.nbytes_fp32


def test_edge_count(fp32: PAHQModel) -> None:
    assert fp32.graph.edge_count == 70_651


@torch.no_grad()
def test_active_head_is_the_fp32_models(fp32: PAHQModel, rtn: PAHQModel) -> None:
    x = torch.randn(1, 5, 576)
    exact, mixed = fp32.patched.layers[12].attention, rtn.patched.layers[12].attention
    rtn.activate("a12.h4")
    try:
        for name, piece in (("q", 4), ("k", 1), ("v", 1)):
            ours, theirs = getattr(mixed, name)(x), getattr(exact, name)(x)
            assert torch.equal(ours[:, piece], theirs[:, piece])
            assert not torch.equal(ours[:, piece - 1], theirs[:, piece - 1])
    finally:
        rtn.deactivate()


@pytest.mark.exhaustive
@torch.no_grad()
def test_gguf_is_the_same_model(fp32: PAHQModel, smollm2_gguf: Path) -> None:
    """Its weights are dequantised while loading and have no safetensors file to go back to."""
    model = PAHQModel.from_pretrained(
        smollm2_gguf.parent, PAHQConfig("rtn", "int8"), gguf_file=smollm2_gguf.name
    )
    assert model.graph.edge_count == 70_651
    assert next_words(model) == " Mary"
    for ours, theirs in zip(model.patched.linears(), fp32.patched.linears(), strict=True):
        with ours.shared.mode.full_precision():
            assert torch.equal(ours.dense(slice(0, 8)), theirs.dense(slice(0, 8)))
    ids = model.tokenizer(IOI, return_tensors="pt")["input_ids"]
    low = model(ids).logits
    with model.patched.precision.full_precision():
        assert relative_error(model(ids).logits, fp32(ids).logits) < 1e-5
    assert 1e-3 < relative_error(low, fp32(ids).logits) < 0.2
