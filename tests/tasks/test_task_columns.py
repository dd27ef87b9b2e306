"""Which columns of a user's data are used, what is said of the others, which examples are taken."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from pahq_hf import Task
from pahq_hf.errors import MetricError, TaskError
from pahq_hf.tasks.loading import load_task
from pahq_hf.tasks.metrics import check_metric
from tests.helpers import id_rows, run_main, save_tiny, write_rows
from tests.models import random_task
from tests.task_tokenizers import byte_level_bpe


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_bpe(digits="pairs")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


PAIR = {"clean": "When Aaron went", "corrupted": "When Adam went"}


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    def one(**more: Any) -> Task:
        return load_task(write_rows(tmp_path / "data.jsonl", [PAIR | more]), tokenizer)

    return one


# -- what is used ------------------------------------------------------------------------------------------


def test_answers_beside_text_are_used(
    load: Any, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    to, the, off = (tokenizer.convert_tokens_to_ids(token) for token in ("Ġto", "Ġthe", "Ġfrom"))
    for columns in (
        {"answer": " to", "distractor": [" the", " from"]},
        {"answers": " to", "distractors": [" the", " from"]},
        {"answers": [" to"], "distractors": '[" the", " from"]'},
        {"answer_ids": [to], "distractor_ids": [the, off]},
        {"answer_ids": to, "distractor": [" the", " from"]},
    ):
        task = load(**columns)
        assert (task.answers, task.distractors) == (((to,),), ((the, off),)), columns
        check_metric("logit_diff", task)
    assert not warnings_of(caplog)
    task = load(correct_idx=to, incorrect_idx=str(the))
    assert (task.answers, task.distractors) == (((to,),), ((the,),))
    assert "correct_idx and incorrect_idx are read as token ids" in warnings_of(caplog)[0]


def test_token_ids_take_all_answer_columns_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    to = tokenizer.convert_tokens_to_ids("Ġto")
    ids = {"clean_ids": [5, 6, 7], "corrupted_ids": [5, 8, 7]}
    for columns in ({"answers": [" to"]}, {"answer_ids": [to]}, {"correct_idx": to, "incorrect_idx": 3}):
        task = load_task(write_rows(tmp_path / "ids.jsonl", [ids | columns]), tokenizer)
        assert task.answers == ((to,),)


@pytest.mark.parametrize(
    "columns",
    [
        {"label": 1},
        {"label": " to"},
        {"correct_idx": 17},  # of a greater-than file it is a year
        {"correct_idx": 0, "incorrect_idx": 1, "choices": ["a", "b"]},
        {"correct_idx": 10**6, "incorrect_idx": 3},  # no token of this vocabulary
        {"correct_idx": "Mary", "incorrect_idx": "John"},
        {"answers": {"text": [" to"], "answer_start": [3]}},
        {"answers": [3, 4]},
        {"target": " to", "id": 7},
    ],
)
def test_what_is_not_used_is_said_once(
    columns: dict[str, Any], load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    task = load(**columns)
    assert not task.has_answers
    (warning,) = warnings_of(caplog)
    assert f"columns that are not used: {', '.join(columns)}; the run has no answers" in warning
    assert "answer_ids" in warning
    with pytest.raises(MetricError) as error:
        check_metric("logit_diff", task)
    assert f"(its data has columns clean, corrupted, {', '.join(columns)})" in str(error.value)


def test_empty_columns_are_not_mentioned_and_names_do_no_harm(
    load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    load(answer=" to", distractor=None, answer_ids=[], label="")
    assert not warnings_of(caplog)
    load(answer=" to", **{"\x1b[31mred": 1, **{f"extra{i}": i for i in range(20)}})
    (warning,) = warnings_of(caplog)
    assert "\x1b" not in warning and "?[31mred, extra0" in warning and "and 9 more" in warning
    assert "no answers" not in warning


def test_a_metric_counts_the_rows_without_answers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [PAIR | {"answer": " to"}, PAIR | {"answer": ""}, PAIR]
    task = load_task(write_rows(tmp_path / "data.jsonl", rows), tokenizer)
    with pytest.raises(
        MetricError, match=r"none in 2 of 3 rows \(its data has columns clean, corrupted, answer\)"
    ):
        check_metric("nll", task)


def test_mib_rows_name_what_is_left_over(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    row = {
        "prompt": "When Aaron went",
        "choices": [" to", " the"],
        "answerKey": 0,
        "s2_io_flip_counterfactual": {"prompt": "When Adam went"},
        "template": "x",
    }
    assert load_task(write_rows(tmp_path / "mib.jsonl", [row]), tokenizer).has_answers
    (warning,) = warnings_of(caplog)
    assert warning.endswith("columns that are not used: template")


# -- which examples are taken ------------------------------------------------------------------------------


ROWS = [{"clean_ids": [1, 2, i], "corrupted_ids": [1, 3, i], "answer_ids": [i]} for i in range(10)]


def taken(path: Path, **options: Any) -> list[int]:
    return [answers[0] for answers in load_task(path, **options).answers]


@pytest.mark.parametrize("kind", ["file", "parquet", "folder"])
def test_offset_and_shuffle(kind: str, tmp_path: Path) -> None:
    if kind == "file":
        path = write_rows(tmp_path / "data.jsonl", ROWS)
    elif kind == "parquet":
        path = tmp_path / "data.parquet"
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        path = tmp_path / "saved"
        Dataset.from_list(ROWS).save_to_disk(path)
    assert taken(path) == list(range(10))
    assert taken(path, n=3, offset=4) == [4, 5, 6]
    assert taken(path, offset=8) == [8, 9]
    shuffled = taken(path, shuffle=True)
    assert sorted(shuffled) == list(range(10)) and shuffled != list(range(10))
    assert taken(path, shuffle=True, seed=0) == shuffled != taken(path, shuffle=True, seed=1)
    assert taken(path, shuffle=True, n=3, offset=2) == shuffled[2:5]  # so what is behind was not seen
    with pytest.raises(TaskError, match="has 10 examples; offset 10 leaves none"):
        taken(path, offset=10)


def test_asking_for_more_than_there_is_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "data.jsonl", ROWS)
    assert len(taken(path, n=5, offset=7)) == 3
    (warning,) = warnings_of(caplog)
    assert "only 3 of the 5 examples asked for are there (10 in all, 7 passed over)" in warning


def test_a_seed_that_changes_nothing_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "data.jsonl", ROWS)
    for seed in (0, 3):
        with pytest.raises(TaskError, match=f"seed {seed} changes nothing: add --shuffle"):
            load_task(path, seed=seed)
    with pytest.raises(TaskError, match="unknown task"):
        load_task("nothing", seed=3)
    for options in ({"offset": 1}, {"shuffle": True}):
        with pytest.raises(TaskError, match="is generated and takes no"):
            load_task("ioi", tokenizer, **options)
    with pytest.raises(TaskError, match="offset must not be negative"):
        load_task(path, offset=-1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choice")
    save_tiny(folder / "model")
    rows = id_rows(random_task(batch=6, seed=3))
    write_rows(folder / "ids.jsonl", rows)
    DatasetDict(train=Dataset.from_list(rows[:4]), test=Dataset.from_list(rows[4:])).save_to_disk(
        folder / "saved"
    )
    return folder


@pytest.mark.parametrize("command", ["discover", "sweep", "attribute"])
def test_every_command_takes_them(
    command: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {
        "discover": ["--threshold", "0.3"],
        "sweep": ["--thresholds", "0.3"],
        "attribute": ["--topn", "9"],
    }
    data, out = str(root / "ids.jsonl"), tmp_path / "run"
    where = [command, str(root / "model"), *more[command], "--precision", "fp32", "--task", data]
    assert run_main(*where, "--out", str(out), "--seed", "3") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "seed 3 changes nothing" in error and not out.exists()
    assert run_main(*where, "--out", str(out), "--n", "2", "--offset", "3", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["header"]["task"] == load_task(data, n=2, offset=3).fingerprint()
    assert "not used" not in json.dumps(facts)
    # what comes next are the examples behind those, and there is one left
    circuit = out / "tau-0.3" if command == "sweep" else out
    assert (
        run_main(
            "evaluate",
            str(circuit),
            "--model",
            str(root / "model"),
            "--task",
            data,
            "--offset",
            "5",
            "--json",
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["examples"] == 1


def test_evaluate_chooses_a_split_and_shuffles(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, out = str(root / "saved"), str(tmp_path / "run")
    where = ["--model", str(root / "model"), "--task", saved, "--json"]
    run = ["discover", str(root / "model"), "--task", saved, "--threshold", "0.3", "--precision", "fp32"]
    assert run_main(*run, "--split", "test", "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["task"]["examples"] == 2
    assert run_main("evaluate", out, *where) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 4  # train
    kl = []
    for seed in ("0", "1", "2"):
        assert run_main("evaluate", out, *where, "--n", "1", "--shuffle", "--seed", seed) == 0
        kl.append(json.loads(capsys.readouterr().out)["kl"])
    assert len(set(kl)) > 1
    assert run_main("evaluate", out, *where, "--seed", "1") == 2
    assert "changes nothing" in capsys.readouterr().err
    # there the seed is that of the random subsets
    assert run_main("evaluate", out, *where, "--seed", "1", "--completeness", "--samples", "1") == 0


def test_the_next_command_goes_to_new_prompts(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(root / "ids.jsonl")
    run = ["discover", str(root / "model"), "--task", data, "--threshold", "0.02", "--precision", "fp32"]
    for name, options, words in (
        ("a", ["--n", "2"], ["--offset", "2"]),
        ("b", ["--n", "2", "--offset", "2", "--shuffle", "--seed", "4"], ["--seed", "4", "--offset", "4"]),
        ("c", [], ["--html"]),
    ):
        assert run_main(*run, *options, "--out", str(tmp_path / name), "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["verdict"]["kind"] == "circuit" and not facts["verdict"]["poor"]
        command = facts["next"].split()
        assert all(word in command for word in words), command
        assert run_main(*command[1:]) == 0
        capsys.readouterr()
