"""What is said of a task before a search, from the full model's logits on its clean prompts."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pahq_hf import PAHQModel, Task
from pahq_hf.evaluation.greedy_accuracy import warn_near_chance
from pahq_hf.evaluation.spelling import warn_of_spelling
from pahq_hf.tasks.base import Spelling
from pahq_hf.tasks.loading import load_task
from tests.task_tokenizers import byte_level_bpe, sentencepiece_like


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_bpe(digits="pairs")


def messages_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def leaning(task: Task, tokenizer: PreTrainedTokenizerFast, *likely: str) -> torch.Tensor:
    """Logits of a model that says these words, a row each."""
    logits = torch.zeros(len(task.answers), len(tokenizer))
    for row, word in enumerate(likely):
        logits[row, tokenizer.convert_tokens_to_ids(word.replace(" ", "Ġ"))] = 12.0
    return logits


def test_answers_without_their_space_are_told(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    pair = {"clean": "Then Alan", "corrupted": "Then Amy"}
    bare = load_task([pair | {"answer": word} for word in ("to", "the", "went")], tokenizer)
    warn_of_spelling(leaning(bare, tokenizer, " to", " the", "went"), bare)
    (message,) = messages_of(caplog)
    assert message.startswith("the full model finds answers likelier with a leading space, such as ' to'")
    assert "its probability of them is 0.6" in message and "and 0.3" in message
    caplog.clear()
    spaced = load_task([pair | {"answer": f" {word}"} for word in ("to", "the", "went")], tokenizer)
    warn_of_spelling(leaning(spaced, tokenizer, "to", "the", "went"), spaced)
    (message,) = messages_of(caplog)
    assert "without a leading space, such as 'to'" in message
    caplog.clear()
    several = load_task([pair | {"answer": "to the"}], tokenizer, answer_tokens="first")
    warn_of_spelling(leaning(several, tokenizer, " to"), several)
    (message,) = messages_of(caplog)
    assert "with a leading space, such as ' to the'" in message
    caplog.clear()
    for task, likely in ((bare, ("to", "the", " went")), (spaced, (" to", " the", " went"))):
        warn_of_spelling(leaning(task, tokenizer, *likely), task)
    both = load_task([pair | {"answer": [" to", "to"]}], tokenizer)
    warn_of_spelling(leaning(both, tokenizer, " to"), both)
    # SentencePiece has one token for both
    other = sentencepiece_like()
    assert not load_task([pair | {"answer": "Amy"}], other).spellings
    assert not messages_of(caplog)


def test_no_preference_for_right_answers_is_told(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """The model says right answers now and then, but no more often than wrong ones."""
    names = ("to", "the", "at", "went", "from", "Alan")
    pair = {"clean": "Then Alan", "corrupted": "Then Amy"}
    rows = [pair | {"answer": f" {name}", "distractor": " Anna"} for name in names]
    task = load_task(rows, tokenizer)
    half = leaning(task, tokenizer, " to", " the", " at", " Anna", " Anna", " Anna")
    warn_near_chance(half, task)
    (message,) = messages_of(caplog)
    assert "likelier than the distractors in 0.50 of the rows, near chance (0.50)" in message
    caplog.clear()
    warn_near_chance(leaning(task, tokenizer, *(f" {name}" for name in names[:5]), " Anna"), task)
    assert not messages_of(caplog)


def test_a_search_says_it_first(caplog: pytest.LogCaptureFixture) -> None:
    """Of the demo model, whose tokenizer has a token for each word with its space and for none without."""
    model = PAHQModel.from_pretrained("demo", precision="fp32")
    pair = {
        "clean": "When Mary and John went to the store, John gave a drink to",
        "corrupted": "When Mary and John went to the store, Mary gave a drink to",
    }
    task = load_task([pair | {"answer": " Mary"}], model.tokenizer)
    token = task.answers[0][0]
    bare = replace(task, answers=((5,),), spellings={5: Spelling(token, " Mary")})
    model.discover(bare, threshold=0.5, progress=False)
    assert sum("with a leading space, such as ' Mary'" in text for text in messages_of(caplog)) == 1
    caplog.clear()
    model.discover(task, threshold=0.5, progress=False)
    assert not any("leading space" in text for text in messages_of(caplog))
