"""Searches by noising, by denoising, or by both (docs/searches.md).

Noising runs circuits on clean prompts, and what is removed carries corrupted activations into them. Denoising
is the same search with the two swapped: it finds the edges that, corrupted, break the behaviour while all
others are clean. Whatever direction found a circuit, it is run and judged as every other.

A search in both directions is a run of each, in folders of their own, and the edges that either found.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.files import CIRCUIT_NAME, DIRECTION_NAMES, JOURNAL_NAME
from pahq_hf.circuit.gates import found_by
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.circuit.run_record import MetricFacts
from pahq_hf.circuit.scored_edges import ranked
from pahq_hf.errors import RunError
from pahq_hf.search.bench import Bench
from pahq_hf.search.kind import Found, OptionsT, SearchKind
from pahq_hf.search.pipeline import Run, Searched
from pahq_hf.search.subject import Subject


def make_run(
    kind: SearchKind[OptionsT], options: OptionsT, subject: Subject, *, progress: bool = True
) -> Run[OptionsT]:
    """The run of a search in the direction that its options say.

    Args:
        kind: The search.
        options: What is asked of it.
        subject: The model on its prompts, and how it is computed.
        progress: Say on stderr how far it is.

    Raises:
        MetricError: If the task lacks what the metric needs.
        ConfigError: If an option means nothing for this model, task or precision.
    """
    kinds: dict[str, type[Run[OptionsT]]] = {"noising": OneWay, "denoising": Denoising, "both": BothWays}
    return kinds[kind.direction_of(options)](kind, options, subject, progress=progress)


class OneWay(Run[OptionsT]):
    """A run that searches in one direction."""

    def _run(self, folder: Path | None, resume: bool) -> Circuit:
        for name in DIRECTION_NAMES:
            if folder is not None and os.path.exists(folder / name / JOURNAL_NAME):
                raise RunError(
                    f"{folder} holds a search in both directions ({name}/{JOURNAL_NAME}); continue it with "
                    "direction both or choose another folder"
                )
        return super()._run(folder, resume)


class Denoising(OneWay[OptionsT]):
    """A run that searches with clean and corrupted prompts swapped.

    What it finds is measured twice: on the swapped prompts as its search did, and as all circuits are.
    """

    def __init__(
        self, kind: SearchKind[OptionsT], options: OptionsT, subject: Subject, *, progress: bool = True
    ) -> None:
        super().__init__(kind, options, subject, progress=progress)
        self._swapped = _swapped(self)

    @property
    def searched_on(self) -> Bench:
        """Captured runs on the swapped prompts."""
        return self._swapped

    def search(self, folder: Path | None, *, resume: bool) -> Searched:
        """Let the algorithm decide, and measure what it found in both ways.

        Args:
            folder: Folder of the journal; None keeps none.
            resume: Continue the search whose journal is there.
        """
        done = super().search(folder, resume=resume)
        found = done.found
        facts = _measured(self, self._swapped, found, found.final)
        final = None if found.final is None else _metric_of(self, self.bench, found)
        label = None if found.label is None else f"{found.label or self.kind.name}, denoising"
        return Searched(replace(found, final=final, label=label), done.engine | {"swapped": facts})


class BothWays(Run[OptionsT]):
    """A run of each direction, and the edges that either found."""

    def __init__(
        self, kind: SearchKind[OptionsT], options: OptionsT, subject: Subject, *, progress: bool = True
    ) -> None:
        super().__init__(kind, options, subject, progress=progress)
        self._parts: dict[str, Run[OptionsT]] = {
            name: make_run(kind, kind.with_option(options, "direction", name), subject, progress=progress)
            for name in DIRECTION_NAMES
        }
        self._parts["denoising"].hush()  # noising says it

    def hush(self) -> None:
        """Leave out warnings, in both directions (`Run.hush`)."""
        super().hush()
        for run in self._parts.values():
            run.hush()

    def finished(self, folder: Path | None, *, resume: bool) -> Circuit | None:
        """The circuit of a run that is finished already, held against those of its directions.

        Args:
            folder: The run's folder.
            resume: Whether there may be a run.

        Raises:
            RunError: If the folder holds another run, or any run when there may be none.
        """
        circuit = super().finished(folder, resume=resume)
        if folder is None:
            return circuit
        if circuit is None and os.path.exists(folder / JOURNAL_NAME):
            raise RunError(
                f"{folder} holds a search in one direction ({JOURNAL_NAME}); continue it with its direction "
                "or choose another folder"
            )
        if circuit is not None and all(os.path.exists(folder / n / CIRCUIT_NAME) for n in DIRECTION_NAMES):
            parts = {name: run.finished(folder / name, resume=True) for name, run in self._parts.items()}
            union = self._union({name: part for name, part in parts.items() if part is not None})
            if not np.array_equal(union.kept, circuit.kept):
                raise RunError(
                    f"the circuit in {folder} is not what its directions found: one of them was changed; "
                    f"remove {CIRCUIT_NAME} and --resume to make it again"
                )
        return circuit

    def search(self, folder: Path | None, *, resume: bool) -> Searched:
        """Search in both directions, or take what is finished of that.

        Args:
            folder: Each has its run in a folder in it; None keeps none.
            resume: Continue those whose journals are there.
        """
        circuits: dict[str, Circuit] = {}
        for name, run in self._parts.items():
            run.fingerprint = self.fingerprint
            where = None if folder is None else folder / name
            circuits[name] = run.run(where, resume=resume, take_over=self.takes_over)
            run.bench.clear()
            self.clock.add(circuits[name].record.seconds)
            self.check_lock()
        found = self._union(circuits)
        records = [circuit.record for circuit in circuits.values()]
        measured = all(record.verified is not None for record in records)
        swapped = _swapped(self)
        facts: dict[str, Any] = {
            "settings": records[-1].settings,
            "directions": {name: _told(circuit) for name, circuit in circuits.items()},
            "swapped": _measured(
                self, swapped, found, _metric_of(self, swapped, found) if measured else None
            ),
        }
        if records[-1].engine is not None:
            facts |= {
                "engine": records[-1].engine,
                "evaluations": sum(record.evaluations or 0 for record in records),
            }
        final = _metric_of(self, self.bench, found) if measured else None
        return Searched(replace(found, final=final), facts)

    def _union(self, circuits: dict[str, Circuit]) -> Found:
        """What either found, each edge or node with the better score of those that it has there."""
        noising, denoising = (self.units.found(circuits[name]) for name in DIRECTION_NAMES)
        readers = getattr(self.options, "readers", None)
        criterion = circuits[DIRECTION_NAMES[0]].record.arguments.criterion
        by_size = getattr(self.options, "by_size", criterion == "absolute")
        tested = noising.tested | denoising.tested
        takes = _is_better(denoising, noising, by_size=by_size)
        estimated = None
        if noising.estimated is not None and denoising.estimated is not None:
            estimated = np.where(takes, denoising.estimated, noising.estimated)
        union = Found(
            noising.kept | denoising.kept,
            np.where(takes, denoising.scores, noising.scores),
            tested,
            searched=None if readers is None else self.setting.graph.match_readers(readers),
            label=f"{self.kind.name}, both directions",
            estimated=estimated,
            found_by=np.where(
                ranked(noising.tested) | ranked(denoising.tested), found_by(noising.kept, denoising.kept), 0
            ).astype(np.uint8),
        )
        return self.units.circuit(union)


def _is_better(one: Found, other: Found, *, by_size: bool) -> BoolArray:
    """Of which edges the score of one search counts before that of another. [readers, writers]

    Args:
        one: The one.
        other: The other.
        by_size: Whether a score is better the larger it is in size.
    """
    ours, theirs = (np.abs(c.scores) if by_size else c.scores for c in (one, other))
    better: BoolArray = ranked(one.tested) & (~ranked(other.tested) | (ours > theirs))
    return (one.kept & ~other.kept) | (better & (one.kept == other.kept))


def _swapped(run: Run[Any]) -> Bench:
    """Captured runs of a run's prompts, with the clean and the corrupted in each other's place."""
    setting = replace(run.setting, task=run.setting.task.swap())
    return Bench(setting, run.limits, run.reporter, run.clock)


def _metric_of(run: Run[Any], bench: Bench, found: Found) -> float:
    """A circuit's metric by the engine that searches use."""
    with run.clock.phase("evaluate"):
        try:
            return bench.engine.metric_of(found.kept)
        finally:
            bench.engine.finish()


def _measured(run: Run[Any], bench: Bench, found: Found, final: float | None) -> MetricFacts:
    """A circuit's metric again by the hooks engine, on the prompts of some captured runs, which go for it."""
    judge = bench.judge()
    with run.clock.phase("evaluate"), run.reporter.phase("verifying"):
        return judge.measure(found.kept, final)[0]


def _told(circuit: Circuit) -> dict[str, Any]:
    """What the record of both directions says of one."""
    names = (
        "metric",
        "swapped",
        "verified",
        "second_looks",
        "estimates",
        "screen",
        "budget",
        "refine",
        "masks",
    )
    document = circuit.record.to_json()
    facts = {"edges": circuit.edge_count, "live": int(circuit.live.sum())}
    return facts | {name: document[name] for name in names if name in document}
