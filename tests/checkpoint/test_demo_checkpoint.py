"""The demo checkpoint: small, plain, and truly able to do its tasks."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import demo_texts
import pytest
import torch
import train_demo
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from pahq_hf.checkpoint.demo_path import demo_path
from pahq_hf.errors import TaskError
from pahq_hf.tasks import induction, words
from pahq_hf.tasks.loading import load_task
from pahq_hf.tasks.metrics import Metric
from tests.tiers import quick

UNSEEN_SEEDS = quick([101, 202, 303], 101)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(demo_path())
    return loaded


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    loaded: GPT2LMHeadModel = AutoModelForCausalLM.from_pretrained(demo_path()).eval()
    return loaded


def test_folder_is_small_and_plain() -> None:
    files = sorted(file.name for file in demo_path().iterdir())
    assert sum(file.stat().st_size for file in demo_path().iterdir()) < 5_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    with safe_open(demo_path() / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118


def test_shape_and_no_dropout(model: GPT2LMHeadModel) -> None:
    config = model.config
    assert (config.model_type, config.n_layer, config.n_head, config.n_embd) == ("gpt2", 4, 4, 128)
    assert config.attn_pdrop == config.embd_pdrop == config.resid_pdrop == 0


def test_tokenizer_is_the_one_the_script_builds(tokenizer: PreTrainedTokenizerFast) -> None:
    """So a word added to the lists without training again is noticed."""
    assert tokenizer.get_vocab() == demo_texts.build_tokenizer().get_vocab()


def test_tokenizer_keeps_words_and_halves_of_years_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize(" Mary") == [" Mary"]
    assert tokenizer.tokenize("The war lasted from the year 1732")[-3:] == [" year", " 17", "32"]
    for sentence in (
        "When Mary and John went to the store, John gave a drink to Mary.",
        "Then Amy and Zach met. At the zoo Amy lent a book to Zach.",
        "The war lasted from the year 1732 to the year 1745.",
        "So Mary is a great friend, isn't she.",
        "The keys to the tables are.",
    ):
        ids = tokenizer(sentence)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == sentence
    assert tokenizer(" Zebulon")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id is not None


def test_ioi_on_held_out_pairs_of_names(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = demo_texts.Corpus(tokenizer, seed=0)
    assert len(corpus.held_out) == len(words.NAMES) * (len(words.NAMES) - 1) // 20
    figures = train_demo.ioi_figures(model, corpus.held_out_ioi(1000))
    assert figures["accuracy"] >= 0.99 and figures["argmax"] >= 0.99


@pytest.mark.parametrize("seed", UNSEEN_SEEDS)
@pytest.mark.parametrize("corruption", ["abc", "s2_flip"])
def test_ioi(seed: int, corruption: str, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task("ioi", tokenizer, n=200, seed=seed, corruption=corruption)
    figures = train_demo.ioi_figures(model, task)
    assert figures["accuracy"] >= 0.99 and figures["argmax"] >= 0.99


@pytest.mark.parametrize("seed", UNSEEN_SEEDS)
def test_greater_than(seed: int, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task("greater_than", tokenizer, n=200, seed=seed)
    assert task.source["continuation"] == "two digits"
    assert train_demo.prob_diff(model, task) >= 0.8


@pytest.mark.parametrize("seed", UNSEEN_SEEDS)
@pytest.mark.parametrize("name", ["gendered_pronoun", "sva"])
def test_one_word_decides(
    name: str, seed: int, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = load_task(name, tokenizer, n=200, seed=seed)
    assert train_demo.argmax_share(model, task) >= 0.95
    flipped = replace(task, clean_ids=task.corrupted_ids, answers=task.distractors, distractors=task.answers)
    assert train_demo.argmax_share(model, flipped) >= 0.95


@torch.no_grad()
@pytest.mark.parametrize("seed", UNSEEN_SEEDS)
def test_induction(seed: int, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task("induction", tokenizer, n=200, seed=seed)
    assert train_demo.argmax_share(model, task) >= 0.9
    nll = Metric("match_nll", task)
    corrupted = replace(task, clean_ids=task.corrupted_ids)
    assert nll(train_demo.answer_logits(model, task)) < 0.5
    assert nll(train_demo.answer_logits(model, corrupted)) > 4


@torch.no_grad()
@pytest.mark.parametrize("length", [6, 9, 13])
def test_induction_looks_for_the_token_not_a_fixed_distance_back(
    length: int, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng, vocabulary = random.Random(length), induction.ordinary_tokens(tokenizer)
    copies = [induction.draw(rng, vocabulary, length)[0] for _ in range(100)]
    ids = torch.tensor([[*copy, *copy] for copy in copies])
    predicted = model(ids).logits.argmax(-1)[:, length:-1]
    assert (predicted == ids[:, length + 1 :]).float().mean() > 0.85


def test_docstrings_are_not_its_language(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TaskError, match=r"'docstring' .*nouns that are one token|does not know"):
        load_task("docstring", tokenizer)


@torch.no_grad()
def test_corrupted_prompts_are_sane(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Patching towards a corrupted prompt must not push the model off what it knows."""
    abc = load_task("ioi", tokenizer, n=100, seed=9)
    names = {tokenizer.get_vocab()[f" {name}"] for name in words.NAMES}
    present = torch.tensor([[token for token in row if token in names] for row in abc.corrupted_ids.tolist()])
    probabilities = model(input_ids=abc.corrupted_ids).logits[:, -1].softmax(-1)
    assert probabilities.gather(1, present[:, :2]).sum(-1).mean() > 0.9
    flipped = load_task("ioi:s2_flip", tokenizer, n=100, seed=9)
    best = model(input_ids=flipped.corrupted_ids).logits[:, -1:].argmax(-1)
    assert (best == torch.tensor(flipped.distractors)).double().mean() >= 0.99
    years = load_task("greater_than", tokenizer, n=100, seed=9)
    spread = model(input_ids=years.corrupted_ids).logits[:, -1].softmax(-1)
    later = tokenizer.convert_tokens_to_ids([f"{year:02d}" for year in range(2, 100)])
    assert spread[:, later].sum(-1).mean() > 0.9


def test_generate_goes_on_in_its_language(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    inputs = tokenizer("When Mary and John went to the store, John gave a drink to", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    text = str(tokenizer.decode(output[0], skip_special_tokens=True))
    assert text.endswith(" gave a drink to Mary.")


@pytest.mark.exhaustive
def test_the_script_trains_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        train_demo.main(f"--out {tmp_path} --steps 3 --batch-size 8 --log-every 2 --no-bf16".split())
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    figures = json.loads(printed[printed.index("{") :])
    assert {"training_seconds", "ioi accuracy", "greater_than"} <= set(figures)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() < 1_250_000
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize(" Mary") == [" Mary"]
