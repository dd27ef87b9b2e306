"""What a search knows of engines: two small protocols, and what crosses the door.

No order of calls is hidden in them. A removal set always says exactly which edges into a reader are gone,
whatever went before; trying and measuring change nothing; only `begin`, `cut` and `accept` change the
current circuit. Nor does one engine notice another on the same model: what it raises to FP32, decodes and
packs is its own, and in place inside its calls only (`engine.session`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.config import EngineName
from pahq_hf.engine.backward_rules import DERIVATIVE, BackwardRules
from pahq_hf.engine.phases import Phases

if TYPE_CHECKING:  # whoever knows engines by these protocols alone loads no torch
    from torch import Tensor

    from pahq_hf.capture.activations import Activations
    from pahq_hf.tasks.base import Task
    from pahq_hf.tasks.metrics import Metric


@dataclass(frozen=True)
class Trial:
    """Circuits that differ from the current one in the edges into one reader, and their metrics.

    Attributes:
        reader: The reader.
        candidates: Writers of exactly the edges into it that are gone, for each circuit.
        values: The metric of each circuit.
    """

    reader: int
    candidates: tuple[tuple[int, ...], ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, reader: int, candidates: Sequence[Sequence[int]], values: Sequence[float]) -> Trial:
        """A trial of candidates in any form."""
        return cls(reader, tuple(tuple(candidate) for candidate in candidates), tuple(values))


@dataclass(frozen=True, eq=False)
class Slopes:
    """How the metric of circuits moves, to first order, as edges into one reader go.

    Attributes:
        trial: The circuits, and their metrics.
        writers: Writers of the edges, gone or not.
        effects: What removing each edge would add to each circuit's metric if the metric were linear: the
            gradient of what the reader reads, times what the edge carries, `c_w - a_w`. Of an edge that is
            gone it is what removing it once more would add. [candidates, writers]
        sizes: The length of what each edge carries, over the tokens that the engine computes. [writers]
    """

    trial: Trial
    writers: tuple[int, ...]
    effects: NDArray[np.float64]
    sizes: NDArray[np.float64]


class Engine(Protocol):
    """Computes metrics of circuits, and keeps a current one from which the next differ in few edges.

    A new engine's current circuit is the full model.
    """

    @property
    def name(self) -> EngineName:
        """Which engine it is."""

    @property
    def graph(self) -> Graph:
        """The model's graph."""

    @property
    def evaluations(self) -> int:
        """Metric values computed so far."""

    @property
    def gains_by_batches(self) -> bool:
        """Whether many candidates at once cost less than one by one."""

    @property
    def phases(self) -> Phases:
        """Seconds by phase, as far as it counts them."""

    @property
    def clean_logits(self) -> Tensor:
        """The full model's logits at the answer positions. [rows, vocab]"""

    def begin(self, kept: BoolArray) -> float:
        """Make an edge set the current circuit.

        Args:
            kept: Its edges. [readers, writers]

        Returns:
            Its metric.
        """

    def focus(self, reader: int) -> float | None:
        """Turn to a reader; `try_` does so by itself.

        Precision may depend on the reader in focus, and tests start from the circuit that is current now.

        Args:
            reader: The reader.

        Returns:
            The current circuit's metric measured again, where turning changed what tests start from.
        """

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """Measure circuits that differ from the current one in a reader's edges.

        Args:
            reader: The reader.
            candidates: Writers of exactly the edges into it that are gone, for each circuit.

        Returns:
            The circuits and their metrics.
        """

    def look_again(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """The same in FP32, whatever the precision of the model."""

    def slopes(self, reader: int, candidates: Sequence[Sequence[int]], writers: Sequence[int]) -> Slopes:
        """How the metrics of circuits as `try_` measures them move as edges into the reader go.

        Like trials, it changes nothing, turns to the reader by itself, and counts one evaluation for each
        candidate. In regime `pahq` gradients run backwards through the low-precision weights, from
        activations that are exact where nothing was removed; what the edges carry is what tested ones do.

        Args:
            reader: The reader.
            candidates: Writers of exactly the edges into it that are gone, for each circuit.
            writers: Writers of edges into it whose effects are asked for, gone or not.

        Returns:
            The circuits, their metrics, and the effects of the edges.

        Raises:
            MetricError: If the metric has no gradient.
        """

    def accept(self, trial: Trial, k: int) -> None:
        """Make a trial's k-th circuit, as to its reader, the current one.

        No matter whether the trial is this engine's own or what was tried since.
        """

    def cut(self, reader: int, writers: Sequence[int]) -> None:
        """Remove exactly these edges into a reader from the current circuit, untried.

        Args:
            reader: The reader.
            writers: Writers of all edges into it that are gone.
        """

    def metric_of(self, kept: BoolArray) -> float:
        """The metric of any circuit; the current one stays what it is."""

    def drop_each(self, kept: BoolArray, edges: BoolArray | None = None) -> NDArray[np.float64]:
        """What removing each edge of any circuit alone adds to its metric; the current one stays.

        Args:
            kept: The circuit. [readers, writers]
            edges: Which of its edges are asked for; all by default. [readers, writers]

        Returns:
            m(C without the edge) - m(C), 0 elsewhere. [readers, writers]
        """

    def add_each(self, kept: BoolArray, absent: BoolArray) -> NDArray[np.float64]:
        """What adding each of some edges alone to any circuit adds to its metric; the current one stays.

        It is exactly zero where the writer is not reached from the input, or the reader does not reach the
        output: an edge that stands in for nothing carries nothing new (docs/semantics.md, section 2).

        Args:
            kept: The circuit. [readers, writers]
            absent: Edges that are not in it. [readers, writers]

        Returns:
            m(C with the edge) - m(C), 0 elsewhere. [readers, writers]
        """

    def finish(self) -> None:
        """Free what can be made again; the model itself is as it was after every call."""


class Referee(Engine, Protocol):
    """An engine that runs whole models, and so knows a circuit's logits."""

    @property
    def metric(self) -> Metric:
        """The metric, bound to the task."""

    @property
    def corrupted(self) -> Activations:
        """The run on corrupted prompts."""

    @property
    def substitute(self) -> Activations:
        """What stands in for removed edges."""

    def logits(self, kept: BoolArray) -> Tensor:
        """Logits of a circuit at the answer positions.

        Args:
            kept: Its edges. [readers, writers]

        Returns:
            [rows, vocab] in float64
        """


# -- gradients ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Examples that share a backward pass.

    Attributes:
        task: The examples, as a task of their own.
        examples: Their numbers in the whole task.
        metric: The share of the metric that is theirs, so that the shares of all parts add up to it.
        real: Real tokens, as indices into the flattened batch. [tokens]
        full: The share of the full model's metric that is theirs.
    """

    task: Task
    examples: slice
    metric: Metric
    real: Tensor
    full: float


class Gradients(Protocol):
    """Gradients of a metric with respect to what every reader reads, of one backward pass."""

    def walk(self, tokens: Tensor) -> Iterator[tuple[range, Tensor]]:
        """Gradients reader by reader, from the output to the input.

        Args:
            tokens: Which tokens, as indices into the flattened batch.

        Yields:
            Consecutive readers, and the gradients of what they read. [reader, tokens, d_model]
        """


class CircuitRuns(Protocol):
    """The runs of a task that gradients at its circuits need."""

    @property
    def graph(self) -> Graph:
        """The model's graph."""

    @property
    def nbytes(self) -> int:
        """What the runs take in memory."""

    def circuit_parts(self, most: int | None = None) -> Iterator[Part]:
        """The task in runs of as many examples as memory allows where gradients are taken at a circuit.

        Args:
            most: At most so many.
        """

    def at_circuit(self, part: Part, shares: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """A part's metric where each edge has a share, and what removing each edge would add to it.

        Args:
            part: The part.
            shares: 1 where an edge is kept, 0 where it is gone. [readers, writers], or of each example its
                own: [batch, readers, writers]

        Returns:
            The part's share of the metric, and of what removing each edge adds to it if all is linear, gone
            or not: shaped as `shares`, each example's by itself where each has its own.
        """


class GradientRuns(CircuitRuns, Protocol):
    """The clean, corrupted and substituted runs of a task, and gradients at runs near them."""

    @property
    def metric(self) -> Metric:
        """What is minimised."""

    @property
    def clean(self) -> Activations:
        """The clean run."""

    @property
    def corrupted(self) -> Activations:
        """The run on corrupted prompts."""

    def parts(self, most: int | None = None) -> Iterator[Part]:
        """The task in runs of as many examples as memory allows.

        Args:
            most: At most so many.
        """

    def gradients(self, part: Part, embedding: Tensor, rules: BackwardRules = DERIVATIVE) -> Gradients:
        """Gradients of a part's metric where the `input` writer writes something of its own.

        Args:
            part: The part.
            embedding: What it writes. [batch, pos, d_model]
            rules: Where the backward pass departs from the derivative.
        """

    def gradients_beside(self, part: Part, writers: range, share: float) -> Gradients:
        """Gradients of a part's metric in the clean run, but for some writers.

        Args:
            part: The part.
            writers: `input`, all heads of a layer, or an MLP, which write `a_w + share (c_w - a_w)`.
            share: How far they are from the clean run.
        """

    def chunks(self, part: Part, writers: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Real tokens of a part, as many at once as memory allows, and what edges would carry instead there.

        Args:
            part: The part.
            writers: Whose edges: `input`, or all heads of a layer, or an MLP; all by default.

        Yields:
            Indices into the flattened batch [tokens], and `c_w - a_w` of these writers.
            [writer, tokens, d_model]
        """
