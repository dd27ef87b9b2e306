"""What users do to a wrapped model between loading and searching: undone, or refused in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pahq_hf import Circuit, PAHQConfig, PAHQModel
from pahq_hf.errors import ConfigError
from pahq_hf.modeling.guard import WeightGuard
from tests.helpers import FP32, save_tiny
from tests.models import padded_prompts, random_task, tiny_gpt2, tiny_llama

PAHQ = PAHQConfig(compute="fp32")
TASK = random_task()
configs = pytest.mark.parametrize("config", [FP32, PAHQ], ids=["fp32", "pahq"])


def gpt2(config: PAHQConfig = FP32) -> PAHQModel:
    """With dropout of .1 everywhere, as GPT-2 has it."""
    model = PAHQModel(tiny_gpt2(), config)
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    return model


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return gpt2().attribute(TASK, topn=40)


WORK: dict[str, Callable[[PAHQModel, Circuit], Any]] = {
    "discover": lambda model, _: model.discover(TASK, threshold=0.05, progress=False).scores,
    "sweep": lambda model, _: model.sweep(TASK, thresholds=[0.2], progress=False)[0.2].scores,
    "attribute": lambda model, _: model.attribute(TASK, method="eap-ig").scores,
    "evaluate": lambda model, circuit: model.evaluate(circuit, TASK)["kl"],
    "apply": lambda model, circuit: applied(model, circuit),
    "apply to corrupted": lambda model, circuit: applied(model, circuit, corrupted=TASK.corrupted_ids),
}


@torch.no_grad()
def applied(model: PAHQModel, circuit: Circuit, **options: Any) -> np.ndarray[Any, Any]:
    with model.apply(circuit, **options):
        logits: np.ndarray[Any, Any] = model(TASK.clean_ids).logits.numpy()
    return logits


# -- modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", WORK)
@configs
def test_training_mode_changes_no_result(work: str, config: PAHQConfig, circuit: Circuit) -> None:
    """And is what it was afterwards."""
    model = gpt2(config)
    expected = WORK[work](model, circuit)
    model.train()
    assert np.array_equal(WORK[work](model, circuit), expected)
    assert all(module.training for module in model.base_model.modules())


def test_modes_are_put_back_one_by_one() -> None:
    model = gpt2()
    model.base_model.transformer.h[1].train()
    modes = [module.training for module in model.modules()]
    assert any(modes) and not all(modes)
    model.attribute(TASK)
    with pytest.raises(ConfigError):
        model.attribute(TASK, topn=10**6)
    assert [module.training for module in model.modules()] == modes


# -- weights ----------------------------------------------------------------------------------------


def edited(model: PAHQModel) -> None:
    """Past autograd, which counts versions."""
    model.base_model.model.norm.weight.data[3] += 1e-3


def swapped(model: PAHQModel) -> None:
    weight = model.base_model.model.embed_tokens.weight.data
    weight[[3, 4]] = weight[[4, 3]]


def replaced(model: PAHQModel) -> None:
    norm = model.base_model.model.norm
    norm.weight = nn.Parameter(norm.weight.detach() * 2)


def low_edited(model: PAHQModel) -> None:
    linear = model.patched.layers[1].attention.v_proj
    if linear.weight is not None:
        linear.weight.data[0, 0] *= 2
    else:
        codes: Any = linear.low
        codes.scale[0] *= 2


def adapter(model: PAHQModel) -> None:
    model.base_model.model.layers[0].register_parameter("lora_A", nn.Parameter(torch.zeros(2, 2)))


CHANGES: dict[str, tuple[Callable[[PAHQModel], Any], str]] = {
    "to bfloat16": (
        lambda model: model.to(torch.bfloat16),
        r"is in torch\.bfloat16, it was in torch\.float32",
    ),
    "half": (lambda model: model.half(), r"is in torch\.float16, it was in torch\.float32"),
    "double": (lambda model: model.double(), r"is in torch\.float64, it was in torch\.float32"),
    "more tokens": (
        lambda model: model.resize_token_embeddings(60),
        r"model\.embed_tokens\.weight has shape \(60, 32\), it had \(53, 32\)",
    ),
    "edited": (edited, r"values of model\.norm\.weight were edited"),
    "rows swapped": (swapped, r"values of model\.embed_tokens\.weight were edited"),
    "replaced": (replaced, r"values of model\.norm\.weight were edited"),
    "a projection edited": (low_edited, r"values of model\.layers\.1\.self_attn\.v_proj\..* were edited"),
    "an adapter": (adapter, r"model\.layers\.0\.lora_A was added"),
}


@pytest.mark.parametrize("change", CHANGES)
@configs
def test_changed_weights_are_refused_before_work(change: str, config: PAHQConfig) -> None:
    model = PAHQModel(tiny_llama(), config)
    found = model.attribute(TASK, method="random", topn=5)
    function, match = CHANGES[change]
    function(model)
    for name, work in WORK.items():
        with pytest.raises(ConfigError, match=f"changed after PAHQModel wrapped it: .*{match}") as caught:
            work(model, found)
        assert "\n" not in str(caught.value), name


@configs
def test_what_is_no_change(config: PAHQConfig, tmp_path: Any) -> None:
    """Use, a device, a copy of equal values, gradients, other modules' hooks, a deep copy."""
    model = PAHQModel.from_pretrained(save_tiny(tmp_path), config)
    found = model.attribute(TASK, topn=5)
    expected = found.scores
    model.generate(padded_prompts()["input_ids"], max_new_tokens=20)
    model.activate("a1.h2")
    model.to("cpu").float().requires_grad_(True).requires_grad_(False)
    norm = model.base_model.model.norm
    norm.weight.data = norm.weight.data.clone()
    with model.apply(found), pytest.raises(ConfigError, match="is applied"):
        WORK["apply"](model, found)
    assert np.array_equal(model.attribute(TASK, topn=5).scores, expected)
    assert np.array_equal(copy.deepcopy(model).attribute(TASK, topn=5).scores, expected)


def test_undone_changes_are_none() -> None:
    model = PAHQModel(tiny_llama(), FP32)
    weight = model.base_model.model.norm.weight
    before = weight.detach().clone()
    edited(model)
    weight.data.copy_(before)
    assert model.attribute(TASK, topn=5).edge_count == 5


def test_the_sum_of_a_gpu_sees_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is other arithmetic; here on the CPU, in chunks."""
    import pahq_hf.modeling.guard

    monkeypatch.setattr(pahq_hf.modeling.guard, "_CHUNK", 100)
    summed = pahq_hf.modeling.guard._sum
    base = torch.randn(40, 9)
    sums = {summed(base, False)}
    for one, two in ((3, 4), (0, 359), (99, 100)):
        other = base.clone().flatten()
        other[[one, two]] = other[[two, one]]
        sums.add(summed(other, False))
    sums |= {summed(base + 1e-6, False), summed(-base, False), summed(base.flip(0), False)}
    assert len(sums) == 7 and summed(base.clone(), False) in sums
    odd = torch.arange(7, dtype=torch.uint8)
    assert summed(odd, False) != summed(odd.flip(0), False)
    guard = WeightGuard(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="values of weight were edited"):
        guard.check(nn.Linear(3, 3))
