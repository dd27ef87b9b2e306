"""How many candidates fit into memory side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from pahq_hf.engine.sparse.captured import TERMS
from pahq_hf.engine.sparse.positions import Liveness
from pahq_hf.engine.sparse.state import CircuitState
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.active_components import ActiveComponents
from pahq_hf.precision.device_memory import free_memory

T = TypeVar("T")

_SHARE = 0.25  # of the memory that is free
BATCH_TOKENS = 3328  # at once
_COPIES = 4  # intermediate copies of a node's activations while it is computed
_LEAST = 256 << 20  # bytes of weights worth keeping


class Fitting(Protocol):
    """Does some work, and when memory runs out again with less kept for speed."""

    def __call__(self, work: Callable[[], T]) -> T:
        """What the work gives.

        Raises:
            OutOfMemoryError: If it does not fit when nothing is left to free.
        """


class MemoryBudget:
    """Bounds batches of candidates.

    Args:
        limit: Bytes; a share of the memory that is free by default.
        model: The patched model.
    """

    def __init__(self, limit: int | None, model: PatchedModel) -> None:
        self.limit = default_budget(model.device) if limit is None else limit
        self._width = int(model.hf.config.hidden_size)
        self._hidden = max((linear.out_features for linear in model.linears()), default=self._width)
        self._size = model.hf.dtype.itemsize
        layer = model.precision.nbytes_fp32 // model.spec.layers
        # Whoever gives memory gets speed; else no more of the model is in FP32 than a layer.
        self.full_weights = layer if limit is None else limit // 4
        self.held_weights = self.limit if limit is None else self.limit - self.full_weights
        self._most = self._together = 1 << 30
        self._vocabulary = model.vocab_size * self._width * self._size

    def bound(self, precision: ActiveComponents) -> None:
        """Bound the weights that a model keeps for another use."""
        precision.allow(held=self.held_weights, full=self.full_weights)

    @property
    def vocabulary_copies(self) -> int:
        """How many copies of the unembedding, packed for products, leave room for the rest."""
        return self.limit // 4 // max(1, self._vocabulary)

    def together(self, tokens: int) -> int:
        """Writers whose differences, and candidates whose input, fit beside all else; at least one of each.

        Args:
            tokens: At which they are wanted.
        """
        fits = self.limit // 4 // max(1, tokens * self._width * self._size)
        return max(1, min(self._together, fits))

    def batch(self, state: CircuitState, reader: int, held: int = 0) -> int:
        """Candidates of a reader that fit, at least one.

        Args:
            state: The current circuit.
            reader: The reader.
            held: Bytes of their inputs, and of what made those.
        """
        changes = 0
        for liveness in state.liveness:
            if liveness is not Liveness.DEAD:
                changes += len(state.plan.at(liveness)) * self._width
        widest = len(state.plan.at(max((*state.liveness, state.reader_liveness(reader)))))
        working = _COPIES * widest * self._hidden
        fits = max(0, self.limit - held) // max(1, (changes + working) * self._size)
        # More tokens at once are 4 % faster at best, and their buffers the most of what a search holds.
        return max(1, min(self._most, fits, BATCH_TOKENS // max(1, widest)))

    def followed(self, state: CircuitState, reader: int) -> int:
        """Candidates of a reader that fit when all of their activations stay for a backward pass.

        Args:
            state: The current circuit.
            reader: The reader.
        """
        tokens = sum(len(state.plan.at(live)) for live in state.liveness if live is not Liveness.DEAD)
        each = tokens * _COPIES * (self._hidden + self._width)
        return max(1, min(self._most, self.limit // max(1, each * self._size)))

    def give_way(self) -> bool:
        """After memory ran out: allow fewer weights that are kept for speed, and fewer writers at once.

        Returns:
            False if there were no such weights, and one writer, already.
        """
        more = self.full_weights + self.held_weights > 0 or self._together > 1
        self.full_weights //= 8
        self.held_weights //= 8
        if self.full_weights + self.held_weights < _LEAST:
            self.full_weights = self.held_weights = 0
        self._together = max(1, min(self._together, TERMS) // 4)
        return more

    def halve(self, size: int) -> bool:
        """After memory ran out with `size` candidates: allow half as many. False if that was one."""
        self._most = max(1, size // 2)
        return size > 1

    def halve_together(self, size: int) -> bool:
        """The same when it ran out before they could be computed."""
        self._together = max(1, size // 2)
        return size > 1


def default_budget(device: torch.device) -> int:
    """The bytes a search may take when nobody says: a share of what is free."""
    return int(free_memory(device) * _SHARE)
