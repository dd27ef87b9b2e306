"""Families without a row: read by the row of another where somebody says so and the self-check agrees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from pahq_hf import PAHQModel
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.errors import ConfigError, SelfCheckError, UnsupportedModelError
from pahq_hf.modeling.architectures import assumption
from pahq_hf.modeling.architectures.assumption import assume_family, resembling
from pahq_hf.modeling.architectures.families import TABLE
from pahq_hf.modeling.architectures.lookup import find_architecture
from tests.families import ALL_FAMILIES, known, llama
from tests.helpers import FP32, random_edges, run_main
from tests.models import random_task, relative_error

IDS = random_task().clean_ids
LIKE_LLAMA = ("internlm3", "jais2")


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    return known(family, llama(**changes))()


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is assumed is so for the rest of a process."""
    known = dict(TABLE)
    monkeypatch.setattr(assumption, "_assumed", set())
    yield
    TABLE.clear()
    TABLE.update(known)


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_it_is_the_model_cut_as_the_other_family(family: str) -> None:
    expected = tiny(family)(IDS, use_cache=False).logits
    model = PAHQModel(tiny(family), FP32, assume_family="llama")
    with torch.no_grad():
        assert relative_error(model(IDS, use_cache=False).logits, expected) < 1e-5
    assert model.graph.spec == PAHQModel(ALL_FAMILIES["llama"](), FP32).graph.spec
    assert model.identity.model_type == family and model.patched.arch.assumed == "llama"
    task = random_task(padding="left")
    kept = random_edges(model.graph, 0.5, seed=0)
    hooks, sparse = HooksEngine(model.patched, task, "kl"), SparseEngine(model.patched, task, "kl")
    assert sparse.metric_of(kept) == pytest.approx(hooks.metric_of(kept), rel=1e-4, abs=1e-6)


def test_from_a_folder_and_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("internlm3").save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    assert run_main("info", folder) == 2
    told = capsys.readouterr().err
    assert (
        "'internlm3' is not supported; its parts lie where those of 'llama' do: assume_family='llama'" in told
    )
    with pytest.raises(UnsupportedModelError, match="--assume-family llama"):
        PAHQModel.from_pretrained(folder)
    model = PAHQModel.from_pretrained(folder, assume_family="llama")
    assert all(linear.low is not None for linear in model.patched.linears())
    assert run_main("info", folder, "--assume-family", "llama", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "internlm3" and facts["edges"] == model.graph.edge_count


@pytest.mark.parametrize(
    ("family", "assumed", "error", "match"),
    [
        ("granite_swa", "llama", SelfCheckError, "is not built like 'llama', as was assumed: logits"),
        ("hyperclovax", "llama", SelfCheckError, "as was assumed: .* residual stream"),
        ("internlm3", "ministral3", SelfCheckError, "as was assumed: .*does not run"),
        ("internlm3", "olmo2", UnsupportedModelError, "is not built like 'olmo2', as was assumed: .* has no"),
        ("internlm3", "granite", UnsupportedModelError, "cannot be read as 'granite': .*attribute"),
    ],
)
def test_a_wrong_assumption_is_one_line(family: str, assumed: str, error: Any, match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        PAHQModel(tiny(family), FP32, assume_family=assumed)
    assert "\n" not in str(caught.value)


def test_it_can_be_assumed_anew() -> None:
    hf = tiny("internlm3")
    with pytest.raises(UnsupportedModelError):
        PAHQModel(tiny("internlm3"), FP32, assume_family="olmo2")
    assert PAHQModel(hf, FP32, assume_family="llama").graph.edge_count


def test_what_cannot_be_assumed() -> None:
    bare = PretrainedConfig()
    with pytest.raises(ConfigError, match="'gpt2' has a row of its own: leave assume_family='llama'"):
        assume_family(ALL_FAMILIES["gpt2"]().config, "llama")
    bare.model_type = "bare"
    for wrong in ("lama", "bare"):
        with pytest.raises(ConfigError, match=f"must be a known family .*'{wrong}'"):
            assume_family(bare, wrong)
    assume_family(bare, "llama")
    with pytest.raises(UnsupportedModelError, match=r"'bare' cannot be read .*no num_attention_heads"):
        find_architecture(bare)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "falcon", "opt", "glm4"])
def test_families_resemble_themselves(family: str) -> None:
    hf = ALL_FAMILIES[family]()
    found = resembling(hf)
    assert found is not None
    assert find_architecture(hf.config).qkv == TABLE[found](hf.config).qkv


@pytest.mark.parametrize("family", ["granite_swa", "nanochat", "persimmon"])
def test_what_has_parts_that_no_row_names_resembles_none(family: str) -> None:
    assert resembling(tiny(family)) is None
    with pytest.raises(UnsupportedModelError, match="is not supported; `pahq families`"):
        PAHQModel(tiny(family), FP32)
