"""What the tests of engines, searches, runs and the command line share."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from pahq_hf import Circuit, PAHQConfig, PAHQModel, Task
from pahq_hf.circuit.graph import BoolArray, Graph, edge_list
from pahq_hf.cli.app import main
from pahq_hf.search.state import ReaderRecord, Search
from pahq_hf.search.work import Work
from tests.families import ALL_FAMILIES
from tests.forked import PAHQ, Ended, Forked
from tests.models import FAMILIES
from tests.referee import Edge, Referee, Result

FP32 = PAHQConfig(regime="fp32")

# Family of tests/models.py, and whether key/value groups are split per head.
GRAPHS = {name: (name, False) for name in FAMILIES} | {"llama_split": ("llama", True)}
# Those of the other families whose circuits the referee knows.
OTHER_GRAPHS = {
    name: (name, False) for name in ("gpt_neox", "gemma2", "gemma3", "falcon", "falcon_new", "olmo2", "qwen3")
} | {"gemma2_split": ("gemma2", True), "olmo2_split": ("olmo2", True), "falcon_split": ("falcon", True)}
ALL_GRAPHS = GRAPHS | OTHER_GRAPHS


def wrapped(name: str, **options: Any) -> PAHQModel:
    """A tiny model of `GRAPHS`, patched; options as `_built`. All tests of the process share it."""
    return _built(name, **options)


@cache
def _built(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    seed: int = 0,
    regime: Any = "fp32",
    fmt: Any = "fp8",
    compute: Any = "auto",
) -> PAHQModel:
    family, split = ALL_GRAPHS[name]
    config = PAHQConfig(regime=regime, format=fmt, split_kv_groups=split, compute=compute)
    return PAHQModel(ALL_FAMILIES[family](dtype=dtype, layers=layers, seed=seed), config)


def referee(name: str, task: Task, *, layers: int = 2, seed: int = 0, **options: Any) -> Referee:
    """The referee of the same model and a task."""
    family, split = ALL_GRAPHS[name]
    return Referee(
        ALL_FAMILIES[family](layers=layers, seed=seed),
        task.clean_ids,
        task.corrupted_ids,
        task.attention_mask,
        task.answer_rows,
        task.answer_positions,
        task.answers,
        task.distractors,
        split_kv_groups=split,
        **options,
    )


# -- edge sets --------------------------------------------------------------------------------------


def named(graph: Graph, edges: BoolArray) -> set[Edge]:
    """An edge set as the referee names it."""
    return {(graph.writers[w].name, graph.readers[r].name) for r, w in edge_list(edges)}


def random_edges(graph: Graph, share: float, seed: int) -> BoolArray:
    """About this share of all edges. [readers, writers]"""
    return graph.all_edges & (np.random.default_rng(seed).random(graph.all_edges.shape) < share)


def tested_in_order(graph: Graph, records: list[ReaderRecord]) -> list[Edge]:
    """The tested edges in the order of their tests."""
    return [(graph.writers[w].name, graph.readers[r.reader].name) for r in records for w in r.scores]


def assert_same_search(ours: Search, theirs: Result, tolerance: float) -> None:
    """Assert that a search took the referee's decisions, in its order, and agrees on the numbers."""
    graph = ours.graph
    assert tested_in_order(graph, ours.records) == theirs.tested
    assert named(graph, ours.kept) == theirs.kept
    assert named(graph, graph.all_edges & ~ours.tested) == theirs.untested
    for edge, score in theirs.scores.items():
        r, w = graph.reader_index(edge[1]), graph.writer_index(edge[0])
        assert abs(ours.scores[r, w] - score) <= tolerance, edge
    assert abs(ours.metric - theirs.final) <= tolerance


# -- files ------------------------------------------------------------------------------------------


def save_tiny(folder: Path, name: str = "llama", **options: Any) -> Path:
    """A tiny model as a checkpoint folder without tokenizer."""
    model: PreTrainedModel = FAMILIES[name](**options)
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def id_rows(task: Task, *, answers: bool = True) -> list[dict[str, Any]]:
    """A task without padding and with one row per example as token-id columns."""
    rows: list[dict[str, Any]] = []
    for i in range(len(task)):
        row: dict[str, Any] = {
            "clean_ids": task.clean_ids[i].tolist(),
            "corrupted_ids": task.corrupted_ids[i].tolist(),
        }
        if answers:
            row |= {"answer_ids": list(task.answers[i]), "distractor_ids": list(task.distractors[i])}
        rows.append(row)
    return rows


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """No file of this process can grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# -- processes --------------------------------------------------------------------------------------


def signalled(arguments: Sequence[str], journal: Path, lines: int, number: signal.Signals) -> Ended:
    """Run `pahq` in a process of its own, and signal it once its journal has so many lines."""
    process = Forked(PAHQ, *arguments)
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
        assert process.poll() is None, process.ended()
        time.sleep(0.002)
    os.kill(process.pid, number)
    return process.ended()


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Interrupt a run that has kept so many steps of its search, just before it keeps the next."""
    keep, kept = Work.keep, []

    def stop(self: Work[Any], step: Any) -> None:
        if len(kept) == steps:
            raise KeyboardInterrupt
        kept.append(step)
        keep(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Work, "keep", stop)
        yield


def run_main(*arguments: str) -> int:
    """The `pahq` command within this process. Returns its exit code."""
    before, sys.argv = sys.argv, ["pahq", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


# -- runs -------------------------------------------------------------------------------------------

FILES = {
    *("circuit.json", "scores.safetensors", "discovery.json", "means.safetensors"),
    *("README.md", "circuit.png", "journal.jsonl"),
}


def journal_lines(folder: Path) -> list[bytes]:
    """The journal of a run, line by line."""
    return (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)


def unsealed(lines: list[bytes]) -> list[bytes]:
    """Lines of a journal as earlier versions wrote them, without checksums."""
    entries = [json.loads(line) for line in lines]
    return [json.dumps({k: v for k, v in e.items() if k != "check"}).encode() + b"\n" for e in entries]


def assert_same_circuit(ours: Circuit, theirs: Circuit) -> None:
    """Assert that two runs ended alike, to the bit."""
    assert np.array_equal(ours.kept, theirs.kept)
    assert np.array_equal(ours.tested, theirs.tested)
    assert np.array_equal(ours.scores, theirs.scores)
    assert ours.model == theirs.model
    assert ours.discovery["metric"] == theirs.discovery["metric"]
    assert ours.discovery["edges"] == theirs.discovery["edges"]
    assert ours.discovery["header"] == theirs.discovery["header"]


# -- weights ----------------------------------------------------------------------------------------


def weight_of(rows: int, cols: int, seed: int, spread: float = 0.0) -> Tensor:
    """A random matrix whose rows differ in size by up to `10**spread`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (spread * (2 * torch.rand(rows, 1, generator=generator) - 1))
    return torch.randn(rows, cols, generator=generator) * sizes


@st.composite
def ranges(draw: st.DrawFn, size: int) -> slice:
    """A non-empty range of an axis."""
    start = draw(st.integers(0, size - 1))
    return slice(start, draw(st.integers(start + 1, size)))


class MemorySource:
    """Slices of tensors kept in memory, where tests need no file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def read(self, name: str, rows: slice, cols: slice) -> Tensor:
        """A private copy of a block."""
        return self.view(name, rows, cols).clone()

    def prefetch(self, name: str) -> None:
        """Nothing to do."""

    def view(self, name: str, rows: slice, cols: slice) -> Tensor:
        """A block; for reading only."""
        return self._tensors[name][rows, cols]
