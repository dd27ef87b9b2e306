"""Searches side by side: how faithful their circuits of each size are to prompts that no search has seen."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pahq_hf import Circuit, PAHQModel, load_task
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.circuit.verdict import faithfulness
from pahq_hf.config import PAHQConfig
from pahq_hf.errors import PAHQError
from pahq_hf.evaluation.curves import rank_edges
from pahq_hf.evaluation.evaluator import Evaluator
from pahq_hf.evaluation.necessity import completeness
from pahq_hf.evaluation.report import curve_facts
from pahq_hf.tasks.base import Task

_DESCRIPTION = """\
Find circuits of some sizes by every method in FP32, and judge them on unseen prompts. Circuits and rows that
are below --out already are not made again, so that it can be interrupted."""

_EPILOG = """\
methods
  refine, edge-pruning  A run for every size. The areas are of one more run of refine, with --curve.
  refine-curve          That run alone: the best edges of its ranking are the circuits of all sizes.
  acdc-sized            A run for every size, at the threshold, of a bisection, with which acdc keeps a number
                        of edges next to it; CPU is that run's alone.
  acdc, both, budget    One run, at --threshold (both: noising and denoising); budget within --max-gap. Its
                        best edges make the circuits, those that it kept before all others.
  ugs                   One run; the best edges of its ranking.
  eap-ig, ...           A method of `pahq attribute`, by score, or by its size: eap-ig:absolute. By another
                        metric where it takes none that is flat at the full model: eap/logit_diff.

figures, all on unseen prompts
  F           (m(circuit) - m(no edges)) / (m(full) - m(no edges)), for each size.
  |1-F|, KL   In --out, besides; edges: how many the circuit has.
  CPR, CMD    Areas under F and |1-F| over MIB's grid of sizes, by score and by its size; log: means over
              log size.
  F>=.9       The smallest of the sizes whose circuit is as faithful.
  outside     F of the model without the largest of the circuits: 0 if that is complete.
  stable      Mean Jaccard index of the circuits of each two seeds, over the sizes.
  values      Metric values computed.  CPU: seconds of processor time.  MB: peak anonymous memory.
"""

_SIZES = (25, 50, 100, 200, 400, 800, 1600)
_METHODS = (
    "refine",
    "acdc",
    "both",
    "budget",
    "eap/logit_diff",
    "eap-ig",
    "eap-ig:absolute",
    "eap-ig-activations",
    "random",
)
_SIZED = ("refine", "edge-pruning", "acdc-sized")
_BISECTIONS = 7
_DISCOVER = (*_SIZED, "refine-curve", "ugs", "acdc", "both", "budget")
_UNSEEN = 1000  # seeds of unseen prompts are so much larger
_CURVE = 0  # the size that stands for a run of all sizes


@dataclass(frozen=True)
class Row:
    """A circuit of one size, or the areas of all sizes (size 0)."""

    task: str
    method: str
    seed: int
    size: int
    edges: int
    f: float | None = None
    kl: float | None = None
    outside: float | None = None
    cpr: float | None = None
    cmd: float | None = None
    cpr_log: float | None = None
    cmd_log: float | None = None
    values: int | None = None
    cpu: float | None = None
    memory_mb: float | None = None

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What it is of."""
        return self.task, self.method, self.seed, self.size


@dataclass(frozen=True)
class Asked:
    """What is compared: fields of the command line."""

    n: int
    unseen: int
    sizes: tuple[int, ...]
    threshold: float
    max_gap: float
    metric: str
    steps: int | None


class Comparison:
    """Runs every method on every task, and keeps what comes out.

    Args:
        model: The model, in FP32.
        asked: What is compared.
        out: Where circuits and rows are kept.
    """

    def __init__(self, model: PAHQModel, asked: Asked, out: Path) -> None:
        self._model, self._asked, self._out = model, asked, out
        self._rows = {row.key: row for row in read_rows(out)}
        self._judges: dict[tuple[str, int], Evaluator] = {}

    def run(self, task: str, method: str, seed: int) -> None:
        """Find and judge the circuits of a method on a task, those that are missing."""
        graph = self._model.patched.graph
        sizes = [size for size in self._asked.sizes if size <= graph.edge_count]
        if method not in _SIZED:
            if all((task, method, seed, size) in self._rows for size in (*sizes, _CURVE)):
                return
            circuit, spent = self._found(task, method, seed, None)
            for size in sizes:
                self._judge(Row(task, method, seed, size, size), best_of(circuit, method, size))
            self._judge(Row(task, method, seed, _CURVE, circuit.edge_count, **spent), circuit)
            return
        for size in sizes:
            if (task, method, seed, size) not in self._rows:
                circuit, spent = self._found(task, method, seed, size)
                self._judge(Row(task, method, seed, size, circuit.edge_count, **spent), circuit.kept)
        if method == "refine" and (task, method, seed, _CURVE) not in self._rows:
            circuit, spent = self._found(task, method, seed, _CURVE)
            self._judge(Row(task, method, seed, _CURVE, circuit.edge_count, **spent), circuit)

    def _found(self, name: str, method: str, seed: int, size: int | None) -> tuple[Circuit, dict[str, Any]]:
        """A circuit, and what it took; from --out if it is there."""
        folder = folder_of(self._out, name, method, seed, size)
        if not (folder / "spent.json").exists():
            task = self._task(name, seed)
            plain, _, rank = method.partition(":")
            plain, _, metric = plain.partition("/")
            options = self._options(plain, task, seed, size) if plain in _DISCOVER else {}
            began = time.process_time()
            if plain in _DISCOVER:
                circuit = self._model.discover(task, out=folder, resume=True, progress=False, **options)
            else:
                more: dict[str, Any] = {"seed": seed} if plain == "random" else {}
                more |= {"metric": metric} if metric else {}
                circuit = self._model.attribute(
                    task, method=plain, absolute=rank == "absolute", out=folder, progress=False, **more
                )
            spent = {
                "values": circuit.discovery.get("evaluations"),
                "cpu": round(time.process_time() - began, 1),
                "memory_mb": round(circuit.discovery["peak_memory"]["anonymous"] / 1e6),
            }
            (folder / "spent.json").write_text(json.dumps(spent))
        return Circuit.from_pretrained(folder), json.loads((folder / "spent.json").read_text())

    def _options(self, method: str, task: Task, seed: int, size: int | None) -> Mapping[str, Any]:
        asked = self._asked
        if method == "acdc-sized":
            return {"threshold": self._threshold(task, size or max(asked.sizes))}
        if method in ("refine", "refine-curve", "edge-pruning", "ugs"):
            curve = method == "refine-curve" or size == _CURVE
            goal: dict[str, Any] = {"curve": True} if curve else {"edges": size or max(asked.sizes)}
            steps = {} if asked.steps is None else {"steps": asked.steps}
            return {"search": method.removesuffix("-curve"), "seed": seed, **goal, **steps}
        if method == "budget":
            return {"search": "budget", "max_gap": asked.max_gap, "threshold": asked.threshold}
        return {"threshold": asked.threshold, "direction": "both" if method == "both" else "noising"}

    def _threshold(self, task: Task, size: int) -> float:
        """The threshold, of a bisection, with which ACDC keeps a number of edges next to the size."""
        low, high = 1e-5, 1.0
        kept: dict[float, int] = {}
        for _ in range(_BISECTIONS):
            tau = (low * high) ** 0.5
            kept[tau] = self._model.discover(task, threshold=tau, progress=False).edge_count
            if kept[tau] == size:
                break
            low, high = (tau, high) if kept[tau] > size else (low, tau)
        return min(kept, key=lambda tau: abs(kept[tau] - size))

    def _judge(self, row: Row, circuit: Circuit | BoolArray) -> None:
        """Judge a circuit on unseen prompts, or a ranking of all edges, and keep the row."""
        judge = self._judge_of(row.task, row.seed)
        found: dict[str, Any]
        if isinstance(circuit, Circuit):
            curve = curve_facts(judge, circuit)
            found = {name: curve[name] for name in ("cpr", "cmd", "cpr_log", "cmd_log")}
        else:
            value = judge.metric_of(circuit)
            found = {"f": faithfulness(value, judge.full, judge.empty)}
            found["kl"] = value if self._asked.metric == "kl" else None
            if row.size == max(self._asked.sizes):
                found["outside"] = completeness(judge, circuit, samples=0).complement_faithfulness
        row = Row(**{**asdict(row), **found})
        self._rows[row.key] = row
        with (self._out / "rows.jsonl").open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(
            json.dumps({k: v for k, v in asdict(row).items() if v is not None}), file=sys.stderr, flush=True
        )

    def _judge_of(self, name: str, seed: int) -> Evaluator:
        if (name, seed) not in self._judges:
            self._judges.clear()  # one is enough: rows come task by task and seed by seed
            unseen = self._task(name, seed + _UNSEEN, self._asked.unseen)
            self._judges[name, seed] = Evaluator(self._model.patched, unseen, self._asked.metric, "corrupted")
        return self._judges[name, seed]

    def _task(self, name: str, seed: int, count: int | None = None) -> Task:
        n = self._asked.n if count is None else count
        return load_task(name, self._model.tokenizer, n=n, seed=seed, metric=self._asked.metric)


def read_rows(out: Path) -> Iterator[Row]:
    """The rows that are kept in a folder."""
    file = out / "rows.jsonl"
    names = {field.name for field in fields(Row)}
    for line in file.read_text().splitlines() if file.exists() else ():
        yield Row(**{name: value for name, value in json.loads(line).items() if name in names})


def folder_of(out: Path, task: str, method: str, seed: int, size: int | None) -> Path:
    """Where a run is kept; one of all sizes has none."""
    return out / re.sub("[:/]", "-", f"{task}-{method}-{seed}-{'all' if size is None else size}")


def best_of(circuit: Circuit, method: str, size: int) -> BoolArray:
    """The best edges of a run of all sizes. [readers, writers]"""
    kept = circuit.graph.no_edges()
    first = circuit.kept if circuit.record.ranks_kept_first else None
    absolute = method.endswith(":absolute")
    order = rank_edges(circuit.graph, circuit.scores, absolute=absolute, first=first)
    kept[tuple(order[:size].T)] = True
    return kept


def circuits_alike(out: Path, rows: Sequence[Row]) -> float | None:
    """The mean Jaccard index of a method's circuits of a size of each two seeds; None of one seed."""
    found: dict[int, list[BoolArray]] = defaultdict(list)
    for row in rows:
        if row.size == _CURVE:
            continue
        if row.method in _SIZED:
            folder = folder_of(out, row.task, row.method, row.seed, row.size)
            found[row.size].append(Circuit.from_pretrained(folder).kept)
        else:
            circuit = Circuit.from_pretrained(folder_of(out, row.task, row.method, row.seed, None))
            found[row.size].append(best_of(circuit, row.method, row.size))
    pairs = [pair for circuits in found.values() for pair in combinations(circuits, 2)]
    return _mean([float((a & b).sum() / max(1, (a | b).sum())) for a, b in pairs])


def table_of(rows: Sequence[Row], out: Path, sizes: Sequence[int]) -> list[tuple[str, ...]]:
    """Lines of the table, a task and method each; means over seeds."""
    lines = []
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.task, row.method].append(row)
    for (task, method), group in groups.items():
        of_size = {size: _mean([row.f for row in group if row.size == size]) for size in sizes}
        reached = [size for size, f in of_size.items() if f is not None and f >= 0.9]
        areas, costs = (
            [_mean([getattr(row, name) for row in group]) for name in names]
            for names in (("cpr", "cmd", "cpr_log", "cmd_log"), ("values", "cpu", "memory_mb"))
        )
        outside = _mean([row.outside for row in group])
        lines.append(
            (
                *(task, method, *(_text(of_size[size], 2) for size in sizes)),
                *(_text(area, 3) for area in areas),
                *(str(min(reached)) if reached else "-", _text(outside, 2)),
                *(_text(circuits_alike(out, group), 2), *(_text(cost, 0) for cost in costs)),
            )
        )
    return lines


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.searches", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="Hub id, folder, or 'demo'")
    parser.add_argument("--tasks", nargs="+", default=["ioi", "gendered_pronoun", "sva"])
    parser.add_argument("--methods", nargs="+", default=list(_METHODS))
    parser.add_argument("--edges", nargs="+", type=int, default=list(_SIZES), metavar="K")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--n", type=int, default=24, help="prompt pairs that are searched")
    parser.add_argument("--unseen", type=int, default=48, help="prompt pairs that judge")
    parser.add_argument("--metric", default="kl")
    parser.add_argument("--threshold", type=float, default=0.05, help="of acdc, both and budget")
    parser.add_argument("--max-gap", type=float, default=0.2, help="of budget")
    parser.add_argument("--steps", type=int, help="of the searches that learn; their own by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder for circuits and rows")
    options = parser.parse_args(arguments)
    sizes = tuple(sorted(options.edges))
    asked = Asked(
        options.n, options.unseen, sizes, options.threshold, options.max_gap, options.metric, options.steps
    )
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        model = PAHQModel.from_pretrained(options.model, PAHQConfig(regime="fp32"), device=options.device)
        comparison = Comparison(model, asked, options.out)
        for task in options.tasks:
            for seed in options.seeds:
                for method in options.methods:
                    comparison.run(task, method, seed)
    except PAHQError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    titles = ("task", "method", *map(str, sizes), "CPR", "CMD", "CPR log", "CMD log", "F>=.9", "outside")
    lines = table_of(list(read_rows(options.out)), options.out, sizes)
    table = Table(*titles, "stable", "values", "CPU", "MB")
    for line in lines:
        table.add_row(*line)
    Console(width=220).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
