"""Questions a task asks a tokenizer: which tokens is this prompt, is that continuation one token?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pahq_hf.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LONGEST = 2**21  # characters; tokenizers take seconds for so many


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise `text` without special tokens.

    Args:
        tokenizer: The model's tokenizer.
        text: Any text.

    Returns:
        Its token ids.
    """
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_text(text: str, what: str) -> None:
    """Check that a tokenizer can read a text.

    Args:
        text: The text.
        what: What it is, for the message.

    Raises:
        TaskError: If it is longer than any prompt, or holds half of a character, as JSON's escapes may.
    """
    if len(text) > _LONGEST:
        raise TaskError(f"{what} has {len(text):,} characters: longer than any prompt")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TaskError(f"{what} holds {text[error.start]!r}, which is half of a character") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a prompt with the tokenizer's own special tokens (Llama's BOS, for instance).

    Args:
        tokenizer: The model's tokenizer.
        text: The prompt.

    Returns:
        Its token ids; a BOS that the text itself begins with is there once.

    Raises:
        TaskError: If the tokenizer closes prompts with a special token: the prediction after it is not
            the continuation of the prompt.
    """
    return prompt_tokens(tokenizer, text)[0]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], bool]:
    """The tokens of `encode_prompt`, and whether the text carries a BOS that the tokenizer adds too.

    Args:
        tokenizer: The model's tokenizer.
        text: The prompt.

    Raises:
        TaskError: If the tokenizer closes prompts with a special token.
    """
    ids = list(tokenizer(text)["input_ids"])
    plain = encode(tokenizer, text)
    if plain and ids[-len(plain) :] != plain:
        raise TaskError(
            f"the tokenizer ends prompts with {tokenizer.decode(ids[-1:])!r}, so the last position does not "
            "predict the answer; load it without (add_eos_token=False)"
        )
    bos = tokenizer.bos_token_id
    doubled = bos is not None and plain[:1] == [bos] and ids[: -len(plain)] == [bos]
    return (plain if doubled else ids), doubled


def continuation(tokenizer: PreTrainedTokenizerBase, context: str, text: str) -> int | None:
    """The one token that `text` is when it follows `context`.

    Args:
        tokenizer: The model's tokenizer.
        context: What comes before, not empty.
        text: The continuation, with its leading space where it has one.

    Returns:
        The token id, or None if the continuation is several tokens, merges with the context or is
        unknown to the vocabulary.
    """
    tokens = continued(tokenizer, context, text)
    return tokens[0] if tokens is not None and len(tokens) == 1 else None


def continued(tokenizer: PreTrainedTokenizerBase, context: str, text: str) -> list[int] | None:
    """The tokens that `text` is when it follows `context`.

    Asking in context is right for every kind of tokenizer: SentencePiece ones put a word-boundary mark
    before a text that stands alone, and byte-pair ones may merge across the seam.

    Args:
        tokenizer: The model's tokenizer.
        context: What comes before, not empty.
        text: The continuation, with its leading space where it has one.

    Returns:
        The token ids, or None if the continuation merges with the context or is unknown to the vocabulary.
    """
    before = encode(tokenizer, context)
    after = encode(tokenizer, context + text)
    rest = after[len(before) :]
    if not rest or after[: len(before)] != before or tokenizer.unk_token_id in rest:
        return None
    return rest


def single_token_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> tuple[str, ...]:
    """The words that are one token after a space, in their order, no two of them the same token.

    Args:
        tokenizer: The model's tokenizer.
        words: Candidates, without leading space.

    Returns:
        The words that pass.
    """
    seen: dict[int, str] = {}
    for word in words:
        # "the" stands in every generator's prompts, so every tokenizer that can serve them knows it.
        token = continuation(tokenizer, "the", f" {word}")
        if token is not None:
            seen.setdefault(token, word)
    return tuple(seen.values())


def has_unknown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether any token is the tokenizer's unknown token.

    Args:
        tokenizer: The model's tokenizer.
        ids: Token ids.

    Returns:
        True if a word is missing from the vocabulary. GPT-2-style tokenizers, whose unknown token doubles
        as the end of text, have no unknown words.
    """
    unknown = tokenizer.unk_token_id
    return unknown is not None and unknown != tokenizer.bos_token_id and unknown in ids


def show(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Tokens for an error message.

    Args:
        tokenizer: The model's tokenizer.
        ids: Token ids.

    Returns:
        The tokens' texts, quoted, in brackets.
    """
    return "[" + ", ".join(repr(tokenizer.decode([token])) for token in ids) + "]"


def pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """A token id to fill padding with; masked, so any valid one does.

    Args:
        tokenizer: The model's tokenizer, or None.

    Returns:
        The padding token, else the end of text, else 0.
    """
    for candidate in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if isinstance(candidate, int):
            return candidate
    return 0
