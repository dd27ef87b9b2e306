"""Prompts of one's own data: text as it is, or messages and text in the tokenizer's chat template."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from pahq_hf.errors import TaskError, first_line
from pahq_hf.tasks.tokenization import check_text, encode, prompt_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Prompts:
    """Reads prompts of a dataset.

    Args:
        tokenizer: The model's tokenizer.
        chat: Whether the tokenizer's chat template is put around them.

    Raises:
        TaskError: If it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> None:
        self.tokenizer = tokenizer
        self._chat = chat
        self._doubled = 0
        if chat and not getattr(tokenizer, "chat_template", None):
            raise TaskError("the tokenizer has no chat template: give prompts as the model reads them")

    def text(self, value: Any, column: str, at: str) -> str:
        """The text of a prompt.

        Args:
            value: A cell: text, or messages where there is a template.
            column: Its column, for messages.
            at: Its row.

        Raises:
            TaskError: If it is neither, or the template does not take it.
        """
        messages = _messages(value)
        if messages is not None and not self._chat:
            raise TaskError(
                f"{at}: column {column} holds messages: chat_template=True (--chat-template) puts them into "
                "the tokenizer's template"
            )
        if messages is None and (not isinstance(value, str) or not value):
            hint = ""
            if isinstance(value, list) and value and all(type(item) is int for item in value):
                hint = f"; token ids are of a column {column}_ids"
            raise TaskError(f"{at}: column {column} must be a non-empty text, found {value!r:.60}{hint}")
        for part in [value] if messages is None else [message["content"] for message in messages]:
            if isinstance(part, str):
                check_text(part, f"{at}: column {column}")
        if not self._chat:
            return str(value)
        if messages is None:
            messages = [{"role": "user", "content": value}]
        begun = messages[-1]["role"] == "assistant"  # an answer whose next token is asked for
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
            )
        except Exception as error:  # a template raises what it likes: jinja2's own, KeyError, ...
            raise TaskError(
                f"{at}: the chat template does not take column {column}: {first_line(error)}"
            ) from error
        return str(text)

    def ids(self, text: str) -> list[int]:
        """The tokens of a prompt's text.

        Raises:
            TaskError: If the tokenizer closes prompts with a special token.
        """
        if self._chat:
            return encode(self.tokenizer, text)  # a template has written all special tokens there are
        ids, doubled = prompt_tokens(self.tokenizer, text)
        self._doubled += doubled
        return ids

    def report(self, where: str) -> None:
        """Say once that prompts carry what the tokenizer adds too."""
        if self._doubled:
            logger.warning(
                "%s: prompts begin with %r, which the tokenizer adds to texts: it is there once",
                where,
                self.tokenizer.bos_token,
            )


def _messages(value: Any) -> list[dict[str, Any]] | None:
    """The messages that a cell holds, also as JSON (CSV); None if it holds none."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value):
        return None
    return value
