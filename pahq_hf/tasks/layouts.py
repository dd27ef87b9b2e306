"""Data whose columns have to be taken apart before they are prompts and answers.

Each layout is a function that looks at the columns and says how a row becomes one in our columns, and a row
of `_LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pahq_hf.errors import TaskError
from pahq_hf.tasks.mib import COUNTERFACTUAL, MIB_COLUMNS, counterfactual_column, mib_as_ours
from pahq_hf.tasks.years import year_column, year_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How rows become rows in our columns.

    Attributes:
        convert: Makes a row from a row, whose name in messages it gets; raises `TaskError` for one it cannot
            read.
        used: Columns that it reads.
        skips: Whether rows that cannot be used are left out unless it is said otherwise.
        corruption: Which corruption was chosen, where there are several.
    """

    convert: Callable[[Row, str], Row]
    used: frozenset[str]
    skips: bool = False
    corruption: str | None = None


@dataclass(frozen=True)
class Look:
    """What a layout is recognised by.

    Attributes:
        rows: The rows, by our names.
        names: Their columns.
        where: The data, for messages.
        tokenizer: The model's tokenizer, if there is one.
        corruption: Which corruption is asked for.
    """

    rows: Sequence[Row]
    names: frozenset[str]
    where: str
    tokenizer: PreTrainedTokenizerBase | None
    corruption: str | None


def find_layout(look: Look) -> Layout | None:
    """The layout of some data; None if its columns are ours.

    Raises:
        TaskError: If it is nearly one.
    """
    return next((found for layout in _LAYOUTS if (found := layout(look)) is not None), None)


def _mib(look: Look) -> Layout | None:
    """MIB's `prompt` with `choices` and `answerKey`, or `label`, and `*_counterfactual`."""
    if {"clean", "corrupted"} <= look.names or "prompt" not in look.names or look.tokenizer is None:
        return None
    column = counterfactual_column(look.rows, look.corruption, look.where)
    return Layout(
        lambda row, at: mib_as_ours(row, column, at),
        frozenset({"prompt", column, *MIB_COLUMNS}),
        skips=True,
        corruption=column.removesuffix(COUNTERFACTUAL),
    )


_SENTENCES = ("ioi_sentences", "text")


def _sentences(look: Look) -> Layout | None:
    """Edge Pruning's sentences: the last word is what has to be said."""
    name = next((name for name in _SENTENCES if {name, f"corr_{name}"} <= look.names), None)
    if name is None or look.names & {"clean", "corrupted"}:
        return None

    def convert(row: Row, at: str) -> Row:
        texts = [row.get(column) for column in (name, f"corr_{name}")]
        found = [
            re.fullmatch(r"(.*\S)(\s+\S+)\s*", text, re.DOTALL) for text in texts if isinstance(text, str)
        ]
        if len(found) < 2 or not all(found):
            raise TaskError(f"{at}: {name} and corr_{name} must be sentences of two words or more")
        clean, corrupted = (match for match in found if match is not None)
        return {**row, "clean": clean[1], "corrupted": corrupted[1], "answer": clean[2]}

    return Layout(convert, frozenset({name, f"corr_{name}"}))


_MARKED = re.compile(r"(.*?)(\s*)<predict>(.*?)</predict>", re.DOTALL)


def _marked(look: Look) -> Layout | None:
    """Edge Pruning's own data: `<predict>` and `</predict>` around what has to be said."""
    cells = [row.get("clean") for row in look.rows]
    if "corrupted" not in look.names or not any(isinstance(c, str) and _MARKED.match(c) for c in cells):
        return None

    def convert(row: Row, at: str) -> Row:
        clean, corrupted = row.get("clean"), row.get("corrupted")
        found = _MARKED.match(clean) if isinstance(clean, str) else None
        if found is None or not found[1] or not found[3].strip():
            raise TaskError(f"{at}: column clean must have a text between <predict> and </predict>")
        other = _MARKED.match(corrupted) if isinstance(corrupted, str) else None
        answer = found[2] + found[3]
        return {**row, "clean": found[1], "corrupted": other[1] if other else corrupted, "answer": answer}

    return Layout(convert, frozenset({"clean", "corrupted"}))


_SPACED = {"pronoun": "answer", "corr_pronoun": "distractor"}


def _pronouns(look: Look) -> Layout | None:
    """Edge Pruning's pronouns, which are bare words."""
    if not {"clean", "corrupted", "pronoun"} <= look.names or look.names & {"answer", "answers"}:
        return None

    def convert(row: Row, at: str) -> Row:
        said = {
            ours: f" {row[name].strip()}" for name, ours in _SPACED.items() if isinstance(row.get(name), str)
        }
        if "answer" not in said:
            raise TaskError(f"{at}: column pronoun must be a word, found {row.get('pronoun')!r:.60}")
        if said.get("distractor") == said["answer"]:
            del said["distractor"]  # the other prompt's pronoun is this one's
        return {**row, **said}

    return Layout(convert, frozenset(_SPACED))


def _years(look: Look) -> Layout | None:
    """Greater-than with a year: the answers are those of this tokenizer."""
    if look.tokenizer is None or not {"clean", "corrupted"} <= look.names:
        return None
    column = year_column(look.rows, look.names)
    if column is None:
        return None
    convert = year_reader(look.rows, column, look.tokenizer, look.where)
    return None if convert is None else Layout(convert, frozenset({column}))


_LAYOUTS = (_mib, _sentences, _marked, _pronouns, _years)
