"""One discovery from model and task to circuit: engine, search, journal, evaluation, facts."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import pahq_hf
from pahq_hf.acdc import (
    AdaptiveBatch,
    BatchSize,
    Engine,
    FixedBatch,
    ReaderRecord,
    Search,
    search,
)
from pahq_hf.attribution.methods import check_gradient
from pahq_hf.attribution.screen import Screen, make_screen
from pahq_hf.circuit import DISCOVERY_NAME, Circuit, make_folder
from pahq_hf.config import ACDCConfig, EngineConfig, MetricName, PAHQConfig, parse_screen
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.hooks import HooksEngine
from pahq_hf.engine.sparse import SparseEngine
from pahq_hf.errors import ConfigError, DriftError, RunError
from pahq_hf.evaluation import Evaluator
from pahq_hf.files import CIRCUIT_NAME, JOURNAL_NAME
from pahq_hf.journal import Journal, check_header
from pahq_hf.memory import PeakMemory
from pahq_hf.metrics import check_metric
from pahq_hf.patch import PatchedModel
from pahq_hf.tasks.base import Task

# The two engines round differently; more than this is a mistake (semantics.md, design.md).
_DRIFT_RELATIVE = 1e-4
_DRIFT_ABSOLUTE = 1e-6
DEFAULT_MARGIN = 0.2  # measured: docs/precision.md
_LIBRARIES = ("torch", "transformers", "torchao", "safetensors", "numpy")


class Discovery:
    """A discovery of one circuit.

    Args:
        model: The patched model.
        identity: What identifies the base model, stored with the circuit.
        task: The prompts.
        pahq: The model's precision.
        acdc: The search.
        engine: How metrics are computed.
        progress: Show a progress bar on stderr.
    """

    def __init__(
        self,
        model: PatchedModel,
        identity: dict[str, Any],
        task: Task,
        pahq: PAHQConfig,
        acdc: ACDCConfig,
        engine: EngineConfig | None = None,
        *,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.identity = identity
        self.task = task
        self.pahq = pahq
        self.acdc = with_margin(acdc, pahq)
        self.engine = engine or EngineConfig()
        self.metric: MetricName = acdc.metric or task.metric
        check_metric(self.metric, task)
        model.graph.match_readers(acdc.readers)  # a wrong glob fails before any work
        if acdc.screen is not None:
            check_gradient(parse_screen(acdc.screen)[0], self.metric)
        self._screen: Screen | None = None
        self.progress = progress
        self._seconds: dict[str, float] = {}
        self._means: dict[str, NDArray[np.float32]] | None = None

    def header(self) -> dict[str, Any]:
        """What pins a run: two runs with equal headers make equal decisions."""
        return {
            "model": self.identity.get("fingerprint"),
            "task": self.task.fingerprint(),
            "dtype": str(self.model.hf.dtype).removeprefix("torch."),
            "precision": self.pahq.to_dict(),
            "policy_order": list(self.pahq.policy),  # the first match counts; objects have no order
            "acdc": self.acdc.to_dict() | {"metric": self.metric},
        }

    def run(self, out: str | Path | None = None, *, resume: bool = False) -> Circuit:
        """Search, evaluate, and (given `out`) save.

        Args:
            out: Folder for the journal and the finished circuit; None keeps everything in memory.
            resume: Continue the run in `out`; a finished one is returned as it is, and where there is
                none one starts.

        Returns:
            The circuit.

        Raises:
            RunError: If `out` cannot be written or holds another run.
            DriftError: If the engine's final metric is not the hooks engine's.
        """
        folder = None if out is None else Path(out)
        if folder is not None:
            if resume and os.path.exists(folder / CIRCUIT_NAME):
                return self._finished(folder)
            self._refuse_overwrite(folder, resume)
        with PeakMemory() as peak:
            started = time.perf_counter()
            self._prepare_screen(folder, resume)  # first: its captured runs make room for the engine's
            with self._phase("capture"):
                engine = self._engine()
            journal = self._journal(folder, resume)
            resumed = 0 if journal is None else len(journal.records)
            with self._phase("search"):
                state = self._search(engine, journal)
            final = state.metric
            if self.pahq.regime in ("pahq", "pahq-literal"):  # state.metric is of the last component's tests
                final = engine.metric_of(state.kept)
                engine.finish()
            facts = self._facts(state, engine)
            del engine  # its captured runs make room for the evaluation's
            with self._phase("evaluate"):
                metric = self._evaluate(state, final)
            self._seconds["total"] = time.perf_counter() - started
        self._seconds |= {f"search.{name}": value for name, value in facts.pop("phases").items()}
        facts["seconds"] = {name: round(value, 3) for name, value in self._seconds.items()}
        facts["peak_memory"] |= peak.report()
        facts |= {"resumed_readers": resumed, "metric": metric}
        found = state.kept, state.scores, state.tested
        circuit = Circuit(self.model.graph, *found, self.identity, facts, self._means)
        if folder is not None:
            circuit.save_pretrained(folder)
        return circuit

    # -- steps ------------------------------------------------------------------------------------

    def _engine(self) -> HooksEngine | SparseEngine:
        return make_engine(self.model, self.task, self.metric, self.acdc.ablation, self.pahq, self.engine)

    def _evaluate(self, state: Search, final: float) -> dict[str, Any]:
        """The circuit's metric again by the hooks engine, at the search's precision and in FP32."""
        evaluator = Evaluator(self.model, self.task, self.metric, self.acdc.ablation)
        self._means = evaluator.means()
        fp32 = recomputed = evaluator.metric_of(state.kept)
        if self.pahq.regime in ("rtn", "pahq-literal"):
            low = HooksEngine(self.model, self.task, self.metric, ablation=self.acdc.ablation)
            recomputed = low.metric_of(state.kept)
        if abs(final - recomputed) > max(_DRIFT_ABSOLUTE, _DRIFT_RELATIVE * abs(recomputed)):
            raise DriftError(
                f"the search ended at {self.metric} {final!r}, the hooks engine finds {recomputed!r} for the "
                "same circuit; this is a bug, please report it"
            )
        return {
            "name": self.metric,
            "full": evaluator.full,
            "empty": evaluator.empty,
            "final": final,
            "final_recomputed": recomputed,
            "fp32": fp32,
        }

    def _refuse_overwrite(self, folder: Path, resume: bool) -> None:
        for name in (CIRCUIT_NAME, JOURNAL_NAME, DISCOVERY_NAME):
            if os.path.exists(folder / name) and not resume:
                raise RunError(
                    f"{folder} holds another run ({name}); continue it with --resume or choose another folder"
                )

    def _finished(self, folder: Path) -> Circuit:
        circuit = Circuit.from_pretrained(folder)
        check_header(circuit.discovery.get("header", {}), self.header(), folder)
        return circuit

    def _prepare_screen(self, folder: Path | None, resume: bool) -> None:
        """Score the edges that the search may pass over, unless the interrupted run did."""
        text = self.acdc.screen
        if text is None or self._screen is not None:
            return
        if folder is not None and resume and (folder / JOURNAL_NAME).exists():
            Journal.resume(folder, self.header())  # another run is refused as such
            self._screen = Screen.load(text, self.model.graph, folder, self.header())
            return
        with self._phase("screen"):
            self._screen = make_screen(
                text, self.model, self.task, self.metric, self.acdc.ablation, self.pahq, self.engine
            )
        if folder is not None:
            make_folder(folder)
            self._screen.save(folder, self.header())

    def _journal(self, folder: Path | None, resume: bool) -> Journal | None:
        self._prepare_screen(folder, resume)
        if folder is None:
            return None
        make_folder(folder)
        if resume and (folder / JOURNAL_NAME).exists():
            journal = Journal.resume(folder, self.header())
            journal.check(self.model.graph, self.acdc.order)
            return journal
        return Journal.create(folder, self.header())

    def _search(self, engine: Engine, journal: Journal | None) -> Search:
        graph = self.model.graph
        done = [] if journal is None else list(journal.records)
        chosen = graph.match_readers(self.acdc.readers)
        total = int(graph.prefix[chosen].sum())
        decided = sum(int(graph.prefix[r.reader]) for r in done if r.searched)
        bar = tqdm(total=total, initial=decided, desc="ACDC", unit="edge", disable=not self.progress)

        def on_reader(state: Search, record: ReaderRecord) -> None:
            if journal is not None:
                journal.append(record)
            if record.searched:
                bar.update(int(graph.prefix[record.reader]) - len(record.scores))
                kept = int(state.kept[chosen].sum()) - (total - bar.n)
                bar.set_postfix(tested=int(state.tested.sum()), kept=kept, metric=f"{state.metric:.4g}")

        def on_batch(_: int, decided: int) -> None:
            bar.update(decided)

        with bar:
            return search(
                engine,
                self.acdc,
                batch=self._batch(engine),
                done=done,
                survivors=None if self._screen is None else self._screen.survivors,
                on_reader=on_reader,
                on_batch=on_batch,
            )

    def _batch(self, engine: Engine) -> BatchSize:
        if self.engine.batch is not None:
            return FixedBatch(self.engine.batch)
        # The hooks engine gains nothing from trying candidates it may not need.
        return AdaptiveBatch() if isinstance(engine, SparseEngine) else FixedBatch(1)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - started

    def _facts(self, state: Search, engine: HooksEngine | SparseEngine) -> dict[str, Any]:
        graph = self.model.graph
        tested = int(state.tested.sum())
        weights = self.model.precision
        return {
            "method": "acdc",
            "header": self.header(),
            "arguments": self.acdc.to_dict() | {"metric": self.metric},
            "precision": self.pahq.to_dict(),
            "engine": "sparse" if isinstance(engine, SparseEngine) else "hooks",
            "task": {"name": self.task.name, "examples": len(self.task), **self.task.source},
            "versions": versions() | {"device": str(self.model.device)},
            "edges": {
                "total": graph.edge_count,
                "tested": tested,
                "untested": graph.edge_count - tested,
                "kept": int(state.kept.sum()),
                "live": int(graph.live_edges(state.kept).sum()),
            },
            "evaluations": engine.evaluations,
            "second_looks": {
                "margin": self.acdc.to_dict()["margin"],
                "tests": sum(record.looks for record in state.records),
                "changed": sum(record.changed for record in state.records),
            },
            **({} if self._screen is None else {"screen": self._screen.facts()}),
            "phases": engine.phases.seconds if isinstance(engine, SparseEngine) else {},
            "peak_memory": {
                "linear_weights": weights.nbytes,
                "linear_weights_fp32": weights.nbytes_fp32,
            },
        }


def with_margin(acdc: ACDCConfig, pahq: PAHQConfig) -> ACDCConfig:
    """The search with the margin of its regime."""
    if pahq.regime == "pahq":
        return acdc if acdc.margin is not None else replace(acdc, margin=DEFAULT_MARGIN)
    if acdc.margin:
        raise ConfigError(f"a margin needs precision pahq: in {pahq.regime} there is no second look")
    return acdc


def versions() -> dict[str, str]:
    """Versions of everything that could change a number."""
    found = {"pahq_hf": pahq_hf.__version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in _LIBRARIES}
    return found | {"threads": str(torch.get_num_threads())}
