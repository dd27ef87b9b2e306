"""`model.apply(circuit)`: inside, the Hugging Face model is its circuit; outside, itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, pipeline

from pahq_hf import Circuit, PAHQConfig, PAHQModel, Task
from pahq_hf.capture.mean_activations import means_of
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.errors import CircuitError, ConfigError, TaskError
from tests.families import ALL_FAMILIES
from tests.helpers import FP32, random_edges, wrapped
from tests.models import padded_prompts, random_task, relative_error, word_tokenizer
from tests.plain import answers

FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "opt", "bloom", "mixtral", "falcon", "olmo2", "granite")


# Those that are tested at length come last.
SPEAKERS = ["gpt2", "llama", "gemma2", "falcon", "bloom", "opt"]
SPEAKERS += [
    pytest.param(name, marks=pytest.mark.exhaustive) for name in ALL_FAMILIES if name not in SPEAKERS
]


def circuit_of(model: PAHQModel, kept: BoolArray, means: Any = None) -> Circuit:
    nothing = np.zeros(kept.shape)
    return Circuit(model.graph, kept, nothing, nothing.astype(bool), model.identity.to_json(), {}, means)


def hub_model(family: str, **options: Any) -> PAHQModel:
    return PAHQModel(ALL_FAMILIES[family](), PAHQConfig(**options) if options else FP32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_with_corrupted_prompts_it_is_the_hooks_engine(family: str, padding: str) -> None:
    model, task = hub_model(family), random_task(padding=padding, rows=2)
    engine = HooksEngine(model.patched, task, "kl")
    for seed, share in enumerate((1.0, 0.8, 0.3, 0.0)):
        kept = random_edges(model.graph, share, seed)
        expected = engine.logits(kept)
        corrupted: dict[str, Any] = {
            "corrupted": task.corrupted_ids,
            "corrupted_mask": task.attention_mask,
        }
        with model.apply(circuit_of(model, kept), **corrupted) as inside:
            assert inside is model
            assert relative_error(answers(model, task), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_edges_it_is_the_model_and_afterwards_too(family: str) -> None:
    model, task = hub_model(family), random_task(padding="left")
    before = answers(model, task)
    means = means_of(HooksEngine(model.patched, task, "kl").corrupted, task)
    with model.apply(circuit_of(model, model.graph.all_edges), means=means):
        assert relative_error(answers(model, task), before) < 1e-5
    with model.apply(circuit_of(model, model.graph.no_edges()), means=means):
        nothing = answers(model, task)
    assert relative_error(nothing, before) > 1e-2
    assert torch.equal(answers(model, task), before)
    # Without any edge nothing of the prompt reaches the logits.
    torch.testing.assert_close(nothing, nothing[:1].expand_as(nothing), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "falcon"])
def test_generate_with_and_without_a_cache_is_the_same(family: str) -> None:
    model, task = hub_model(family), random_task()
    means = means_of(HooksEngine(model.patched, task, "kl").corrupted, task)
    circuit = circuit_of(model, random_edges(model.graph, 0.3, 3), means)
    inputs = {"input_ids": task.clean_ids, "attention_mask": task.attention_mask}
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**inputs, **options)
    with model.apply(circuit):
        found = [model.generate(**inputs, **options, use_cache=use) for use in (True, False)]
        assert torch.equal(*found)
    assert not torch.equal(found[0], plain), "the circuit should say something else"
    assert torch.equal(model.generate(**inputs, **options), plain)


def test_means_are_those_of_real_tokens() -> None:
    model, task = hub_model("llama"), random_task(padding="right")
    run = HooksEngine(model.patched, task, "kl").corrupted
    means, real = means_of(run, task), task.attention_mask.bool()
    np.testing.assert_allclose(means["z"][1, 2], run.z[1][real][:, 2].mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(means["mlp"][0], run.mlp[0][real].mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(means["embedding"], run.embedding[real].mean(0), rtol=1e-5, atol=1e-7)


def test_low_precision_models_are_applied_in_fp32_unless_asked() -> None:
    full, low, task = hub_model("llama"), hub_model("llama", compute="fp32"), random_task()
    kept = random_edges(full.graph, 0.6, 1)
    with full.apply(circuit_of(full, kept), corrupted=task.corrupted_ids):
        expected = answers(full, task)
    with low.apply(circuit_of(low, kept), corrupted=task.corrupted_ids):
        assert relative_error(answers(low, task), expected) < 1e-5
    with low.apply(circuit_of(low, kept), corrupted=task.corrupted_ids, exact=False):
        assert 1e-4 < relative_error(answers(low, task), expected) < 0.2


class Stop(Exception):
    pass


def test_everything_is_restored_after_an_exception() -> None:
    model, task = hub_model("gpt2", compute="fp32"), random_task()
    before, count = answers(model, task), hook_count(model)
    circuit = circuit_of(model, random_edges(model.graph, 0.5, 0))
    with pytest.raises(Stop), model.apply(circuit, corrupted=task.corrupted_ids):
        assert hook_count(model) > count
        raise Stop
    assert hook_count(model) == count and not model.patched.is_applied
    assert torch.equal(answers(model, task), before)


def hook_count(model: PAHQModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nesting_and_searching_inside_are_refused() -> None:
    model, task = hub_model("gpt2"), random_task()
    circuit = circuit_of(model, random_edges(model.graph, 0.5, 0))
    with model.apply(circuit, corrupted=task.corrupted_ids):
        inside = answers(model, task)
        with pytest.raises(ConfigError, match="applied already"):
            model.apply(circuit, corrupted=task.corrupted_ids).__enter__()
        with pytest.raises(ConfigError, match="circuit is applied to this model"):
            model.discover(task, threshold=0.1, progress=False)
        with pytest.raises(ConfigError, match="circuit is applied to this model"):
            model.evaluate(circuit, task)
        assert torch.equal(answers(model, task), inside)


def test_what_cannot_be_applied_is_refused() -> None:
    model, task = hub_model("llama"), random_task()
    kept = model.graph.all_edges
    with pytest.raises(ConfigError, match="without mean activations"), model.apply(circuit_of(model, kept)):
        pass
    means = means_of(HooksEngine(model.patched, task, "kl").corrupted, task)
    circuit = circuit_of(model, kept, means)
    with (
        pytest.raises(ConfigError, match="not both"),
        model.apply(circuit, corrupted=task.corrupted_ids, means=means),
    ):
        pass
    other = circuit_of(wrapped("gpt2"), wrapped("gpt2").graph.all_edges, means)
    with pytest.raises(CircuitError, match="another model"), model.apply(other):
        pass
    wrong = dict(means) | {"z": means["z"][:, :2]}
    with pytest.raises(CircuitError, match="stored means have shapes"), model.apply(circuit, means=wrong):
        pass
    with (
        pytest.raises(ConfigError, match=r"corrupted prompts have shape \(3, 9\)"),
        model.apply(circuit, corrupted=task.corrupted_ids),
    ):
        model(task.clean_ids[:, :5])
    assert not model.patched.is_applied and model(task.clean_ids).logits.isfinite().all()


def test_circuits_of_other_weights_are_refused_unless_allowed() -> None:
    model, task = hub_model("llama"), random_task()
    tuned = PAHQModel(ALL_FAMILIES["llama"](seed=1), FP32)
    circuit = circuit_of(tuned, model.graph.all_edges)
    with pytest.raises(CircuitError, match=r"other weights.*--any-weights"):
        model.evaluate(circuit, task)
    with (
        pytest.raises(CircuitError, match="other weights"),
        model.apply(circuit, corrupted=task.corrupted_ids),
    ):
        pass
    assert model.evaluate(circuit, task, any_weights=True)["kl"] == pytest.approx(0, abs=1e-6)
    with model.apply(circuit, corrupted=task.corrupted_ids, any_weights=True):
        assert answers(model, task).isfinite().all()


def test_a_discovered_circuit_applies_as_it_comes(tmp_path: Any) -> None:
    model, task = hub_model("llama", compute="fp32"), random_task()
    found = model.discover(task, threshold=0.02, out=tmp_path / "run", progress=False)
    again = Circuit.from_pretrained(tmp_path / "run")
    logits = []
    for circuit in (found, again):
        with model.apply(circuit):
            logits.append(answers(model, task))
    assert torch.equal(*logits)


def test_a_pipeline_runs_the_circuit() -> None:
    model, task = hub_model("gpt2"), random_task()
    means = means_of(HooksEngine(model.patched, task, "kl").corrupted, task)
    write = pipeline("text-generation", model=model.base_model, tokenizer=word_tokenizer())
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    plain = write("w3 w5 w7", **options)
    with model.apply(circuit_of(model, model.graph.no_edges(), means)):
        assert write("w3 w5 w7", **options) != plain
        assert write("w3 w5 w7", **options) == write("w9 w2 w8", **options)
    assert write("w3 w5 w7", **options) == plain


def test_modules_apply_still_works() -> None:
    """`nn.Module.apply` calls a function on every module."""
    seen: list[nn.Module] = []
    model = hub_model("gpt2")
    assert model.apply(seen.append) is model  # type: ignore[arg-type]
    assert model in seen and len(seen) == len(list(model.modules()))


def test_prompts_with_padding_keep_their_positions() -> None:
    model = hub_model("llama")
    means = means_of(HooksEngine(model.patched, random_task(), "kl").corrupted, random_task())
    circuit = circuit_of(model, random_edges(model.graph, 0.7, 0), means)
    left = padded_prompts("left")
    with model.apply(circuit), torch.no_grad():
        together = model(**left).logits
        for row, real in enumerate(left["attention_mask"].bool()):
            alone = model(input_ids=left["input_ids"][row : row + 1, real]).logits
            assert relative_error(together[row, real], alone[0]) < 1e-4


# -- corrupted prompts that run along ----------------------------------------------------------------


def spoken_naively(model: PAHQModel, kept: BoolArray, task: Task, count: int) -> Tensor:
    """Greedy tokens under a circuit, each from the hooks engine's run of both whole prompts so far.

    The partner's prompts are continued with the circuit's own tokens.
    """
    for _ in range(count):
        following = HooksEngine(model.patched, task, "kl").logits(kept).argmax(-1)
        task = Task(
            "so far",
            torch.cat([task.clean_ids, following[:, None]], dim=1),
            torch.cat([task.corrupted_ids, following[:, None]], dim=1),
            torch.cat([task.attention_mask, torch.ones_like(following)[:, None]], dim=1),
            task.answer_rows,
            torch.full_like(task.answer_positions, task.length),
            task.answers,
            task.distractors,
        )
    return task.clean_ids[:, -count:]


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", SPEAKERS)
def test_generate_beside_corrupted_prompts_is_a_naive_loop(family: str, padding: str) -> None:
    model, task = hub_model(family), random_task(padding=padding, length=6)
    kept = random_edges(model.graph, 0.4, 2)
    expected = spoken_naively(model, kept, task, 4)
    inputs = {"input_ids": task.clean_ids, "attention_mask": task.attention_mask}
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(**inputs, **options)
    for mask in (None, task.attention_mask):
        with model.apply(circuit_of(model, kept), corrupted=task.corrupted_ids, corrupted_mask=mask):
            for use_cache in (True, False):
                said = model.generate(**inputs, **options, use_cache=use_cache)
                assert torch.equal(said[:, task.length :], expected), (mask, use_cache)
    if family in ("gpt2", "llama"):  # some tiny models repeat a token for ever, and so do their circuits
        assert not torch.equal(plain[:, task.length :], expected), "the circuit should say something else"
    assert torch.equal(model.generate(**inputs, **options), plain)


def test_a_cached_loop_by_hand_and_chunks_of_a_prompt_run_along() -> None:
    model, task = hub_model("llama"), random_task(length=6)
    kept = random_edges(model.graph, 0.4, 2)
    expected = spoken_naively(model, kept, task, 3)
    with torch.no_grad(), model.apply(circuit_of(model, kept), corrupted=task.corrupted_ids):
        out, said = model(task.clean_ids), []
        for _ in range(3):
            said.append(out.logits[:, -1].argmax(-1, keepdim=True))
            out = model(said[-1], cache=out.cache)
        assert torch.equal(torch.cat(said, dim=1), expected)
        chunked = model.generate(task.clean_ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=2)
        assert torch.equal(chunked[:, task.length :], expected)


def test_beams_take_their_partners_along() -> None:
    """A beam that is dropped takes its partner's tokens with it: the score says whether it did."""
    model, task = hub_model("gpt2"), random_task(length=6)
    circuit = circuit_of(model, random_edges(model.graph, 0.4, 2))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    with model.apply(circuit, corrupted=task.corrupted_ids):
        cached, whole = (
            model.generate(
                task.clean_ids, **options, use_cache=use, return_dict_in_generate=True, output_scores=True
            )
            for use in (True, False)
        )
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(cached.sequences_scores, whole.sequences_scores, rtol=1e-4, atol=1e-4)


def test_a_cache_from_outside_the_block_is_refused() -> None:
    model, task = hub_model("llama"), random_task()
    circuit = circuit_of(model, random_edges(model.graph, 0.4, 2))
    outside = model(task.clean_ids).cache
    with (
        model.apply(circuit, corrupted=task.corrupted_ids),
        pytest.raises(ConfigError, match="filled without these corrupted prompts"),
    ):
        model(task.clean_ids[:, :1], cache=outside)
    with model.apply(circuit, corrupted=task.corrupted_ids):
        inside = model(task.clean_ids).cache
    with (
        model.apply(circuit, corrupted=task.clean_ids),
        pytest.raises(ConfigError, match="filled without these corrupted prompts"),
    ):
        model(task.clean_ids[:, :1], cache=inside)


def test_corrupted_prompts_of_no_such_tokens_are_refused() -> None:
    model, task = hub_model("gpt2"), random_task()
    circuit = circuit_of(model, model.graph.all_edges)
    with (
        pytest.raises(TaskError, match="holds token id 999"),
        model.apply(circuit, corrupted=torch.full_like(task.clean_ids, 999)),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"token ids \[batch, pos\].*have shape \(9,\)"),
        model.apply(circuit, corrupted=task.corrupted_ids[0]),
    ):
        pass


def test_corrupted_prompts_as_a_tokenizer_returns_them() -> None:
    model, task = hub_model("gpt2"), random_task(padding="left", rows=2)
    circuit = circuit_of(model, random_edges(model.graph, 0.5, 0))
    with model.apply(circuit, corrupted=task.corrupted_ids, corrupted_mask=task.attention_mask):
        expected = answers(model, task)
    encoded = {"input_ids": task.corrupted_ids, "attention_mask": task.attention_mask}
    for given in (encoded, BatchEncoding(encoded)):
        with model.apply(circuit, corrupted=given):
            assert torch.equal(answers(model, task), expected)


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"corrupted": [[1, 2, 3]]}, "got list"),
        ({"corrupted": {"input_ids": [[1, 2, 3]]}}, "got list"),
        ({"corrupted": {"ids": IDS}}, "need input_ids"),
        ({"corrupted": np.ones((2, 3), dtype=int)}, "got ndarray"),
        ({"corrupted": IDS.float()}, "got a tensor of torch.float32"),
        ({"corrupted": "The cat"}, "got str: 'The cat'"),
        ({"corrupted": 5}, "got int: 5"),
        ({"corrupted": IDS[0]}, "shape (3,)"),
        ({"corrupted": IDS, "corrupted_mask": IDS[:1]}, "a mask of the same shape"),
        ({"corrupted": IDS, "corrupted_mask": [[1, 1, 1]]}, "got list"),
        ({"corrupted": IDS * 10**6}, "token id 1000000"),
        ({"corrupted": -IDS}, "token id -1"),
        ({"means": "mean"}, "means_of"),
    ],
)
def test_what_is_no_corrupted_prompt_is_refused_on_entry(given: dict[str, Any], said: str) -> None:
    model = hub_model("gpt2")
    circuit = circuit_of(model, model.graph.all_edges)
    with pytest.raises((ConfigError, TaskError)) as caught, model.apply(circuit, **given):
        pass
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not model.patched.is_applied


@pytest.mark.parametrize("given", ["/path", 5, None, {"kept": 1}])
def test_apply_says_that_it_takes_a_circuit(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"apply takes a Circuit \(Circuit.from_pretrained\(...\)\); got"):
        hub_model("gpt2").apply(given)
