"""The untouched model, given back."""

from __future__ import annotations

import pytest
import torch

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.errors import ConfigError
from tests.families import ALL_FAMILIES
from tests.helpers import FP32
from tests.models import random_task, tiny_llama

pytestmark = pytest.mark.crossing
TASK = random_task(batch=2, seed=3)
REGIMES = {
    "fp32": FP32,
    "int8": PAHQConfig("rtn", "int8"),
    "tables too": PAHQConfig(quantize_embeddings=True),
}


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("regime", REGIMES)
@torch.no_grad()
def test_unload_gives_back_the_untouched_model(family: str, regime: str) -> None:
    """As PEFT's does: class, names, values, and what it says; and the wrapper goes on."""
    hf, model = ALL_FAMILIES[family](), PAHQModel(ALL_FAMILIES[family](), REGIMES[regime])
    before = model(TASK.clean_ids).logits
    found = model.unload()
    assert type(found) is type(hf) and not found.training
    wanted, state = hf.state_dict(), found.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[name], value) for name, value in wanted.items())
    assert torch.equal(found(TASK.clean_ids).logits, hf(TASK.clean_ids).logits)
    for parameter in found.parameters():
        parameter.zero_()
    assert torch.equal(model(TASK.clean_ids).logits, before)


def test_a_restricted_model_is_not_unloaded() -> None:
    model = PAHQModel(tiny_llama(), FP32)
    circuit = model.discover(TASK, threshold=0.1, progress=False)
    with (
        model.apply(circuit, corrupted=TASK.corrupted_ids),
        pytest.raises(ConfigError, match="leave that block"),
    ):
        model.unload()
    assert PAHQModel(model.unload(), FP32).identity.fingerprint == model.identity.fingerprint
