"""Methods of circuit discovery side by side: what they find, how good it is, and what it costs."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.variants import Variant
from pahq_hf import Circuit, PAHQModel, load_task
from pahq_hf.circuit.files import CIRCUIT_NAME
from pahq_hf.circuit.verdict import faithfulness
from pahq_hf.config import PAHQConfig
from pahq_hf.errors import PAHQError
from pahq_hf.evaluation.curves import rank_edges
from pahq_hf.evaluation.evaluator import Evaluator
from pahq_hf.evaluation.report import EvaluationOptions, evaluate
from pahq_hf.precision.memory import trim
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.tasks.base import Task

_DESCRIPTION = """\
Find each task's circuit by every method and judge all of them in FP32 on prompts that no method has seen.
Finished circuits below --out are not searched again."""

_EPILOG = """\
methods, given as NAME or NAME:REGIME[:FORMAT] (fp32 by default)
  acdc            The greedy search at the task's threshold; in its precision regimes.
  eap, eap-ig, eap-ig-activations, clean-corrupted, gim, hisp, exact, random, ensemble
                  Attributions, of which as many edges are kept as acdc (fp32) kept.

figures
  edges          Kept by the method.
  KL             Of its circuit from the full model, on unseen prompts.
  faith.         (m(circuit) - m(empty)) / (m(full) - m(empty)) of its circuit, m the task's metric.
  faith. = K     The same for its K best edges, K what acdc (fp32) kept; edges ranked by score, those that an
                 ACDC run kept before the others.
  CPR, CMD       Areas under faithfulness, and under its distance from 1, over MIB's grid of fractions of
                 edges, ranked by score and by absolute score.
  seconds        Capture and search or scoring, without evaluation. Only comparable on a quiet machine.
  memory         Peak anonymous memory of the process during the run, model included, in MB.
"""

_TASKS = (
    "ioi/logit_diff=0.1",
    "greater_than=0.01",
    "induction=0.2",
    "gendered_pronoun=0.1",
    "sva=0.1",
)
_METHODS = ("acdc", "acdc:pahq", "acdc:rtn", "eap", "eap-ig", "hisp", "random")


@dataclass(frozen=True)
class Method:
    """A row: how a circuit is found.

    Attributes:
        text: As given.
        name: `acdc` or an attribution.
        variant: Its precision.
    """

    text: str
    name: str
    variant: Variant

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read `acdc:pahq:fp8`."""
        name, _, rest = text.partition(":")
        return cls(text, name, Variant.parse(rest or "fp32"))


@dataclass(frozen=True)
class TaskChoice:
    """A task, what is minimised, and the threshold of its search.

    Attributes:
        name: The task's name.
        metric: None takes the task's own.
        threshold: tau.
    """

    name: str
    metric: str | None
    threshold: float

    @classmethod
    def parse(cls, text: str) -> TaskChoice:
        """Read `ioi/logit_diff=0.4`, or `sva=0.4`."""
        task, _, tau = text.rpartition("=")
        name, _, metric = task.partition("/")
        return cls(name, metric if metric else None, float(tau))


@dataclass
class Row:
    """Figures of one method on one task; see --help."""

    task: str
    method: str
    edges: int
    kl: float
    faithfulness: float | None
    faithfulness_at_k: float | None
    cpr: float
    cmd: float
    seconds: float
    memory_mb: float


class Comparison:
    """Runs every method on every task.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._tasks = [TaskChoice.parse(text) for text in options.tasks]
        self._methods = [Method.parse(text) for text in options.methods]
        self._out = Path(options.out)

    def rows(self) -> Iterator[Row]:
        """Find all circuits, then judge them task by task."""
        self._find()
        model = PAHQModel.from_pretrained(self._options.model, PAHQConfig(regime="fp32"))
        for choice in self._tasks:
            task = self._task(model, choice, unseen=True)
            evaluator = Evaluator(model.patched, task, task.metric, "corrupted")
            size = self._read(choice, self._reference).edge_count
            for method in self._methods:
                yield self._judge(choice, method, evaluator, size)

    def _find(self) -> None:
        """All circuits, regime by regime; the reference first, as it says how many edges others keep."""
        ordered = sorted(self._methods, key=lambda m: (m.text != "acdc", m.variant.name))
        for _, group in groupby(ordered, key=lambda m: m.variant.name):
            methods = list(group)
            missing = [(c, m) for c in self._tasks for m in methods if not self._is_done(c, m)]
            if not missing:
                continue
            model = PAHQModel.from_pretrained(self._options.model, methods[0].variant.pahq)
            for choice, method in missing:
                self._find_one(model, choice, method)
                print(choice.name, method.text, "done", file=sys.stderr)
            del model
            gc.collect()
            trim()

    def _find_one(self, model: PAHQModel, choice: TaskChoice, method: Method) -> None:
        task = self._task(model, choice, unseen=False)
        folder = self._folder(choice, method)
        if method.name == "acdc":
            acdc = ACDCConfig(threshold=choice.threshold, margin=method.variant.margin)
            model.discover(task, config=acdc, out=folder, resume=True, progress=False)
            return
        size = self._read(choice, self._reference).edge_count
        model.attribute(task, method=method.name, topn=size).save_pretrained(folder)

    def _judge(self, choice: TaskChoice, method: Method, evaluator: Evaluator, size: int) -> Row:
        circuit = self._read(choice, method)
        report = evaluate(evaluator, circuit, EvaluationOptions(curve=True))
        first = circuit.kept if circuit.record.ranks_kept_first else None
        best = circuit.graph.no_edges()
        best[tuple(rank_edges(circuit.graph, circuit.scores, first=first)[:size].T)] = True
        seconds = circuit.discovery["seconds"]
        return Row(
            task=choice.name,
            method=method.text,
            edges=circuit.edge_count,
            kl=report["kl"],
            faithfulness=report["faithfulness"],
            faithfulness_at_k=faithfulness(evaluator.metric_of(best), evaluator.full, evaluator.empty),
            cpr=report["curve"]["cpr"],
            cmd=report["curve"]["cmd"],
            seconds=seconds["total"] - seconds["evaluate"],
            memory_mb=circuit.discovery["peak_memory"]["anonymous"] / 1e6,
        )

    # -- helpers ----------------------------------------------------------------------------------

    @property
    def _reference(self) -> Method:
        return Method.parse("acdc")

    def _task(self, model: PAHQModel, choice: TaskChoice, *, unseen: bool) -> Task:
        seed = self._options.seed + (1000 if unseen else 0)
        n, metric = self._options.n, choice.metric
        return load_task(choice.name, model.tokenizer, n=n, seed=seed, metric=metric)

    def _folder(self, choice: TaskChoice, method: Method) -> Path:
        name = f"{choice.name}-{method.text}".replace(":", "_")
        return self._out / name

    def _is_done(self, choice: TaskChoice, method: Method) -> bool:
        return (self._folder(choice, method) / CIRCUIT_NAME).exists()

    def _read(self, choice: TaskChoice, method: Method) -> Circuit:
        return Circuit.from_pretrained(self._folder(choice, method))


def _print(rows: Sequence[Row], markdown: bool) -> None:
    titles = ("task", "method", "edges", "KL", "faith.", "faith. = K", "CPR", "CMD", "seconds", "memory MB")
    cells = [
        (
            row.task, row.method, f"{row.edges:,}", f"{row.kl:.3f}", _share(row.faithfulness),
            _share(row.faithfulness_at_k), f"{row.cpr:.3f}", f"{row.cmd:.3f}", f"{row.seconds:.1f}",
            f"{row.memory_mb:,.0f}",
        )
        for row in rows
    ]  # fmt: skip
    if markdown:
        for line in (titles, ("---",) * len(titles), *cells):
            print("| " + " | ".join(line) + " |")
        return
    table = Table()
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number < 2 else "right", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    Console(width=140).print(table)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="Hub id, folder, or 'demo'")
    parser.add_argument("--tasks", nargs="+", default=list(_TASKS), metavar="NAME[/METRIC]=TAU")
    parser.add_argument("--methods", nargs="+", default=list(_METHODS))
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the searched prompts; unseen ones: + 1000")
    parser.add_argument("--out", required=True, help="folder for the circuits")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    if "acdc" not in options.methods:
        parser.error("the methods must include acdc, which says how many edges are kept")
    try:
        rows = list(Comparison(options).rows())
    except PAHQError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _print(rows, options.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
