"""Small tokenizers that split names and years as the real families do, and ways to look into a task."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pahq_hf.errors import TaskError
from pahq_hf.tasks import gendered_pronoun, greater_than, ioi, sva, words
from pahq_hf.tasks.base import Task

NAMES, PLACES, OBJECTS, NOUNS = words.NAMES[:40], words.PLACES[:8], words.OBJECTS[:8], words.NOUNS[:30]
TEXT_WORDS = sorted(
    {
        word.strip(".,;")
        for template in (
            *ioi.TEMPLATES,
            "The lasted from the year to",
            gendered_pronoun.TEMPLATE.replace("n't", "n"),
            " ".join((*gendered_pronoun.PRONOUNS, *sva.PREPOSITIONS, *sva.VERBS)),
            "def self param",
        )
        for word in template.split()
        if "{" not in word
    }
)
COUNTED = (*words.SUBJECTS[:12], *words.ATTRACTORS[:12])
WORDS = ("the", *TEXT_WORDS, *NAMES, *PLACES, *OBJECTS, *NOUNS)
WORDS += (*words.ADJECTIVES[:5], *words.ROLES[:8], *words.ARGUMENTS[:30])
WORDS += tuple(form for noun in COUNTED for form in sva.both_numbers(noun))


def byte_level_bpe(*, digits: str) -> PreTrainedTokenizerFast:
    """A GPT-2-like tokenizer whose words are whole.

    Args:
        digits: `"pairs"` splits " 1732" into " 17" and "32" as GPT-2 mostly does, `"single"` into " ", "1",
            "7", "3", "2" as SmolLM2 does, `"triples"` into " ", "173", "2" as Llama 3 does.
    """
    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    # "Ġ" is the byte-level letter of a space.
    pieces += [f"{space}{word}" for word in WORDS for space in ("", "Ġ")]
    merges: list[tuple[str, str]] = []
    if digits == "pairs":
        merges += [(f"{value:02d}"[0], f"{value:02d}"[1]) for value in range(100)]
        merges += [("Ġ", str(century)) for century in greater_than.CENTURIES]
        # Some years are one token under GPT-2; here all even ones, so generators must draw again.
        pieces += [f"Ġ{year}" for year in range(1100, 1800, 2)]
    elif digits == "triples":
        pieces += [f"{value:03d}" for value in range(1000)]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    # A text that is in the vocabulary is that token, whatever the merges: no need to learn words by parts.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = {
        "pairs": pre_tokenizers.Split(Regex(r" ?[0-9]+"), "isolated"),
        "single": pre_tokenizers.Digits(individual_digits=True),
        "triples": pre_tokenizers.Split(Regex(r"[0-9]{1,3}"), "isolated"),
    }[digits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A Llama-2-like tokenizer: a mark before every text, single digits, a BOS."""
    pieces = ["<unk>", "<s>", "▁", *"0123456789", *".,;:()'\"\nt", "self", "param"]
    pieces += [*(f"▁{word}" for word in WORDS), *words.ARGUMENTS[:30]]
    scored = [(piece, -float(index) / 100) for index, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def word_level(vocabulary: list[str], *, end: bool = False) -> PreTrainedTokenizerFast:
    """Whole words with their leading space; `end` closes every text with an end-of-text token."""
    ids = {word: index for index, word in enumerate(["<unk>", "<end>", *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w ]"), "isolated")
    if end:
        tokenizer.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


def prompt(task: Task, row: int, *, corrupted: bool = False) -> list[int]:
    """An example's real tokens."""
    ids = task.corrupted_ids if corrupted else task.clean_ids
    return ids[row][task.attention_mask[row].bool()].tolist()


def text(task: Task, row: int, tokenizer: PreTrainedTokenizerFast, *, corrupted: bool = False) -> str:
    """An example as text, without special tokens."""
    return str(tokenizer.decode(prompt(task, row, corrupted=corrupted), skip_special_tokens=True))


def words_of(
    task: Task, row: int, tokenizer: PreTrainedTokenizerFast, *, corrupted: bool = False
) -> list[str]:
    """An example's words without punctuation."""
    return text(task, row, tokenizer, corrupted=corrupted).translate(str.maketrans(".,;", "   ")).split()


def one_line(error: pytest.ExceptionInfo[TaskError]) -> str:
    """The message, which must be one line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message
