"""How far the decisions of each precision regime are FP32's, on one model and one task."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.variants import Variant
from pahq_hf import ACDCConfig, Circuit, PAHQModel, load_task
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.engine.sparse.arithmetic import Anchored, Arithmetic, Reads
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.engine.sparse.positions import Liveness
from pahq_hf.errors import PAHQError
from pahq_hf.search.bench import Bench
from pahq_hf.search.pipeline import Run
from pahq_hf.search.registry import find_search
from pahq_hf.search.subject import Subject
from pahq_hf.tasks.base import Task

_DESCRIPTION = """\
Search one circuit in several precision regimes and compare every decision with FP32's. Each run is
kept in a folder below --out and not repeated when it is finished."""

_EPILOG = """\
rows, given as REGIME[:FORMAT][:OPTION...]
  fp32                 The reference.
  rtn, pahq-literal    Uniform rounding; the paper's rule.
  pahq                 Anchored precision. Options: margin=M (0: no second look), compute=fp32|bf16,
                       active=both, once (anchored to the clean run only, never re-anchored).

figures
  first flip     Number of the first test, in FP32's order, that is decided otherwise; - if none.
  flipped        Tests that both runs made and decided differently, later consequences included.
  Jaccard        Kept edges in common over kept edges of either.
  error          Relative error of scores of at least tau/4 (by FP32), over the tests before the first
                 flip: median and 99th percentile.
  looks          Second looks, in percent of tests, and decisions they changed.
  KL fp32        The metric of the circuit, in FP32.
  seconds        The whole run. Only comparable when the machine did nothing else.
  weights        Resident bytes of linear weights, in MB.
"""


@dataclass
class Agreement:
    """A row of figures; see --help."""

    name: str
    tested: int
    kept: int
    first_flip: int | None
    flipped: int
    jaccard: float
    median_error: float
    p99_error: float
    looks: float
    changed: int
    fp32_metric: float
    seconds: float
    phases: dict[str, float]
    weights_mb: float
    anonymous_mb: float


# -- anchoring without re-anchoring ---------------------------------------------------------------


class AnchoredOnce(Anchored):
    """Anchors at the clean run only: the current circuit itself is computed by differences from it."""

    def __init__(self, engine: SparseEngine) -> None:
        super().__init__(engine.model)
        self._engine = engine

    def state_precision(self) -> AbstractContextManager[None]:
        """Low precision."""
        return nullcontext()

    def _clean(self, stream: Tensor, count: int) -> Tensor:
        plan = self._engine._plan
        window = plan.window.pick(stream)
        wanted = Liveness.WINDOW if count == len(plan.window) else Liveness.ANSWERS
        return plan.narrow(window, Liveness.WINDOW, wanted)

    def read(self, reads: Reads) -> Tensor:
        """Queries, keys or values of the state, from the clean run's."""
        layer = self._engine.graph.readers[reads.readers[0]].layer
        clean = self._clean(self._engine._clean.attention_in[layer], reads.inputs[0].shape[0])
        from_clean = replace(reads, inputs=[clean] * len(reads.readers))
        with self._model.precision.full_precision():
            super().read(from_clean)
        return self.reread(from_clean, [(x - clean)[None] for x in reads.inputs])[:, 0]

    def mlp(self, number: int, x: Tensor) -> Tensor:
        """What an MLP adds in the state, from what it adds in the clean run."""
        clean = self._clean(self._engine._clean.mlp_in[number], x.shape[0])
        with self._model.precision.full_precision():
            output = super().mlp(number, clean)
        out = torch.empty_like(x)[None]
        self.mlp_change(number, clean, (x - clean)[None], output, out)
        if number in self._mlps:  # what propagation changes is the state's output, not the anchor's
            self._mlps[number] = replace(self._mlps[number], ends=False)
        return output + out[0]


class OnceEngine(SparseEngine):
    """The sparse engine, anchored to the clean run only."""

    _searching = True

    def _arithmetic(self) -> Arithmetic:
        return AnchoredOnce(self) if self._searching else super()._arithmetic()

    def metric_of(self, kept: BoolArray) -> float:
        """The minimised metric of a circuit, exactly: the search is over."""
        self._searching = False
        return super().metric_of(kept)


class _OnceBench(Bench):
    def _make_engine(self) -> SparseEngine:
        setting = self.setting
        return OnceEngine(
            setting.model, setting.task, setting.metric, ablation=setting.ablation, rule=setting.rule
        )


# -- comparing ------------------------------------------------------------------------------------


def tests_in_order(circuit: Circuit) -> Iterator[tuple[int, int, bool, float]]:
    """Reader, writer, whether it stayed, and score of every test, in the order of the search."""
    for reader in circuit.graph.reader_order(circuit.discovery["arguments"]["order"]):
        for writer in circuit.graph.in_edges(reader):
            if circuit.tested[reader, writer]:
                kept = bool(circuit.kept[reader, writer])
                yield reader, writer, kept, float(circuit.scores[reader, writer])


def compare(name: str, exact: Circuit, other: Circuit) -> Agreement:
    """The figures of one row."""
    tau = exact.discovery["arguments"]["threshold"]
    first: int | None = None
    errors = []
    for number, (reader, writer, kept, score) in enumerate(tests_in_order(exact), 1):
        if not other.tested[reader, writer] or bool(other.kept[reader, writer]) is not kept:
            first = number
            break
        if abs(score) >= tau / 4:
            errors.append(abs(float(other.scores[reader, writer]) - score) / abs(score))
    both = exact.tested & other.tested
    union = int((exact.kept | other.kept).sum())
    facts = other.discovery
    tested = int(other.tested.sum())
    return Agreement(
        name=name,
        tested=tested,
        kept=other.edge_count,
        first_flip=first,
        flipped=int((both & (exact.kept != other.kept)).sum()),
        jaccard=int((exact.kept & other.kept).sum()) / max(1, union),
        median_error=float(np.median(errors)) if errors else float("nan"),
        p99_error=float(np.quantile(errors, 0.99)) if errors else float("nan"),
        looks=100 * facts["second_looks"]["tests"] / max(1, tested),
        changed=facts["second_looks"]["changed"],
        fp32_metric=facts["metric"]["fp32"],
        seconds=facts["seconds"]["total"],
        phases=facts["seconds"],
        weights_mb=facts["peak_memory"]["linear_weights"] / 1e6,
        anonymous_mb=facts["peak_memory"].get("anonymous", 0) / 1e6,
    )


def _discover(options: argparse.Namespace, variant: Variant) -> Circuit:
    folder = Path(options.out) / variant.name.replace(":", "_").replace("=", "-")
    model = PAHQModel.from_pretrained(options.model, variant.pahq)
    task: Task = load_task(options.task, model.tokenizer, n=options.n)
    acdc = ACDCConfig(threshold=options.threshold, metric=options.metric, margin=variant.margin)
    subject = Subject(model.patched, model.identity, task, model.pahq_config)
    run = Run(find_search("acdc"), acdc, subject, progress=False)
    if variant.once:
        run.bench = _OnceBench(run.setting, clock=run.clock)
    circuit = run.run(folder, resume=True)
    del model, run
    gc.collect()
    return circuit


def _print(rows: list[Agreement]) -> None:
    table = Table()
    titles = ("row", "tests", "kept", "first flip", "flipped", "Jaccard", "error med", "p99")
    for title in (*titles, "looks %", "changed", "metric fp32", "seconds", "weights MB"):
        table.add_column(title, justify="right" if title != "row" else "left", no_wrap=True)
    for row in rows:
        flip = "-" if row.first_flip is None else f"{row.first_flip:,}"
        table.add_row(
            row.name, f"{row.tested:,}", str(row.kept), flip, str(row.flipped), f"{row.jaccard:.3f}",
            f"{100 * row.median_error:.2f} %", f"{100 * row.p99_error:.1f} %", f"{row.looks:.2f}",
            str(row.changed), f"{row.fp32_metric:.4f}", f"{row.seconds:.1f}", f"{row.weights_mb:.1f}",
        )  # fmt: skip
    Console(width=160).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agreement", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="Hub id, folder, or 'demo'")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--threshold", type=float, default=0.02)
    parser.add_argument("--metric", default="kl")
    parser.add_argument("--rows", nargs="+", default=["rtn", "pahq-literal", "pahq:margin=0", "pahq"])
    parser.add_argument("--out", required=True, help="folder for the runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        variants = [Variant.parse(text) for text in options.rows]
        exact = _discover(options, Variant.parse("fp32"))
        rows = [compare("fp32", exact, exact)]
        for variant in variants:
            rows.append(compare(variant.name, exact, _discover(options, variant)))
            print(variant.name, "done", file=sys.stderr)
    except PAHQError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _print(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
