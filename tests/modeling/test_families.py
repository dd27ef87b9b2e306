"""Every family: the patched model is Hugging Face's, and both engines agree on any circuit of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pahq_hf import EngineConfig, PAHQConfig, PAHQModel
from pahq_hf.capture import recording as capturing
from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import capture
from pahq_hf.capture.substitutes import with_streams
from pahq_hf.circuit.graph import Graph
from pahq_hf.config import Ablation, Regime
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.modeling.architectures.lookup import graph_spec
from pahq_hf.precision.linear import PAHQLinear
from tests.families import ALL_FAMILIES, USUAL
from tests.helpers import GRAPHS, OTHER_GRAPHS, assert_same_circuit, random_edges
from tests.models import PADDINGS, padded_prompts, random_task, relative_error
from tests.tiers import exhaustive, quick

pytestmark = pytest.mark.crossing

TOLERANCE = 1e-5
# Their rotary embedding and norms compute in float32 whatever the model's dtype.
FLOAT32_ONLY = {"cohere", "cohere_qk", "cohere2", "ernie4_5", "xglm"}
# Families whose heads depend on each other, and those with experts.
COUPLED = ("gemma2", "gemma3", "olmo2", "olmo3", "olmoe", "glm4", "exaone4")
ROUTED = ("mixtral", "qwen2_moe", "qwen3_moe")

families = pytest.mark.parametrize("family", quick(ALL_FAMILIES, *USUAL))
# One for each way in which a family can differ; the others' whole searches are left to the exhaustive tests.
DIFFERENT = (
    *("gpt2", "llama", "gpt_neox", "gemma2", "olmo2", "mixtral", "falcon", "bloom"),
    *("mistral_window", "gpt_oss"),
)
# Of these, what no search of gpt2 and llama, which other tests run everywhere, goes through.
ODD = ("gemma2", "olmo2", "mixtral", "bloom")
every_family_in_time = pytest.mark.parametrize("family", quick(ALL_FAMILIES, *DIFFERENT))


@cache
def patched(
    family: str,
    *,
    regime: Regime = "fp32",
    split: bool = False,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
) -> PAHQModel:
    """A tiny model, patched; shared by all tests of the process, which leave it as it was."""
    config = PAHQConfig(regime=regime, split_kv_groups=split, compute="fp32")
    return PAHQModel(ALL_FAMILIES[family](dtype=dtype, layers=layers), config)


def untouched(family: str) -> PreTrainedModel:
    """The model as Hugging Face computes it."""
    hf = ALL_FAMILIES[family]()
    if family == "falcon_alibi":  # its eager forward adds ALiBi twice (docs/families.md)
        hf.config._attn_implementation = "sdpa"
    return hf


def linears(model: PAHQModel) -> list[PAHQLinear]:
    return list(model.patched.linears())


# -- against Hugging Face ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_logits_are_hugging_faces(family: str, padding: str) -> None:
    prompts = padded_prompts(padding)
    real = prompts["attention_mask"].bool()
    expected = untouched(family)(**prompts, use_cache=False).logits
    for split in (False, True):
        ours = patched(family, split=split)(**prompts, use_cache=False).logits
        assert relative_error(ours[real], expected[real]) < TOLERANCE


@families
@pytest.mark.parametrize("padding", PADDINGS)
def test_contributions_sum_to_the_stream(family: str, padding: str) -> None:
    model = patched(family).patched
    task = random_task(padding=padding)
    run = capture(model, task, task.clean_ids)
    added = with_streams(model, run)
    ours = [*added.attention_in, *added.mlp_in, added.final_in]
    theirs = [*run.attention_in, *run.mlp_in, run.final_in]
    assert len(ours) == len(theirs) == 5
    assert max(map(relative_error, ours, theirs)) < TOLERANCE
    total = run.embedding
    for layer, z, mlp in zip(model.layers, run.z, run.mlp, strict=True):
        total = total + layer.attention.contributions(z).sum(-2) + mlp
        if layer.attention.o_proj.bias is not None:
            total = total + layer.attention.output.multiplier * layer.attention.o_proj.bias
    assert relative_error(total, run.final_in) < TOLERANCE


@families
@torch.no_grad()
def test_generate_is_unchanged(family: str) -> None:
    prompts = {"input_ids": random_task().clean_ids, "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = untouched(family).generate(**prompts, **options)
    assert torch.equal(patched(family).generate(**prompts, **options), expected)


@every_family_in_time
def test_attention_probabilities_are_still_there(family: str) -> None:
    ids = random_task().clean_ids
    found = patched(family)(ids, output_attentions=True, use_cache=False).attentions
    assert len(found) == 2
    for pattern in found:
        assert pattern.shape == (3, 4, 9, 9)
        if family == "gpt_oss":  # its sinks have the rest
            assert (pattern.sum(-1) < 1).all()
            continue
        torch.testing.assert_close(pattern.sum(-1), torch.ones(3, 4, 9))


# -- the graph --------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("split", [False, True])
def test_edges_by_formula_from_the_config_alone(family: str, split: bool) -> None:
    """Every reader sees what was written before it: counted one by one."""
    config = ALL_FAMILIES[family]().config
    spec = graph_spec(config, split_kv_groups=split)
    groups = {"falcon": 1, "gpt_bigcode": 1}.get(family, spec.heads if _all_heads_have_keys(family) else 2)
    assert (spec.layers, spec.heads, spec.kv_groups, spec.mlps) == (2, 4, groups, True)
    parallel = family in PARALLEL
    written, edges = 1, 0
    for _ in range(2):
        edges += written * (4 + 2 * (4 if split else groups))
        edges += written + (0 if parallel else 4)
        written += 5
    assert edges + written == spec.edge_count == Graph(spec).edge_count
    assert patched(family, split=split).graph.spec == spec


PARALLEL = {
    "gptj", "gpt_neox", "phi", "phi_qk", "stablelm_parallel", "falcon", "falcon_new", "cohere", "cohere_qk",
    "cohere2", "codegen",
}  # fmt: skip


def _all_heads_have_keys(family: str) -> bool:
    gpt_like = {"gpt2", "gpt_neo", "gptj", "gpt_neox", "gpt_neox_sequential", "opt", "bloom"}
    return family in gpt_like | {"falcon_alibi", "gpt_bigcode_heads", "xglm", "codegen", "mpt"}


def test_heads_that_a_norm_couples_are_read_together() -> None:
    for family in ALL_FAMILIES:
        graph = patched(family).graph
        q = graph.readers[graph.reader_index("a1.h2<q>")]
        assert [graph.writers[node].name for node in q.nodes] == ["a1.h2"]
        assert len(q.feeds) == (4 if family in COUPLED else 1), family


# -- engines ----------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("ablation", ["corrupted", "mean"])
def test_engines_agree_on_random_circuits(family: str, split: bool, ablation: Ablation) -> None:
    double = family not in FLOAT32_ONLY
    model = patched(family, split=split, dtype=torch.float64 if double else torch.float32)
    # In float64 the untouched families turn a row that padding on the left masks into NaN.
    cases: tuple[tuple[str, str], ...] = (("none", "kl"), ("right", "logit_diff"), ("left", "kl"))
    for padding, metric in cases[:2] if double else cases:
        task = random_task(padding=padding, rows=2, metric=metric)
        hooks = HooksEngine(model.patched, task, metric, ablation=ablation)
        sparse = SparseEngine(model.patched, task, metric, ablation=ablation)
        for seed, share in enumerate((1.0, 0.9, 0.5, 0.2, 0.0)):
            kept = random_edges(model.graph, share, seed)
            wanted = hooks.metric_of(kept)
            slack = 1e-9 if double else 1e-4 * max(1.0, abs(wanted))
            assert abs(sparse.metric_of(kept) - wanted) < slack, (padding, metric, share)


@families
def test_engines_agree_with_padding_on_the_left(family: str) -> None:
    model = patched(family)
    task = random_task(padding="left", rows=2)
    hooks, sparse = HooksEngine(model.patched, task, "kl"), SparseEngine(model.patched, task, "kl")
    for seed, share in enumerate((0.9, 0.5, 0.2)):
        kept = random_edges(model.graph, share, seed)
        assert sparse.metric_of(kept) == pytest.approx(hooks.metric_of(kept), rel=1e-4, abs=1e-6)


def searches(family: str, regime: Regime, split: bool, **options: Any) -> list[Any]:
    """The circuits that both engines find."""
    model = patched(family, regime=regime, split=split)
    task = random_task(padding="left")
    return [
        model.discover(task, threshold=0.02, engine=EngineConfig(engine=name), progress=False, **options)
        for name in ("sparse", "hooks")
    ]


# Whose searches in FP32 test_families_acdc.py and test_sparse_engine.py compare.
COMPARED = {family for family, _ in (GRAPHS | OTHER_GRAPHS).values()}


def assert_searches_agree(family: str, regime: Regime, **options: Any) -> None:
    options |= {"margin": 0.0} if regime == "pahq" else {}
    ours, theirs = searches(family, regime, False, **options)
    assert np.array_equal(ours.kept, theirs.kept)
    assert np.array_equal(ours.tested, theirs.tested) and ours.tested.any()
    assert np.abs(ours.scores - theirs.scores).max() < 1e-5


@families
def test_searches_of_some_readers_agree(family: str) -> None:
    """In every family: of each kind a reader of the last layer, which reads all that the first writes."""
    assert_searches_agree(family, "pahq", readers="logits,m1,a1.*0<*>")


@pytest.mark.parametrize(
    ("regime", "family"),
    [
        *(("pahq", f) if f in ODD else exhaustive("pahq", f) for f in ALL_FAMILIES),
        ("fp32", "bloom"),
        *(exhaustive("fp32", f) for f in ALL_FAMILIES if f not in COMPARED and f != "bloom"),
    ],
)
def test_searches_agree(family: str, regime: Regime) -> None:
    assert_searches_agree(family, regime)


@pytest.mark.parametrize(
    ("regime", "family"),
    [
        ("pahq-literal", "gemma2"),
        ("rtn", "gemma3"),
        *(
            exhaustive("pahq-literal", f)
            for f in ("mixtral", "falcon", "gemma3", "olmo2", "qwen2_moe", "qwen3_moe", "bloom", "granite")
        ),
        *(exhaustive("rtn", f) for f in ("qwen2_moe", "falcon")),
    ],
)
def test_searches_agree_without_anchors(family: str, regime: Regime) -> None:
    ours, theirs = searches(family, regime, False)
    assert np.array_equal(ours.kept, theirs.kept)
    assert np.abs(ours.scores - theirs.scores).max() < 1e-5


@pytest.mark.parametrize(
    "family",
    quick([*COUPLED, "mixtral", "falcon", "stablelm_parallel", "cohere_qk"], "gemma2"),
)
def test_searches_agree_with_groups_split(family: str) -> None:
    ours, theirs = searches(family, "pahq", True)
    assert np.array_equal(ours.kept, theirs.kept)
    assert np.abs(ours.scores - theirs.scores).max() < 1e-5


@pytest.mark.parametrize("family", quick(ALL_FAMILIES, *ODD))
def test_a_second_look_at_everything_takes_fp32s_decisions(family: str) -> None:
    task = random_task(padding="right")
    full = patched(family).discover(task, threshold=0.02, progress=False)
    low = patched(family, regime="pahq").discover(task, threshold=0.02, margin=float("inf"), progress=False)
    assert np.array_equal(full.kept, low.kept) and np.array_equal(full.tested, low.tested)
    assert np.abs(full.scores - low.scores).max() < 1e-4


def effects(family: str, regime: Regime) -> Tensor:
    """What removing one edge of the whole model does to the logit difference."""
    model, task = patched(family, regime=regime), random_task(metric="logit_diff")
    rule = RegimeRule.of(model.pahq_config, model.patched.device)
    engine = SparseEngine(model.patched, task, "logit_diff", rule=rule)
    start, found = engine.begin(model.graph.all_edges), []
    for reader in range(len(model.graph.readers)):
        before = engine.focus(reader)
        edges = [[writer] for writer in model.graph.in_edges(reader)]
        base = start if before is None else before
        found += [value - base for value in engine.try_(reader, edges).values]
    engine.finish()
    return torch.tensor(found)


@every_family_in_time
def test_anchored_effects_stray_less_than_rounded_ones(family: str) -> None:
    exact, anchored, rounded = (effects(family, regime) for regime in ("fp32", "pahq", "rtn"))
    errors = [float((found - exact).abs().mean()) for found in (anchored, rounded)]
    assert 0 < errors[0] < 0.5 * errors[1], errors


@pytest.mark.parametrize("metric", ["kl", "logit_diff", "nll", "prob_diff"])
@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "gptj"])
def test_metrics_of_scaled_capped_and_biased_logits(family: str, metric: str) -> None:
    model = patched(family)
    task = random_task(rows=2, metric=metric)
    hooks, sparse = HooksEngine(model.patched, task, metric), SparseEngine(model.patched, task, metric)
    for seed, share in enumerate((1.0, 0.8, 0.3)):
        kept = random_edges(model.graph, share, seed)
        assert sparse.metric_of(kept) == pytest.approx(hooks.metric_of(kept), rel=1e-4, abs=1e-6)


def assert_same_run(ours: Activations, theirs: Activations) -> None:
    for name in ("embedding", "final_in", "logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    for name in ("z", "mlp", "attention_in", "mlp_in", "masks", "rotary"):
        for one, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            if one is None or other is None:
                assert one is other
                continue
            for mine, its in zip(one, other, strict=True):
                mine, its = torch.broadcast_tensors(mine, its)
                torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("family", ["bloom", "falcon_alibi", "gpt_neo", "gptj", "gemma3", "mistral_window"])
def test_a_run_captured_in_parts_is_the_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = patched(family).patched, random_task(batch=5, padding="left")
    whole = capture(model, task, task.clean_ids)
    monkeypatch.setattr(capturing, "_TOKENS", 2 * task.length)
    parts = capture(model, task, task.clean_ids)
    assert len({id(mask) for mask in parts.masks}) == len({id(mask) for mask in whole.masks})
    for run in (whole, parts):
        run.masks = [None if m is None else m.expand(5, -1, -1, -1) for m in run.masks]
        run.rotary = [None if t is None else tuple(x.expand(5, -1, -1) for x in t) for t in run.rotary]
    assert_same_run(parts, whole)


# -- precision --------------------------------------------------------------------------------------


@every_family_in_time
def test_the_active_head_is_exact_and_its_neighbours_are_not(family: str) -> None:
    full, low = patched(family), PAHQModel(ALL_FAMILIES[family](), PAHQConfig(compute="fp32"))
    low.activate("a1.h2")
    exact, raised = (model.patched.layers[1].attention for model in (full, low))
    x, group = torch.randn(2, 5, 32), 2 * exact.n_groups // 4
    for name, own in (("q", 2), ("k", group), ("v", group)):
        ours, theirs = getattr(raised, name)(x), getattr(exact, name)(x)
        for block in range(ours.shape[1]):
            assert torch.equal(ours[:, block], theirs[:, block]) == (block == own), (name, block)
    z = torch.randn(2, 5, 4, exact.d_head)
    ours, theirs = raised.contributions(z), exact.contributions(z)
    for head in range(4):
        assert torch.equal(ours[..., head, :], theirs[..., head, :]) == (head == 2)
    low.deactivate()
    low.activate("m1")
    mlps = [model.patched.layers[1].mlp(x) for model in (full, low)]
    assert torch.allclose(*mlps, rtol=1e-5, atol=1e-6)
    low.deactivate()
    assert not torch.allclose(low.patched.layers[1].mlp(x), mlps[0], rtol=1e-5, atol=1e-6)


@families
def test_loaded_from_a_folder_fp32_weights_stay_there(family: str, tmp_path: Path) -> None:
    """Low precision in memory, FP32 read from the checkpoint: never a copy, but for fused experts."""
    folder = tmp_path / family
    ALL_FAMILIES[family]().save_pretrained(folder)
    model = PAHQModel.from_pretrained(folder, PAHQConfig(compute="fp32"))
    assert all(linear.low is not None and linear.weight is None for linear in linears(model))
    experts = {
        linear for layer in model.patched.layers if layer.mlp.is_routed for linear in layer.mlp.linears
    }
    for linear in linears(model):
        assert linear.source_block is not None
        copied = type(linear.source_block.source).__name__ == "SpillSource"
        assert not copied or linear in experts
    ids = random_task().clean_ids
    with model.patched.precision.full_precision(), torch.no_grad():
        ours = model(ids, use_cache=False).logits
    assert relative_error(ours, untouched(family)(ids, use_cache=False).logits) < TOLERANCE
    assert model.identity.fingerprint == patched(family).identity.fingerprint


@families
def test_embeddings_in_low_precision(family: str) -> None:
    """What families make of their embedding (Gemma multiplies it) goes on around the table."""
    config = PAHQConfig(compute="fp32", quantize_embeddings=True)
    model = PAHQModel(ALL_FAMILIES[family](), config)
    ids = random_task().clean_ids
    with torch.no_grad():
        expected = patched(family)(ids, use_cache=False).logits
        low = model(ids, use_cache=False).logits
        with model.patched.precision.full_precision(), model.patched.exact_embeddings():
            exact = model(ids, use_cache=False).logits
    assert relative_error(exact, expected) < TOLERANCE < relative_error(low, expected)


def test_runs_repeat_to_the_bit_and_resume(tmp_path: Path) -> None:
    """Coupled heads: the state is a function of the circuit, not of how the search came to it."""
    model, task = patched("gemma2", regime="pahq"), random_task(padding="left")
    options: dict[str, Any] = {"threshold": 0.01, "progress": False}
    whole = model.discover(task, out=tmp_path / "whole", **options)
    lines = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for count in range(2, len(lines), 8):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(b"".join(lines[:count]))
        assert_same_circuit(model.discover(task, out=folder, resume=True, **options), whole)
