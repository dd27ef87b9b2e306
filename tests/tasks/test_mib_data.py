"""The columns of the MIB benchmark's datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from pahq_hf.errors import TaskError
from pahq_hf.tasks.loading import load_task
from tests.task_tokenizers import byte_level_bpe, one_line, text


@pytest.fixture(scope="module")
def gpt2_like() -> PreTrainedTokenizerFast:
    return byte_level_bpe(digits="pairs")


def words(tokens: tuple[int, ...], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.decode([token])) for token in tokens]


def mib_row(subject: str, indirect: str, **counterfactuals: str) -> dict[str, Any]:
    """A row as in mib-bench/ioi."""
    return {
        "prompt": f"Then {subject} and {indirect} met. {subject} gave a bag to",
        "choices": [indirect, subject],
        "answerKey": 0,
        **{
            f"{kind}_counterfactual": {"prompt": prompt, "answerKey": 1}
            for kind, prompt in counterfactuals.items()
        },
    }


def test_mib_columns(tmp_path: Path, gpt2_like: PreTrainedTokenizerFast) -> None:
    rows = [
        mib_row(
            a,
            b,
            abc="Then Carl and Chris met. Ben gave a bag to",
            s2_io_flip=f"Then {a} and {b} met. {b} gave a bag to",
        )
        for a, b in (("Alan", "Amy"), ("Zebulon", "Amy"), ("Adam", "Anna"))
    ]
    path = tmp_path / "mib.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = load_task(path, gpt2_like)
    # As in MIB, what cannot be paired is left out; the task says how much.
    assert len(task) == 2 and task.source["skipped"] == 1 and task.source["corruption"] == "s2_io_flip"
    assert text(task, 1, gpt2_like, corrupted=True) == "Then Adam and Anna met. Anna gave a bag to"
    assert task.answers[0] == (gpt2_like.convert_tokens_to_ids("ĠAmy"),)
    assert task.distractors[0] == (gpt2_like.convert_tokens_to_ids("ĠAlan"),)
    other = load_task(path, gpt2_like, corruption="abc")
    assert text(other, 0, gpt2_like, corrupted=True) == "Then Carl and Chris met. Ben gave a bag to"
    with pytest.raises(TaskError, match="no corruption 'xyz'; the data has abc, s2_io_flip"):
        load_task(path, gpt2_like, corruption="xyz")
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(
        TaskError,
        match=r"none of the 1 examples can be used; the last: .*example 0: distractor ' Zebulon' is 8",
    ) as error:
        load_task(path, gpt2_like)
    one_line(error)


def test_mib_multiple_choice_columns(tmp_path: Path, gpt2_like: PreTrainedTokenizerFast) -> None:
    """As in mib-bench/copycolors_mcqa and arc_easy: labelled choices, in the counterfactual too."""

    def side(labels: str, right: int) -> dict[str, Any]:
        lines = "".join(f"\n{label}. bag" for label in labels)
        choices = {"label": list(labels), "text": ["bag"] * len(labels)}
        return {"prompt": f"A bag{lines}\nAnswer:", "choices": choices, "answerKey": right}

    row = side("ABCD", 2) | {
        "label": 2,
        "answerPosition_counterfactual": side("ABCD", 1),
        "symbol_counterfactual": side("JKLM", 2),
    }
    path = tmp_path / "mcqa.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"symbol_counterfactual": None}))
    task = load_task(path, gpt2_like)
    assert task.source["corruption"] == "symbol" and task.source["skipped"] == 1
    labels = [words(tokens[0], gpt2_like) for tokens in (task.answers, task.distractors)]
    # MIB's metric: the right label against the one that would be right in the counterfactual.
    assert labels == [["C"], ["L"]]
    assert text(task, 0, gpt2_like, corrupted=True).endswith("M. bag\nAnswer:")
    moved = load_task(path, gpt2_like, corruption="answerPosition", n=1)
    assert words(moved.distractors[0], gpt2_like) == ["B"]


def test_mib_arithmetic_columns(tmp_path: Path, gpt2_like: PreTrainedTokenizerFast) -> None:
    """As in mib-bench/arithmetic_addition: numbers as labels, operands, and sometimes no counterfactual."""
    other = {"prompt": "21 + 24 = ", "label": 45}
    rows: list[dict[str, Any]] = [
        {"prompt": "12 + 34 = ", "label": 46, "operator": "+", "operand1": 12, "operand2": 34},
        {"prompt": "52 + 31 = ", "label": 83, "operator": "+", "operand1": 52, "operand2": 31},
        {"prompt": "92 + 91 = ", "label": 183, "operator": "+", "operand1": 92, "operand2": 91},
        {"prompt": "12 + 34 = ", "label": None, "operator": "+", "operand1": 12, "operand2": 34},
    ]
    for row in rows:
        row["random_counterfactual"] = other
        row["ones_carry_counterfactual"] = {"prompt": None, "label": None}
    rows[1]["random_counterfactual"] = None
    path = tmp_path / "addition.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = load_task(path, gpt2_like)
    # Row 1 has no counterfactual, row 2 an answer of two tokens, row 3 none.
    assert len(task) == 1 and task.source["skipped"] == 3 and task.source["corruption"] == "random"
    assert text(task, 0, gpt2_like) == "12 + 34 = "
    assert [words(tokens[0], gpt2_like) for tokens in (task.answers, task.distractors)] == [["46"], ["45"]]
    with pytest.raises(TaskError, match=r"none of the 4 examples can be used; .*not a row in MIB's layout"):
        load_task(path, gpt2_like, corruption="ones_carry")


def test_a_hub_dataset_with_configurations(
    monkeypatch: pytest.MonkeyPatch, gpt2_like: PreTrainedTokenizerFast
) -> None:
    asked = []

    def stand_in(*arguments: str) -> Dataset:
        asked.append(arguments)
        return Dataset.from_list([{"clean": "Then Alan", "corrupted": "Then Adam"}])

    monkeypatch.setattr("datasets.load_dataset", stand_in)
    for name in ("owner/data:four_choices", "owner/data"):
        assert len(load_task(name, gpt2_like)) == 1
    assert asked == [("owner/data", "four_choices"), ("owner/data",)]


@pytest.mark.parametrize("key", [float("inf"), float("nan"), 9, "x", None, [], True])
def test_an_answer_key_that_is_none_is_named(key: object, gpt2_like: PreTrainedTokenizerFast) -> None:
    row = mib_row("Alan", "Amy", abc="Then Carl and Chris met. Ben gave a bag to")
    bad = row | {"answerKey": key, "choices": ["Amy"]}
    with pytest.raises(TaskError, match="example 1: not a row in MIB's layout"):
        load_task([row, bad], gpt2_like, on_mismatch="error")
    assert load_task([row, bad], gpt2_like).source["skipped"] == 1
