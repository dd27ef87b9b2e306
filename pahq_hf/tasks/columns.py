"""Which columns of a user's data hold the answers, and which are not used."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

logger = logging.getLogger(__name__)
Row = dict[str, Any]
_SHOWN = 12  # columns in a message
_ROWS_SHOWN = 3
_EMPTY: tuple[Any, ...] = (None, "", [])
# Token ids as EAP-IG's files name them. One alone says nothing: for greater-than it is a year, beside choices
# it is the place among them.
_EAP_IG = ("correct_idx", "incorrect_idx")


@dataclass(frozen=True)
class LabelColumns:
    """Where the right or the wrong answers of a row are.

    Attributes:
        ids: Column of token ids.
        texts: Columns that hold text or lists of texts; the first that a row fills counts.
        index: Column of token ids in EAP-IG's files, if there is one.
    """

    ids: str
    texts: tuple[str, ...]
    index: str | None


@dataclass
class Columns:
    """The columns of some rows, and which of them were read.

    Attributes:
        rows: The rows.
        size: Tokens of the vocabulary, if it is known.
        used: Names of columns that filled something.
    """

    rows: Sequence[Row]
    size: int | None = None
    used: set[str] = field(default_factory=set)

    @cached_property
    def names(self) -> list[str]:
        """All columns, in the order of the file."""
        return list(dict.fromkeys(str(column) for row in self.rows for column in row))

    @property
    def filled(self) -> list[str]:
        """Columns that some row fills."""
        return [name for name in self.names if any(row.get(name) not in _EMPTY for row in self.rows)]

    @cached_property
    def answer(self) -> LabelColumns:
        """Where right answers can be."""
        return self._labels("answer", _EAP_IG[0])

    @cached_property
    def distractor(self) -> LabelColumns:
        """Where wrong answers can be."""
        return self._labels("distractor", _EAP_IG[1])

    def _labels(self, name: str, index: str) -> LabelColumns:
        """Columns of answers or distractors whose meaning leaves no doubt."""
        texts = [name]
        if all(_is_text(row.get(f"{name}s")) for row in self.rows):
            texts.append(f"{name}s")
        return LabelColumns(f"{name}_ids", tuple(texts), index if self._indexed else None)

    @cached_property
    def _indexed(self) -> bool:
        """Whether there are answers and distractors as in EAP-IG's files."""
        if "choices" in self.names or not set(_EAP_IG) <= set(self.names):
            return False
        return all(self._is_token(row.get(column)) for row in self.rows for column in _EAP_IG)

    def _is_token(self, value: Any) -> bool:
        """Whether a cell holds a token id, also as text (CSV), or nothing."""
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            return value in _EMPTY
        return value >= 0 and (self.size is None or value < self.size)

    def report(self, where: str, *, answered: bool, sample: Sequence[str] = ()) -> None:
        """Say once which columns are not used, and what could be meant otherwise.

        Args:
            where: The data, for the message.
            answered: Whether rows have answers.
            sample: The answer and the distractor of one row, as text.
        """
        if set(_EAP_IG) <= self.used:
            logger.warning(
                "%s: %s are read as token ids of answers and distractors%s",
                where,
                " and ".join(_EAP_IG),
                f", {' and '.join(map(repr, sample))} in the first row" if sample else "",
            )
        unused = [name for name in self.filled if name not in self.used]
        if not unused:
            return
        hint = (
            ""
            if answered
            else "; the run has no answers: name their column answer (the token's text) or answer_ids (token "
            "ids of this model's tokenizer)"
        )
        logger.warning("%s: columns that are not used: %s%s", where, listed(unused), hint)

    def report_unanswered(self, where: str, unanswered: Sequence[int]) -> None:
        """Say which rows lack an answer, where a column of answers is there: then none of the others counts.

        Args:
            where: The data, for the message.
            unanswered: Places of the rows without an answer.
        """
        labels = self.answer
        there = {labels.ids, *labels.texts, labels.index} & set(self.names)
        if not unanswered or not there:
            return
        first = ", ".join(map(str, unanswered[:_ROWS_SHOWN]))
        rest = ", ..." if len(unanswered) > _ROWS_SHOWN else ""
        logger.warning(
            "%s: %d of %d examples have no answer (example %s%s, counted from 0), so right answers are not "
            "counted for any: accuracy is agreement with the full model",
            where,
            len(unanswered),
            len(self.rows),
            first,
            rest,
        )


def listed(names: Iterable[str]) -> str:
    """Names of columns for a message, which do no harm to a terminal."""
    clean = ["".join(c if c.isprintable() else "?" for c in str(name))[:40] for name in names]
    rest = f" and {len(clean) - _SHOWN} more" if len(clean) > _SHOWN else ""
    return (", ".join(clean[:_SHOWN]) or "none") + rest


def _is_text(value: Any) -> bool:
    """Whether a cell holds text, or a list of texts, also as JSON, or nothing."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return True
    items = value if isinstance(value, list) else [value]
    return value in _EMPTY or all(isinstance(item, str) for item in items)
