"""How far a search finds the same circuit when its prompts are drawn again (docs/searches.md).

A run with a bootstrap is several in one folder: the search on the task as it is, and the same search on
resamples of its pairs, each with a journal of its own. Its circuit is that of the task as it is, with how
often the resamples kept each edge; the edges that enough of them kept are a circuit beside it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit.bootstrap_facts import BootstrapFacts
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.comparison import jaccard
from pahq_hf.circuit.files import CIRCUIT_NAME, CONSENSUS_NAME, JOURNAL_NAME, ORIGINAL_NAME, RESAMPLE_PREFIX
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.errors import RunError
from pahq_hf.precision.memory import PeakMemory
from pahq_hf.search.bootstrap_options import BootstrapConfig, check_pairs, check_search
from pahq_hf.search.directions import make_run
from pahq_hf.search.kind import Found, OptionsT, SearchKind
from pahq_hf.search.learning_options import LearningOptions
from pahq_hf.search.pipeline import Run, Searched
from pahq_hf.search.subject import Subject
from pahq_hf.tasks.base import Task


def drawn(examples: int, seed: int, number: int) -> list[int]:
    """The pairs of a resample: as many as there are, each drawn from all of them.

    Args:
        examples: How many there are.
        seed: The same seed draws the same.
        number: Of the resample, from 1.

    Returns:
        Their numbers, rising; some are there several times, and some never.
    """
    random_numbers = random.Random(f"bootstrap {seed} {number}")
    return sorted(int(random_numbers.random() * examples) for _ in range(examples))


def resample(task: Task, seed: int, number: int) -> Task:
    """A task of pairs that were drawn from another's. It says which, and draws more if that one does.

    Args:
        task: The task.
        seed: The same seed draws the same.
        number: Of the resample, from 1.
    """
    pairs = drawn(len(task), seed, number)
    source = {**task.source, "resample": number, "pairs": pairs}
    found = replace(task.select(pairs), name=f"{task.name}, resample {number}", source=source)
    return found if task.more is None else found.drawn_by(task.more)


def own_noise(options: OptionsT, number: int) -> OptionsT:
    """Options of a resample's search: what draws noise has a seed of its own.

    Searches that begin with the same noise find more alike circuits than the prompts make them.

    Args:
        options: Of the search on the task as it is.
        number: Of the resample, from 1.
    """
    if not isinstance(options, LearningOptions):
        return options
    seed = random.Random(f"resample noise {options.seed} {number}").getrandbits(32)
    return replace(options, seed=seed)


@dataclass(frozen=True, eq=False)
class Stability:
    """What the circuits of resamples have in common.

    Attributes:
        frequencies: The share of them that each edge is in. [readers, writers]
        between: Mean Jaccard index of two of them.
        with_circuit: Mean Jaccard index of one and the circuit of the task as it is.
    """

    frequencies: NDArray[np.float64]
    between: float
    with_circuit: float

    @classmethod
    def of(cls, original: BoolArray, resamples: Sequence[BoolArray]) -> Stability:
        """Compare circuits.

        Args:
            original: The circuit of the task as it is. [readers, writers]
            resamples: The circuits of its resamples, two at least. [readers, writers]
        """
        return cls(
            _shares(resamples),
            float(np.mean([_alike(a, b) for a, b in combinations(resamples, 2)])),
            float(np.mean([_alike(original, each) for each in resamples])),
        )


def _alike(a: BoolArray, b: BoolArray) -> float:
    """The Jaccard index; two circuits without edges are the same."""
    found = jaccard(a, b)
    return 1.0 if found is None else found


def counted(circuit: Circuit, resamples: Sequence[Circuit]) -> Circuit:
    """A circuit with how often resamples kept each edge; and each node, where nodes are kept or removed.

    Args:
        circuit: The circuit.
        resamples: The circuits of the resamples.
    """
    nodes, edges = circuit.scored_nodes, _shares([each.kept for each in resamples])
    inside = [each.scored_nodes.kept for each in resamples if each.scored_nodes is not None]
    if nodes is not None and inside:
        nodes = replace(nodes, frequencies=_shares(inside))
    return replace(circuit, frequencies=edges, scored_nodes=nodes)


def _least(share: float, count: int) -> str:
    return f"all {count:,}" if share == 1 else f"at least {100 * share:.4g} % of {count:,}"


def _shares(kept: Sequence[BoolArray]) -> NDArray[np.float64]:
    return np.asarray(np.sum(np.stack(kept), axis=0, dtype=np.int64) / len(kept))


def _frequencies(circuit: Circuit) -> list[list[Any] | None]:
    nodes = circuit.scored_nodes
    both = (circuit.frequencies, None if nodes is None else nodes.frequencies)
    return [None if each is None else each.tolist() for each in both]


class BootstrapRun(Run[OptionsT]):
    """A run of a search on a task and on resamples of its pairs.

    Args:
        kind: The search.
        options: What is asked of it.
        subject: The model on its prompts, and how it is computed.
        asked: How many resamples, and what is made of them.
        progress: Say on stderr how far it is.

    Raises:
        MetricError: If the task lacks what the metric needs.
        ConfigError: If an option means nothing for this model, task or precision, or
            there is nothing to resample.
    """

    def __init__(
        self,
        kind: SearchKind[OptionsT],
        options: OptionsT,
        subject: Subject,
        asked: BootstrapConfig,
        *,
        progress: bool = True,
    ) -> None:
        check_search(kind, options)
        check_pairs(len(subject.task))
        self._original = make_run(kind, options, subject, progress=progress)
        super().__init__(kind, self._original.options, subject, progress=progress)
        self._wanted, self._subject, self._asked, self._progress = options, subject, asked, progress

    def finished(self, folder: Path | None, *, resume: bool) -> Circuit | None:
        """The circuit of a run that is finished already, held against those of its resamples.

        Args:
            folder: The run's folder.
            resume: Whether there may be a run. One of other resamples, or of another share, goes on.

        Raises:
            RunError: If the folder holds another run, or any run when there may be none.
        """
        circuit = super().finished(folder, resume=resume)
        if folder is None:
            return circuit
        told = None if circuit is None else circuit.frequencies
        if told is None and (circuit is not None or os.path.exists(folder / JOURNAL_NAME)):
            raise RunError(
                f"{folder} holds a search without a bootstrap; continue it without --bootstrap or choose "
                "another folder"
            )
        if circuit is None or not self._is_asked_for(circuit, folder):
            return None
        names = [self._name(number) for number in range(self._asked.resamples + 1)]
        if all(os.path.exists(folder / name / CIRCUIT_NAME) for name in names):
            parts = [Circuit.from_pretrained(folder / name) for name in names]
            same = np.array_equal(circuit.kept, parts[0].kept)
            again = counted(circuit, parts[1:])
            if told is None or not (same and _frequencies(circuit) == _frequencies(again)):
                raise RunError(
                    f"the circuit in {folder} is not what its resamples found: one of them was changed; "
                    f"remove {CIRCUIT_NAME} and --resume to make it again"
                )
        return circuit

    def _is_asked_for(self, circuit: Circuit, folder: Path) -> bool:
        """Whether a finished circuit has the resamples and the consensus that are wanted."""
        told, asked = circuit.record.bootstrap, self._asked
        if told.seed != asked.seed:
            raise RunError(
                f"{folder} holds another run: its bootstrap seed is {told.seed} there, {asked.seed} now; "
                "choose another folder"
            )
        return (told.resamples, told.share) == (asked.resamples, asked.consensus)

    @staticmethod
    def _name(number: int) -> str:
        """The folder of a resample; 0 is the task as it is."""
        return ORIGINAL_NAME if number == 0 else f"{RESAMPLE_PREFIX}{number:04d}"

    def _part(self, number: int) -> Run[OptionsT]:
        """The run on a resample."""
        if number == 0:
            return self._original
        task = resample(self._subject.task, self._asked.seed, number)
        options, subject = own_noise(self._wanted, number), replace(self._subject, task=task)
        run = make_run(self.kind, options, subject, progress=self._progress)
        run.called = f"resample {number}: "
        run.hush()
        return run

    def _run(self, folder: Path | None, resume: bool) -> Circuit:
        circuits: list[Circuit] = []
        total = self._asked.resamples + 1
        with self.reporter.count("bootstrap", "run", total) as count:
            for number in range(total):
                run = self._part(number)
                run.fingerprint = self.fingerprint
                where = None if folder is None else folder / self._name(number)
                circuits.append(run.run(where, resume=resume, take_over=self.takes_over))
                run.bench.clear()
                self.check_lock()
                count.advance(1)
        original, others = circuits[0], circuits[1:]
        found = self._stability(circuits)
        consensus = self._consensus(found.frequencies, circuits)
        facts = self._facts(found, consensus, others)
        consensus.discovery["bootstrap"] = facts
        if folder is not None:
            self.check_lock()
            consensus.save_pretrained(folder / CONSENSUS_NAME)
        circuit = counted(
            replace(original, discovery=original.discovery | {"bootstrap": facts}), circuits[1:]
        )
        if folder is not None:
            self.save(circuit, folder)
        return circuit

    def _stability(self, circuits: Sequence[Circuit]) -> Stability:
        """What the resamples' circuits have in common, by what is kept or removed: edges or nodes."""
        original, *others = (self.units.found(circuit).kept for circuit in circuits)
        return Stability.of(original, others)

    def _consensus(self, frequencies: NDArray[np.float64], circuits: Sequence[Circuit]) -> Circuit:
        """What enough resamples kept, measured on the task as it is; frequencies are its scores."""
        share, count = self._asked.consensus, self._asked.resamples
        readers = getattr(self.options, "readers", None)
        kept: BoolArray = (frequencies >= share) & (frequencies > 0)
        kind = replace(
            self.kind,
            name="consensus",
            title=f"{self.units.word}s in {_least(share, count)} resamples: {self.kind.title}",
            ranks_kept_first=False,
            fixed={},
            resolve=None,
            check=None,
        )
        run = Run(kind, self.options, self._subject, progress=self._progress)
        run.fingerprint, run.called = self.fingerprint, ""
        with PeakMemory(self.setting.model.device) as peak:
            found = self.units.circuit(
                Found(
                    kept,
                    frequencies,
                    np.logical_or.reduce([self.units.found(circuit).tested for circuit in circuits[1:]]),
                    searched=None if readers is None else self.setting.graph.match_readers(readers),
                )
            )
            engine: dict[str, Any] = {}
            if circuits[0].record.verified is not None:
                with run.clock.phase("evaluate"):
                    found = replace(found, final=run.bench.engine.metric_of(found.kept))
                    run.bench.engine.finish()
                engine = {"settings": circuits[0].record.settings, "engine": circuits[0].record.engine}
            circuit = run.conclude(Searched(found, engine), run.bench.judge(), peak)
        run.bench.clear()
        return counted(circuit, circuits[1:])

    def _facts(self, found: Stability, consensus: Circuit, resamples: Sequence[Circuit]) -> dict[str, Any]:
        """What the record says of the resamples."""
        records = [circuit.record for circuit in resamples]
        verdict, unparted = consensus.verdict, sum(record.unparted for record in records)
        return BootstrapFacts(
            resamples=len(resamples),
            seed=self._asked.seed,
            between=found.between,
            with_circuit=found.with_circuit,
            share=self._asked.consensus,
            consensus=int(self.units.found(consensus).kept.sum()),
            faithfulness=None if verdict is None else verdict.faithfulness,
            always=int((found.frequencies == 1).sum()),
            ever=int((found.frequencies > 0).sum()),
            unconfirmed=sum(record.doubt is not None for record in records),
            consensus_verified=consensus.record.verified,
            seconds=round(sum(record.total_seconds or 0.0 for record in records), 3),
            evaluations=sum(record.evaluations or 0 for record in records),
            unparted=unparted or None,
            units=None if self.units.word == "edge" else self.units.word,
        ).to_json()
