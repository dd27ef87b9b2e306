"""ACDC at several thresholds: one run that computes once what the searches have in common.

The model, the engine's captured runs, the evaluation's captured runs, and every search's common beginning
with another one (`engine/recall.py`) are shared. What comes out is, to the bit, what a run per threshold
would find: batches depend on decisions alone, so values are computed side by side with the same others.
Only where memory runs short do batches depend on what is free; then scores may differ in their last bits,
as those of any two runs may.

How much is shared depends on how early decisions differ, and the first edge with a score between two
thresholds is where they do. What is always shared is starting, loading and capturing.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pahq_hf.checkpoint.legacy_fingerprint import known_fingerprint
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.confirmation import warn_unverified
from pahq_hf.circuit.extras import spared
from pahq_hf.circuit.files import (
    ANSWERS_NAME,
    SWEEP_PREFIX,
    make_folder,
    output_path,
    read_json,
    write_atomically,
    write_text,
)
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.circuit.verdict import Verdict, faithfulness
from pahq_hf.config import ACDCConfig, EngineConfig, PAHQConfig
from pahq_hf.errors import CircuitError, ConfigError, RunError
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.flags import exact_products
from pahq_hf.precision.memory import PeakMemory
from pahq_hf.precision.threads import threads
from pahq_hf.search.hardware import hardware_facts
from pahq_hf.search.journal import DATA, check_header
from pahq_hf.search.lock import LOCK_NAME, RunLock, check_free
from pahq_hf.search.pipeline import Discovery, Found, versions
from pahq_hf.search.shared_answers import Answers
from pahq_hf.search.verification import Judge
from pahq_hf.tasks.base import Task

SWEEP_NAME = "sweep.json"
_PLOT_NAME = "pareto"


@dataclass(frozen=True)
class SweepRow:
    """One threshold of a sweep.

    Attributes:
        threshold: tau.
        kept: Edges of its circuit.
        live: Those on a path from `input` to `logits`.
        tested: Edges that were tested.
        evaluations: Metric values computed for it; of the last session, if the sweep was interrupted.
        reused: Metric values that another threshold's search had computed.
        name: The metric that was minimised.
        metric: The circuit's, in FP32.
        kl: Its KL divergence from the full model, in FP32.
        faithfulness: `(m(C) - m(empty)) / (m(full) - m(empty))`.
        seconds: Search and evaluation; what all thresholds share is not in it.
        verdict: Whether the circuit does what the model does; None if an earlier version found it.
        verified: Whether the hooks engine confirmed its metric; None if an earlier version found it.
    """

    threshold: float
    kept: int
    live: int
    tested: int
    evaluations: int
    reused: int
    name: str
    metric: float
    kl: float
    faithfulness: float | None
    seconds: float
    verdict: Verdict | None = None
    verified: bool | None = None

    @classmethod
    def of(cls, circuit: Circuit) -> SweepRow:
        """The row of a circuit that a sweep found.

        Raises:
            CircuitError: If no sweep found it.
        """
        run = circuit.record
        metric = run.metric
        measured: dict[str, Any] = {
            "threshold": run.arguments.threshold,
            "evaluations": run.evaluations,
            "reused": run.reused.evaluations,
            "name": metric.name,
            "metric": metric.fp32,
            "kl": run.kl,
            "seconds": run.total_seconds,
        }
        missing = [name for name, value in measured.items() if value is None]
        if missing or metric.fp32 is None or metric.full is None or metric.empty is None:
            lacks = ", ".join(missing or ["the metric of all edges and of none"])
            raise CircuitError(f"this circuit is not one of a sweep: its facts lack {lacks}")
        return cls(
            kept=circuit.edge_count,
            live=int(circuit.live.sum()),
            tested=int(circuit.tested.sum()),
            faithfulness=faithfulness(metric.fp32, metric.full, metric.empty),
            verdict=run.verdict,
            verified=circuit.verified,
            **measured,
        )

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, for JSON."""
        verdict = {} if self.verdict is None else {"verdict": self.verdict.to_dict()}
        return {name: value for name, value in asdict(self).items() if name != "verdict"} | verdict


class Sweep(Mapping[float, Circuit]):
    """The circuits of a sweep by threshold, ascending.

    Args:
        circuits: They, each with the facts of its search.
        facts: What the searches shared: `header`, `seconds`, `peak_memory`, `versions`.
    """

    def __init__(self, circuits: Mapping[float, Circuit], facts: Mapping[str, Any]) -> None:
        self._circuits = dict(sorted(circuits.items()))
        self.facts = dict(facts)
        self.rows = [SweepRow.of(circuit) for circuit in self._circuits.values()]

    def __getitem__(self, threshold: float) -> Circuit:
        """The circuit of a threshold."""
        return self._circuits[threshold]

    def __iter__(self) -> Iterator[float]:
        """The thresholds, ascending."""
        return iter(self._circuits)

    def __len__(self) -> int:
        """How many thresholds there are."""
        return len(self._circuits)

    def __repr__(self) -> str:
        """Thresholds and edges on one line."""
        inside = ", ".join(f"{row.threshold:g}: {row.kept:,} edges" for row in self.rows)
        return f"Sweep({inside})"

    @property
    def kept(self) -> list[BoolArray]:
        """The edge sets, by ascending threshold: what a ROC curve over a sweep needs."""
        return [circuit.kept for circuit in self.values()]

    @property
    def verified(self) -> bool:
        """Whether the hooks engine confirmed every search's result, as far as is known."""
        return all(row.verified is not False for row in self.rows)

    def warn_unverified(self) -> None:
        """Warn of each circuit that the hooks engine did not confirm."""
        for circuit in self.values():
            warn_unverified(circuit.record.doubt)

    def to_json(self) -> dict[str, Any]:
        """Rows and totals (`sweep.json`)."""
        shared = self.facts.get("seconds", {})
        own = sum(row.seconds for row in self.rows)
        totals = {
            "thresholds": len(self),
            "tested": sum(row.tested for row in self.rows),
            "evaluations": sum(row.evaluations for row in self.rows),
            "reused": sum(row.reused for row in self.rows),
            "seconds": round(own + sum(shared.values()), 3),
        }
        return {"rows": [row.to_dict() for row in self.rows], "totals": totals, **self.facts}

    def draw(self, path: str | Path) -> None:
        """Draw edges against the metric into a file, by its ending: .png, .svg or .html.

        Raises:
            ConfigError: If the ending is another one.
            RunError: If it cannot be written.
        """
        from pahq_hf.circuit.render.pareto import ParetoPoint, draw_pareto, pareto_page

        path = output_path(path)
        names = [entry.name for entry in fields(ParetoPoint)]
        rows = [ParetoPoint(**{name: getattr(row, name) for name in names}) for row in self.rows]
        title, ending = self._title(), path.suffix.lower()
        if ending == ".html":
            write_text(path, pareto_page(rows, title))
        elif ending == ".png":
            write_atomically(path, lambda where: draw_pareto(rows, title, where, "png"))
        elif ending == ".svg":
            write_atomically(path, lambda where: draw_pareto(rows, title, where, "svg"))
        else:
            raise ConfigError(f"cannot draw into {path.name}; use a file that ends in .png, .svg or .html")

    def _title(self) -> str:
        first = next(iter(self.values()))
        return f"{first.identity.base_model or 'model'} on {first.record.task.name or 'unknown'}"

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Sweep:
        """Read what a finished sweep wrote.

        Args:
            folder: Its folder.

        Raises:
            CircuitError: If something is missing or damaged.
        """
        folder = Path(folder)
        document = read_json(folder / SWEEP_NAME)
        rows, totals = document.pop("rows", None), document.pop("totals", None)
        if not isinstance(rows, list) or not rows or not isinstance(totals, dict):
            raise CircuitError(f"{folder / SWEEP_NAME} has no rows; it is not a sweep")
        try:
            thresholds = [float(row["threshold"]) for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise CircuitError(f"{folder / SWEEP_NAME} is damaged: a row has no threshold") from error
        return cls(
            {tau: Circuit.from_pretrained(threshold_folder(folder, tau)) for tau in thresholds}, document
        )


def check_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    """Thresholds of a sweep, ascending.

    Raises:
        ConfigError: If there are none, one is no number >= 0, or one is given twice.
    """
    try:
        found = sorted(float(value) for value in thresholds)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"thresholds must be numbers; got {thresholds!r}") from error
    if not found:
        raise ConfigError("a sweep needs at least one threshold")
    for value in found:
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"thresholds must be numbers >= 0; got {value}")
    for value, following in pairwise(found):
        if value == following:
            raise ConfigError(f"threshold {value:g} is given twice")
    return tuple(value + 0.0 for value in found)  # -0.0 is 0.0


class SweepRun:
    """One sweep.

    Args:
        model: The patched model.
        identity: What identifies the base model, stored with circuits.
        task: The prompts.
        pahq: The model's precision.
        acdc: The searches, but for their thresholds.
        thresholds: These.
        engine: How metrics are computed.
        progress: Say on stderr how far it is.

    Raises:
        ConfigError: If a threshold is no number >= 0 or given twice, an option contradicts the precision,
            or no reader matches.
        MetricError: If the task lacks what the metric needs.
    """

    def __init__(
        self,
        model: PatchedModel,
        identity: dict[str, Any],
        task: Task,
        pahq: PAHQConfig,
        acdc: ACDCConfig,
        thresholds: Sequence[float],
        engine: EngineConfig | None = None,
        *,
        progress: bool = True,
    ) -> None:
        self._runs = {
            tau: Discovery(
                model, identity, task, pahq, replace(acdc, threshold=tau), engine, progress=progress
            )
            for tau in check_thresholds(thresholds)
        }
        self._any = next(iter(self._runs.values()))

    def header(self) -> dict[str, Any]:
        """What pins a sweep: a run's header without its threshold."""
        header = self._any.header()
        acdc = {name: value for name, value in header["acdc"].items() if name != "threshold"}
        return header | {"acdc": acdc}

    def _told_header(self) -> dict[str, Any]:
        return self.header() | {DATA: self._any.data()}

    @exact_products()
    def run(self, out: str | Path | None = None, *, resume: bool = False, take_over: bool = False) -> Sweep:
        """Search at every threshold, evaluate, and (given `out`) save.

        All searches come before the first evaluation, so that no more captured runs are in memory at
        once than in a single discovery.

        Args:
            out: Folder of the sweep; None keeps everything in memory.
            resume: Continue the sweep in `out`, or add thresholds to it; a finished one is returned as
                it is, and where there is none one starts.
            take_over: Take the place of another machine's process that works in `out`.

        Returns:
            The circuits.

        Raises:
            RunError: If `out` cannot be written, holds a sweep already, or is in use by another process.

        Warns:
            UnverifiedWarning: For each search whose final metric is not the hooks engine's.
        """
        with threads(self._any.engine.threads):
            if out is None:
                sweep = self._run(None, resume, take_over)
            else:
                sweep = self._run_in(output_path(out), resume, take_over)
        sweep.warn_unverified()
        return sweep

    def _run_in(self, folder: Path, resume: bool, take_over: bool) -> Sweep:
        """Run in a folder that no other process works in."""
        check_free(folder, take_over=take_over)
        if resume:
            known = known_fingerprint(folder, self._any.model, str(self._any.fingerprint))
            for run in self._runs.values():
                run.fingerprint = known
        # A finished one is only read, unless it died over its plots: that is tidied up.
        if not os.path.exists(folder / LOCK_NAME):
            finished = self._look_into(folder, resume)
            if finished is not None:
                return finished
        with RunLock(folder, take_over=take_over):
            # Another process may have finished it meanwhile.
            return self._look_into(folder, resume) or self._run(folder, resume, take_over)

    def _run(self, folder: Path | None, resume: bool, take_over: bool) -> Sweep:
        answers = Answers() if folder is None else self._answers(folder)
        folders = {tau: None if folder is None else threshold_folder(folder, tau) for tau in self._runs}
        found: dict[float, Circuit] = {}
        for tau, run in self._runs.items():
            circuit = run.finished(folders[tau], resume=resume)
            if circuit is not None:
                found[tau] = circuit
        seconds = {}
        left = {tau: folders[tau] for tau in self._runs if tau not in found}
        with ExitStack() as locks, PeakMemory(self._any.model.device) as peak:
            for tau, own in left.items():
                if own is not None:  # `discover` takes it for a run of its own
                    self._runs[tau].lock = locks.enter_context(RunLock(own, take_over=take_over))
            searched, seconds["capture"] = self._search(left, answers, resume)
            if searched:
                started = time.perf_counter()
                with self._any.reporter.phase("verifying"):
                    judge = self._any.judge()
                seconds["judge"] = round(time.perf_counter() - started, 3)
                for tau, result in searched.items():
                    found[tau] = self._conclude(tau, result, judge, peak, folders[tau])
        facts = {
            "header": self.header(),
            "versions": versions() | {"device": str(self._any.model.device)},
            **hardware_facts(self._any.model.device),
            "seconds": seconds,
            "peak_memory": peak.report(),
        }
        sweep = Sweep(found, facts)
        if folder is not None:
            with self._any.reporter.phase("drawing"):
                _save(sweep, folder)
        return sweep

    def _search(
        self, left: Mapping[float, Path | None], answers: Answers, resume: bool
    ) -> tuple[dict[float, Found], float]:
        """What searches find at some thresholds, and the seconds that capturing took."""
        if not left:
            return {}, 0.0
        screen = self._any.make_screen()
        for run in self._runs.values():
            run.screen = screen
        started = time.perf_counter()
        with self._any.reporter.phase("capturing"):
            engine = self._any.make_engine()
        capture = round(time.perf_counter() - started, 3)
        engine.phases.take()  # capturing is no search's own
        # In any order all make the same tests together; the smallest circuits are found soonest.
        return {
            tau: self._runs[tau].search(
                engine, left[tau], resume=resume, answers=answers, first=tau == max(left)
            )
            for tau in sorted(left, reverse=True)
        }, capture

    def _conclude(
        self, tau: float, found: Found, judge: Judge, peak: PeakMemory, folder: Path | None
    ) -> Circuit:
        circuit = self._runs[tau].conclude(found, judge)
        circuit.discovery["peak_memory"] |= peak.report()
        metric = circuit.discovery["metric"]
        is_kl = metric["name"] == "kl"
        circuit.discovery["kl"] = metric["fp32"] if is_kl else judge.evaluator.report(circuit)["kl"]
        if folder is not None:
            self._runs[tau].save(circuit, folder)
        return circuit

    # -- files ------------------------------------------------------------------------------------

    def _look_into(self, folder: Path, resume: bool) -> Sweep | None:
        """The sweep in a folder, if it is this one and finished.

        Raises:
            RunError: If the folder holds a sweep already, or any when there may be none.
        """
        for name in (SWEEP_NAME, ANSWERS_NAME):
            if os.path.exists(folder / name) and not resume:
                raise RunError(
                    f"{folder} holds a sweep already ({name}); continue it with --resume or choose another "
                    "folder"
                )
        wanted = {threshold_folder(folder, tau).name for tau in self._runs}
        for path in sorted(folder.iterdir()) if os.path.isdir(folder) else ():
            if path.name.startswith(SWEEP_PREFIX) and path.name not in wanted:
                tau = path.name.removeprefix(SWEEP_PREFIX)
                raise RunError(
                    f"{folder} holds a sweep with threshold {tau}; ask for that too or choose another folder"
                )
        if not os.path.exists(folder / SWEEP_NAME):
            return None
        sweep = Sweep.from_pretrained(folder)
        told = next((circuit.discovery.get("task") for circuit in sweep.values()), None)
        check_header({**sweep.facts.get("header", {}), DATA: told}, self._told_header(), folder)
        return sweep if set(sweep) == set(self._runs) else None

    def _answers(self, folder: Path) -> Answers:
        make_folder(folder)
        return Answers.open(folder / ANSWERS_NAME, self._told_header())


def threshold_folder(folder: Path, tau: float) -> Path:
    """The run of a threshold; `repr` tells any two floats apart."""
    return folder / f"{SWEEP_PREFIX}{tau!r}"


def _save(sweep: Sweep, folder: Path) -> None:
    # After the runs: its presence says that the folder is complete. Pictures can be made again from it.
    write_text(folder / SWEEP_NAME, json.dumps(sweep.to_json(), indent=1) + "\n")
    for ending in ("png", "svg", "html"):
        path = folder / f"{_PLOT_NAME}.{ending}"
        with spared(path):
            sweep.draw(path)
