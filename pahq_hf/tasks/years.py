"""Greater-than of one's own data: a year in a column, and the answers that a tokenizer makes of it.

EAP-IG calls it `label`, later `correct_idx`, Edge Pruning `digits`, all three the last two digits as a
number; MIB `year`, all four.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, Any

from pahq_hf.errors import TaskError
from pahq_hf.tasks.greater_than import Splitting, YearText, answer_sets, splittings
from pahq_hf.tasks.tokenization import encode, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Row = dict[str, Any]
_COLUMNS = ("year", "digits", "label", "correct_idx")
_ANSWERS = {"answer", "answers", "answer_ids", "incorrect_idx"}


def year_column(rows: Sequence[Row], names: Set[str]) -> str | None:
    """The column of years that the clean prompts end the century of; None if there is none.

    Args:
        rows: The rows, by our names.
        names: Their columns.

    Returns:
        The column whose numbers most clean prompts have: one that only looks like it does not.
    """
    if names & _ANSWERS:
        return None
    for column in _COLUMNS:
        read = sum(_text_of(row, column) is not None for row in rows) if column in names else 0
        if read and 2 * read >= len(rows):
            return column
    return None


def year_reader(
    rows: Sequence[Row], column: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> Callable[[Row, str], Row] | None:
    """What gives rows their answers, as `greater_than` does.

    Args:
        rows: The rows.
        column: Of the years.
        tokenizer: The model's tokenizer, which splits years in one of two ways.
        where: The data, for messages.

    Returns:
        What makes a row from a row; None, and a warning, if the tokenizer splits years in neither way.
    """
    texts = [text for row in rows if (text := _text_of(row, column)) is not None]
    ways = (way for way in splittings(tokenizer) if any(answer_sets(tokenizer, text, way) for text in texts))
    splitting: Splitting | None = next(ways, None)
    if splitting is None:
        sample = texts[0].clean
        logger.warning(
            "%s: the answers of %s need a tokenizer that splits years into two two-digit tokens or into "
            "single digits, and are left out; this one splits %.80r as %s",
            where,
            column,
            sample,
            show(tokenizer, encode(tokenizer, sample)),
        )
        return None

    def convert(row: Row, at: str) -> Row:
        text = _text_of(row, column)
        if text is None:
            raise TaskError(
                f"{at}: {column} {row.get(column)!r:.20} is not the year of the clean prompt, which begins "
                "with the century that it ends with"
            )
        found = answer_sets(tokenizer, text, splitting)
        if found is None:
            raise TaskError(f"{at}: the tokenizer does not split the year of {text.clean!r:.80} as others")
        answers, distractors = found
        if not answers or not distractors:
            raise TaskError(
                f"{at}: no {'later' if distractors else 'earlier'} year than {text.year:02d} can be told"
            )
        return {**row, "answer_ids": list(answers), "distractor_ids": list(distractors)}

    return convert


def _text_of(row: Row, column: str) -> YearText | None:
    """A row's prompts with the year that is in its column; None if the clean one does not have it."""
    clean, corrupted, value = row.get("clean"), row.get("corrupted"), row.get(column)
    if not isinstance(clean, str) or not isinstance(corrupted, str) or isinstance(value, bool):
        return None
    digits, century = str(value).strip(), re.search(r"(?<!\d)(\d\d)$", clean)
    if century is None or not digits.isascii() or not digits.isdigit() or len(digits) not in (1, 2, 4):
        return None
    if len(digits) == 4 and digits[:2] != century[1]:
        return None
    year = int(digits[-2:])
    begin = clean.find(f"{century[1]}{year:02d}")
    if begin < 0:
        return None
    return YearText(clean, corrupted, clean[: begin + 2], year)
