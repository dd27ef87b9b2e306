"""What the demo checkpoint is trained on: words as tokens, and texts of the generated tasks."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import combinations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pahq_hf.tasks import gendered_pronoun, greater_than, induction, ioi, sva, words
from pahq_hf.tasks.base import Pair, Task, collate
from pahq_hf.tasks.generating import PromptText

END, UNKNOWN = "<|endoftext|>", "<unk>"
EVALUATION_SEED = 987_654
# Shares of the texts; `abc` is IOI's corrupted prompt. `new` is for learning induction and pronouns.
MIXTURES = {
    "even": {"induction": 16, "ioi": 20, "abc": 16, "gendered_pronoun": 11, "sva": 4, "greater_than": 33},
    "new": {"induction": 42, "ioi": 18, "abc": 5, "gendered_pronoun": 13, "sva": 4, "greater_than": 18},
}
# A word with the space before it, two digits of a year (the first two with the space), a punctuation mark.
TOKEN = r" ?[A-Za-z]+| ?[0-9]{2}|[^A-Za-z0-9]|[0-9]"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over every word the generators use, but `docstring`'s.

    Returns:
        The tokenizer; " Mary" is one token and " 1732" the two tokens " 17" and "32".
    """
    vocabulary = [END, UNKNOWN]
    texts = [
        re.sub(r"\{\w+\}", "", template)
        for template in (
            *ioi.TEMPLATES,
            "The {noun} lasted from the year to",
            gendered_pronoun.TEMPLATE,
            sva.TEMPLATE,
        )
    ]
    vocabulary += sorted({token for text in texts for token in re.findall(TOKEN, text) if token != " "})
    for word_list in (words.NAMES, words.PLACES, words.OBJECTS, words.NOUNS):
        vocabulary += [f" {word}" for word in word_list]
    for nouns in (words.SUBJECTS, words.ATTRACTORS):
        vocabulary += [f" {form}" for noun in nouns for form in sva.both_numbers(noun)]
    for word_list in (words.ADJECTIVES, words.ROLES, sva.PREPOSITIONS):
        vocabulary += [f" {word}" for word in word_list]
    vocabulary += [*gendered_pronoun.PRONOUNS, *sva.VERBS]
    vocabulary += [f" {century}" for century in greater_than.CENTURIES]
    vocabulary += [f"{year:02d}" for year in range(100)]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


@dataclass(frozen=True)
class Text:
    """One training text.

    Attributes:
        ids: Its tokens.
        answers: Positions whose next token the tasks ask for.
        random: How many tokens at the start are random, with nothing to learn from.
    """

    ids: list[int]
    answers: range
    random: int = 0


class Corpus:
    """Texts of the generators, with a tenth of the name pairs held out of `ioi`.

    Args:
        tokenizer: The demo tokenizer.
        seed: Decides the held-out pairs and the texts.
        mixture: A name of `MIXTURES`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, mixture: str = "even") -> None:
        self.shares = MIXTURES[mixture]
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.vocabulary = induction.ordinary_tokens(tokenizer)
        pairs = [frozenset(pair) for pair in combinations(words.NAMES, 2)]
        self.held_out = set(random.Random(f"held-out {seed}").sample(pairs, len(pairs) // 10))

    def draw_ioi(self, rng: random.Random, *, held_out: bool) -> PromptText:
        """Draw a prompt pair whose answer and distractor are, or are not, a held-out pair."""
        while True:
            text = ioi.draw(rng, words.NAMES, words.PLACES, words.OBJECTS)
            if (frozenset((text.answer[1:], text.distractors[0][1:])) in self.held_out) is held_out:
                return text

    def held_out_ioi(self, n: int) -> Task:
        """IOI on held-out pairs of names, the same at every call."""
        rng = random.Random(EVALUATION_SEED)
        pairs = []
        for _ in range(n):
            text = self.draw_ioi(rng, held_out=True)
            clean, corrupted, (answer,), (distractor,) = (
                self.tokenizer(part)["input_ids"]
                for part in (text.clean, text.corrupted, text.answer, *text.distractors)
            )
            pairs.append(Pair(clean, corrupted, (answer,), (distractor,)))
        return collate(pairs, name="ioi", metric="logit_diff")

    def draw(self) -> Text:
        """One training text."""
        (kind,) = self.rng.choices(list(self.shares), weights=list(self.shares.values()))
        if kind == "induction":
            return self.draw_induction()
        prompt, answer = self.draw_prompt(kind)
        before = self.tokenizer(prompt)["input_ids"]
        ids = self.tokenizer(f"{prompt}{answer}.{END}")["input_ids"]
        return Text(ids, range(len(before) - 1, len(before)))

    def draw_prompt(self, kind: str) -> tuple[str, str]:
        """A prompt and its continuation."""
        if kind == "ioi":
            text = self.draw_ioi(self.rng, held_out=False)
            return text.clean, text.answer
        if kind == "abc":
            # Three different names: the corrupted prompt of `abc`. Either of the first two may receive.
            prompt = self.draw_ioi(self.rng, held_out=False).corrupted
            present = [name for name in re.findall(r" [A-Z][a-z]+", prompt) if name[1:] in words.NAMES]
            return prompt, self.rng.choice(present[:2])
        if kind == "gendered_pronoun":
            pronoun = gendered_pronoun.draw(self.rng, gendered_pronoun.Scene())
            return pronoun.clean, pronoun.answer
        if kind == "sva":
            agreement = sva.draw(self.rng, words.SUBJECTS, words.ATTRACTORS)
            return agreement.clean, agreement.answer
        years = greater_than.draw(self.rng, words.NOUNS, first=greater_than.CORRUPTED_YEAR)
        return years.clean, f"{self.rng.randint(years.year + 1, 99):02d}"

    def draw_induction(self) -> Text:
        """Draw a sequence and its copy. Lengths vary, so that looking a fixed distance back is no use."""
        length = self.rng.randint(5, 14)
        copy, _ = induction.draw(self.rng, self.vocabulary, length)
        return Text([*copy, *copy], range(length, 2 * length - 1), random=length)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of texts.

        Args:
            size: Number of texts.

        Returns:
            Token ids [batch, pos], targets with -100 where there is none [batch, pos], and the weights of
            the positions that predict an answer, 1 in all per text [batch, pos].
        """
        texts = [self.draw() for _ in range(size)]
        length = max(len(text.ids) for text in texts)
        ids = torch.full((size, length), self.tokenizer.eos_token_id)
        targets = torch.full((size, length), -100)
        weights = torch.zeros(size, length)
        for row, text in enumerate(texts):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            targets[row, text.random : len(text.ids) - 1] = torch.tensor(text.ids[text.random + 1 :])
            weights[row, text.answers.start : text.answers.stop] = 1 / len(text.answers)
        return ids, targets, weights
