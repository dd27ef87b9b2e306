"""Which tokens a node is computed at.

A change can only begin at the first token in which an example's clean and corrupted prompts differ, and
only matters up to the last scored one: that is the `window`. Nodes that are read nowhere but at the
scored positions are computed at the `answers` alone. Both are flat lists of (example, position).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from pahq_hf.errors import TaskError
from pahq_hf.precision.sums import take_tokens
from pahq_hf.tasks.base import Task


class Liveness(IntEnum):
    """Where a node's output matters; a larger value includes the smaller."""

    DEAD = 0
    ANSWERS = 1
    WINDOW = 2


@dataclass(frozen=True)
class TokenSet:
    """A list of tokens and its layout as a padded grid, one row per example.

    Attributes:
        example: Example of each token. [tokens]
        position: Column of each token. [tokens]
        grid: Token number of every cell; cells beyond an example's tokens repeat one. [batch, width]
        cells: Flat cell of each token. [tokens]
    """

    example: Tensor
    position: Tensor
    grid: Tensor
    cells: Tensor

    @classmethod
    def of(cls, positions: list[list[int]], device: torch.device) -> TokenSet:
        """Build from the positions wanted in each example."""
        width = max(map(len, positions))
        example: list[int] = []
        position: list[int] = []
        cells: list[int] = []
        grid = torch.zeros(len(positions), width, dtype=torch.long)
        for number, wanted in enumerate(positions):
            for slot in range(width):
                grid[number, slot] = len(example) + min(slot, len(wanted) - 1)
            cells += [number * width + slot for slot in range(len(wanted))]
            example += [number] * len(wanted)
            position += wanted
        return cls(
            torch.tensor(example, device=device),
            torch.tensor(position, device=device),
            grid.to(device),
            torch.tensor(cells, device=device),
        )

    def __len__(self) -> int:
        return self.example.numel()

    @property
    def width(self) -> int:
        """Cells per example."""
        return self.grid.shape[1]

    @property
    def is_dense(self) -> bool:
        """Whether the grid has no repeated cells, so that it is a mere view of the list."""
        return self.grid.numel() == len(self)

    def pick(self, values: Tensor) -> Tensor:
        """The tokens out of a padded batch. [batch, pos, ...] -> [tokens, ...]"""
        return values[self.example, self.position]

    def to_grid(self, values: Tensor) -> Tensor:
        """Lay tokens out per example. [..., tokens, d] -> [..., batch, width, d]"""
        if not self.is_dense:
            values = take_tokens(values, self.grid.flatten())
        return values.unflatten(-2, tuple(self.grid.shape))

    def from_grid(self, values: Tensor) -> Tensor:
        """Take tokens out of the grid. [..., batch, width, d] -> [..., tokens, d]"""
        flat = values.flatten(-3, -2)
        return flat if self.is_dense else take_tokens(flat, self.cells)


@dataclass(frozen=True)
class TokenPlan:
    """The token sets of a task.

    Attributes:
        answers: Scored positions; token i is row i of the task.
        window: Every token that can change and matter; contains the answers.
        answers_in_window: Where the answers are in the window. [rows]
    """

    answers: TokenSet
    window: TokenSet
    answers_in_window: Tensor

    @classmethod
    def of(cls, task: Task, *, from_start: bool, device: torch.device) -> TokenPlan:
        """Plan the tokens of a task.

        Args:
            task: The task; its rows must be ordered by example.
            from_start: Whether changes can begin at the first token (zero and mean ablation).
            device: Where the index tensors go.

        Raises:
            TaskError: If the rows are not ordered by example, as tokens are laid out.
        """
        if bool((task.answer_rows.diff() < 0).any()):
            raise TaskError(
                f"task {task.name!r}: the sparse engine needs rows ordered by example; sort answer_rows"
            )
        wanted: list[list[int]] = [[] for _ in range(len(task))]
        for example, position in zip(task.answer_rows.tolist(), task.answer_positions.tolist(), strict=True):
            wanted[example].append(position)
        differs = task.clean_ids != task.corrupted_ids
        real = task.attention_mask.bool()
        start = real if from_start else differs & real
        window = []
        for example, scored in enumerate(wanted):
            changing = start[example].nonzero().flatten().tolist()
            first = min([*changing[:1], *scored])
            window.append([p for p in range(first, max(scored) + 1) if real[example, p]])
        inside = _numbers_of_rows(window, task).to(device)
        return cls(TokenSet.of(wanted, device), TokenSet.of(window, device), inside)

    @classmethod
    def everywhere(cls, task: Task, device: torch.device) -> TokenPlan:
        """A plan without liveness: every node at every real token. The referee of the other plans."""
        answers = cls.of(task, from_start=True, device=device)
        window = [row.nonzero().flatten().tolist() for row in task.attention_mask.bool()]
        inside = _numbers_of_rows(window, task).to(device)
        return cls(answers.answers, TokenSet.of(window, device), inside)

    def at(self, liveness: Liveness) -> TokenSet:
        """The tokens of a liveness."""
        return self.window if liveness is Liveness.WINDOW else self.answers

    def narrow(self, values: Tensor, have: Liveness, want: Liveness) -> Tensor:
        """Values at fewer tokens. [..., tokens(have), d] -> [..., tokens(want), d]"""
        if have is want:
            return values
        return take_tokens(values, self.answers_in_window)


def _numbers_of_rows(window: list[list[int]], task: Task) -> Tensor:
    """Where each row's token stands in the window's flat list. [rows]"""
    tokens = [(example, position) for example, positions in enumerate(window) for position in positions]
    number = {token: index for index, token in enumerate(tokens)}
    rows = zip(task.answer_rows.tolist(), task.answer_positions.tolist(), strict=True)
    return torch.tensor([number[row] for row in rows])
