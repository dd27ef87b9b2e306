"""Reads rows of a user's data: text or token ids, with answers of either kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pahq_hf.errors import TaskError
from pahq_hf.tasks.base import Spelling
from pahq_hf.tasks.columns import Columns, LabelColumns
from pahq_hf.tasks.pairs import Answers, Draft
from pahq_hf.tasks.prompts import Prompts
from pahq_hf.tasks.tokenization import check_text, continuation, continued, encode, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
_LARGEST = 1 << 31  # more tokens than any vocabulary has
_Reader = Callable[[Row, str, str], Answers]


class RowReader:
    """Turns rows into tokens.

    Args:
        prompts: Reads prompts that are text; None where all are token ids and there is no tokenizer.
        several: Whether an answer may have several tokens.

    Attributes:
        spellings: For tokens of answers that were read, what they are with or without their leading space.
    """

    def __init__(self, prompts: Prompts | None, *, several: bool = False) -> None:
        self._prompts = prompts
        self._several = several
        self._size = None if prompts is None else len(prompts.tokenizer)
        self.spellings: dict[int, Spelling] = {}
        self._spelt: set[int] = set()

    @property
    def size(self) -> int | None:
        """Tokens of the vocabulary, if it is known."""
        return self._size

    def of_text(self, row: Row, columns: Columns, at: str) -> Draft:
        """A row whose prompts are text.

        Args:
            row: The row.
            columns: Where its answers are; what fills something is noted there.
            at: The row, for messages.

        Raises:
            TaskError: If it cannot be used.
        """
        assert self._prompts is not None
        texts = {column: self._prompts.text(row.get(column), column, at) for column in ("clean", "corrupted")}
        columns.used |= set(texts)
        clean, corrupted = (self._prompts.ids(text) for text in texts.values())

        def labels(where: LabelColumns) -> Answers:
            readers = [*((text, self._texts(texts["clean"])) for text in where.texts)]
            return self._first(row, [*readers, (where.ids, self._ids), (where.index, self._ids)], columns, at)

        return Draft(clean, corrupted, labels(columns.answer), labels(columns.distractor))

    def of_ids(self, row: Row, columns: Columns, at: str) -> Draft:
        """A row whose prompts are token ids.

        Args:
            row: The row.
            columns: Where its answers are; what fills something is noted there.
            at: The row, for messages.

        Raises:
            TaskError: If it cannot be used.
        """
        clean, corrupted = (
            token_ids(row, column, self._size, at) for column in ("clean_ids", "corrupted_ids")
        )
        columns.used |= {"clean_ids", "corrupted_ids"}

        def labels(where: LabelColumns) -> Answers:
            readers = [(text, self._texts(clean)) for text in where.texts]
            return self._first(row, [(where.ids, self._ids), *readers, (where.index, self._ids)], columns, at)

        return Draft(clean, corrupted, labels(columns.answer), labels(columns.distractor))

    def _first(
        self, row: Row, readers: Sequence[tuple[str | None, _Reader]], columns: Columns, at: str
    ) -> Answers:
        """Answers of the first of some columns that a row fills."""
        for column, read in readers:
            found = () if column is None else read(row, column, at)
            if found:
                columns.used.add(str(column))
                return found
        return ()

    def _ids(self, row: Row, column: str, at: str) -> Answers:
        """Answers of one token each, as token ids."""
        return tuple((token,) for token in token_ids(row, column, self._size, at, optional=True))

    def _texts(self, prompt: str | Sequence[int]) -> _Reader:
        """Reads texts that continue a prompt."""

        def read(row: Row, column: str, at: str) -> Answers:
            if row.get(column) in (None, "", []):
                return ()
            if self._prompts is None:
                name = column.removesuffix("s")
                raise TaskError(
                    f"{at}: column {column} is text, so a tokenizer is needed (or use {name}_ids)"
                )
            tokenizer = self._prompts.tokenizer
            text = prompt if isinstance(prompt, str) else str(tokenizer.decode(list(prompt)))
            return self._answers(row, column, tokenizer, text, at)

        return read

    def _answers(
        self, row: Row, column: str, tokenizer: PreTrainedTokenizerBase, prompt: str, at: str
    ) -> Answers:
        """Tokens of the texts in one cell."""
        found: dict[tuple[int, ...], None] = {}
        for text in _texts_of(row.get(column)):
            if not isinstance(text, str) or not text:
                hint = f" (token ids are of a column {column.removesuffix('s')}_ids)" if _is_id(text) else ""
                raise TaskError(
                    f"{at}: column {column} must hold text or a list of texts, found {text!r:.60}{hint}"
                )
            check_text(text, f"{at}: column {column}")
            tokens = _answer_tokens(tokenizer, prompt, text)
            if tokens is None:
                raise TaskError(f"{at}: {column} {text!r} is not in the tokenizer's vocabulary")
            if len(tokens) > 1 and not self._several:
                raise TaskError(
                    f"{at}: {column} {text!r} is {len(tokens)} tokens {show(tokenizer, tokens)}; it must be "
                    "exactly one (mind the leading space), or answer_tokens (--answer-tokens) first or whole"
                )
            found[tuple(tokens)] = None
            if tokens[0] not in self._spelt:
                self._spell(tokenizer, prompt, text, tokens[0])
        return tuple(found)

    def _spell(self, tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, token: int) -> None:
        """Note what an answer begins with where it has a leading space or none, if that is another token."""
        self._spelt.add(token)
        other = text.lstrip(" ") if text.startswith(" ") else f" {text}"
        tokens = _answer_tokens(tokenizer, prompt, other) if other else None
        if tokens is not None and tokens[0] != token:
            self.spellings[token] = Spelling(tokens[0], other)


def token_ids(row: Row, column: str, size: int | None, at: str, *, optional: bool = False) -> tuple[int, ...]:
    """Token ids of one cell: a list, one number, or a JSON list or number as text (CSV).

    Args:
        row: The row.
        column: Which cell.
        size: Tokens of the vocabulary, if it is known.
        at: The row, for messages.
        optional: Whether it may be empty.

    Raises:
        TaskError: If it holds something else, or tokens that the vocabulary does not have.
    """
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise TaskError(
                f"{at}: column {column} must be a list of token ids, found {value!r:.60}"
            ) from error
    if optional and value in (None, "", []):
        return ()
    items: list[Any] = value if isinstance(value, list) else [value]
    for item in items:
        if not _is_id(item):
            raise TaskError(f"{at}: column {column} must be a list of token ids, found {value!r:.60}")
        if item < 0 or item >= (size or _LARGEST):
            limit = "a vocabulary" if size is None else f"the vocabulary of {size}"
            raise TaskError(f"{at}: token id {_shown(item)} in column {column} is outside {limit}")
    return tuple(items)


def _shown(number: int) -> str:
    """A number for a message, in which thousands of digits would be of no use."""
    return str(number) if abs(number) < 1 << 64 else "of more than 64 bits"


def _is_id(item: object) -> bool:
    # bool is an int to Python; in a column of token ids it is a mistake
    return isinstance(item, int) and not isinstance(item, bool)


def _texts_of(value: Any) -> list[Any]:
    """The texts of a cell."""
    if isinstance(value, str) and value.startswith("["):
        # A list in a CSV cell; a text that merely begins with a bracket stays a text.
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def _answer_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> list[int] | None:
    """The tokens of an answer, as the user wrote it; None if the vocabulary lacks it.

    The text is tokenised alone first. SentencePiece tokenizers put a word-boundary mark of its own before
    " Mary" or "7", two tokens; what counts then is what it is after the prompt.
    """
    ids = encode(tokenizer, text)
    unknown = tokenizer.unk_token_id
    if len(ids) == 1 and ids[0] != unknown:
        return ids
    token = continuation(tokenizer, prompt, text)
    if token is not None:
        return [token]
    if not ids or all(token == unknown for token in ids):
        return None
    return continued(tokenizer, prompt, text) or ids
