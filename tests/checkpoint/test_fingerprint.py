"""The fingerprint tells any two models apart, and knows one again whatever it is kept in."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pahq_hf import Circuit, PAHQConfig, PAHQModel
from pahq_hf.checkpoint.fingerprint import fingerprint
from pahq_hf.checkpoint.legacy_fingerprint import legacy_fingerprint_of
from pahq_hf.errors import CircuitError, RunError
from tests.families import ALL_FAMILIES, USUAL
from tests.helpers import FP32, assert_same_circuit, journal_lines
from tests.models import FAMILIES, random_task, tiny_gpt2, tiny_llama
from tests.tiers import quick

PAHQ = PAHQConfig(compute="fp32")
TASK = random_task()
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "two values of a row swapped": lambda w: _swapped(w, (3, 1), (3, 2)),
    "two rows swapped": lambda w: w[[1, 0, *range(2, len(w))]],
    "columns permuted": lambda w: w.flip(-1),
    "values moved between rows": lambda w: _swapped(w, (0, 1), (4, 1)),
    "a sign": lambda w: w * (1 - 2 * (torch.arange(w.numel()) == 5).view(w.shape)),
}


def _swapped(weight: Tensor, one: tuple[int, int], two: tuple[int, int]) -> Tensor:
    out = weight.clone()
    out[one], out[two] = weight[two], weight[one]
    return out


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_order_counts(change: str, name: str) -> None:
    hf = tiny_llama()
    hf.get_parameter(name).data = CHANGES[change](hf.get_parameter(name).data)
    assert fingerprint(hf) != fingerprint(tiny_llama())


@pytest.mark.parametrize("change", CHANGES)
def test_a_circuit_of_such_a_model_is_refused(change: str) -> None:
    circuit = PAHQModel(tiny_llama(), FP32).attribute(TASK, topn=5)
    hf = tiny_llama()
    weight = hf.model.layers[1].mlp.up_proj.weight
    weight.data = CHANGES[change](weight.data).contiguous()
    other = PAHQModel(hf, FP32)
    with pytest.raises(CircuitError, match="other weights"):
        other.evaluate(circuit, TASK)
    assert other.evaluate(circuit, TASK, any_weights=True)["edges"] == 5


def test_weights_that_change_places_are_another_model() -> None:
    hf = tiny_llama()
    mlp = hf.model.layers[0].mlp
    mlp.up_proj.weight.data, mlp.gate_proj.weight.data = mlp.gate_proj.weight.data, mlp.up_proj.weight.data
    assert fingerprint(hf) != fingerprint(tiny_llama())


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_one_identity_of_file_copy_and_model(family: str, tmp_path: Path) -> None:
    """A BF16 file streamed and whole, its FP32 copy, that in FP64, and all of them patched."""
    FAMILIES[family](dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    whole = PAHQModel.from_pretrained(tmp_path / "bf16", FP32)
    whole.base_model.save_pretrained(tmp_path / "fp32")
    marks = {
        PAHQModel.from_pretrained(tmp_path / name, config).identity.fingerprint
        for name in ("bf16", "fp32")
        for config in (FP32, PAHQ)
    }
    marks.add(PAHQModel.from_pretrained(tmp_path / "fp32", FP32, dtype=torch.float64).identity.fingerprint)
    assert marks == {whole.identity.fingerprint} and next(iter(marks)).startswith("xxh3-")


# -- runs and circuits of earlier versions ------------------------------------------------------------


def earlier(hf: PreTrainedModel) -> str:
    """The fingerprint of versions up to 0.1, as they computed it: sums of rows."""
    digest = hashlib.sha256(hf.config.model_type.encode())
    for name, parameter in hf.named_parameters():
        digest.update(repr((name, tuple(parameter.shape))).encode())
        bits = parameter.detach().to(torch.float32).contiguous().view(torch.int32)
        digest.update(bits.sum(-1, dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()[:32]


def test_the_earlier_fingerprint_is_what_it_was() -> None:
    assert (
        earlier(tiny_llama()) == "ba2fa86d2d4561afbe72a5c0b2deb880"
        and earlier(tiny_gpt2()) == "bb7af4f0ba339c7054fb824d6f219d9e"
    )


@pytest.mark.crossing
@pytest.mark.parametrize("family", quick(ALL_FAMILIES, *USUAL))
@pytest.mark.parametrize("config", [PAHQ, FP32], ids=["pahq", "fp32"])
def test_the_earlier_fingerprint_of_a_patched_model(family: str, config: PAHQConfig) -> None:
    model = PAHQModel(ALL_FAMILIES[family](), config)
    assert legacy_fingerprint_of(model.patched) == earlier(ALL_FAMILIES[family]())


@pytest.mark.parametrize("config", [FP32, PAHQ], ids=["fp32", "pahq"])
def test_circuits_of_earlier_versions_load_with_a_note(
    config: PAHQConfig, caplog: pytest.LogCaptureFixture
) -> None:
    model = PAHQModel(tiny_gpt2(), config)
    circuit = model.attribute(TASK, method="random", topn=5)
    circuit.model["fingerprint"] = earlier(tiny_gpt2())
    with caplog.at_level(logging.WARNING, "pahq_hf"):
        assert model.evaluate(circuit, TASK)["edges"] == 5
    assert "fingerprint of an earlier version" in caplog.text
    circuit.model["fingerprint"] = earlier(tiny_gpt2(seed=1))
    with pytest.raises(CircuitError, match="other weights"):
        model.evaluate(circuit, TASK)


def outdated(folder: Path, mark: str, new: str) -> None:
    """Let a run's folder look as an earlier version left it."""
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text().replace(new, mark))
    for path in folder.rglob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().replace(new, mark).splitlines()]
        for line in lines:
            if isinstance(line, dict):
                line.pop("check", None)  # those had no checksums
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def discover(model: PAHQModel, out: Path, **options: Any) -> Circuit:
    return model.discover(TASK, threshold=0.05, out=out, progress=False, **options)


def test_finished_runs_of_earlier_versions_are_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = PAHQModel(tiny_gpt2(), FP32)
    circuit = discover(model, tmp_path / "run")
    outdated(tmp_path / "run", earlier(tiny_gpt2()), model.identity.fingerprint)
    again = discover(model, tmp_path / "run", resume=True)
    assert np.array_equal(again.kept, circuit.kept)
    assert "fingerprint of an earlier version" in caplog.text
    with pytest.raises(RunError, match="another run: its model"):
        discover(PAHQModel(tiny_gpt2(seed=1), FP32), tmp_path / "run", resume=True)


@pytest.mark.parametrize("config", [FP32, PAHQ], ids=["fp32", "pahq"])
def test_interrupted_runs_of_earlier_versions_are_resumed(config: PAHQConfig, tmp_path: Path) -> None:
    model = PAHQModel(tiny_gpt2(), config)
    whole = discover(model, tmp_path / "whole")
    discover(model, tmp_path / "run")
    for name in ("circuit.json", "discovery.json", "scores.safetensors"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "journal.jsonl").write_bytes(b"".join(journal_lines(tmp_path / "run")[:6]))
    mark = earlier(tiny_gpt2())
    outdated(tmp_path / "run", mark, model.identity.fingerprint)
    with pytest.raises(RunError, match="another run: its model"):
        discover(PAHQModel(tiny_gpt2(seed=1), config), tmp_path / "run", resume=True)
    circuit = discover(model, tmp_path / "run", resume=True)
    assert circuit.discovery["resumed_readers"] == 5
    assert circuit.discovery["header"].pop("model") == mark
    assert whole.discovery["header"].pop("model") == model.identity.fingerprint
    assert_same_circuit(circuit, whole)
    assert circuit.model["fingerprint"] == model.identity.fingerprint


def test_sweeps_of_earlier_versions_are_resumed(tmp_path: Path) -> None:
    model = PAHQModel(tiny_gpt2(), FP32)
    options: dict[str, Any] = {"out": tmp_path / "sweep", "progress": False}
    model.sweep(TASK, thresholds=[0.2, 0.05], **options)
    outdated(tmp_path / "sweep", earlier(tiny_gpt2()), model.identity.fingerprint)
    more = model.sweep(TASK, thresholds=[0.2, 0.1, 0.05], resume=True, **options)
    alone = model.discover(TASK, threshold=0.1, progress=False)
    assert np.array_equal(more[0.1].kept, alone.kept) and len(more) == 3
    assert len(model.sweep(TASK, thresholds=[0.2, 0.1, 0.05], resume=True, **options)) == 3
