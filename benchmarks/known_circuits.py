"""Area under the ROC curve of every method on the models whose circuit is known."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.config import Regime
from pahq_hf.errors import ConfigError, PAHQError
from pahq_hf.evaluation.ground_truth.hand_built import KNOWN_MODELS, load_known_model
from pahq_hf.evaluation.roc import Roc, edge_roc, node_roc
from pahq_hf.search.attribution.kinds import MethodName
from pahq_hf.tasks.base import Task

_DESCRIPTION = """\
Score methods against models whose circuit is known by construction: how well do they tell
edges and nodes of the truth from the others? One row for each method and precision, model by model."""

_EPILOG = """\
rows, given as METHOD[:REGIME]
  acdc       One search for each threshold; each is one point of the curve. All regimes.
  both       The same in both directions: what noising or denoising finds.
  refine, refine-kl, refine-both
             Its ranking, with room for twice as many edges as are true: by logit_diff, by kl, and by
             logit_diff in both directions.
  eap, eap-ig, eap-ig-activations, clean-corrupted, gim, hisp, exact, random, ensemble
             One score per edge, signed: positive where removing the edge hurts. random: mean over --seeds.

figures
  step       Pessimistic rule: ties count as losses, nothing is interpolated.
  trapezoid  Ties count one half.
  best       ACDC: share of true edges found at the threshold that finds most without a false one.
             Scores: true edges above the best false one.
All but refine-kl minimise logit_diff, and removed edges carry the corrupted prompt's activations.
"""

_ROWS = (
    "acdc:fp32,acdc:pahq,acdc:pahq-literal,acdc:rtn,both,refine,refine-kl,refine-both,eap,eap:pahq,eap:rtn,eap-ig,eap-ig:pahq,eap-ig:rtn,"
    "hisp,exact,exact:rtn,random"
)
_REFINED: dict[str, dict[str, Any]] = {
    "refine": {},
    "refine-kl": {"metric": "kl"},
    "refine-both": {"direction": "both"},
}
_THRESHOLDS = "0.00001,0.0001,0.001,0.003,0.01,0.03,0.1,0.3,1,3"


@dataclass
class Score:
    """One method on one model; see --help."""

    model: str
    method: str
    regime: str
    edge_step: float
    edge_trapezoid: float
    node_step: float
    node_trapezoid: float
    best: float

    @classmethod
    def of(cls, model: str, row: tuple[str, Regime], edges: Roc, nodes: Roc) -> Score:
        clean = [tpr for fpr, tpr in zip(edges.fpr, edges.tpr, strict=True) if fpr == 0]
        return cls(
            model,
            *row,
            edges.auc("step"),
            edges.auc("trapezoid"),
            nodes.auc("step"),
            nodes.auc("trapezoid"),
            max(clean),
        )


def parse_rows(text: str) -> list[tuple[str, Regime]]:
    rows = []
    for item in text.split(","):
        method, _, regime = item.strip().partition(":")
        if (regime or "fp32") not in get_args(Regime):
            raise ConfigError(f"unknown regime {regime!r}; known: {', '.join(get_args(Regime))}")
        rows.append((method, cast(Regime, regime or "fp32")))
    return rows


def mean(scores: Sequence[Score]) -> Score:
    """The mean of several runs of one row."""
    first = scores[0]
    figures = [name for name, value in asdict(first).items() if isinstance(value, float)]
    values = {name: float(np.mean([getattr(score, name) for score in scores])) for name in figures}
    return Score(first.model, first.method, first.regime, **values)


def measure(
    name: str, rows: Sequence[tuple[str, Regime]], thresholds: Sequence[float], *, n: int, seeds: int
) -> Iterator[Score]:
    """All rows on one model.

    Args:
        name: The known model.
        rows: Methods and regimes.
        thresholds: ACDC's.
        n: Number of prompt pairs.
        seeds: Random rankings to take the mean of.
    """
    models: dict[str, PAHQModel] = {}
    known = load_known_model(name, n=n)
    graph, truth, task = known.graph, known.truth, known.task
    for row in rows:
        method, regime = row
        if regime not in models:
            models[regime] = PAHQModel(load_known_model(name, n=n).model, PAHQConfig(regime=regime))
        model = models[regime]
        if method in ("acdc", "both"):
            kept = (
                model.sweep(task, thresholds=thresholds, progress=False).kept
                if method == "acdc"
                else [
                    model.discover(task, threshold=tau, direction="both", progress=False).kept
                    for tau in thresholds
                ]
            )
            yield Score.of(
                name,
                row,
                edge_roc(graph, truth, circuits=kept),
                node_roc(graph, truth, circuits=kept),
            )
            continue
        runs = []
        for seed in range(seeds if method == "random" else 1):
            scores = _scores(model, task, method, 2 * int(truth.sum()), seed)
            edges, nodes = edge_roc(graph, truth, scores=scores), node_roc(graph, truth, scores=scores)
            runs.append(Score.of(name, row, edges, nodes))
        yield mean(runs)


def _scores(model: PAHQModel, task: Task, method: str, edges: int, seed: int) -> NDArray[np.float64]:
    if method in _REFINED:
        options = _REFINED[method]
        return model.discover(task, search="refine", edges=edges, progress=False, **options).scores
    return model.attribute(task, method=cast(MethodName, method), seed=seed).scores


def show(scores: Sequence[Score]) -> None:
    """Print the table."""
    table = Table("model", "method", "precision")
    for heading in ("edges: step", "trapezoid", "nodes: step", "trapezoid", "best"):
        table.add_column(heading, justify="right")
    last = None
    for score in scores:
        if last not in (None, score.model):
            table.add_section()
        figures = (
            score.edge_step,
            score.edge_trapezoid,
            score.node_step,
            score.node_trapezoid,
            score.best,
        )
        name = score.model if score.model != last else ""
        table.add_row(name, score.method, score.regime, *(f"{value:.3f}" for value in figures))
        last = score.model
    Console(width=110).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.known_circuits",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", default=",".join(KNOWN_MODELS), help="default: %(default)s")
    parser.add_argument("--rows", default=_ROWS, help="default: %(default)s")
    parser.add_argument("--thresholds", default=_THRESHOLDS, help="of ACDC; default: %(default)s")
    parser.add_argument("--n", type=int, default=32, help="prompt pairs; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=20, help="random rankings; default: %(default)s")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    logging.getLogger("pahq_hf").setLevel(logging.WARNING)
    scores: list[Score] = []
    try:
        thresholds = [float(tau) for tau in options.thresholds.split(",")]
        rows = parse_rows(options.rows)
        for name in options.models.split(","):
            scores += measure(name, rows, thresholds, n=options.n, seeds=options.seeds)
    except (PAHQError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(scores)
    if options.json is not None:
        document = {
            "thresholds": thresholds,
            "n": options.n,
            "seeds": options.seeds,
            "scores": [asdict(score) for score in scores],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
