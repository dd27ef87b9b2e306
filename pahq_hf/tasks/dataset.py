"""A user's own prompt pairs: text columns, token-id columns or the columns of the MIB benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pahq_hf.errors import TaskError
from pahq_hf.tasks.base import Pair, Task, collate
from pahq_hf.tasks.columns import Columns
from pahq_hf.tasks.reading import Choice, Row, read_rows
from pahq_hf.tasks.tokenization import continuation, encode, encode_prompt, pad_id, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COUNTERFACTUAL = "_counterfactual"
_MIB_ANSWERS = ("choices", "answerKey", "label")
_COLUMNS = 50  # whose names are kept with a run
# What MIB's circuit track patches with: IOI; MCQA and ARC; arithmetic.
_USUAL_COUNTERFACTUALS = ("s2_io_flip", "symbol", "random")


def load_dataset_task(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    n: int | None = None,
    offset: int = 0,
    shuffle: int | None = None,
    split: str | None = None,
    corruption: str | None = None,
    metric: str = "kl",
    padding_side: str = "right",
) -> Task:
    """Load prompt pairs from a file, a dataset folder or the Hub.

    Accepted columns, first match wins:

    - `clean_ids`, `corrupted_ids`, optional `answer_ids`, `distractor_ids`: token ids, no tokenizer needed;
    - `clean`, `corrupted`, optional `answer`, `distractor` (or `answers`, `distractors`): text, or lists of
      texts for the last two; or `answer_ids`, `distractor_ids`; or EAP-IG's `correct_idx`, `incorrect_idx`;
    - `prompt`, `choices`, `answerKey`, `*_counterfactual`: MIB's IOI, MCQA and ARC; `prompt`, `label`,
      `*_counterfactual`: its arithmetic. Rows a tokenizer cannot pair are left out, as MIB does, and counted
      in `task.source["skipped"]`.

    Columns that are not used are named in a warning, and so are rows without an answer where others have one.

    Args:
        source: A .jsonl, .json, .csv or .parquet file, a local dataset folder or a Hub dataset id, with its
            configuration after a colon where it has several (`mib-bench/copycolors_mcqa:4_answer_choices`).
            Lists in CSV cells are written as JSON.
        tokenizer: The model's tokenizer.
        n: Use `n` examples; all by default.
        offset: Pass over so many before; what a search was not run on is behind its own examples.
        shuffle: Seed of an order the examples are put into first; they stay in their own by default.
        split: Split of a dataset that has several; `train` by default.
        corruption: Which `*_counterfactual` column of MIB data to use; by default MIB's own choice,
            `s2_io_flip`, `symbol` or `random`, where it exists, else the first.
        metric: Default metric of the task.
        padding_side: `"right"` or `"left"`.

    Returns:
        The task.

    Raises:
        TaskError: If the data cannot be read or an example cannot be used; the message names it.
    """
    data = read_rows(source, Choice(n, offset, shuffle), split=split)
    rows = data.rows
    found = Columns(rows, None if tokenizer is None else len(tokenizer))
    columns = set(found.names)
    where = str(source)
    # It is published with the circuit: a file's name says enough, its folder is nobody's business.
    origin = Path(source).name if Path(source).exists() else where
    provenance: dict[str, object] = {"dataset": origin, "n": n, "split": split, "offset": offset}
    provenance |= {"shuffle": shuffle, "total": data.total, "columns": found.names[:_COLUMNS]}
    made = {"name": Path(source).stem, "metric": metric, "padding_side": padding_side}
    read: Callable[[Row, str], Pair]
    if {"clean_ids", "corrupted_ids"} <= columns:

        def read(row: Row, at: str) -> Pair:
            return _pair_from_ids(row, tokenizer, found, at)

    elif {"clean", "corrupted"} <= columns or "prompt" not in columns:
        _require_text_columns(columns, where)
        needed = _need_tokenizer(tokenizer, where)

        def read(row: Row, at: str) -> Pair:
            return _pair_from_text(row, needed, found, at)

    else:
        needed = _need_tokenizer(tokenizer, where)
        column = _counterfactual_column(rows, corruption, where)
        pairs, skipped = _mib_pairs(rows, column, needed, where)
        found.used |= {"prompt", column, *_MIB_ANSWERS}
        found.report(where, answered=True)
        provenance |= {"corruption": column.removesuffix(_COUNTERFACTUAL), "skipped": skipped}
        return collate(pairs, pad_id=pad_id(tokenizer), source=provenance, **made)
    if corruption is not None:
        raise TaskError(
            f"{where}: its corrupted prompts are given, so corruption {corruption!r} cannot be chosen"
        )
    pairs = [read(row, f"{where}, example {index}") for index, row in enumerate(rows)]
    if all(list(pair.clean) == list(pair.corrupted) for pair in pairs):
        raise TaskError(f"{where}: every corrupted prompt equals its clean one, so patching changes nothing")
    found.report(where, answered=any(pair.answers for pair in pairs))
    found.report_unanswered(where, [index for index, pair in enumerate(pairs) if not pair.answers])
    return collate(pairs, pad_id=pad_id(tokenizer), source=provenance, **made)


def _need_tokenizer(tokenizer: PreTrainedTokenizerBase | None, where: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise TaskError(f"{where}: its prompts are text, so a tokenizer is needed (or use *_ids columns)")
    return tokenizer


def _require_text_columns(columns: set[str], where: str) -> None:
    missing = sorted({"clean", "corrupted"} - columns)
    if missing:
        raise TaskError(
            f"{where}: missing column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; it needs clean "
            f"and corrupted (or clean_ids and corrupted_ids), and has {', '.join(sorted(columns)) or 'none'}"
        )


def _pair_from_text(row: Row, tokenizer: PreTrainedTokenizerBase, columns: Columns, at: str) -> Pair:
    prompts: dict[str, str] = {}
    for column in ("clean", "corrupted"):
        value = row.get(column)
        if not isinstance(value, str) or not value:
            raise TaskError(f"{at}: column {column} must be a non-empty text, found {value!r:.60}")
        prompts[column] = value
        columns.used.add(column)
    clean, corrupted = (encode_prompt(tokenizer, prompts[column]) for column in ("clean", "corrupted"))
    labels: dict[str, tuple[int, ...]] = {}
    for name, where in (("answer", columns.answer), ("distractor", columns.distractor)):
        read, read_ids = _text_reader(tokenizer, prompts["clean"]), _id_reader(len(tokenizer))
        readers = [*((text, read) for text in where.texts), (where.ids, read_ids), (where.index, read_ids)]
        labels[name] = _first(row, readers, columns, at)
    return _checked(clean, corrupted, labels["answer"], labels["distractor"], at)


def _pair_from_ids(row: Row, tokenizer: PreTrainedTokenizerBase | None, columns: Columns, at: str) -> Pair:
    size = None if tokenizer is None else len(tokenizer)
    clean, corrupted = (_ids(row, column, size, at) for column in ("clean_ids", "corrupted_ids"))
    labels: dict[str, tuple[int, ...]] = {}
    columns.used |= {"clean_ids", "corrupted_ids"}
    for name, where in (("answer", columns.answer), ("distractor", columns.distractor)):
        read, read_ids = _text_reader(tokenizer, clean), _id_reader(size)
        readers = [(where.ids, read_ids), *((text, read) for text in where.texts), (where.index, read_ids)]
        labels[name] = _first(row, readers, columns, at)
    return _checked(clean, corrupted, labels["answer"], labels["distractor"], at)


Reader = Callable[[Row, str, str], tuple[int, ...]]


def _first(
    row: Row, readers: Sequence[tuple[str | None, Reader]], columns: Columns, at: str
) -> tuple[int, ...]:
    """Token ids of the first of some columns that a row fills."""
    for column, read in readers:
        found = () if column is None else read(row, column, at)
        if found:
            columns.used.add(str(column))
            return found
    return ()


def _id_reader(size: int | None) -> Reader:
    """Reads token ids of a vocabulary of so many tokens."""
    return lambda row, column, at: _ids(row, column, size, at, optional=True)


def _text_reader(tokenizer: PreTrainedTokenizerBase | None, prompt: str | Sequence[int]) -> Reader:
    """Reads texts that continue a prompt."""

    def read(row: Row, column: str, at: str) -> tuple[int, ...]:
        if row.get(column) in (None, "", []):
            return ()
        if tokenizer is None:
            name = column.removesuffix("s")
            raise TaskError(f"{at}: column {column} is text, so a tokenizer is needed (or use {name}_ids)")
        text = prompt if isinstance(prompt, str) else str(tokenizer.decode(list(prompt)))
        return _answers(row, column, tokenizer, text, at)

    return read


def _checked(
    clean: Sequence[int],
    corrupted: Sequence[int],
    answers: tuple[int, ...],
    distractors: tuple[int, ...],
    at: str,
) -> Pair:
    if not clean:
        raise TaskError(f"{at}: the clean prompt has no tokens")
    if len(clean) != len(corrupted):
        raise TaskError(
            f"{at}: the clean prompt has {len(clean)} tokens and the corrupted one {len(corrupted)}; "
            "activation patching needs equal lengths"
        )
    both = sorted(set(answers) & set(distractors))
    if both:
        raise TaskError(f"{at}: token {both[0]} is both an answer and a distractor")
    return Pair(clean, corrupted, answers, distractors)


def _ids(row: Row, column: str, size: int | None, at: str, *, optional: bool = False) -> tuple[int, ...]:
    """Token ids of one cell: a list, one number, or a JSON list or number as text (CSV)."""
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise TaskError(
                f"{at}: column {column} must be a list of token ids, found {value!r:.60}"
            ) from error
    if optional and value in (None, "", []):
        return ()
    items: list[Any] = value if isinstance(value, list) else [value]
    for item in items:
        # bool is an int to Python; in a column of token ids it is a mistake
        if not isinstance(item, int) or isinstance(item, bool):
            raise TaskError(f"{at}: column {column} must be a list of token ids, found {value!r:.60}")
        if item < 0 or (size is not None and item >= size):
            limit = "a vocabulary" if size is None else f"the vocabulary of {size}"
            raise TaskError(f"{at}: token id {item} in column {column} is outside {limit}")
    return tuple(items)


def _answers(
    row: Row, column: str, tokenizer: PreTrainedTokenizerBase, prompt: str, at: str
) -> tuple[int, ...]:
    """Token ids of the texts in one cell, each exactly one token."""
    value = row.get(column)
    if isinstance(value, str) and value.startswith("["):
        # A list in a CSV cell; a text that merely begins with a bracket stays a text.
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        value = parsed
    if value is None or value == "":
        return ()
    tokens: list[int] = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str) or not text:
            raise TaskError(f"{at}: column {column} must hold text or a list of texts, found {text!r:.60}")
        token = _answer_token(tokenizer, prompt, text, column, at)
        if token not in tokens:
            tokens.append(token)
    return tuple(tokens)


def _answer_token(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, column: str, at: str) -> int:
    """The one token of an answer, as the user wrote it.

    The text is tokenised alone first. SentencePiece tokenizers put a word-boundary mark of its own before
    " Mary" or "7", two tokens; what counts then is the token it is after the prompt.
    """
    ids = encode(tokenizer, text)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    token = continuation(tokenizer, prompt, text)
    if token is not None:
        return token
    if ids and all(token == tokenizer.unk_token_id for token in ids):
        raise TaskError(f"{at}: {column} {text!r} is not in the tokenizer's vocabulary")
    raise TaskError(
        f"{at}: {column} {text!r} is {len(ids)} tokens {show(tokenizer, ids)}; it must be exactly one "
        "(mind the leading space)"
    )


def _counterfactual_column(rows: list[Row], corruption: str | None, where: str) -> str:
    columns = [column for column in rows[0] if column.endswith(_COUNTERFACTUAL)]
    answered = {"choices", "answerKey"} <= rows[0].keys() or "label" in rows[0]
    if not columns or not answered:
        raise TaskError(
            f"{where}: missing columns clean, corrupted (or clean_ids, corrupted_ids; or MIB's prompt, "
            f"choices, answerKey or label and a *{_COUNTERFACTUAL}), and has {', '.join(sorted(rows[0]))}"
        )
    if corruption is None:
        usual = (f"{name}{_COUNTERFACTUAL}" for name in _USUAL_COUNTERFACTUALS)
        return next((column for column in usual if column in columns), columns[0])
    if f"{corruption}{_COUNTERFACTUAL}" not in columns:
        names = ", ".join(column.removesuffix(_COUNTERFACTUAL) for column in columns)
        raise TaskError(f"{where}: no corruption {corruption!r}; the data has {names}")
    return f"{corruption}{_COUNTERFACTUAL}"


def _mib_pairs(
    rows: list[Row], column: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[Pair], int]:
    """Pairs of MIB rows and the number of rows that cannot be paired."""
    pairs: list[Pair] = []
    reason = ""
    for index, row in enumerate(rows):
        at = f"{where}, example {index}"
        try:
            text = _mib_as_text(row, column, at)
            pairs.append(_pair_from_text(text, tokenizer, Columns([text]), at))
        except TaskError as error:
            reason = str(error)
    if not pairs:
        raise TaskError(f"none of the {len(rows)} examples can be used; the last: {reason}")
    return pairs, len(rows) - len(pairs)


def _mib_as_text(row: Row, column: str, at: str) -> Row:
    """A MIB row in our columns.

    As in MIB's circuit track, the distractor is what the counterfactual's answer is where the rows say so
    (arithmetic, MCQA, ARC); in IOI it is the other name.
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
        corrupted = other["prompt"]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise TaskError(f"{at}: not a row in MIB's layout: {error!r}") from error
    return {"clean": row["prompt"], "corrupted": corrupted, "answer": answer, "distractor": distractors}


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
