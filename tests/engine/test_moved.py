"""A model that is moved after it was made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pahq_hf import PAHQConfig, PAHQModel, load_task
from pahq_hf.precision import products
from tests.pretend.process import BEST, rehearsed

MOVES = {
    compute: {
        "command": "moved",
        "config": {"regime": "pahq"} if compute == "auto" else {"regime": "pahq", "compute": compute},
        "search": {"readers": "logits,m2"},
    }
    for compute in ("auto", "fp32")
}


@pytest.mark.parametrize("compute", MOVES)
def test_products_follow_the_model_unless_they_were_asked_for_by_name(compute: str) -> None:
    """A model that ran on the CPU, where `auto` is made FP32, is moved to a device that has BF16."""
    outcome = rehearsed(BEST, MOVES[compute])
    assert not outcome["failed"], outcome["failed"]
    assert outcome["facts"] == (
        {"before": "fp32", "moved": "bf16", "found": "bf16"}
        if compute == "auto"
        else {"before": "fp32", "moved": "fp32", "found": "fp32"}
    )
    assert outcome["same"] and outcome["launches"] > 0


def test_weights_that_are_moved_behind_its_back_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model inside is moved, here by name only: what `auto` means is asked for again."""
    monkeypatch.setattr(products, "native_bf16", lambda device: False)
    model = PAHQModel.from_pretrained("demo", PAHQConfig("pahq"))
    assert model.pahq_config.compute == "fp32"
    monkeypatch.setattr(products, "native_bf16", lambda device: True)
    model._settled = torch.device("meta")
    circuit = model.discover(
        load_task("ioi", model.tokenizer, n=2), threshold=0.05, readers="logits", progress=False
    )
    assert model.pahq_config.compute == circuit.discovery["precision"]["compute"] == "bf16"
    assert np.isfinite(circuit.scores).all()
