"""A screen before ACDC: only the edges with the largest attribution scores are tested."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pahq_hf.circuit.files import SCREEN_NAME
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.config import EngineConfig
from pahq_hf.engine.setting import Setting
from pahq_hf.search.attribution.kinds import MethodName
from pahq_hf.search.attribution.methods import Scores
from pahq_hf.search.attribution.options import parse_screen
from pahq_hf.search.attribution.scoring import edge_scores
from pahq_hf.search.attribution.selection import top_edges
from pahq_hf.search.bench import Bench
from pahq_hf.search.journal import check_header
from pahq_hf.search.kept_arrays import DAMAGED, cannot_continue, checksum, read_arrays, save_arrays
from pahq_hf.search.progress import Progress


@dataclass(frozen=True)
class Screen:
    """Which edges a search tests.

    Attributes:
        method: How edges were scored.
        fraction: Share of all edges that survive, those with the largest magnitudes.
        scores: [readers, writers]
        survivors: [readers, writers]
        seconds: What it took.
    """

    method: MethodName
    fraction: float
    scores: Scores
    survivors: BoolArray
    seconds: float

    @classmethod
    def of(cls, text: str, graph: Graph, scores: Scores, seconds: float) -> Screen:
        """The screen that scores make.

        Args:
            text: As `ACDCConfig.screen`.
            graph: The graph.
            scores: [readers, writers]
            seconds: What they took.
        """
        method, fraction = parse_screen(text)
        count = max(1, round(fraction * graph.edge_count))
        survivors = top_edges(graph, scores, count, absolute=True)
        return cls(method, fraction, scores, survivors, seconds)

    def facts(self) -> dict[str, Any]:
        """For `discovery.json`."""
        return {
            "method": self.method,
            "fraction": self.fraction,
            "survivors": int(self.survivors.sum()),
            "seconds": round(self.seconds, 3),
        }

    def save(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Keep the scores in a run's folder, so that a resumed run has the same survivors.

        Raises:
            RunError: If the folder cannot be written.
        """
        facts = {"header": dict(header), "seconds": self.seconds, "check": checksum([self.scores])}
        save_arrays(folder / SCREEN_NAME, {"score": self.scores}, facts)

    @classmethod
    def load(cls, text: str, graph: Graph, folder: Path, header: Mapping[str, Any]) -> Screen:
        """The screen of an interrupted run.

        Args:
            text: As `ACDCConfig.screen`.
            graph: The graph.
            folder: The run's folder.
            header: What pins the run.

        Raises:
            RunError: If it is missing, damaged, or of another run.
        """
        path = folder / SCREEN_NAME
        try:
            arrays, notes = read_arrays(path, ["score"])
            scores: Scores = arrays["score"]
            found, seconds = dict(notes["header"]), float(notes["seconds"])
            if scores.shape != graph.all_edges.shape or scores.dtype != np.float64:
                raise ValueError(f"its scores have shape {scores.shape}")
            check = checksum([scores])
            if notes.get("check", check) != check:  # those of earlier versions have none
                raise ValueError("its scores do not have their checksum")
            if not np.isfinite(scores).all() or scores[~graph.all_edges].any():
                raise ValueError("its scores are not those of a graph")
        except DAMAGED as error:
            raise cannot_continue(path, "its screen", error) from error
        check_header(found, header, folder)
        return cls.of(text, graph, scores, seconds)


def make_screen(
    text: str, setting: Setting, limits: EngineConfig, progress: Progress | None = None
) -> Screen:
    """Score all edges and let the best survive.

    Args:
        text: As `ACDCConfig.screen`.
        setting: Model, task, metric, ablation and precision.
        limits: Of the engine that method `exact` uses.
        progress: Who is told how far it is.

    Raises:
        MetricError: If the method means nothing for the metric.
    """
    started = time.perf_counter()
    method, _ = parse_screen(text)
    bench = Bench(setting, limits, progress)
    scores = edge_scores(method, bench)
    bench.clear()
    return Screen.of(text, setting.graph, scores, time.perf_counter() - started)
