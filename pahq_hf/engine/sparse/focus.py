"""The reader in focus: how its input changes as edges into it go and come back.

What an edge carries, `a_w - c_w`, is computed for all edges of a trial together. Accepting one of its
circuits takes their sum from there, so it is the same bits whether that is still at hand or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import reduce

import torch
from torch import Tensor

from pahq_hf.engine.sparse.budget import Fitting, MemoryBudget
from pahq_hf.engine.sparse.buffers import Buffers
from pahq_hf.engine.sparse.captured import Carried
from pahq_hf.engine.sparse.state import CircuitState

WRITERS = 64  # whose differences are computed at once
_READ = 3  # a product reads what all edges carry, and not what is picked, if it wants a third of it


class Focus:
    """A reader whose edges are tested, from the state of the circuit as it was when it came into focus.

    Args:
        reader: The reader.
        gone: Its edges that are gone in the state.
        state: The state of that circuit.
        memory: Bounds how much is computed at once.
        buffers: Room for what is valid until the next trial.
        precision: The precision of what tested edges carry.
        fitting: Goes on with less when memory runs out as the circuit moves.
    """

    def __init__(
        self,
        reader: int,
        gone: Sequence[int],
        state: CircuitState,
        memory: MemoryBudget,
        buffers: Buffers,
        precision: Callable[[], AbstractContextManager[None]],
        fitting: Fitting,
    ) -> None:
        self.reader = reader
        self._state = state
        self._memory = memory
        self._buffers = buffers
        self._precision = precision
        self._fitting = fitting
        self._at_first = list(gone)
        self._gone = set(gone)
        self._taken: Tensor | None = None  # what edges that went since then took away. [tokens, d_model]
        self._tried: tuple[list[int], Tensor] | None = None  # writers, and what their edges carry
        self._all: Carried | None = None  # what all its edges carry, once slopes were asked
        self._liveness = state.reader_liveness(reader)
        self._edges = int(state.graph.prefix[reader])  # it reads so many writers, from the first on
        self._moves: list[tuple[list[int], Sequence[Sequence[int]]]] = []  # not followed yet

    @property
    def together(self) -> int:
        """Writers or candidates at once."""
        return self._memory.together(len(self._state.plan.at(self._liveness)))

    @property
    def nbytes(self) -> int:
        """Bytes of what tested edges carry, as far as that is at hand."""
        tried = 0 if self._tried is None else self._tried[1].nbytes
        return tried + (0 if self._all is None else self._all.values.nbytes)

    def forget(self) -> None:
        """Let go of what tested edges carry; it can be computed again."""
        self._tried = self._all = None

    def changes(self, candidates: Sequence[Sequence[int]]) -> Tensor:
        """Change of the reader's input in every candidate, in memory that the next call uses again.

        Args:
            candidates: Writers of exactly the edges that are gone.

        Returns:
            [K, tokens, d_model]
        """
        self._follow()
        new = [[w for w in c if w not in self._gone] for c in candidates]
        back = [sorted(self._gone.difference(c)) for c in candidates]
        writers = sorted({w for some in (*new, *back) for w in some})
        change = self._buffers.take("candidates", (len(candidates), *self._shape))
        flat = change.view(len(candidates), -1)
        self._tried = None
        if self._all is not None and _READ * len(writers) > self._edges:
            every = range(self._edges)
            choose = (_choice(new, every) - _choice(back, every)).to(flat).neg_()
            torch.mm(choose, self._all.values.flatten(1), out=flat)
            return change if self._taken is None else change.sub_(self._taken)
        few = self.together
        for start in range(0, max(1, len(writers)), few):
            some = writers[start : start + few]
            differences = self._carried(some, self._buffers.take("differences", (len(some), *self._shape)))
            choose = (_choice(new, some) - _choice(back, some)).to(differences).neg_()
            if start == 0:
                torch.mm(choose, differences.flatten(1), out=flat)
            else:
                flat.addmm_(choose, differences.flatten(1))
            if len(some) == len(writers):
                self._tried = (writers, differences)
        return change if self._taken is None else change.sub_(self._taken)

    def effects(self, gradients: Tensor, writers: Sequence[int]) -> Tensor:
        """What removing each edge would add to a metric that is linear in what the reader reads.

        Args:
            gradients: Of the metric in some circuits. [K, tokens, d_model]
            writers: The edges' writers.

        Returns:
            [K, writers] in float64
        """
        few, flat = self.together, gradients.flatten(1)
        every = self._every()
        if every is not None:
            return -torch.mm(flat, every.values.flatten(1).T)[:, list(writers)].to(torch.float64)
        parts = []
        for start in range(0, len(writers), few):
            carried = self._carried(writers[start : start + few])
            parts.append(torch.mm(flat, carried.flatten(1).T))
        return -torch.cat(parts, dim=1).to(torch.float64)

    def sizes(self, writers: Sequence[int]) -> Tensor:
        """The length of what each edge carries, over all tokens. [writers] in float64"""
        every = self._every()
        if every is not None:
            return every.lengths[list(writers)]
        few = self.together
        parts = [
            Carried.of(self._carried(writers[start : start + few])).lengths
            for start in range(0, len(writers), few)
        ]
        return torch.cat(parts)

    def _every(self) -> Carried | None:
        """What all edges carry, if that fits: asked once, it will be again."""
        if self._all is None and self._edges <= self.together:
            with self._precision():
                self._all = self._state.every_carried(self._edges, self._liveness)
        return self._all

    def changes_from_start(self, candidates: Sequence[Sequence[int]]) -> Tensor:
        """The same at the present precision, whatever went since the reader came into focus.

        Args:
            candidates: Writers of exactly the edges that are gone.

        Returns:
            [K, tokens, d_model]
        """
        before = self._at_first
        writers = sorted({w for gone in candidates for w in gone} | set(before))
        total = self._state.captured.zeros(len(candidates), *self._shape)
        few = min(WRITERS, self.together)
        for start in range(0, len(writers), few):
            some = writers[start : start + few]
            differences = self._state.carried(some, self._liveness)
            choose = _choice([before], some) - _choice(candidates, some)
            total += torch.tensordot(choose.to(differences), differences, dims=1)
        return total

    def move(self, gone: Sequence[int], tried: Sequence[Sequence[int]]) -> None:
        """Make exactly these edges those that are gone.

        Args:
            gone: Their writers, those that go now in the order in which they go.
            tried: All circuits of the trial that decided it.
        """
        self._moves.append((list(gone), tried))  # the last of a reader's is never followed

    def _follow(self) -> None:
        for gone, tried in self._moves:
            self._step(gone, tried)
        self._moves.clear()

    def _step(self, gone: list[int], tried: Sequence[Sequence[int]]) -> None:
        stays = self._gone.intersection(gone)
        new = [writer for writer in gone if writer not in self._gone]
        if len(stays) < len(self._gone):
            with self._precision():
                self._taken = -self._fitting(lambda: self.changes_from_start([sorted(stays)]))[0]
        if new:
            every = sorted({w for c in tried for w in c} - stays)
            taken = self._fitting(lambda: self._sum(new, every))
            self._taken = taken if self._taken is None else self._taken + taken
        self._gone = set(gone)

    def _sum(self, writers: Sequence[int], tried: list[int]) -> Tensor:
        """What some of the tried writers' edges carry. [tokens, d_model]"""
        if self._all is not None:
            return self._carried(writers).sum(0)
        few = self.together
        if len(tried) <= few:
            known, differences = self._tried or ([], torch.empty(0))
            if known != tried:
                differences = self._carried(tried)
            return differences[[tried.index(w) for w in writers]].sum(0)
        parts = [writers[start : start + few] for start in range(0, len(writers), few)]
        return reduce(torch.add, (self._carried(some).sum(0) for some in parts))

    def _carried(self, writers: Sequence[int], out: Tensor | None = None) -> Tensor:
        """`a_w - c_w` of tested edges. [writer, tokens, d_model]"""
        if self._all is not None:
            rows = torch.tensor(list(writers), dtype=torch.long, device=self._all.values.device)
            return torch.index_select(self._all.values, 0, rows, out=out)  # the same bits as computed anew
        with self._precision():
            return self._state.carried(writers, self._liveness, out)

    @property
    def _shape(self) -> tuple[int, int]:
        """Of the reader's input: tokens, d_model."""
        return len(self._state.plan.at(self._liveness)), self._state.captured.width


def _choice(candidates: Sequence[Sequence[int]], writers: Sequence[int]) -> Tensor:
    """Which writers each candidate names. [K, writers]"""
    column = {writer: number for number, writer in enumerate(writers)}
    choose = torch.zeros(len(candidates), len(writers))
    for row, candidate in enumerate(candidates):
        choose[row, [column[w] for w in candidate if w in column]] = 1
    return choose
