"""The circuits of a sweep: one a threshold, a row for each, and a picture of them all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.confirmation import warn_unverified
from pahq_hf.circuit.estimates import EstimateFacts
from pahq_hf.circuit.extras import spared
from pahq_hf.circuit.files import (
    PARETO_NAMES,
    SWEEP_NAME,
    SWEEP_PREFIX,
    output_path,
    write_atomically,
    write_text,
)
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.circuit.json_reader import read_json
from pahq_hf.circuit.verdict import Verdict, faithfulness
from pahq_hf.errors import CircuitError, ConfigError

_OF_NODES = ("nodes", "nodes_tested")
_SECTIONS = ("verdict", "estimates")


@dataclass(frozen=True)
class SweepRow:
    """One threshold of a sweep.

    Attributes:
        threshold: tau.
        kept: Edges of its circuit.
        live: Kept edges on a path from `input` to `logits`.
        tested: Edges that were tested.
        evaluations: Metric values computed for it.
        reused: Metric values that another threshold's search had computed.
        name: The metric that was minimised.
        metric: The circuit's, in FP32.
        kl: Its KL divergence from the full model, in FP32.
        faithfulness: `(m(C) - m(empty)) / (m(full) - m(empty))`.
        seconds: Search and evaluation; what all thresholds share is not in it.
        verdict: Whether the circuit does what the model does; None if an earlier version found it.
        verified: Whether the hooks engine confirmed its metric; None if an earlier version found it.
        estimates: Decisions taken by estimates, and their audit; None where all were tested.
        nodes: Heads and MLPs of its circuit, where whole nodes are kept or removed.
        nodes_tested: Heads and MLPs that were tested, there.
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
    estimates: EstimateFacts | None = None
    nodes: int | None = None
    nodes_tested: int | None = None

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
            estimates=None if run.estimates.text is None else run.estimates,
            nodes=run.nodes.kept,
            nodes_tested=run.nodes.tested,
            **measured,
        )

    @property
    def text(self) -> str:
        """What its circuit has, in words."""
        nodes = "" if self.nodes is None else f"{self.nodes:,} nodes, "
        return f"{nodes}{self.kept:,} edges"

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, for JSON."""
        verdict = {} if self.verdict is None else {"verdict": self.verdict.to_dict()}
        estimates = {} if self.estimates is None else {"estimates": self.estimates.to_json()}
        values = {name: value for name, value in asdict(self).items() if name not in _SECTIONS}
        for name in _OF_NODES:
            if values[name] is None:
                del values[name]
        return values | verdict | estimates


class Sweep(Mapping[float, Circuit]):
    """The circuits of a sweep by threshold, ascending.

    Args:
        circuits: The circuit of each threshold, with the facts of its search.
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
        """Thresholds and edges, or nodes, on one line."""
        inside = ", ".join(f"{row.threshold:g}: {row.text}" for row in self.rows)
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

    def save(self, folder: Path) -> None:
        """Write `sweep.json` and the pictures; the circuits have folders of their own.

        Raises:
            RunError: If `sweep.json` cannot be written.
        """
        # After the runs: its presence says that the folder is complete. Pictures can be made again from it.
        write_text(folder / SWEEP_NAME, json.dumps(self.to_json(), indent=1) + "\n")
        for name in PARETO_NAMES:
            path = folder / name
            with spared(path):
                self.draw(path)

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


def threshold_folder(folder: Path, tau: float) -> Path:
    """The run of a threshold; `repr` tells any two floats apart."""
    return folder / f"{SWEEP_PREFIX}{tau!r}"
