"""Learned masks beside the other searches: circuits of equal size, judged on prompts that no search saw."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pahq_hf import Circuit, PAHQModel, load_task
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.circuit.verdict import faithfulness
from pahq_hf.config import PAHQConfig
from pahq_hf.evaluation.curves import rank_edges
from pahq_hf.evaluation.evaluator import Evaluator
from pahq_hf.tasks.base import Task

_DESCRIPTION = """\
Find circuits of some sizes by every method, by KL in FP32, and judge them on unseen prompts."""

_EPILOG = """\
methods
  edge-pruning, ugs, refine   Searches that learn, with --steps of the first two. ugs learns the same whatever
                              the size: it runs once, for the middle one, and the best of its ranking are the
                              others.
  acdc                        At the threshold, of a bisection, with which it keeps a number next to the size.
  eap-ig                      The best by absolute score.

figures
  F, KL     Faithfulness and KL of the circuit on unseen prompts.
  seconds   Of the processor, for capture and search; of acdc the last run's, not those of the bisection.
"""
_BISECTIONS = 7


class Comparison:
    """Runs the methods on one task.

    Args:
        options: Of the command line.
        name: The task.
    """

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        self._options = options
        self._model = PAHQModel.from_pretrained(options.model, PAHQConfig(regime="fp32"))
        self._task = self._load(name, options.n, 0)
        unseen = self._load(name, options.unseen, 1)
        self._judge = Evaluator(self._model.patched, unseen, "kl", "corrupted")

    def _load(self, name: str, count: int, seed: int) -> Task:
        return load_task(name, self._model.tokenizer, n=count, seed=seed, metric="kl")

    def rows(self, method: str) -> Iterator[dict[str, Any]]:
        """What a method finds at each size."""
        sizes: list[int] = self._options.edges
        if method == "ugs":
            circuit, seconds = self._timed(method, sizes[len(sizes) // 2])
            order = rank_edges(circuit.graph, circuit.scores)
            for size in sizes:
                kept = circuit.graph.no_edges()
                kept[tuple(order[:size].T)] = True
                yield self._row(method, size, kept, seconds)
            return
        for size in sizes:
            circuit, seconds = self._at_size(size) if method == "acdc" else self._timed(method, size)
            yield self._row(method, size, circuit.kept, seconds)

    def _row(self, method: str, size: int, kept: BoolArray, seconds: float) -> dict[str, Any]:
        metric = self._judge.metric_of(kept)
        return {
            "task": self._task.name,
            "method": method,
            "size": size,
            "edges": int(kept.sum()),
            "F": faithfulness(metric, self._judge.full, self._judge.empty),
            "KL": metric,
            "seconds": round(seconds, 1),
        }

    def _timed(self, method: str, size: int) -> tuple[Circuit, float]:
        began = time.process_time()
        if method == "eap-ig":
            found = self._model.attribute(
                self._task, method="eap-ig", topn=size, absolute=True, progress=False
            )
        else:
            steps: Mapping[str, Any] = {"steps": self._options.steps} if method != "refine" else {}
            found = self._model.discover(self._task, search=method, edges=size, progress=False, **steps)
        return found, time.process_time() - began

    def _at_size(self, size: int) -> tuple[Circuit, float]:
        """ACDC's circuit that has a number of edges next to the size."""
        low, high, found = 1e-5, 1.0, []
        for _ in range(_BISECTIONS):
            tau, began = (low * high) ** 0.5, time.process_time()
            circuit = self._model.discover(self._task, threshold=tau, progress=False)
            found.append((circuit, time.process_time() - began))
            if circuit.edge_count == size:
                break
            low, high = (tau, high) if circuit.edge_count > size else (low, tau)
        return min(found, key=lambda each: abs(each[0].edge_count - size))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--tasks", nargs="+", default=["ioi", "gendered_pronoun", "sva"])
    parser.add_argument("--methods", nargs="+", default=["edge-pruning", "ugs", "refine", "acdc", "eap-ig"])
    parser.add_argument("--edges", nargs="+", type=int, default=[25, 50, 100])
    parser.add_argument("--n", type=int, default=32, help="Prompt pairs that are searched.")
    parser.add_argument("--unseen", type=int, default=128, help="Prompt pairs that judge afterwards.")
    parser.add_argument("--steps", type=int, default=3000, help="Of edge-pruning and ugs.")
    parser.add_argument("--out", type=Path, required=True, help="Lines of JSON, one a circuit.")
    options = parser.parse_args(arguments)
    for name in options.tasks:
        comparison = Comparison(options, name)
        for method in options.methods:
            for row in comparison.rows(method):
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
