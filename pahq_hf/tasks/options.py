"""How data of one's own is read: which columns it has, and what is done with rows that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pahq_hf.errors import TaskError, describe
from pahq_hf.tasks.names import check_columns

OnMismatch = Literal["error", "skip", "pad"]
AnswerTokens = Literal["one", "first", "whole"]


@dataclass(frozen=True)
class DataOptions:
    """Options of data that is not generated.

    Attributes:
        columns: The data's names of columns by ours.
        on_mismatch: What is done with a row that cannot be used, such as prompts of different lengths:
            `"error"` ends with it, `"skip"` leaves it out, `"pad"` fills shorter corrupted prompts and leaves
            out the rest. By default `"error"`, and `"skip"` for MIB's data.
        answer_tokens: What is scored of answers of several tokens: `"one"` refuses them, `"first"` scores the
            first token in which answers and distractors differ, `"whole"` all tokens.
        chat_template: Put prompts into the tokenizer's chat template.

    Raises:
        TaskError: If one is of another type or unknown.
    """

    columns: Mapping[str, str] | None = None
    on_mismatch: OnMismatch | None = None
    answer_tokens: AnswerTokens = "one"
    chat_template: bool = False

    def __post_init__(self) -> None:
        check_columns(self.columns)
        if self.on_mismatch is not None:
            _check("on_mismatch", self.on_mismatch, get_args(OnMismatch))
        _check("answer_tokens", self.answer_tokens, get_args(AnswerTokens))
        if not isinstance(self.chat_template, bool):
            raise TaskError(f"chat_template is True or False; got {describe(self.chat_template)}")

    @property
    def given(self) -> dict[str, Any]:
        """What is not as by default, as it is kept with a run."""
        own = {
            "columns_of": None if self.columns is None else dict(self.columns),
            "on_mismatch": self.on_mismatch,
            "answer_tokens": None if self.answer_tokens == "one" else self.answer_tokens,
            "chat_template": self.chat_template or None,
        }
        return {name: value for name, value in own.items() if value is not None}


def _check(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise TaskError(f"{name} is one of {', '.join(choices)}; got {describe(value)}")
