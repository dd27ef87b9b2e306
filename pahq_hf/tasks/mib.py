"""Rows of the MIB benchmark in our columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pahq_hf.errors import TaskError

Row = dict[str, Any]
COUNTERFACTUAL = "_counterfactual"
MIB_COLUMNS = ("choices", "answerKey", "label")
# What MIB's circuit track patches with: IOI; MCQA and ARC; arithmetic.
_USUAL_COUNTERFACTUALS = ("s2_io_flip", "symbol", "random")


def counterfactual_column(rows: Sequence[Row], corruption: str | None, where: str) -> str:
    """The column of the corrupted prompts.

    Args:
        rows: The rows.
        corruption: Which is asked for; by default MIB's own choice, where it is there, else the first.
        where: The data, for messages.

    Raises:
        TaskError: If it is not there.
    """
    columns = [column for column in rows[0] if column.endswith(COUNTERFACTUAL)]
    answered = {"choices", "answerKey"} <= rows[0].keys() or "label" in rows[0]
    if not columns or not answered:
        raise TaskError(
            f"{where}: missing columns clean, corrupted (or clean_ids, corrupted_ids; or MIB's prompt, "
            f"choices, answerKey or label and a *{COUNTERFACTUAL}), and has {', '.join(sorted(rows[0]))}"
        )
    if corruption is None:
        usual = (f"{name}{COUNTERFACTUAL}" for name in _USUAL_COUNTERFACTUALS)
        return next((column for column in usual if column in columns), columns[0])
    if f"{corruption}{COUNTERFACTUAL}" not in columns:
        names = ", ".join(column.removesuffix(COUNTERFACTUAL) for column in columns)
        raise TaskError(f"{where}: no corruption {corruption!r}; the data has {names}")
    return f"{corruption}{COUNTERFACTUAL}"


def mib_as_ours(row: Row, column: str, at: str) -> Row:
    """A MIB row in our columns.

    As in MIB's circuit track, the distractor is what the counterfactual's answer is where the rows say so
    (arithmetic, MCQA, ARC); in IOI it is the other name.

    Args:
        row: The row.
        column: Of the counterfactual.
        at: The row, for messages.

    Raises:
        TaskError: If it is none.
    """
    try:
        other = row[column]
        if row.get("choices") is None:
            answer, distractors = _label(row), [_label(other)]
        else:
            texts = _choices(row)
            answer = texts[int(row["answerKey"])]
            distractors = [text for text in texts if text != answer]
            if isinstance(other.get("choices"), dict):
                wrong = _choices(other)[int(other["answerKey"])]
                distractors = [wrong] if wrong != answer else distractors
        clean, corrupted = row["prompt"], other["prompt"]
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TaskError(f"{at}: not a row in MIB's layout: {error!r}") from error
    return {"clean": clean, "corrupted": corrupted, "answer": answer, "distractor": distractors}


def _label(row: Row) -> str:
    """The answer of an arithmetic row, which is a number there."""
    if row["label"] is None:
        raise ValueError("no label")
    return str(row["label"])


def _choices(row: Row) -> list[str]:
    choices = row["choices"]
    if isinstance(choices, dict):
        return [str(label) for label in choices["label"]]
    # Names are listed bare there and follow a word of the prompt.
    return [choice if choice.startswith(" ") else f" {choice}" for choice in choices]
