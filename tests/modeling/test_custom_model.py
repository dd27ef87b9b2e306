"""`register_architecture`: a model class of one's own, from its row to a circuit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pahq_hf import EngineConfig, PAHQConfig, PAHQModel, register_architecture
from pahq_hf.errors import ConfigError, SelfCheckError, UnsupportedModelError
from pahq_hf.modeling.architectures.describe import describe_families
from pahq_hf.modeling.architectures.families import TABLE
from tests.custom_model import ROW, TwinConfig, TwinForCausalLM, register
from tests.helpers import FP32, named, random_edges
from tests.models import padded_prompts, random_task, randomize_parameters, relative_error


@pytest.fixture(autouse=True)
def table_as_it_was() -> Iterator[None]:
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


def twin() -> TwinForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TwinForCausalLM(TwinConfig())
        randomize_parameters(model)
    return model.eval()


def test_without_a_row_it_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'twin' is not supported.*register_architecture"):
        PAHQModel(twin(), FP32)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_with_a_row_it_computes_as_before(padding: str) -> None:
    register()
    prompts = padded_prompts(padding)
    real = prompts["attention_mask"].bool()
    expected = twin()(**prompts).logits
    model = PAHQModel(twin(), FP32)
    assert model.graph.spec.parallel and model.graph.spec.kv_groups == 2
    assert relative_error(model(**prompts).logits[real], expected[real]) < 1e-5


@pytest.mark.parametrize("regime", ["fp32", "pahq"])
def test_both_engines_find_its_circuit(regime: str) -> None:
    register()
    task = random_task(padding="left")
    config = PAHQConfig(regime=regime, compute="fp32")  # type: ignore[arg-type]
    found = [
        PAHQModel(twin(), config).discover(
            task, threshold=0.02, engine=EngineConfig(engine=engine), progress=False
        )
        for engine in ("sparse", "hooks")
    ]
    assert 0 < found[0].edge_count < found[0].graph.edge_count
    assert named(found[0].graph, found[0].kept) == named(found[1].graph, found[1].kept)
    assert np.abs(found[0].scores - found[1].scores).max() < 1e-5


def test_it_loads_from_a_folder_low_precision_weights_streamed(tmp_path: Path) -> None:
    register()
    AutoConfig.register("twin", TwinConfig, exist_ok=True)
    AutoModelForCausalLM.register(TwinConfig, TwinForCausalLM, exist_ok=True)
    twin().save_pretrained(tmp_path)
    model = PAHQModel.from_pretrained(tmp_path)
    prompts = padded_prompts()
    with model.patched.precision.full_precision():
        assert relative_error(model(**prompts).logits, twin()(**prompts).logits) < 1e-5
    blocks = [linear.source_block for linear in model.patched.linears()]
    sources = {type(block.source).__name__ for block in blocks if block}
    assert sources == {"CheckpointSource"}, "FP32 weights are read from the checkpoint, not from a copy"


def test_a_function_makes_rows_from_configs() -> None:
    register_architecture(
        lambda config: dataclasses.replace(ROW, parallel=config.num_hidden_layers == 2), "twin"
    )
    assert PAHQModel(twin(), FP32).graph.spec.parallel
    with pytest.raises(ConfigError, match="model_type"):
        register_architecture(lambda config: ROW)
    with pytest.raises(
        ConfigError, match="takes an Architecture or a function that makes one; got str: 'mine'"
    ):
        register_architecture("mine")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model_type is the name in a model's config; got int: 3"):
        register_architecture(ROW, 3)  # type: ignore[arg-type]


def test_a_wrong_row_is_refused() -> None:
    register_architecture(dataclasses.replace(ROW, scaling=lambda mixer: 0.3))
    with pytest.raises(SelfCheckError, match="logits"):
        PAHQModel(twin(), FP32)


def test_a_row_may_ask_for_the_hooks_engine(caplog: pytest.LogCaptureFixture) -> None:
    register_architecture(dataclasses.replace(ROW, sparse=False))
    model, task = PAHQModel(twin(), FP32), random_task()
    with caplog.at_level("WARNING", logger="pahq_hf"):
        circuit = model.discover(task, threshold=0.02, progress=False)
    assert "using the hooks engine" in caplog.text and "twin" in caplog.text
    assert circuit.discovery["engine"] == "hooks"
    assert circuit.discovery["evaluations"] < 3 * circuit.discovery["edges"]["tested"], "one at a time"
    register()
    assert np.array_equal(
        circuit.kept, PAHQModel(twin(), FP32).discover(task, threshold=0.02, progress=False).kept
    )


def test_it_is_listed() -> None:
    register()
    facts = {row.family: row for row in describe_families()}["twin"]
    assert (facts.blocks, facts.layers) == ("parallel", "blocks")
    assert facts.attention == "norm_a → mixer.(wq, wk, wv, wo)"


def test_random_edge_sets_agree() -> None:
    from pahq_hf.engine.hooks.engine import HooksEngine
    from pahq_hf.engine.sparse.engine import SparseEngine

    register()
    model, task = PAHQModel(twin(), FP32), random_task(padding="right")
    hooks, sparse = HooksEngine(model.patched, task, "kl"), SparseEngine(model.patched, task, "kl")
    for seed in range(4):
        kept = random_edges(model.graph, 0.25 * seed, seed)
        assert sparse.metric_of(kept) == pytest.approx(hooks.metric_of(kept), rel=1e-4, abs=1e-6)
