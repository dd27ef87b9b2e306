"""Rows of a user's data that do not fit as they are: lengths, answers of several tokens, chats."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from pahq_hf import PAHQModel
from pahq_hf.circuit.run_record import TaskFacts
from pahq_hf.errors import MetricError, TaskError
from pahq_hf.tasks.loading import load_task
from pahq_hf.tasks.metrics import Metric, check_metric
from tests.helpers import run_main, save_tiny, wrapped, write_rows
from tests.task_tokenizers import byte_level_bpe, one_line, prompt, sentencepiece_like, text


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_bpe(digits="pairs")


def messages_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def words(tokens: tuple[int, ...], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.decode([token])) for token in tokens]


# -- prompts of different lengths --------------------------------------------------------------------------


FIT = {"clean_ids": [1, 2, 3, 4], "corrupted_ids": [1, 5, 3, 4], "answer_ids": [6]}
SHORT = {"clean_ids": [1, 2, 3, 4], "corrupted_ids": [1, 5, 4], "answer_ids": [6]}
LONG = {"clean_ids": [1, 2, 3], "corrupted_ids": [1, 5, 5, 3], "answer_ids": [6]}
EMPTY = {"clean_ids": [], "corrupted_ids": [], "answer_ids": [6]}


def test_one_bad_row_is_named_with_how_many_there_are() -> None:
    with pytest.raises(TaskError) as error:
        load_task([FIT, FIT, LONG, FIT, SHORT])
    message = one_line(error)
    assert message.startswith(
        "the given rows, example 2: the clean prompt has 3 tokens and the corrupted one 4"
    )
    assert message.endswith(
        '; 2 of 5 examples cannot be used; on_mismatch="skip" (--on-mismatch skip) leaves such examples out'
    )
    with pytest.raises(TaskError, match=r"needs equal lengths$"):
        load_task([LONG], on_mismatch="error")  # there is nothing that skipping would leave


def test_skip_goes_on_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    task = load_task([FIT, LONG, FIT, EMPTY, SHORT, FIT], on_mismatch="skip")
    assert len(task) == 3 and [prompt(task, row) for row in range(3)] == [[1, 2, 3, 4]] * 3
    assert task.source["skipped"] == 3 and task.source["total"] == 6 and task.source["on_mismatch"] == "skip"
    (message,) = messages_of(caplog)
    assert "3 of 6 examples are used, 3 left out, 2 of them for prompts of different token lengths" in message
    assert "; the first: example 1: the clean prompt has 3 tokens" in message
    with pytest.raises(TaskError, match=r"none of the 2 examples can be used; the last: .*example 1"):
        load_task([LONG, SHORT], on_mismatch="skip")


@pytest.mark.parametrize(
    ("choice", "number"),
    [({}, 3), ({"offset": 2}, 3), ({"offset": 1, "n": 3}, 3), ({"shuffle": True, "seed": 5}, 3)],
)
def test_a_bad_row_is_named_by_its_place_in_the_data(choice: dict[str, Any], number: int) -> None:
    """Not by its place among those that were chosen."""
    with pytest.raises(TaskError, match=rf"example {number}: .*3 tokens"):
        load_task([FIT, FIT, FIT, LONG, FIT], **choice)


def test_a_split_that_nobody_chose_is_told(caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list([FIT] * 2)
    both = DatasetDict(validation=rows, test=rows)
    assert len(load_task(both)) == 2
    assert any("split 'validation' is taken, and not test" in message for message in messages_of(caplog))
    caplog.clear()
    load_task(both, split="test")
    load_task(DatasetDict(test=rows))
    assert messages_of(caplog) == []


def test_mib_rows_that_are_left_out_are_told(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": "Then Alan", "choices": ["to", "the"], "answerKey": 0}
    rows = [
        row | {"abc_counterfactual": {"prompt": "Then Amy"}},
        row | {"abc_counterfactual": {"prompt": "Then"}},
    ]
    assert load_task(rows, tokenizer).source["skipped"] == 1
    assert "1 of 2 examples are used, 1 left out" in messages_of(caplog)[0]
    with pytest.raises(TaskError, match=r"example 1: .* needs equal lengths"):
        load_task(rows, tokenizer, on_mismatch="error")


@pytest.mark.parametrize(
    ("clean", "corrupted", "filled"),
    [
        ([1, 2, 2, 3, 4], [1, 5, 3, 4], [1, 0, 5, 3, 4]),  # where they differ
        ([1, 2, 3, 4], [3, 4], [0, 0, 3, 4]),
        ([1, 2, 3, 4], [1, 4], [1, 0, 0, 4]),
        ([1, 1, 1, 1], [1, 1], None),  # where the clean one begins, and nothing is scored there
        ([1, 2, 3, 4], [1, 2], None),
        ([1, 2], [1, 3, 4], None),  # a longer one
    ],
)
def test_pad_fills_shorter_corrupted_prompts_where_they_differ(
    clean: list[int], corrupted: list[int], filled: list[int] | None, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"clean_ids": clean, "corrupted_ids": corrupted}, FIT]
    task = load_task(rows, on_mismatch="pad")
    kept = [(prompt(task, row), prompt(task, row, corrupted=True)) for row in range(len(task))]
    whole = [] if filled is None else [(clean, filled)]
    assert kept == [*whole, ([1, 2, 3, 4], [1, 5, 3, 4])]
    assert (task.source["padded"], task.source["skipped"]) == (len(whole), 1 - len(whole))
    told = "shorter and are filled with the token 0" if whole else "1 of 2 examples are used, 1 left out"
    assert told in messages_of(caplog)[0]


def test_a_prompt_that_only_begins_alike_may_be_filled() -> None:
    """The last token of both is the one whose prediction is scored."""
    rows = [{"clean_ids": [1, 1, 1, 4], "corrupted_ids": [1, 1, 4]}]
    task = load_task(rows, on_mismatch="pad")
    assert prompt(task, 0, corrupted=True) == [1, 1, 0, 4]


def test_padded_pairs_are_searched_as_any_others() -> None:
    """Both engines see the prompts that are filled, and the clean ones as they are."""
    task = load_task([SHORT, FIT], on_mismatch="pad", metric="nll")
    filled = load_task([SHORT | {"corrupted_ids": [1, 0, 5, 4]}, FIT], metric="nll")
    assert task.fingerprint() == filled.fingerprint()
    circuit = wrapped("llama").discover(task, threshold=0.01, progress=False)
    assert circuit.verified


# -- answers of several tokens -----------------------------------------------------------------------------


MANY = {"clean": "Then Alan", "corrupted": "Then Amy", "answer": " went to the", "distractor": " went at"}


def test_answers_of_several_tokens_are_scored_where_they_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TaskError, match=r"is 3 tokens .*or answer_tokens \(--answer-tokens\) first or whole"):
        load_task([MANY], tokenizer)
    task = load_task([MANY], tokenizer, answer_tokens="first")
    assert text(task, 0, tokenizer) == "Then Alan went"
    assert text(task, 0, tokenizer, corrupted=True) == "Then Amy went"
    assert words(task.answers[0], tokenizer) == [" to"]
    assert words(task.distractors[0], tokenizer) == [" at"]
    check_metric("logit_diff", task)
    for row, begun, right, wrong in (
        ({"distractor": None}, "", [" went"], []),  # nothing to differ from
        ({"distractor": " to"}, "", [" went"], [" to"]),
        ({"answer": [" went to", " went at"], "distractor": " went the"}, " went", [" to", " at"], [" the"]),
        ({"answer": [" went to the", " went to"], "distractor": " the"}, "", [" went"], [" the"]),
    ):
        task = load_task([MANY | row], tokenizer, answer_tokens="first")
        assert text(task, 0, tokenizer) == f"Then Alan{begun}"
        assert words(task.answers[0], tokenizer) == right
        assert words(task.distractors[0], tokenizer) == wrong
    for answer, distractor in ((" went to", " went to the"), ([" to", " the"], " to at")):
        with pytest.raises(TaskError, match="the first in which others differ, is both an answer and a dis"):
            load_task([MANY | {"answer": answer, "distractor": distractor}], tokenizer, answer_tokens="first")


@pytest.mark.parametrize("side", ["left", "right"])
def test_whole_answers_are_sums_of_log_probabilities(
    side: str, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [MANY, MANY | {"clean": "Then Alan Adam", "corrupted": "Then Amy Adam", "answer": " to"}]
    task = load_task(rows, tokenizer, answer_tokens="whole", metric="nll", padding_side=side)
    assert [text(task, row, tokenizer) for row in range(2)] == ["Then Alan went to", "Then Alan Adam"]
    assert text(task, 0, tokenizer, corrupted=True) == "Then Amy went to"
    assert [words(tokens, tokenizer)[0] for tokens in task.answers] == [" went", " to", " the", " to"]
    assert task.answer_rows.tolist() == [0, 0, 0, 1] and "distractors are not used" in messages_of(caplog)[0]
    logits = torch.randn(4, len(tokenizer), generator=torch.Generator().manual_seed(0))
    log_p = logits.double().log_softmax(-1)
    by_hand = [-float(log_p[row, tokens[0]]) for row, tokens in enumerate(task.answers)]
    assert Metric("nll", task)(logits) == pytest.approx((sum(by_hand[:3]) + by_hand[3]) / 2)
    part, _ = task.part(0, 1)
    assert Metric("nll", part)(logits[:3]) == pytest.approx(sum(by_hand[:3]))
    assert Metric("nll", task.select([1, 0]))(logits[[3, 0, 1, 2]]) == pytest.approx(
        (sum(by_hand[:3]) + by_hand[3]) / 2
    )
    with pytest.raises(
        MetricError, match=r"as whole answers are scored alone: use nll, or answer_tokens first$"
    ):
        check_metric("logit_diff", task)
    with pytest.raises(TaskError, match="so a row has one; this one has 2"):
        load_task([MANY | {"answer": [" went", " to"]}], tokenizer, answer_tokens="whole")


def test_a_whole_answer_is_what_the_model_gives_it() -> None:
    """On the demo model, whose tokenizer has whole words, and by both engines."""
    model = PAHQModel.from_pretrained("demo", precision="fp32")
    rows = [
        {
            "clean": "When Mary and John went to the store, John gave a drink to",
            "corrupted": "When Mary and John went to the store, Mary gave a drink to",
            "answer": " Mary.",
        }
    ]
    task = load_task(rows, model.tokenizer, answer_tokens="whole", metric="nll")
    assert len(task.answers) == 2
    ids = model.tokenizer(rows[0]["clean"] + " Mary.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)[0, :-1]
    by_hand = -sum(float(log_p[at, ids[0, at + 1]]) for at in range(len(ids[0]) - 3, len(ids[0]) - 1))
    circuit = model.discover(task, threshold=0.5, progress=False)
    assert circuit.record.metric.full == pytest.approx(by_hand, abs=1e-4)
    assert circuit.verified


# -- chats, and what begins a prompt -----------------------------------------------------------------------


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}to{% endif %}"
)


def test_chats_are_put_into_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    chatty = byte_level_bpe(digits="pairs")
    chatty.chat_template = TEMPLATE
    said = [{"role": "user", "content": "Alan"}]
    others = [{"role": "user", "content": "Amy"}]
    expected = [
        chatty.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for messages in (said, others)
    ]
    for clean, corrupted in ((said, others), ("Alan", "Amy"), (json.dumps(said), json.dumps(others))):
        row = {"clean": clean, "corrupted": corrupted, "answer": " the"}
        task = load_task([row], chatty, chat_template=True, on_mismatch="pad")
        assert prompt(task, 0) == expected[0]
        assert prompt(task, 0).count(chatty.bos_token_id) == 1
    begun = [*said, {"role": "assistant", "content": "went"}]
    task = load_task(
        [{"clean": begun, "corrupted": [*begun[:1], begun[1] | {"content": "to"}], "answer": " the"}],
        chatty,
        chat_template=True,
        on_mismatch="pad",
    )
    assert text(task, 0, chatty).endswith("assistant went") and task.source["chat_template"] is True
    with pytest.raises(
        TaskError, match=r"column clean holds messages: chat_template=True \(--chat-template\)"
    ):
        load_task([{"clean": said, "corrupted": others}], chatty)
    with pytest.raises(TaskError, match="the tokenizer has no chat template"):
        load_task([{"clean": said, "corrupted": others}], tokenizer, chat_template=True)
    with pytest.raises(TaskError, match="its prompts are token ids, and chat_template is of text"):
        load_task([FIT], chatty, chat_template=True)
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        TaskError, match="example 0: the chat template does not take column clean: roles must"
    ):
        load_task([{"clean": said, "corrupted": others}], chatty, chat_template=True)


def test_a_bos_is_there_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = sentencepiece_like()
    plain = {"clean": "Then Alan", "corrupted": "Then Amy", "answer": "went"}
    marked = plain | {"clean": "<s>Then Alan", "corrupted": "<s>Then Amy"}
    one, other = load_task([plain], tokenizer), load_task([marked], tokenizer)
    assert prompt(one, 0).count(tokenizer.bos_token_id) == 1
    assert prompt(other, 0).count(tokenizer.bos_token_id) == 1
    assert prompt(other, 0)[0] == tokenizer.bos_token_id
    (message,) = messages_of(caplog)
    assert "prompts begin with '<s>', which the tokenizer adds to texts: it is there once" in message


# -- the command line --------------------------------------------------------------------------------------


def test_commands_take_what_data_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = str(save_tiny(tmp_path / "model")), tmp_path / "data.jsonl"
    rows = [{"q": FIT["clean_ids"], "x": row["corrupted_ids"], "a": [6]} for row in (FIT, SHORT, LONG, FIT)]
    write_rows(data, [row | {"q": [1, 2, 3]} if at == 2 else row for at, row in enumerate(rows)])
    columns = ["--columns", "clean_ids=q,corrupted_ids=x,answer_ids=a"]
    capsys.readouterr()
    run = ["discover", model, "--task", str(data), "--threshold", "0.02", "--precision", "fp32", "--json"]
    assert run_main(*run, *columns, "--out", str(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "example 1: " in error and "--on-mismatch skip" in error
    fitting = [*columns, "--on-mismatch", "pad"]
    assert run_main(*run, *fitting, "--n", "3", "--out", str(tmp_path / "run")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["task"]["padded"] == 1 and facts["task"]["skipped"] == 1 and facts["task"]["examples"] == 2
    assert TaskFacts.from_json(facts["task"]).pairs == "2 (1 left out, 1 filled)"
    # what comes next reads the rest of the data in the same way
    assert facts["next"].startswith("pahq evaluate ")
    assert facts["next"].endswith(f" --n 3 {' '.join(fitting)} --offset 3")
    for wrong, message in (
        (["--columns", "clean"], "write them like clean=Q,answer=A"),
        (["--columns", "cleen=Q"], "did you mean 'clean'"),
        (["--task", "ioi", "--on-mismatch", "skip"], "is generated and takes no on_mismatch"),
    ):
        assert run_main(*run, *wrong, "--out", str(tmp_path / "wrong")) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
