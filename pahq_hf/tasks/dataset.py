"""A task of a user's own prompt pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pahq_hf.errors import TaskError
from pahq_hf.tasks.base import Pair, Task, collate
from pahq_hf.tasks.choice import Choice
from pahq_hf.tasks.columns import Columns, listed
from pahq_hf.tasks.formats import file_type
from pahq_hf.tasks.layouts import Layout, Look, find_layout
from pahq_hf.tasks.names import named
from pahq_hf.tasks.options import DataOptions, OnMismatch
from pahq_hf.tasks.pairs import Draft, LengthMismatch, aligned, scored
from pahq_hf.tasks.prompts import Prompts
from pahq_hf.tasks.reading import Source, read_rows, told_source
from pahq_hf.tasks.row_reader import RowReader
from pahq_hf.tasks.tokenization import pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Row = dict[str, Any]
_COLUMNS = 50  # whose names are kept with a run


def load_dataset_task(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    n: int | None = None,
    offset: int = 0,
    shuffle: int | None = None,
    split: str | None = None,
    corruption: str | None = None,
    metric: str = "kl",
    padding_side: str = "right",
    options: DataOptions | None = None,
) -> Task:
    """Load prompt pairs from a file, a dataset folder, the Hub or Python objects.

    Accepted columns, first match wins:

    - `clean_ids`, `corrupted_ids`, optional `answer_ids`, `distractor_ids`: token ids, no tokenizer needed;
    - `clean`, `corrupted`, optional `answer`, `distractor` (or `answers`, `distractors`): text, or lists of
      texts for the last two; or `answer_ids`, `distractor_ids`; or EAP-IG's `correct_idx`, `incorrect_idx`;
    - other programs' names of these, in any case (`pahq_hf.tasks.names`), or those of `options.columns`;
    - data that has to be taken apart (`pahq_hf.tasks.layouts`): MIB's, Edge Pruning's, greater-than with a
      column of years.

    Columns that are not used are named in a warning, and so are rows without an answer where others have one,
    and rows that are left out.

    Args:
        source: A file of a type in `FILE_TYPES`, a local dataset folder or a Hub dataset id, with its
            configuration after a colon where it has several (`mib-bench/copycolors_mcqa:4_answer_choices`);
            or a list of dictionaries, a DataFrame or a `datasets.Dataset`. Lists in CSV cells are written as
            JSON.
        tokenizer: The model's tokenizer.
        n: Use `n` examples; all by default.
        offset: Pass over so many before; what a search was not run on is behind its own examples.
        shuffle: Seed of an order the examples are put into first; they stay in their own by default.
        split: Split of a dataset that has several; `train` by default.
        corruption: Which `*_counterfactual` column of MIB data to use; by default MIB's own choice,
            `s2_io_flip`, `symbol` or `random`, where it exists, else the first.
        metric: Default metric of the task.
        padding_side: `"right"` or `"left"`.
        options: Names of columns, and what is done with rows that do not fit.

    Returns:
        The task.

    Raises:
        TaskError: If the data cannot be read or an example cannot be used; the message names it.
    """
    options = options or DataOptions()
    where = told_source(source)
    choice = Choice(n, offset, shuffle)
    data = read_rows(source, choice, split=split, columns=options.columns)
    there = Columns(data.rows).names
    rows = named(data.rows, options.columns, where).rows
    found = Columns(rows, None if tokenizer is None else len(tokenizer))
    has_ids = {"clean_ids", "corrupted_ids"} <= set(found.names)
    look = Look(rows, frozenset(found.names), where, tokenizer, corruption)
    layout = None if has_ids else find_layout(look)
    if not has_ids and layout is None:
        _require_text_columns(look)
    if tokenizer is None and not has_ids:
        raise TaskError(f"{where}: its prompts are text, so a tokenizer is needed (or use *_ids columns)")
    given = layout is None or layout.corruption is None
    if given and corruption is not None:
        raise TaskError(
            f"{where}: its corrupted prompts are given, so corruption {corruption!r} cannot be chosen"
        )
    if options.chat_template and has_ids:
        raise TaskError(f"{where}: its prompts are token ids, and chat_template is of text")
    prompts = None if tokenizer is None else Prompts(tokenizer, chat=options.chat_template)
    reader = RowReader(prompts, several=options.answer_tokens != "one")
    on_mismatch = options.on_mismatch or ("skip" if layout is not None and layout.skips else "error")
    read = _reader(reader, found, layout, has_ids=has_ids)
    fitting = _Fitting(where, options, on_mismatch, pad_id(tokenizer))
    pairs = fitting.pairs(rows, choice.of(data.total), read)
    if given and all(list(pair.clean) == list(pair.corrupted) for pair in pairs):
        raise TaskError(f"{where}: every corrupted prompt equals its clean one, so patching changes nothing")
    said = (*pairs[0].answers[:1], *pairs[0].distractors[:1])
    sample = [] if tokenizer is None else [str(tokenizer.decode([token])) for token in said]
    found.report(where, answered=any(pair.answers for pair in pairs), sample=sample)
    found.report_unanswered(where, [at for at, pair in enumerate(pairs) if not pair.answers])
    if prompts is not None:
        prompts.report(where)
    if options.answer_tokens == "whole" and fitting.distracted:
        logger.warning(
            "%s: whole answers are scored alone, by nll or kl, and its distractors are not used", where
        )
    # It is published with the circuit: a file's name says enough, its folder is nobody's business.
    origin, name = _told(source)
    provenance: dict[str, object] = {"dataset": origin, "n": n, "split": split, "offset": offset}
    provenance |= {"shuffle": shuffle, "total": data.total, "columns": there[:_COLUMNS], **options.given}
    if layout is not None and layout.corruption is not None:
        provenance["corruption"] = layout.corruption
    if on_mismatch != "error":
        provenance["skipped"] = fitting.skipped
    if on_mismatch == "pad":
        provenance["padded"] = fitting.padded
    return collate(
        pairs,
        name=name,
        metric=metric,
        pad_id=pad_id(tokenizer),
        padding_side=padding_side,
        source=provenance,
        summed=options.answer_tokens == "whole",
        spellings=reader.spellings,
    )


def _told(source: Source) -> tuple[str, str]:
    """What data is called with a circuit, and its task."""
    if not isinstance(source, (str, Path)):
        return type(source).__name__, "data"
    path = Path(source)
    stem = path.name.removesuffix(path.suffix) if path.suffix else path.name
    if file_type(path) != path.suffix.lower():  # packed
        stem = Path(stem).stem
    return (path.name if path.exists() else str(source)), stem


_Read = Callable[[Row, str], Draft]


def _reader(reader: RowReader, found: Columns, layout: Layout | None, *, has_ids: bool) -> _Read:
    """What makes a row into tokens."""
    if has_ids:
        return lambda row, at: reader.of_ids(row, found, at)
    if layout is None:
        return lambda row, at: reader.of_text(row, found, at)
    convert = layout.convert
    found.used |= layout.used

    def converted(row: Row, at: str) -> Draft:
        ours = convert(row, at)
        columns = Columns([ours], reader.size)
        draft = reader.of_text(ours, columns, at)
        found.used |= columns.used & set(row)
        return draft

    return converted


@dataclass
class _Fitting:
    """Makes rows into pairs, as far as they fit.

    Attributes:
        where: The data, for messages.
        options: What is asked for.
        on_mismatch: What is done with a row that does not fit.
        filler: Token that shorter prompts are filled with.
        skipped: How many rows were left out.
        padded: How many corrupted prompts were filled.
        distracted: Whether some row has distractors.
    """

    where: str
    options: DataOptions
    on_mismatch: OnMismatch
    filler: int
    skipped: int = 0
    padded: int = 0
    distracted: bool = False

    def pairs(self, rows: Sequence[Row], numbers: Sequence[int], read: _Read) -> list[Pair]:
        """The pairs of the rows that fit.

        Args:
            rows: The rows.
            numbers: Which ones of the data they are, for messages.
            read: Makes a row into tokens.

        Raises:
            TaskError: If none does, or one does not where all have to.
        """
        pairs: list[Pair] = []
        failures: list[TaskError] = []
        for number, row in zip(numbers, rows, strict=True):
            at = f"{self.where}, example {number}"
            try:
                pairs.append(self._pair(read(row, at), at))
            except TaskError as error:
                failures.append(error)
        self.skipped = len(failures)
        if failures and self.on_mismatch == "error":
            raise self._refused(failures, len(rows))
        if not pairs:
            raise TaskError(f"none of the {len(rows)} examples can be used; the last: {failures[-1]}")
        self._report(failures, len(rows))
        return pairs

    def _pair(self, draft: Draft, at: str) -> Pair:
        even = aligned(draft, self.filler if self.on_mismatch == "pad" else None, at)
        self.padded += even is not draft
        self.distracted |= bool(draft.distractors)
        return scored(even, self.options.answer_tokens, at)

    def _refused(self, failures: Sequence[TaskError], total: int) -> TaskError:
        """The first row that does not fit, and how many others do not."""
        first = failures[0]
        if len(failures) == total:
            return first
        kind = type(first)
        more = f"; {_examples(len(failures), total)} cannot be used" if len(failures) > 1 else ""
        return kind(f'{first}{more}; on_mismatch="skip" (--on-mismatch skip) leaves such examples out')

    def _report(self, failures: Sequence[TaskError], total: int) -> None:
        """Say how many rows are used, and why others are not."""
        if self.padded:
            logger.warning(
                "%s: the corrupted prompts of %s are shorter and are filled with the token %d",
                self.where,
                _examples(self.padded, total),
                self.filler,
            )
        if not failures:
            return
        unequal = sum(isinstance(error, LengthMismatch) for error in failures)
        why = f", {unequal} of them for prompts of different token lengths" if unequal else ""
        logger.warning(
            "%s: %s are used, %d left out%s; the first: %s",
            self.where,
            _examples(total - len(failures), total),
            len(failures),
            why,
            str(failures[0]).removeprefix(f"{self.where}, "),
        )


def _examples(count: int, total: int) -> str:
    return f"{count:,} of {total:,} examples"


def _require_text_columns(look: Look) -> None:
    missing = sorted({"clean", "corrupted"} - look.names)
    if missing and not ("prompt" in look.names and look.tokenizer is None):
        raise TaskError(
            f"{look.where}: missing column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; it needs "
            f"clean and corrupted (or clean_ids and corrupted_ids), and has {listed(sorted(look.names))}: "
            "columns (--columns clean=NAME,...) says which is which"
        )
