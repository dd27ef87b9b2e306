"""What columns are called: one table of the names that this field's programs give them.

A row in `_NAMES` is all that another program's names need, where its columns mean what ours do. Columns that
have to be taken apart first are layouts (`pahq_hf.tasks.layouts`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pahq_hf.errors import TaskError, describe

logger = logging.getLogger(__name__)
Row = dict[str, Any]

_NAMES: dict[str, tuple[str, ...]] = {
    # ours: AutoCircuit; feature circuits; Edge Pruning; others
    "clean": ("clean_prefix", "prefix", "clean_prompt", "clean_text"),
    "corrupted": (
        *("corrupt", "patch_prefix", "corr_prefix"),
        *("corrupted_prompt", "corrupt_prompt", "corrupted_text", "corrupt_text"),
    ),
    "answer": ("clean_answer", "correct_answer"),
    "answers": ("correct_answers",),
    "distractor": ("patch_answer", "wrong_answer", "incorrect_answer", "corrupted_answer"),
    "distractors": ("wrong_answers", "incorrect_answers"),
    "clean_ids": ("clean_tokens",),
    "corrupted_ids": ("corrupted_tokens", "corrupt_tokens"),
    "answer_ids": (),
    "distractor_ids": (),
    "correct_idx": (),  # EAP-IG: token ids beside text, or a year
    "incorrect_idx": (),
    "year": (),  # MIB's greater-than
}
_ROLE_OF = {name: role for role, names in _NAMES.items() for name in (role, *names)}
_INDEX = ("", "unnamed: 0", "__index_level_0__")  # what pandas calls the column of row numbers


def known_role(name: object) -> str | None:
    """What a column of this name holds, in our words; None if it is not known."""
    return _ROLE_OF.get(str(name).strip().lower())


def is_ids(name: object) -> bool:
    """Whether a column of this name holds token ids in lists."""
    return (known_role(name) or "").endswith("_ids")


def check_columns(columns: object) -> None:
    """Check names that are given for columns.

    Raises:
        TaskError: If they are no mapping from our names to the data's.
    """
    if columns is None:
        return
    if not isinstance(columns, Mapping):
        raise TaskError(
            f"columns maps our names to the data's, as in {{'clean': 'Q'}}; got {describe(columns)}"
        )
    for role, name in columns.items():
        if role not in _NAMES:
            close = get_close_matches(str(role), _NAMES, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(_NAMES)}"
            raise TaskError(f"columns has no name {str(role)!r:.60}: {hint}")
        if not isinstance(name, str) or not name:
            raise TaskError(f"columns: {role} must be a column's name; got {describe(name)}")
    names = list(columns.values())
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TaskError(f"columns: {twice!r:.60} is named for two columns")


@dataclass(frozen=True)
class Named:
    """Rows whose columns are called as ours.

    Attributes:
        rows: The rows.
        sources: What the columns with another name were called, by ours.
    """

    rows: list[Row]
    sources: dict[str, str]


def named(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None, where: str) -> Named:
    """Call the columns of rows by our names.

    Names that are given come first; then our own, in any case; then those of the table, the first of which
    that is there counts.

    Args:
        rows: The rows.
        columns: Names that are given: the data's by ours.
        where: The data, for messages.

    Returns:
        The rows; columns of row numbers that pandas writes are gone.

    Raises:
        TaskError: If a column that is named is not there.
    """
    there = list(dict.fromkeys(str(column) for row in rows for column in row))
    sources = _given(there, columns or {}, where)
    taken = set(sources.values())
    lower = {name.strip().lower(): name for name in reversed(there) if name not in taken}
    guessed: dict[str, str] = {}
    for role, names in _NAMES.items():
        if role in sources or (role in there and role not in taken):
            continue
        for name in (role, *names):
            found = lower.get(name)
            if found is not None and found not in taken and found not in _NAMES:
                sources[role] = found
                taken.add(found)
                if name != role:
                    guessed[found] = role
                break
    if guessed:
        logger.warning(
            "%s: columns %s are read as %s", where, ", ".join(guessed), ", ".join(guessed.values())
        )
    called = {name: role for role, name in sources.items()}
    return Named([_renamed(row, called) for row in rows], sources)


def _given(there: Sequence[str], columns: Mapping[str, str], where: str) -> dict[str, str]:
    """The columns that are named, as the data spells them."""
    found: dict[str, str] = {}
    for role, name in columns.items():
        spelt = name if name in there else next((n for n in there if n.lower() == name.lower()), None)
        if spelt is None:
            close = get_close_matches(name, there, n=1)
            shown = ", ".join(f"{n:.40}" for n in there[:12])
            hint = f"did you mean {close[0]!r:.60}?" if close else f"it has {shown or 'none'}"
            raise TaskError(f"{where}: no column {name!r:.60} for {role}: {hint}")
        found[role] = spelt
    return found


def _renamed(row: Mapping[str, Any], called: Mapping[str, str]) -> Row:
    """A row by our names. What else has a name that another column has now keeps a mark."""
    roles = set(called.values())
    new: Row = {}
    for name, cell in row.items():
        text = str(name)
        if text.strip().lower() in _INDEX:
            continue
        if text in called:
            new[called[text]] = cell
        else:
            new[f"{text} (column)" if text in roles else text] = cell
    return new
