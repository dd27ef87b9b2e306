"""One discovery from model and task to circuit: engine, search, journal, evaluation, facts."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import pahq_hf
from pahq_hf.acdc import ReaderRecord, Search, search
from pahq_hf.circuit import CIRCUIT_NAME, DISCOVERY_NAME, Circuit, make_folder
from pahq_hf.config import ACDCConfig, MetricName, PAHQConfig
from pahq_hf.engine.hooks import HooksEngine
from pahq_hf.errors import RunError
from pahq_hf.evaluation import Evaluator
from pahq_hf.journal import JOURNAL_NAME, Journal, check_header
from pahq_hf.memory import PeakMemory
from pahq_hf.metrics import check_metric
from pahq_hf.patch import PatchedModel
from pahq_hf.tasks.base import Task

_LIBRARIES = ("torch", "transformers", "torchao", "safetensors", "numpy")


class Discovery:
    """A discovery of one circuit.

    Args:
        model: The patched model.
        identity: What identifies the base model, stored with the circuit.
        task: The prompts.
        pahq: The model's precision.
        acdc: The search.
        progress: Show a progress bar on stderr.
    """

    def __init__(
        self,
        model: PatchedModel,
        identity: dict[str, Any],
        task: Task,
        pahq: PAHQConfig,
        acdc: ACDCConfig,
        *,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.identity = identity
        self.task = task
        self.pahq = pahq
        self.acdc = acdc
        self.metric: MetricName = acdc.metric or task.metric
        check_metric(self.metric, task)
        model.graph.match_readers(acdc.readers)  # a wrong glob fails before any work
        self.progress = progress
        self._seconds: dict[str, float] = {}

    def header(self) -> dict[str, Any]:
        """What pins a run: two runs with equal headers make equal decisions."""
        return {
            "model": self.identity.get("fingerprint"),
            "task": self.task.fingerprint(),
            "precision": self.pahq.to_dict(),
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
        """
        folder = None if out is None else make_folder(out)
        if folder is not None:
            if (folder / CIRCUIT_NAME).exists() and resume:
                return self._finished(folder)
            self._refuse_overwrite(folder, resume)
        with PeakMemory() as peak:
            started = time.perf_counter()
            with self._phase("capture"):
                engine = self._engine()
            journal = self._journal(folder, resume)
            resumed = 0 if journal is None else len(journal.records)
            with self._phase("search"):
                state = self._search(engine, journal)
            engine_final = engine.metric_of(state.kept)
            with self._phase("evaluate"):
                evaluator = Evaluator(self.model, self.task, self.metric, self.acdc.ablation)
                fp32 = evaluator.metric_of(state.kept)
            self._seconds["total"] = time.perf_counter() - started
        facts = self._facts(state, engine, peak)
        facts["resumed_readers"] = resumed
        facts["metric"] = {
            "name": self.metric,
            "full": evaluator.full,
            "empty": evaluator.empty,
            "final": state.metric,
            "final_recomputed": engine_final,
            "fp32": fp32,
        }
        circuit = Circuit(self.model.graph, state.kept, state.scores, state.tested, self.identity, facts)
        if folder is not None:
            circuit.save_pretrained(folder)
        return circuit

    # -- steps ------------------------------------------------------------------------------------

    def _engine(self) -> HooksEngine:
        return HooksEngine(
            self.model,
            self.task,
            self.metric,
            ablation=self.acdc.ablation,
            raise_active=self.pahq.regime == "pahq-literal",
        )

    def _refuse_overwrite(self, folder: Path, resume: bool) -> None:
        for name in (CIRCUIT_NAME, JOURNAL_NAME, DISCOVERY_NAME):
            if (folder / name).exists() and not resume:
                raise RunError(
                    f"{folder} holds another run ({name}); continue it with --resume or choose another folder"
                )

    def _finished(self, folder: Path) -> Circuit:
        circuit = Circuit.from_pretrained(folder)
        check_header(circuit.discovery.get("header", {}), self.header(), folder)
        return circuit

    def _journal(self, folder: Path | None, resume: bool) -> Journal | None:
        if folder is None:
            return None
        if resume and (folder / JOURNAL_NAME).exists():
            return Journal.resume(folder, self.header())
        return Journal.create(folder, self.header())

    def _search(self, engine: HooksEngine, journal: Journal | None) -> Search:
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
            return search(engine, self.acdc, done=done, on_reader=on_reader, on_batch=on_batch)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - started

    def _facts(self, state: Search, engine: HooksEngine, peak: PeakMemory) -> dict[str, Any]:
        graph = self.model.graph
        tested = int(state.tested.sum())
        weights = self.model.precision
        return {
            "header": self.header(),
            "arguments": self.acdc.to_dict() | {"metric": self.metric},
            "precision": self.pahq.to_dict(),
            "engine": "hooks",
            "task": {"name": self.task.name, "examples": len(self.task), **self.task.source},
            "versions": versions(),
            "edges": {
                "total": graph.edge_count,
                "tested": tested,
                "untested": graph.edge_count - tested,
                "kept": int(state.kept.sum()),
                "live": int(graph.live_edges(state.kept).sum()),
            },
            "evaluations": engine.evaluations,
            "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
            "peak_memory": {
                **peak.report(),
                "linear_weights": weights.nbytes,
                "linear_weights_fp32": weights.nbytes_fp32,
            },
        }


def versions() -> dict[str, str]:
    """Versions of everything that could change a number."""
    found = {"pahq_hf": pahq_hf.__version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in _LIBRARIES}
    return found | {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
    }
