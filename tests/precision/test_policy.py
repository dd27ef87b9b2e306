"""Formats per component, and embeddings in low precision."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from pahq_hf import Circuit, PAHQConfig, PAHQModel
from pahq_hf.config import EngineConfig
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.errors import ConfigError, RunError
from pahq_hf.precision.embeddings import EmbeddingMatrix, patch_embedding
from pahq_hf.precision.formats.registry import quantize
from pahq_hf.precision.fp32.source import SourceBlock
from pahq_hf.precision.policy import formats_of
from pahq_hf.search.acdc import search
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.batches import AdaptiveBatch, FixedBatch
from tests.helpers import MemorySource, id_rows, run_main, save_tiny, wrapped, write_rows
from tests.models import FAMILIES, HEADS, KV_HEADS, VOCAB, WIDTH, padded_prompts, random_task
from tests.tiers import examples

pytestmark = pytest.mark.crossing

TASK = random_task(batch=3, length=7, padding="right", seed=11)
FULL_TASK = random_task(batch=3, length=6, seed=2)
IDS = padded_prompts()["input_ids"]
MIXED: dict[str, str] = {"m*": "bf16", "a0.*": "int8"}
NAMES = [f"a{layer}.h{head}" for layer in range(2) for head in range(HEADS)] + ["m0", "m1"]
RISING: tuple[str, ...] = ("fp8-e5m2", "fp8", "int8", "bf16")  # from coarse to fine


def mixed(family: str, policy: dict[str, str], fmt: str = "fp8", **options: Any) -> PAHQModel:
    regime: Any = options.pop("regime", "rtn")
    return PAHQModel(FAMILIES[family](), PAHQConfig(regime, fmt, policy=policy, **options))


def blocks(model: PAHQModel, name: str) -> list[Tensor]:
    """The weights of a component: q, k, v and o of a head, or the MLP's."""
    parts = model.patched.precision.parts[name]
    return [linear.dense(region.rows, region.cols) for linear, region in parts]


@cache
def uniform(family: str, fmt: Any) -> dict[str, list[Tensor]]:
    """The weights of every component in a model of one format."""
    model = wrapped(family) if fmt == "fp32" else wrapped(family, regime="rtn", fmt=fmt)
    return {name: blocks(model, name) for name in NAMES}


def assert_blocks(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Assert that they are the same weights."""
    assert len(found) == len(wanted) >= 2
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


# -- which format -----------------------------------------------------------------------------------


@given(
    policy=st.lists(
        st.tuples(
            st.sampled_from(["*", "a*", "m*", "a0.*", "a?.h1", "m1", "a1.h[12]", "*1"]),
            st.sampled_from(RISING),
        ),
        unique_by=lambda entry: entry[0],
        max_size=5,
    )
)
@examples(60)
def test_the_first_pattern_that_matches_counts(policy: list[tuple[str, str]]) -> None:
    found = formats_of(NAMES, dict(policy), "mx")
    matches = {  # spelt out
        "*": set(NAMES), "a*": set(NAMES[:8]), "m*": {"m0", "m1"}, "a0.*": set(NAMES[:4]), "m1": {"m1"},
        "a?.h1": {"a0.h1", "a1.h1"}, "a1.h[12]": {"a1.h1", "a1.h2"}, "*1": {"a0.h1", "a1.h1", "m1"},
    }  # fmt: skip
    for name, fmt in zip(NAMES, found, strict=True):
        assert fmt == next((fmt for pattern, fmt in policy if name in matches[pattern]), "mx")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fmt", ["fp8", "fp8-e5m2", "mx"])
def test_a_policy_gives_the_weights_of_uniform_models(family: str, fmt: str) -> None:
    model, seen = mixed(family, MIXED, fmt), set()
    for name in NAMES:
        wanted: Any = "bf16" if name[0] == "m" else "int8" if name.startswith("a0") else fmt
        assert_blocks(blocks(model, name), uniform(family, wanted)[name])
        assert not torch.equal(blocks(model, name)[0], uniform(family, "fp32")[name][0])
        seen.add(wanted)
    assert seen == {"bf16", "int8", fmt}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("fine", ["int8", "bf16"])
def test_single_heads(family: str, fine: str) -> None:
    """Rows of q are those of uniform models; columns of o have scales of their own."""
    model = mixed(family, {"a0.h1": fine, "a1.h[23]": fine})
    for name in NAMES[:8]:
        fmt: Any = fine if name in ("a0.h1", "a1.h2", "a1.h3") else "fp8"
        q, _, _, o = blocks(model, name)
        assert torch.equal(q, uniform(family, fmt)[name][0])
        full = uniform(family, "fp32")[name][3].contiguous()
        assert torch.equal(o, quantize(full, fmt).dense(slice(0, WIDTH), slice(0, full.shape[1])))
    for name in ("m0", "m1"):
        assert_blocks(blocks(model, name), uniform(family, "fp8")[name])


@pytest.mark.parametrize("first", RISING)
@pytest.mark.parametrize("second", RISING)
def test_shared_keys_and_values_get_the_finest_format(first: str, second: str) -> None:
    """Heads 2 and 3 of the tiny Llama share a group; heads 0 and 1 share the other."""
    assert HEADS // KV_HEADS == 2
    model = mixed("llama", {"a0.h2": first, "a0.h3": second}, "fp8-e5m2")
    finest = max(first, second, key=RISING.index)
    for name, own in (("a0.h2", first), ("a0.h3", second)):
        q, k, v, _ = blocks(model, name)
        assert torch.equal(q, uniform("llama", own)[name][0])
        assert torch.equal(k, uniform("llama", finest)[name][1])
        assert torch.equal(v, uniform("llama", finest)[name][2])
    for name in ("a0.h0", "a0.h1"):
        assert_blocks(blocks(model, name)[:3], uniform("llama", "fp8-e5m2")[name][:3])


def test_a_mixed_model_takes_the_bytes_of_its_parts() -> None:
    def size(policy: dict[str, str]) -> int:
        return mixed("llama", policy).patched.precision.nbytes

    elements, rows = 3 * WIDTH * 2 * WIDTH, 2 * 2 * WIDTH + WIDTH  # of one MLP
    assert size({"m0": "bf16"}) - size({}) == elements - 4 * rows
    assert size({"m*": "bf16"}) - size({}) == 2 * (elements - 4 * rows)


def test_activation_raises_a_component_of_any_format() -> None:
    model = mixed("llama", {"a0.h1": "int8", "m0": "mx"}, regime="pahq-literal")
    for name in ("a0.h1", "a0.h2", "m0"):
        before = {other: blocks(model, other) for other in NAMES}
        model.activate(name)
        assert_blocks(blocks(model, name), uniform("llama", "fp32")[name])
        model.deactivate()
        for other in NAMES:
            assert_blocks(blocks(model, other), before[other])


# -- as a configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["b*", "a2.*", "m2", "a0.h4", "q", "A0.*", "", "m0 "])
def test_a_pattern_that_matches_nothing(pattern: str) -> None:
    with pytest.raises(
        ConfigError, match=r"matches no component; they are named like a0\.h1 and m0"
    ) as caught:
        mixed("llama", {"*": "int8", pattern: "bf16"})
    assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": {"m*": "fp4"}}, "the policy's format for 'm\\*' must be one of fp8, .*; got 'fp4'"),
        ({"policy": {"m*": "fp32"}}, "must be one of"),
        ({"policy": [("m*", "bf16")]}, "policy must map patterns to formats"),
        ({"policy": None}, "policy must map patterns to formats"),
        ({"policy": {3: "bf16"}}, "policy"),
        ({"policy": {"m*": "bf16"}, "regime": "fp32"}, "need a low-precision regime, not fp32"),
        ({"quantize_embeddings": True, "regime": "fp32"}, "need a low-precision regime, not fp32"),
    ],
    ids=str,
)
def test_policies_that_are_none(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PAHQConfig(**options)
    with pytest.raises(ConfigError, match=words):
        PAHQConfig.from_dict(options)


def test_a_policy_goes_to_json_and_back() -> None:
    """In its order, which counts."""
    config = PAHQConfig("pahq", "mx", policy={"m1": "int8", "*": "bf16"}, quantize_embeddings=True)
    for again in (
        PAHQConfig.from_dict(config.to_dict()),
        PAHQConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
    ):
        assert again == config and hash(again) == hash(config)
        assert list(again.policy.items()) == [("m1", "int8"), ("*", "bf16")] and again.quantize_embeddings


def run(model: PAHQModel, out: Path, **options: Any) -> Circuit:
    return model.discover(TASK, threshold=0.05, out=out, progress=False, **options)


def test_a_run_shows_its_policy_and_refuses_another(tmp_path: Path) -> None:
    model = mixed("llama", {"m*": "bf16", "m0": "int8"}, regime="pahq", quantize_embeddings=True)
    circuit = run(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "discovery.json").read_text())
    for facts in (written["precision"], written["header"]["precision"], circuit.discovery["precision"]):
        assert facts["policy"] == {"m*": "bf16", "m0": "int8"} and facts["quantize_embeddings"] is True
    assert np.array_equal(run(model, tmp_path / "out", resume=True).scores, circuit.scores)
    (tmp_path / "half").mkdir()
    lines = (tmp_path / "out" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "half" / "journal.jsonl").write_bytes(b"".join(lines[:5]))
    others: list[dict[str, str]] = [{}, {"m*": "bf16"}, {"m*": "bf16", "m0": "bf16"}]
    for policy in others:
        other = mixed("llama", policy, regime="pahq", quantize_embeddings=True)
        for folder in ("out", "half"):
            with pytest.raises(RunError, match="holds another run: its p"):
                run(other, tmp_path / folder, resume=True)


def test_the_order_of_a_policy_is_another_run(tmp_path: Path) -> None:
    """The first match counts: the same entries the other way round are other weights."""
    run(mixed("llama", {"m*": "fp8-e5m2", "m0": "bf16"}), tmp_path / "out")
    other = mixed("llama", {"m0": "bf16", "m*": "fp8-e5m2"})
    assert not torch.equal(blocks(other, "m0")[0], uniform("llama", "fp8-e5m2")["m0"][0])
    with pytest.raises(RunError, match=r"holds another run: its policy order is"):
        run(other, tmp_path / "out", resume=True)


def test_policies_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, rows = save_tiny(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", id_rows(FULL_TASK))
    command = ["discover", str(folder), "--task", str(rows), "--out", str(tmp_path / "out"), "--json"]
    assert run_main(*command, "--policy", "m*=bf16", "--policy", "a0.*=int8", "--quantize-embeddings") == 0
    facts = json.loads(capfd.readouterr().out)["precision"]
    assert facts["policy"] == MIXED and facts["quantize_embeddings"] is True
    for text, words in (
        ("q*=bf16", "'q*' matches no component"), ("m*=fp4", "must be one of"), ("m*", "cannot read the pol"),
        ("=bf16", "cannot read the policy"), ("m*=", "cannot read the policy"),
    ):  # fmt: skip
        bad = [*command[:4], "--out", str(tmp_path / "bad"), "--policy", text]
        assert run_main(*bad) == 2
        out, err = capfd.readouterr()
        assert not out and words in err.splitlines()[-1] and not (tmp_path / "bad").exists()


# -- decisions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "family", "tables"),
    [
        ("sparse", "gpt2", False),
        ("sparse", "gpt2", True),
        ("sparse", "llama", True),
        ("hooks", "llama", False),
    ],
)
def test_with_an_infinite_margin_decisions_are_fp32s(kind: str, family: str, tables: bool) -> None:
    policy: dict[str, str] = {"a0.h1": "int8", "a0.*": "fp8-e5m2", "m1": "mx", "m*": "bf16"}
    config = PAHQConfig("pahq", "fp8", policy=policy, quantize_embeddings=tables)
    model = PAHQModel(FAMILIES[family](), config).patched
    readers = "logits,m*" if kind == "hooks" else None  # it is slow
    for metric, threshold in (("kl", 0.03 if readers else 0.003), ("logit_diff", 0.1)):
        chosen: Any = metric
        options = ACDCConfig(threshold, readers=readers)
        exact = search(SparseEngine(wrapped(family).patched, TASK, chosen), options, batch=AdaptiveBatch())
        make: Any = SparseEngine if kind == "sparse" else HooksEngine
        engine = make(model, TASK, chosen, rule=RegimeRule.of(replace(config, compute="bf16"), model.device))
        batch = AdaptiveBatch() if kind == "sparse" else FixedBatch(3)
        ours = search(engine, replace(options, margin=math.inf), batch=batch)
        assert np.array_equal(ours.kept, exact.kept) and np.array_equal(ours.tested, exact.tested)
        assert np.abs(ours.scores - exact.scores).max() <= 1e-5
        assert 0 < (ours.kept & exact.tested).sum() < exact.tested.sum()


# -- embeddings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("regime", ["pahq", "pahq-literal", "rtn"])
@pytest.mark.parametrize("engine", ["sparse", "hooks"])
@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
def test_discovery_does_not_see_rounded_embeddings(
    family: str, regime: Any, engine: Any, metric: Any
) -> None:
    found = []
    for tables in (False, True):
        model = mixed(family, {}, regime=regime, quantize_embeddings=tables)
        options: dict[str, Any] = {"threshold": 0.03, "metric": metric, "progress": False}
        options["engine"] = EngineConfig(engine=engine)
        options["readers"] = "logits,m*" if engine == "hooks" else None  # it is slow
        found.append(model.discover(TASK, **options))
    plain, rounded = found
    assert np.array_equal(rounded.scores, plain.scores) and np.array_equal(rounded.kept, plain.kept)
    assert np.array_equal(rounded.tested, plain.tested) and rounded.edge_count > 0
    assert rounded.discovery["metric"] == plain.discovery["metric"]
    assert rounded.model == plain.model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fmt", ["fp8", "fp8-e5m2", "int8", "mx"])
@torch.no_grad()
def test_forward_and_generate_see_rounded_embeddings(family: str, fmt: str) -> None:
    ours = mixed(family, {}, fmt, quantize_embeddings=True)
    hf, exact = FAMILIES[family](), mixed(family, {}, fmt)
    tied = hf.lm_head.weight is hf.get_input_embeddings().weight
    assert len(ours.patched.embedding_matrices) == (1 if tied else 2)
    assert (ours.patched.embedding.table is ours.patched.unembedding) == tied
    for weight in {hf.lm_head.weight, hf.get_input_embeddings().weight}:
        full = weight.clone()
        weight.copy_(quantize(full, fmt).dense(slice(0, VOCAB), slice(0, WIDTH)))
        assert not torch.equal(weight, full)
    expected = PAHQModel(hf, PAHQConfig("rtn", fmt))
    assert torch.equal(ours(IDS).logits, expected(IDS).logits)
    assert not torch.allclose(ours(IDS).logits, exact(IDS).logits, rtol=1e-3, atol=1e-3)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(IDS, **options), expected.generate(IDS, **options))
    with ours.patched.exact_embeddings():
        assert torch.equal(ours(IDS).logits, exact(IDS).logits)
    held = sum(table.nbytes for table in ours.patched.embedding_matrices)
    assert held <= 0.29 * 4 * VOCAB * WIDTH * len(ours.patched.embedding_matrices)


@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_a_familys_own_embedding_stays_what_it_is(kind: str) -> None:
    """Gemma multiplies rows by sqrt(d_model), rounded or not."""
    make: Any = nn.Embedding if kind == "plain" else Gemma3TextScaledWordEmbedding
    more: dict[str, Any] = {"embed_scale": 5.5} if kind == "scaled" else {}
    module, factor = make(VOCAB, WIDTH, 0, **more), 5.5 if kind == "scaled" else 1.0
    full = module.weight.detach().clone()
    expected = module(IDS).detach()
    table = EmbeddingMatrix(full, None)
    patch_embedding(module, table)
    assert torch.equal(module(IDS), expected)
    table.lower("fp8", SourceBlock(MemorySource({"w": full}), "w", False, ((0, VOCAB),)))
    decoded = quantize(full, "fp8").dense(slice(0, VOCAB), slice(0, WIDTH))
    assert torch.equal(module(IDS), decoded[IDS] * factor) and not torch.equal(module(IDS), expected)
    assert isinstance(module, make)
    with table.shared.mode.exact_embeddings():
        assert torch.equal(module(IDS), expected)
    assert torch.equal(table.exact_rows(IDS), full[IDS])


def test_a_large_vocabulary_is_scored_in_blocks() -> None:
    weight, bias, x = torch.randn(5000, 16), torch.randn(5000), torch.randn(2, 3, 16)
    table = EmbeddingMatrix(weight, bias)
    table.lower("int8", SourceBlock(MemorySource({"w": weight}), "w", False, ((0, 5000),)))
    decoded = quantize(weight, "int8").dense(slice(0, 5000), slice(0, 16))
    torch.testing.assert_close(table(x), x @ decoded.T + bias)
    assert torch.equal(table.exact(slice(7, 2500)), weight[7:2500])
