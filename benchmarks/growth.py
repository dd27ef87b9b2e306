"""Time per test against sequence length, examples, layers and width, next to the hooks engine's."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.acdc_speed import output_file, positive
from benchmarks.recording import Recorder, repeat_tests
from pahq_hf import ACDCConfig, PAHQConfig, PAHQModel
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.protocol import Engine, Trial
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.errors import PAHQError
from pahq_hf.search.acdc import search
from pahq_hf.search.batches import AdaptiveBatch
from pahq_hf.search.versions import versions
from pahq_hf.tasks.base import Pair, Task, collate

_HEAD = 16  # width of a head
_VOCAB = 4000
_DESCRIPTION = """\
How the time of one ACDC test grows with sequence length, examples, layers and width, in the sparse
engine with speculation and in the hooks engine. One axis varies at a time, the others have their base
value. The models are random Llamas made in memory. Which edges stay is fixed beforehand, --kept at random
into each reader, so that rows differ in size alone and not in the circuit that a threshold happens to
leave; every test is computed in full all the same."""

_EPILOG = """\
figures
  edges, tests   Edges of the graph, and those tested.
  kept           Share of the edges left at the end.
  sparse         Milliseconds per test of a whole search: capture, refresh and all, over tests.
  hooks          Milliseconds of one test, the mean over --sample tests spaced evenly over the same search.
  hooks/sparse   How many times faster the sparse engine is.
  growth         Each time over that of the first row of the table.
"""


@dataclass(frozen=True)
class Setting:
    """The size of a problem; the defaults are the base values.

    Attributes:
        length: Tokens per prompt. Clean and corrupted prompts differ from the second quarter on.
        examples: Prompt pairs.
        layers: Layers of the model.
        width: `hidden_size`; heads are 16 wide, two share keys and values.
    """

    length: int = 16
    examples: int = 8
    layers: int = 6
    width: int = 128


AXES: dict[str, tuple[int, ...]] = {
    "length": (16, 32, 64, 128, 256),
    "examples": (8, 16, 32, 64),
    "layers": (3, 6, 12),
    "width": (128, 256, 384),
}


@dataclass(frozen=True)
class Point:
    """What was measured at one setting; times in milliseconds per test."""

    axis: str
    setting: Setting
    edges: int
    tests: int
    kept: int
    acceptance: float
    sparse_ms: float
    hooks_ms: float
    ratio: float
    deviation: float
    agrees: bool


# -- problems ---------------------------------------------------------------------------------------


def random_model(setting: Setting, seed: int = 0) -> PAHQModel:
    """A random Llama of a setting's shape, made in memory."""
    heads = setting.width // _HEAD
    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=setting.width,
        intermediate_size=3 * setting.width,
        num_hidden_layers=setting.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=max(64, setting.length),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(std=1.5 / module.in_features**0.5)
            elif isinstance(module, torch.nn.Embedding):
                module.weight.normal_()
    return PAHQModel(model, PAHQConfig(regime="fp32"), base_model="random")


def random_task(setting: Setting, seed: int = 0) -> Task:
    """Random prompts; the corrupted ones are others from the second quarter on."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, setting.examples, setting.length)
    clean, corrupted = torch.randint(_VOCAB, shape, generator=generator).unbind()
    same = max(1, setting.length // 4)
    corrupted[:, :same] = clean[:, :same]
    pairs = [Pair(one.tolist(), other.tolist()) for one, other in zip(clean, corrupted, strict=True)]
    return collate(pairs, name="random", metric="kl")


# -- measuring --------------------------------------------------------------------------------------


class Decided(Recorder):
    """Records an engine that does all its work, but answers so that a given circuit comes out.

    Args:
        engine: The engine that does the work.
        circuit: The edges that stay. [readers, writers]
    """

    threshold = 0.5

    def __init__(self, engine: Engine, circuit: BoolArray) -> None:
        super().__init__(engine)
        self._circuit = circuit

    def begin(self, kept: BoolArray) -> float:
        """Start from an edge set."""
        super().begin(kept)
        return 0.0

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        """Compute a batch; the answer is 1 where the candidate's last edge stays, else 0."""
        trial = super().try_(reader, candidates)
        values = tuple(float(self._circuit[reader, candidate[-1]]) for candidate in candidates)
        return replace(trial, values=values)


def random_circuit(graph: Graph, kept: int, seed: int = 0) -> BoolArray:
    """So many random edges into each reader. [readers, writers]"""
    random = np.random.default_rng(seed)
    circuit = graph.no_edges()
    for reader, prefix in enumerate(graph.prefix):
        circuit[reader, random.permutation(int(prefix))[:kept]] = True
    return circuit


def measure(axis: str, setting: Setting, kept: int, sample: int) -> Point:
    """Time a search at one setting, and single tests of it by the hooks engine.

    Args:
        axis: Which axis the setting is for.
        setting: The size of the problem.
        kept: Edges that stay, per reader.
        sample: Tests of the hooks engine.

    Returns:
        The times.
    """
    model, task = random_model(setting).patched, random_task(setting)
    started = time.perf_counter()
    recorder = Decided(SparseEngine(model, task, "kl"), random_circuit(model.graph, kept))
    state = search(recorder, ACDCConfig(threshold=Decided.threshold), batch=AdaptiveBatch())
    tests = len(recorder.log.tests)
    sparse_ms = 1000 * (time.perf_counter() - started) / tests
    single = repeat_tests(HooksEngine(model, task, "kl"), recorder.log, sample, warm=False)
    return Point(
        axis=axis,
        setting=setting,
        edges=model.graph.edge_count,
        tests=tests,
        kept=int(state.kept.sum()),
        acceptance=tests / recorder.log.candidates,
        sparse_ms=sparse_ms,
        hooks_ms=single.mean_ms,
        ratio=single.mean_ms / sparse_ms,
        deviation=single.deviation,
        agrees=single.agrees,
    )


def table(axis: str, points: Sequence[Point]) -> Table:
    """One axis as a table."""
    made = Table(title=f"Time per test against {axis}", title_justify="left")
    for column in (
        axis,
        "edges",
        "tests",
        "kept",
        "sparse ms",
        "growth",
        "hooks ms",
        "growth",
        "hooks/sparse",
    ):
        made.add_column(column, justify="right", no_wrap=True)
    first = points[0]
    for point in points:
        made.add_row(
            str(getattr(point.setting, axis)),
            f"{point.edges:,}",
            f"{point.tests:,}",
            f"{point.kept / point.edges:.1%}",
            f"{point.sparse_ms:.3f}",
            f"{point.sparse_ms / first.sparse_ms:.2f}",
            f"{point.hooks_ms:.3f}",
            f"{point.hooks_ms / first.hooks_ms:.2f}",
            f"{point.ratio:.1f}",
        )
    return made


# -- command line -----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    base = Setting()
    for axis, values in AXES.items():
        made.add_argument(
            f"--{axis}", type=positive, nargs="*", default=list(values), metavar="N",
            help=f"values of this axis, none to leave it out (default: {' '.join(map(str, values))}; "
            f"base value {getattr(base, axis)})",
        )  # fmt: skip
    made.add_argument("--kept", type=positive, default=4, help="edges that stay per reader (default: 4)")
    made.add_argument("--sample", type=positive, default=8, help="hooks tests per row (default: 8)")
    made.add_argument("--threads", type=positive, help="PyTorch's threads (default: its own choice)")
    made.add_argument("--json", type=output_file, metavar="FILE", help="write everything measured there")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit code."""
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    console = console if console.is_terminal else Console(width=110)
    measured: list[Point] = []
    try:
        measure("warm-up", Setting(layers=1), options.kept, 1)  # what is done once per process
        for axis in AXES:
            settings = [replace(Setting(), **{axis: value}) for value in getattr(options, axis)]
            points = [measure(axis, setting, options.kept, options.sample) for setting in settings]
            if points:
                console.print(table(axis, points))
            measured += points
    except PAHQError as error:
        sys.stderr.write(f"growth: {error}\n")
        return 2
    if options.json is not None:
        _write(options.json, options, measured)
    return 0


def _write(file: Path, options: argparse.Namespace, measured: list[Point]) -> None:
    arguments = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    document: dict[str, Any] = {
        "benchmark": "growth",
        "arguments": arguments,
        "base": asdict(Setting()),
        "versions": versions(),
        "rows": [asdict(point) for point in measured],
    }
    file.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
