"""`pahq tasks`: the list of tasks, alone and under a model's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pahq_hf.cli.app import app
from pahq_hf.errors import ModelLoadError
from pahq_hf.tasks.loading import available_tasks
from tests.models import FAMILIES


def run(*arguments: str) -> str:
    """What the command prints; its errors are raised."""
    result = CliRunner().invoke(app, ["tasks", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def listed(*arguments: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(run("--json", *arguments))["tasks"]}


def test_every_task_is_listed() -> None:
    rows = listed()
    assert sorted(rows) == available_tasks()
    assert rows["ioi"]["corruptions"] == ["abc", "s2_flip"] and rows["induction"]["metric"] == "match_nll"
    assert all(row["description"] and "->" in row["example"] for row in rows.values())
    assert "available" not in rows["ioi"]


def test_examples_under_a_models_tokenizer() -> None:
    rows = listed("--model", "demo")
    # The demo's tokenizer is of whole words and knows no Python.
    assert [name for name, row in rows.items() if not row["available"]] == ["docstring"]
    assert "'docstring'" in rows["docstring"]["reason"] and "clean" not in rows["docstring"]
    pronoun = rows["gendered_pronoun"]
    assert pronoun["clean"].startswith("So ") and pronoun["clean"] != pronoun["corrupted"]
    assert {*pronoun["answers"], *pronoun["distractors"]} == {" he", " she"}
    assert rows["induction"]["rows_per_example"] == 9 and rows["induction"]["distractors"] == []
    assert len(rows["greater_than"]["answers"]) + len(rows["greater_than"]["distractors"]) == 100


def test_tables_for_people() -> None:
    printed = run("--model", "demo")
    assert all(name in printed for name in available_tasks())
    assert "and" in printed and "more" in printed, "a hundred years are cut"
    assert "reason" in printed and "' she'" in printed


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    FAMILIES["gpt2"]().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="has no tokenizer, so no task can be generated"):
        run("--model", str(tmp_path))
    with pytest.raises(ModelLoadError):
        run("--model", str(tmp_path / "nowhere"))
