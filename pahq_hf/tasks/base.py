"""`Task`: pairs of clean and corrupted prompts, tokenised and ready for any engine."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pahq_hf.errors import TaskError
from pahq_hf.tasks.metrics import find_metric

if TYPE_CHECKING:  # torch takes seconds to import, and `pahq tasks` lists tasks without it
    from torch import Tensor


@dataclass(frozen=True)
class Spelling:
    """The same answer with a leading space or without.

    Attributes:
        token: Its first token.
        text: Its text.
    """

    token: int
    text: str


@dataclass(frozen=True)
class Task:
    """Tokenised prompt pairs with the positions and tokens a metric looks at.

    A *row* is one scored position of one example; most tasks have one row per example.

    Attributes:
        name: Name shown in cards and logs.
        clean_ids: Token ids of the clean prompts. [batch, pos]
        corrupted_ids: Token ids of the corrupted prompts, same lengths pair by pair. [batch, pos]
        attention_mask: 1 on real tokens, 0 on padding. [batch, pos]
        answer_rows: Example index of each row. [rows]
        answer_positions: Column of `clean_ids` whose next-token prediction is scored. [rows]
        answers: Token ids of the right answers of each row, possibly empty.
        distractors: Token ids of the wrong answers of each row, possibly empty.
        metric: The metric this task is usually scored with.
        source: How the data was made (generator, seed, file): kept with the circuit.
        swapped: Whether clean and corrupted prompts have changed places (`swap`). A metric of answers is
            turned round then: it is least where the right answers are least likely.
        summed: Whether a metric adds up over an example's rows, as log probabilities of one answer's tokens
            do; else it is their mean.
        spellings: For tokens of answers, what they are with a leading space where they have none, and without
            where they have one. They are not part of what is scored.
        more: Draws so many other pairs of the same kind, given a seed; None where nothing can. What is made
            of a task by other means than its generator's has none.
    """

    name: str
    clean_ids: Tensor
    corrupted_ids: Tensor
    attention_mask: Tensor
    answer_rows: Tensor
    answer_positions: Tensor
    answers: tuple[tuple[int, ...], ...]
    distractors: tuple[tuple[int, ...], ...]
    metric: str = "kl"
    source: dict[str, object] = field(default_factory=dict)
    swapped: bool = False
    summed: bool = False
    spellings: Mapping[int, Spelling] = field(default_factory=dict, repr=False)
    more: Callable[[int, int], Task] | None = field(default=None, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        """What is kept in a file: generators of pairs are not."""
        return {**self.__dict__, "more": None}

    def __post_init__(self) -> None:
        find_metric(self.metric)
        batch, _ = self.clean_ids.shape
        rows = self.answer_rows.numel()
        if batch == 0:
            raise TaskError(f"task {self.name!r} has no examples: give it at least one prompt pair")
        if self.corrupted_ids.shape != self.clean_ids.shape:
            raise TaskError(
                f"task {self.name!r}: clean and corrupted prompts have different token lengths; "
                "every pair must tokenise to the same length"
            )
        if self.attention_mask.shape != self.clean_ids.shape:
            raise TaskError(f"task {self.name!r}: attention_mask must have the shape of clean_ids")
        if not (self.answer_positions.numel() == rows == len(self.answers) == len(self.distractors)):
            raise TaskError(f"task {self.name!r}: one position, answer and distractor entry per row")
        if set(self.answer_rows.tolist()) != set(range(batch)):
            raise TaskError(f"task {self.name!r}: every example needs at least one scored position")
        if not self.attention_mask[self.answer_rows, self.answer_positions].bool().all():
            raise TaskError(f"task {self.name!r}: an answer position lies in the padding")

    def __len__(self) -> int:
        return self.clean_ids.shape[0]

    @property
    def length(self) -> int:
        """Padded length in tokens."""
        return self.clean_ids.shape[1]

    def drawn_by(self, more: Callable[[int, int], Task]) -> Task:
        """The same task that can draw more pairs.

        Args:
            more: Draws so many, given a seed.
        """
        found = replace(self)
        object.__setattr__(found, "more", more)  # frozen, and not to be carried along by `replace`
        return found

    @property
    def has_answers(self) -> bool:
        """Whether every row names at least one right answer."""
        return all(self.answers)

    @property
    def has_distractors(self) -> bool:
        """Whether every row names at least one wrong answer."""
        return all(self.distractors)

    @property
    def position_ids(self) -> Tensor:
        """Position of every token counted from its example's first real token. [batch, pos]"""
        return (self.attention_mask.cumsum(-1) - 1).clamp_min(0)

    def swap(self) -> Task:
        """The same with clean and corrupted prompts in each other's place, answers as they are."""
        clean, corrupted, more = self.corrupted_ids, self.clean_ids, self.more
        found = replace(self, clean_ids=clean, corrupted_ids=corrupted, swapped=not self.swapped)
        return found if more is None else found.drawn_by(lambda count, seed: more(count, seed).swap())

    def part(self, first: int, last: int) -> tuple[Task, Tensor]:
        """Some of the examples as a task of their own.

        Args:
            first: First example.
            last: The one after the last.

        Returns:
            The task, and which rows of this one its rows are. [rows of the part]
        """
        rows = ((self.answer_rows >= first) & (self.answer_rows < last)).nonzero().flatten()
        chosen = rows.tolist()
        some = replace(
            self,
            clean_ids=self.clean_ids[first:last],
            corrupted_ids=self.corrupted_ids[first:last],
            attention_mask=self.attention_mask[first:last],
            answer_rows=self.answer_rows[rows] - first,
            answer_positions=self.answer_positions[rows],
            answers=tuple(self.answers[row] for row in chosen),
            distractors=tuple(self.distractors[row] for row in chosen),
        )
        return some, rows

    def select(self, examples: Sequence[int]) -> Task:
        """Some of the examples, in an order of their own, as a task.

        Args:
            examples: Which; one that is named twice is there twice.

        Returns:
            The task; its prompts are as wide as this one's.
        """
        import torch

        rows_of: defaultdict[int, list[int]] = defaultdict(list)
        for row, owner in enumerate(self.answer_rows.tolist()):
            rows_of[owner].append(row)
        owners = [place for place, example in enumerate(examples) for _ in rows_of[example]]
        chosen = [row for example in examples for row in rows_of[example]]
        index, rows = torch.tensor(list(examples)), torch.tensor(chosen)
        return replace(
            self,
            clean_ids=self.clean_ids[index],
            corrupted_ids=self.corrupted_ids[index],
            attention_mask=self.attention_mask[index],
            answer_rows=torch.tensor(owners),
            answer_positions=self.answer_positions[rows],
            answers=tuple(self.answers[row] for row in chosen),
            distractors=tuple(self.distractors[row] for row in chosen),
        )

    def prompts(self) -> list[tuple[int, ...]]:
        """Token ids of the clean prompts without padding, in whichever place these are."""
        masks, prompts = self.attention_mask.bool(), self.corrupted_ids if self.swapped else self.clean_ids
        return [tuple(ids[mask].tolist()) for ids, mask in zip(prompts, masks, strict=True)]

    def fingerprint(self) -> str:
        """SHA-256 over every token, mask, position and answer: pins the data of a run."""
        import torch

        digest = hashlib.sha256()
        for tensor in (
            self.clean_ids,
            self.corrupted_ids,
            self.attention_mask,
            self.answer_rows,
            self.answer_positions,
        ):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().to(torch.int64).contiguous().numpy().tobytes())
        digest.update(repr((self.answers, self.distractors)).encode())
        if self.summed:
            digest.update(b"summed")
        return digest.hexdigest()


@dataclass(frozen=True)
class Pair:
    """One tokenised prompt pair before batching.

    Attributes:
        clean: Token ids of the clean prompt.
        corrupted: Token ids of the corrupted prompt, as many.
        answers: Right next tokens, may be empty.
        distractors: Wrong next tokens, may be empty.
        scored: How many of its last positions are scored. At each but the last one the right token is the
            one that follows in the clean prompt.
    """

    clean: Sequence[int]
    corrupted: Sequence[int]
    answers: Sequence[int] = ()
    distractors: Sequence[int] = ()
    scored: int = 1


def collate(
    pairs: Sequence[Pair],
    *,
    name: str,
    metric: str,
    pad_id: int = 0,
    padding_side: str = "right",
    source: dict[str, object] | None = None,
    summed: bool = False,
    spellings: Mapping[int, Spelling] | None = None,
) -> Task:
    """Pad pairs into one `Task`; each example is scored at its last token, or its last ones.

    Args:
        pairs: The prompt pairs.
        name: Task name.
        metric: Default metric.
        pad_id: Token id written into the padding; it is masked, so any valid id does.
        padding_side: `"right"` or `"left"`.
        source: Provenance, stored with the task.
        summed: Whether the metric adds up over an example's rows.
        spellings: What tokens of answers are with or without their leading space.

    Returns:
        The batched task.

    Raises:
        TaskError: If there are no pairs, a prompt is empty, or a pair's lengths differ.
    """
    import torch

    if not pairs:
        raise TaskError(f"task {name!r} has no examples: give it at least one prompt pair")
    if padding_side not in ("left", "right"):
        raise TaskError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
    for index, pair in enumerate(pairs):
        if len(pair.clean) == 0:
            raise TaskError(f"task {name!r}, example {index}: the clean prompt has no tokens")
        if len(pair.clean) != len(pair.corrupted):
            raise TaskError(
                f"task {name!r}, example {index}: the clean prompt has {len(pair.clean)} tokens and the "
                f"corrupted one {len(pair.corrupted)}; activation patching needs equal lengths"
            )
    length = max(len(pair.clean) for pair in pairs)
    clean = torch.full((len(pairs), length), pad_id, dtype=torch.long)
    corrupted = clean.clone()
    mask = torch.zeros_like(clean)
    rows: list[int] = []
    positions: list[int] = []
    answers: list[tuple[int, ...]] = []
    distractors: list[tuple[int, ...]] = []
    for row, pair in enumerate(pairs):
        start = 0 if padding_side == "right" else length - len(pair.clean)
        stop = start + len(pair.clean)
        clean[row, start:stop] = torch.tensor(list(pair.clean))
        corrupted[row, start:stop] = torch.tensor(list(pair.corrupted))
        mask[row, start:stop] = 1
        rows += [row] * pair.scored
        positions += range(stop - pair.scored, stop)
        answers += [(token,) for token in list(pair.clean)[len(pair.clean) - pair.scored + 1 :]]
        distractors += [()] * (pair.scored - 1)
        answers.append(tuple(pair.answers))
        distractors.append(tuple(pair.distractors))
    return Task(
        name=name,
        clean_ids=clean,
        corrupted_ids=corrupted,
        attention_mask=mask,
        answer_rows=torch.tensor(rows),
        answer_positions=torch.tensor(positions),
        answers=tuple(answers),
        distractors=tuple(distractors),
        metric=metric,
        source=source or {},
        summed=summed,
        spellings=spellings or {},
    )
